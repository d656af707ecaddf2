"""What is read of a target beside its text attention: its vision tower's attention, and hidden states on the way.

Shape suffixes: W windows, H heads, L patches of a window, R patches in the tower's own order, F frames, P tokens of one frame,
Q rows of one pass, S prompt tokens, T tokens of the text after the video, N video tokens, D width, C = 1 + a key's width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

BLOCK = 2**28  # bytes of attention scores held at once
ROWS = 4096  # of hidden states widened to float32 at once


def received(query_WHLD: Tensor, key_WHLD: Tensor, scaling: float) -> Tensor:
    """(W, L) attention that each key gets inside its window: the mean over heads and queries, so 1 in sum over a window."""
    windows, heads, length, _ = query_WHLD.shape
    wide = torch.promote_types(query_WHLD.dtype, torch.float32)
    row_bytes = heads * length * wide.itemsize
    rows = max(1, min(length, BLOCK // row_bytes))
    step = max(1, BLOCK // (rows * row_bytes))
    out_WL = torch.zeros(windows, length, dtype=wide, device=query_WHLD.device)
    for window in range(0, windows, step):
        keys_WHDL = key_WHLD[window : window + step].to(wide).mT
        for row in range(0, length, rows):
            scores_WHQL = (query_WHLD[window : window + step, :, row : row + rows].to(wide) @ keys_WHDL).mul_(scaling)
            out_WL[window : window + step] += scores_WHQL.softmax(-1).sum((1, 2))
    return out_WL / (heads * length)


class VisionProbe:
    """Attention that the patches receive in one layer of a vision tower, and their keys, pooled to video tokens by the family.

    Read on the side: what the tower puts out stays bit-equal. Holds BLOCK bytes of scores, and keeps (N, C).
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self._module: nn.Module | None = None
        self._seen_RC: Tensor | None = None

    def of(self, module: nn.Module) -> Self:
        """Itself, with an eye on that attention module alone."""
        self._module = module
        return self

    def observe(self, module: nn.Module, query_RHD: Tensor, key_RHD: Tensor, lengths: Tensor, scaling: float | None) -> None:
        """Rows in the order of their windows, whose lengths lie on the host."""
        if module is not self._module:
            return
        scaling = float(scaling or query_RHD.shape[-1] ** -0.5)
        length_of_row, parts = lengths.repeat_interleave(lengths), []
        order = []
        for length in lengths.unique().tolist():
            rows = (length_of_row == length).nonzero().flatten().to(query_RHD.device)
            query, key = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (query_RHD, key_RHD))
            parts.append(received(query, key, scaling).flatten())
            order.append(rows)
        seen = torch.cat(parts)
        received_R = torch.empty_like(seen).index_copy_(0, torch.cat(order), seen)
        self._seen_RC = torch.cat([received_R[:, None], key_RHD.to(seen.dtype).mean(1)], 1)

    def take(self) -> Tensor:
        """(R, C) what the last pass of the tower gave: attention received, and the key, mean over heads."""
        assert self._seen_RC is not None, "the layer watched did not run"
        seen_RC, self._seen_RC = self._seen_RC, None
        return seen_RC

    def add(self, tokens_NC: Tensor) -> None:
        """The next video tokens of the prompt."""
        self.parts.append(tokens_NC)

    def add_newlines(self, count: int) -> None:
        """Tokens that the tower does not know."""
        self.parts.append(self.parts[-1].new_zeros(count, self.parts[-1].shape[1]))

    def attention(self) -> Tensor:
        """(N,)."""
        return torch.cat([part[:, 0] for part in self.parts])

    def keys(self) -> Tensor:
        """(N, C - 1)."""
        return torch.cat([part[:, 1:] for part in self.parts])


@contextmanager
def inputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """The hidden states that enter a module while this block runs; for towers that hand no arguments on to their attention.

    Without a module, none.
    """
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    if module is None:
        yield found
        return
    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


class HiddenStateProbe:
    """Hidden states behind the first `layer` layers of a language model, of the video tokens and of the text after the last.

    Passes come in the order of the prompt, in pieces of any length; of each, only those rows are kept: (N, D) and (T, D) in the
    model's dtype, and the (T, D) that entered the first layer. norm_D: the weight of the model's final norm.
    """

    def __init__(self, video_index: Tensor, cut: int, layer: int, norm_D: Tensor | None = None) -> None:
        self.video_index, self.cut, self.layer, self._norm_D = video_index.cpu(), cut, layer, norm_D
        self._start = 0
        self._entering: list[Tensor] = []
        self._video: list[Tensor] = []
        self._text: list[Tensor] = []

    def enter(self, hidden_QD: Tensor) -> None:
        """A pass begins, with these rows."""
        self._entering.append(hidden_QD[max(self.cut - self._start, 0) :].clone())

    def observe(self, layers: int, hidden_QD: Tensor) -> None:
        """What came out of so many layers."""
        if layers != self.layer:
            return
        inside = (self.video_index >= self._start) & (self.video_index < self._start + len(hidden_QD))
        rows = (self.video_index[inside] - self._start).to(hidden_QD.device)
        self._video.append(hidden_QD[rows])
        self._text.append(hidden_QD[max(self.cut - self._start, 0) :].clone())
        self._start += len(hidden_QD)

    def video(self) -> Tensor:
        """(N, D)."""
        self._video = [torch.cat(self._video)]  # the pieces are let go
        return self._video[0]

    def text(self) -> Tensor:
        """(T, D)."""
        return torch.cat(self._text)

    def norm(self) -> Tensor:
        """(D,) a strategy's own."""
        assert self._norm_D is not None, "made without a norm"
        return self._norm_D.detach().clone()

    def similarity(self, features_ND: Tensor) -> Tensor:
        """(2, N): see `mean_cosine`, of what entered the first layer and of what came out of `layer` layers."""
        entering_TD = torch.cat(self._entering)
        before_N = mean_cosine(features_ND.to(entering_TD), entering_TD)
        return torch.stack([before_N, mean_cosine(self.video(), self.text()).to(before_N)])


def mean_cosine(video_ND: Tensor, text_TD: Tensor) -> Tensor:
    """(N,) mean over the text of cos(video token, text token), by one product a piece; 0 for zero rows. Costs N x D."""
    wide = torch.promote_types(video_ND.dtype, torch.float32)
    mean_D = normalize(text_TD.to(wide), dim=-1).mean(0)
    return torch.cat([normalize(piece.to(wide), dim=-1) @ mean_D for piece in video_ND.split(ROWS)])
