"""The attention functions our forward passes run through, and the side computation that reads guidance from the text's.

Registered with Hugging Face's own AttentionInterface, so that no modeling file is forked. Masks and the guidance
collector are arguments of the forward pass; nothing is set on a model.

Shape suffixes: H heads (of the keys, where G is there too), G query heads of one KV head, Q rows of this pass, R rows of some
windows, K keys, N video tokens, D head width.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from specvlm.models.vision_probe import BLOCK, HiddenStateProbe, VisionProbe
from specvlm.parallel.ranks import ProcessGroup

NAME = "specvlm"
# Hugging Face hands a vision tower's attention the whole sequence and its windows only under a name with "flash" in it; under
# any other it calls it once a window, thousands of times a video.
VISION = "specvlm_flash_windows"
# For a loaded model's `set_attn_implementation`; at loading, that word in a name would ask for a kernel of the hub.
IMPLEMENTATIONS = {"text_config": NAME, "vision_config": VISION}


class StopForward(Exception):
    """Raised inside a forward pass when the guidance asked for needs no deeper layer."""


@dataclass(eq=False, repr=False)
class AttentionCollector:
    """Attention from the rows of one pass to the video tokens, reduced layer by layer as it happens (SpecVLM, section 3).

    Holds as many KV heads' (H, G, Q, K) scores at once as fit BLOCK, or rows of one head where even that is too much, and about
    twice that beside them; what is kept is (N,) sums or, where asked for, (L, N). heads: keep what `rows` reads for each KV
    head too, (L, H, N), a query head's group added up: 33 MB for 64 layers, 8 KV heads and 16,384 video tokens. hidden: keep
    the video tokens' last hidden states, (N, D).
    video_index: key slots of the video tokens. depth: stop the forward pass after that many layers (None: run it all).
    weigh: from (Q, D) embeddings of the rows and (N, D) features to a weight a row, for a second mean. keys: the layer whose
    keys' L1 norms are read. states, sight: what else is gathered of the model, by others.
    """

    video_index: Tensor
    _: KW_ONLY
    rows: bool = True
    last_row: bool = False
    depth: int | None = None
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None
    keys: int | None = None
    states: HiddenStateProbe | None = None
    sight: VisionProbe | None = None
    heads: bool = False
    hidden: bool = False

    def __post_init__(self) -> None:
        self._weights_Q: Tensor | None = None
        self._mean, self._last, self._weighted, self._norms, self._heads = (dict[int, Tensor]() for _ in range(5))  # by layer
        self._hidden: list[Tensor] = []

    @property
    def whole(self) -> bool:
        """Must all rows watched come in one pass?"""
        return self.rows or self.weigh is not None

    @property
    def reads(self) -> bool:
        """Is there anything to gather at all?"""
        others = any(part is not None for part in (self.keys, self.states, self.sight))
        return self.whole or self.last_row or self.hidden or others

    def ahead(self) -> Self | None:
        """For passes before the one that is watched: sees nothing, and stops where this one stops."""
        return None if self.depth is None else type(self)(self.video_index, rows=False, depth=self.depth)

    def weigh_rows(self, embeds_QD: Tensor, features_ND: Tensor, ranks: ProcessGroup) -> None:
        """Before the pass: what each row counts for, the first rank's word for all. Raises ValueError for bad weights."""
        if self.weigh is None:
            return
        # Copies: these rows go on into the target.
        wide = torch.promote_types(embeds_QD.dtype, torch.float32)
        weights_Q = self.weigh(embeds_QD.clone(), features_ND.clone()).to(embeds_QD.device, wide)
        total = float(weights_Q.sum())
        if weights_Q.shape != embeds_QD.shape[:1] or bool((weights_Q < 0).any()) or not 0 < total < float("inf"):
            raise ValueError(
                f"row_weights gave {tuple(weights_Q.shape)} weights of sum {total} for {len(embeds_QD)} rows of text:"
                " wanted one a row, none negative, not all zero"
            )
        self._weights_Q = ranks.first((weights_Q / total).contiguous())

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """query (1, H * G, Q, D), key (1, H, K, D), after rotation. Reads only: the pass itself is not touched."""
        if self.whole or self.last_row:
            first = 0 if self.whole else query.shape[2] - 1
            read = self._read(query[0].unflatten(0, (key.shape[1], -1)), key[0], scaling, first)
            mean_N, last_N, weighted_N, heads_HN = (weights.to(self.video_index.device) for weights in read)
            if self.heads:
                self._heads[layer] = heads_HN
            if self.rows:
                self._mean[layer] = mean_N
            if self.last_row:
                self._last[layer] = last_N
            if self.weigh is not None:
                self._weighted[layer] = weighted_N
        if layer == self.keys:
            norms_K = key[0].to(torch.promote_types(key.dtype, torch.float32)).abs().sum((0, 2))
            self._norms[layer] = norms_K.to(self.video_index.device)
        if self.depth is not None and layer + 1 >= self.depth:
            raise StopForward

    def _read(self, query_HGQD: Tensor, key_HKD: Tensor, scaling: float, first: int) -> tuple[Tensor, ...]:
        """Weights (N,) of the video tokens, mean over heads: of the rows from `first` on, of the last row, of weighted rows.
        Also (H, N), those of each KV head, or nothing.
        """
        heads, group, count, _ = query_HGQD.shape
        wide = torch.promote_types(query_HGQD.dtype, torch.float32)  # 8 bits of mantissa would make false ties
        row_bytes = group * key_HKD.shape[1] * wide.itemsize
        rows = max(1, min(count - first, BLOCK // row_bytes))
        step = max(1, BLOCK // (rows * row_bytes))
        video_index = self.video_index.to(query_HGQD.device)
        mean_N = torch.zeros(len(video_index), dtype=wide, device=query_HGQD.device)
        last_N, weighted_N = torch.zeros_like(mean_N), torch.zeros_like(mean_N)
        heads_HN = mean_N.new_zeros(heads if self.heads else 0, len(mean_N))
        counts_Q = None if self._weights_Q is None else self._weights_Q.to(mean_N)
        for head in range(0, heads, step):
            keys_HDK = key_HKD[head : head + step].to(wide).mT
            for row in range(first, count, rows):
                queries_HGQD = query_HGQD[head : head + step, :, row : row + rows].to(wide)
                scores_HGQK = (queries_HGQD.flatten(1, 2) @ keys_HDK).unflatten(1, queries_HGQD.shape[1:3]).mul_(scaling)
                future = torch.ones(queries_HGQD.shape[2], count, dtype=torch.bool, device=mean_N.device).triu(row + 1)
                scores_HGQK[..., -count:].masked_fill_(future, float("-inf"))
                weights_HGQN = scores_HGQK.softmax(-1).index_select(-1, video_index)
                mean_N += weights_HGQN.sum((0, 1, 2))
                if counts_Q is not None:
                    weighted_N += counts_Q[row : row + rows] @ weights_HGQN.sum((0, 1))
                if self.heads:
                    heads_HN[head : head + step] += weights_HGQN.sum((1, 2))
                if row + rows >= count:
                    last_N += weights_HGQN[:, :, -1].sum((0, 1))
        count_all = heads * group * (count - first)
        heads_HN /= group * (count - first)
        return mean_N / count_all, last_N / (heads * group), weighted_N / (heads * group), heads_HN

    def see(self, start: int, hidden_QD: Tensor) -> None:
        """What a pass left of its rows, the first of which stands in slot `start`."""
        if self.hidden:
            inside = (self.video_index >= start) & (self.video_index < start + len(hidden_QD))
            rows_ND = hidden_QD[(self.video_index[inside] - start).to(hidden_QD.device)]
            self._hidden.append(normalize(rows_ND.float(), dim=-1).to(rows_ND.dtype))

    def video_hidden(self) -> Tensor:
        """(N, D) last hidden states of the video tokens, to unit length."""
        self._hidden = [torch.cat(self._hidden)]  # the pieces are let go
        return self._hidden[0]

    def gather(self, ranks: ProcessGroup) -> None:
        """From this rank's heads to all heads: means of means, since every rank holds as many, and sums of norms."""
        if ranks.size == 1:
            return
        for kept, count in ((self._mean, ranks.size), (self._last, ranks.size), (self._weighted, ranks.size), (self._norms, 1)):
            if kept:
                all_LN = ranks.sum(torch.stack([kept[layer] for layer in sorted(kept)]) / count)
                kept.update(zip(sorted(kept), all_LN, strict=True))

    def per_layer(self) -> Tensor:
        """(L, N), mean over heads and rows."""
        return torch.stack([self._mean[layer] for layer in sorted(self._mean)])

    def per_head(self) -> Tensor:
        """(L, H, N), mean over rows and a KV head's query heads; of this rank's KV heads."""
        all_LHN = torch.stack([self._heads[layer] for layer in sorted(self._heads)])
        self._heads = dict(zip(sorted(self._heads), all_LHN, strict=True))  # the pieces are let go
        return all_LHN

    def last_rows(self) -> Tensor:
        """(L, N), the last row alone, mean over heads."""
        return torch.stack([self._last[layer] for layer in sorted(self._last)])

    def weighted(self) -> Tensor:
        """(L, N), mean over heads, weighted mean over rows."""
        return torch.stack([self._weighted[layer] for layer in sorted(self._weighted)])

    def key_norms(self) -> tuple[Tensor, Tensor]:
        """(N,) and (T,): of the video tokens, and of all that follows the last of them. Over all heads' dimensions together."""
        (norms_K,) = self._norms.values()
        return norms_K[self.video_index], norms_K[int(self.video_index[-1]) + 1 :]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    collector: AttentionCollector | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; without a mask it is causal, the rows being the last of the keys."""
    rows, keys = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < rows < keys:
        out = _behind_a_prefix(query, key, value, scaling)
    else:
        causal, grouped = attention_mask is None and rows > 1, key.shape[1] != query.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    if collector is not None:
        collector.observe(int(module.layer_idx), query, key, float(scaling or query.shape[-1] ** -0.5))  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def _behind_a_prefix(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the last rows: row i of Q sees the first K - Q + i + 1 keys.

    `is_causal` of scaled_dot_product_attention aligns the triangle at the upper left, where rows and keys differ in number. The
    flash kernel itself aligns it at the lower right, reads grouped keys as they lie and needs no mask; it is called by the
    name that torch.nn.attention.bias.causal_lower_right calls it by (the same in torch 2.11 to 2.13). That class is not used
    since it is a prototype, pads odd head widths by a copy of all keys, and prefers an efficient-attention kernel to a mask
    where flash cannot be had. Elsewhere (CPU, float32, float64, head widths flash has no kernel for): a mask, exact and simple,
    (Q, K) in size.
    """
    grouped = key.shape[1] != query.shape[1]
    if query.is_cuda and query.shape[-1] % 8 == 0:
        asked = SDPAParams(query, key, value, None, 0.0, False, grouped)  # is_causal=True would be refused: not square
        if can_use_flash_attention(asked):
            flash = torch.ops.aten._scaled_dot_product_flash_attention.default
            return flash(query, key, value, dropout_p=0.0, is_causal=True, scale=scaling)[0]
    rows, keys = query.shape[2], key.shape[2]
    mask_QK = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask_QK, scale=scaling, enable_gqa=grouped)


def attend_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sight: VisionProbe | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a vision tower: everything to everything (SigLIP's images) or, of one sequence, inside its windows.

    query, key, value: (B, H, Q, D). cu_seq_lens_q: where the windows of the only sequence start, and its end; best on the
    CPU, since their lengths are read here. Windows of one length are a batch of one call: as exact as a call each, anywhere.
    """
    if cu_seq_lens_q is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    lengths = cu_seq_lens_q.cpu().diff()
    query_QHD, key_QHD, value_QHD = (x[0].transpose(0, 1) for x in (query, key, value))
    if sight is not None:
        sight.observe(module, query_QHD, key_QHD, lengths, scaling)
    if len(kinds := lengths.unique().tolist()) == 1:
        return _inside(query_QHD, key_QHD, value_QHD, kinds[0], scaling)[None], None
    length_of_row = lengths.repeat_interleave(lengths)
    out_QHD = torch.empty_like(query_QHD, memory_format=torch.contiguous_format)
    for length in kinds:
        rows = (length_of_row == length).nonzero().flatten().to(query.device)
        out_QHD[rows] = _inside(query_QHD[rows], key_QHD[rows], value_QHD[rows], length, scaling)
    return out_QHD[None], None


def _inside(query_RHD: Tensor, key_RHD: Tensor, value_RHD: Tensor, length: int, scaling: float | None) -> Tensor:
    """(R, H, D): attention inside each `length` rows, one window after the other."""
    query, key, value = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query_RHD, key_RHD, value_RHD))
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)


def register() -> None:
    """Make IMPLEMENTATIONS known. The mask function keeps a bare `generate` right under those names too."""
    for name, function in ((NAME, attend), (VISION, attend_windows)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
