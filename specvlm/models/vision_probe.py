"""Probes that read a vision tower's attention and a language model's hidden states, without changing their outputs.

Shape suffixes: W windows, H heads, L patches of a window, R patches in the tower's own order, F frames, P tokens per
frame, Q rows of one pass, S prompt tokens, T tokens of the text after the video, N video tokens, D hidden size, C = 1 +
the size of a key.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

BLOCK = 2**28  # bytes of attention scores in memory at once
ROWS = 4096  # rows of hidden states converted to float32 at once


def received(query_WHLD: Tensor, key_WHLD: Tensor, scaling: float) -> Tensor:
    """(W, L) attention that each key receives in its window, averaged over heads and queries. Each window sums to 1."""
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
    """Records the attention that patches receive in one layer of a vision tower, and their keys.

    The model class pools them into video tokens (`add`). The tower's output stays bit-identical. Memory: BLOCK bytes of
    scores at a time, and an (N, C) record.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self._module: nn.Module | None = None
        self._seen_RC: Tensor | None = None

    def of(self, module: nn.Module) -> Self:
        """Select the attention module to record; returns the probe itself."""
        self._module = module
        return self

    def observe(self, module: nn.Module, query_RHD: Tensor, key_RHD: Tensor, lengths: Tensor, scaling: float | None) -> None:
        """Record one call of an attention module, if it is the selected one.

        Rows are in window order. lengths: patches of each window, on the host.
        """
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
        """(R, C) record of the tower's last pass: attention received, then the key, averaged over heads."""
        assert self._seen_RC is not None, "the selected layer did not run"
        seen_RC, self._seen_RC = self._seen_RC, None
        return seen_RC

    def add(self, tokens_NC: Tensor) -> None:
        """Append the record of the prompt's next video tokens, pooled by the model class."""
        self.parts.append(tokens_NC)

    def add_newlines(self, count: int) -> None:
        """Append zeros for tokens that the tower does not see."""
        self.parts.append(self.parts[-1].new_zeros(count, self.parts[-1].shape[1]))

    def attention(self) -> Tensor:
        """(N,) attention that each video token received."""
        return torch.cat([part[:, 0] for part in self.parts])

    def keys(self) -> Tensor:
        """(N, C - 1) key of each video token."""
        return torch.cat([part[:, 1:] for part in self.parts])


@contextmanager
def inputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the hidden states that enter a module within this block; none if there is no module.

    Used for towers that do not pass our extra arguments on to their attention.
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
    """Records hidden states after the first `layer` layers: (N, D) of the video tokens, (T, D) of the text after them.

    Also records the (T, D) embeddings of that text. All are in the model's dtype. Passes must come in prompt order;
    they may have any length.

    Args:
        video_index: (N,) prompt slots of the video tokens.
        cut: First slot of the text after the last video.
        layer: Number of layers after which states are read.
        norm_D: Weight of the model's final norm.
    """

    def __init__(self, video_index: Tensor, cut: int, layer: int, norm_D: Tensor | None = None) -> None:
        self.video_index, self.cut, self.layer, self._norm_D = video_index.cpu(), cut, layer, norm_D
        self._start = 0
        self._entering: list[Tensor] = []
        self._video: list[Tensor] = []
        self._text: list[Tensor] = []

    def enter(self, hidden_QD: Tensor) -> None:
        """Begin a pass over these rows: record the embeddings of the text after the video."""
        self._entering.append(hidden_QD[max(self.cut - self._start, 0) :].clone())

    def observe(self, layers: int, hidden_QD: Tensor) -> None:
        """Record the output of the first `layers` layers, if `layer` is that number."""
        if layers != self.layer:
            return
        inside = (self.video_index >= self._start) & (self.video_index < self._start + len(hidden_QD))
        rows = (self.video_index[inside] - self._start).to(hidden_QD.device)
        self._video.append(hidden_QD[rows])
        self._text.append(hidden_QD[max(self.cut - self._start, 0) :].clone())
        self._start += len(hidden_QD)

    def resume(self, start: int, video: list[Tensor]) -> None:
        """Continue after rows whose states are known. start: slot of the next row; video: states of video tokens."""
        self._start, self._video = start, video

    def ahead(self) -> Self:
        """Return a second probe that continues at this one's next slot, with the video states recorded so far.

        Used to run the text through the first layers before the target's own prefill gets to it.
        """
        other = type(self)(self.video_index, self.cut, self.layer, self._norm_D)
        other.resume(self._start, [*self._video])
        return other

    def adopt(self, other: Self) -> None:
        """Copy what another probe of the same prompt and layer has recorded."""
        for name in ("_entering", "_video", "_text"):
            setattr(self, name, [part.clone() for part in getattr(other, name)])
        self._start = other._start

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(part.nbytes for part in (*self._entering, *self._video, *self._text))

    def video(self) -> Tensor:
        """(N, D) hidden states of the video tokens."""
        self._video = [torch.cat(self._video)]  # frees the parts
        return self._video[0]

    def text(self) -> Tensor:
        """(T, D) hidden states of the text after the video."""
        return torch.cat(self._text)

    def norm(self) -> Tensor:
        """(D,) weight of the final norm, a copy that the strategy may write to."""
        assert self._norm_D is not None, "made without a norm"
        return self._norm_D.detach().clone()

    def similarity(self, features_ND: Tensor) -> Tensor:
        """(2, N) `mean_cosine` of each video token with the text: entering the first layer, and after `layer` layers.

        features_ND: video tokens as they enter the first layer.
        """
        entering_TD = torch.cat(self._entering)
        before_N = mean_cosine(features_ND.to(entering_TD), entering_TD)
        return torch.stack([before_N, mean_cosine(self.video(), self.text()).to(before_N)])


def mean_cosine(video_ND: Tensor, text_TD: Tensor) -> Tensor:
    """(N,) mean over the text of cos(video token, text token); 0 for zero rows. Costs N x D, not N x T x D."""
    wide = torch.promote_types(video_ND.dtype, torch.float32)
    mean_D = normalize(text_TD.to(wide), dim=-1).mean(0)
    return torch.cat([normalize(piece.to(wide), dim=-1) @ mean_D for piece in video_ND.split(ROWS)])
