"""Attention functions of our forward passes, and the collector that reads attention to the video from them.

They are registered with Hugging Face's AttentionInterface, so that no modeling file is forked. Masks and the collector
are arguments of the forward pass; nothing is set on a model.

Shape suffixes: H heads (KV heads if G is present), G query heads per KV head, Q rows of the pass, R rows of several
windows, K keys, N video tokens, D head dimension, L layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from specvlm.models.attention_sums import attention_sums
from specvlm.models.vision_attention import attend_windows
from specvlm.models.vision_probe import HiddenStateProbe, VisionProbe
from specvlm.parallel.ranks import ProcessGroup
from specvlm.types import Features, entering

NAME = "specvlm"
# Hugging Face passes a vision tower's whole sequence and its windows only to a function with "flash" in its name. Any
# other is called once per window, thousands of times per video.
VISION = "specvlm_flash_windows"
# Set on a loaded model (`set_attn_implementation`): while loading, "flash" in a name would fetch a kernel from the hub.
IMPLEMENTATIONS = {"text_config": NAME, "vision_config": VISION}


class Part(NamedTuple):
    """Rows of one request in a joined pass, and that request's keys and values.

    Attributes:
        rows: The request's rows of the pass.
        keys: (1, H, K, D) keys that they attend to; the rows' own keys are the last ones.
        values: Values of these keys.
        mask: Mask of the rows over the keys. None: causal.
    """

    rows: slice
    keys: Tensor
    values: Tensor
    mask: Tensor | None


class StopForward(Exception):
    """Ends a forward pass early: the collector needs no deeper layer."""


@dataclass(eq=False, repr=False)
class AttentionCollector:
    """Collects attention from rows of the text to the video tokens, layer by layer (SpecVLM, section 3).

    Of the attention it keeps only (N,) tensors per layer, averaged over heads, unless `heads` is set (`attention_sums`).

    Attributes:
        video_index: (N,) key slots of the video tokens.
        rows: Collect the attention averaged over all rows.
        last_row: Collect the attention of the last row.
        depth: Stop the forward pass after this many layers. None runs all.
        weigh: Maps (Q, D) embeddings of the rows and (N, D) features to (Q,) row weights, for a weighted mean.
        keys: Layer whose keys' L1 norms are collected.
        states: Probe that collects hidden states.
        sight: Probe that collects attention of the vision tower.
        heads: Also keep the mean over rows per KV head, (L, H, N), which takes 33 MB for 64 layers, 8 KV heads and
            16,384 tokens.
        hidden: Keep the video tokens' last hidden states, (N, D) with D the hidden size.
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
        """Whether all rows are read: in one pass, or in passes that say which part of the rows they have (`observe`)."""
        return self.rows or self.weigh is not None

    @property
    def reads(self) -> bool:
        """Whether anything is collected."""
        others = any(part is not None for part in (self.keys, self.states, self.sight))
        return self.whole or self.last_row or self.hidden or others

    @property
    def reads_text(self) -> bool:
        """Whether anything is collected from the rows after the last video."""
        return self.whole or self.last_row or self.keys is not None or self.states is not None

    @property
    def by_steps(self) -> bool:
        """Whether queries and keys are all that is read from the text: neither hidden states, nor an early stop."""
        return self.states is None and self.depth is None

    def without_text(self) -> Self:
        """Make a collector for the passes before the text, which records into this one what `of_video` names."""
        other = copy(self)
        other.rows = other.last_row = other.heads = False
        other.weigh = other.keys = None
        return other

    def ahead(self) -> Self | None:
        """Make a collector for earlier passes, which only stops them at the same layer. None if `depth` is None."""
        return None if self.depth is None else type(self)(self.video_index, rows=False, depth=self.depth)

    @property
    def spec(self) -> tuple[object, ...]:
        """Identifies what is collected: for one prompt, collectors with equal specs collect equal signals."""
        layer = None if self.states is None else self.states.layer
        kinds = (self.rows, self.last_row, self.depth, self.heads, self.hidden, self.sight is not None)
        return (*kinds, self.weigh, self.keys, layer)

    @property
    def of_video(self) -> frozenset[str]:
        """Names of the signals recorded while the videos' own rows are computed, in the vision tower or the layers."""
        layer = None if self.states is None else f"states after {self.states.layer}"
        names = (layer, "sight" if self.sight else None, "hidden" if self.hidden else None)
        return frozenset(name for name in names if name is not None)

    def recorded(self) -> dict[str, Tensor]:
        """Return the (N, ...) records that `of_video` names, to reuse them in later requests with the same videos."""
        found: dict[str, Tensor] = {}
        for name in self.of_video:
            parts = self._hidden if name == "hidden" else self.sight.parts if name == "sight" and self.sight else None
            found[name] = self.states.video() if parts is None and self.states else torch.cat(parts or [])
        return found

    def resume(self, start: int, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Continue after videos whose records are known. start: first slot that is still to be computed."""
        for name in self.of_video:
            known = [part[name] for part in parts]
            if name == "hidden":
                self._hidden = known
            elif name == "sight" and self.sight is not None:
                self.sight.parts = known
            elif self.states is not None:
                self.states.resume(start, known)

    def copy(self) -> Self:
        """Copy the collector and its signals, so that a strategy may write to the copy."""
        other = copy(self)
        other.sight, other.states = copy(self.sight), copy(self.states)
        other.adopt(self)
        return other

    def adopt(self, other: Self) -> None:
        """Copy the signals that a collector with the same spec collected from the same prompt."""
        for name in ("_mean", "_last", "_weighted", "_norms", "_heads"):
            setattr(self, name, {layer: values.clone() for layer, values in getattr(other, name).items()})
        self._hidden = [part.clone() for part in other._hidden]
        if self.sight is not None and other.sight is not None:
            self.sight.parts = [part.clone() for part in other.sight.parts]
        if self.states is not None and other.states is not None:
            self.states.adopt(other.states)

    @property
    def nbytes(self) -> int:
        """Bytes of all collected signals."""
        kept = (self._mean, self._last, self._weighted, self._norms, self._heads)
        parts = [*(x for found in kept for x in found.values()), *self._hidden, *(self.sight.parts if self.sight else ())]
        return sum(part.nbytes for part in parts) + (self.states.nbytes if self.states else 0)

    def weigh_alike(self, other: Self) -> None:
        """Take over the row weights of another collector of the same prompt."""
        self._weights_Q = other._weights_Q

    def weigh_rows(self, embeds: Tensor | Features, features: Tensor | Features, ranks: ProcessGroup) -> None:
        """Compute the row weights before the pass; all ranks use rank 0's. Raises ValueError if they are invalid."""
        if self.weigh is None:
            return
        embeds_QD, features_ND = entering(embeds), entering(features)
        # Pass copies: the target reads these rows next.
        wide = torch.promote_types(embeds_QD.dtype, torch.float32)
        weights_Q = self.weigh(embeds_QD.clone(), features_ND.clone()).to(embeds_QD.device, wide)
        total = float(weights_Q.sum())
        if weights_Q.shape != embeds_QD.shape[:1] or bool((weights_Q < 0).any()) or not 0 < total < float("inf"):
            raise ValueError(
                f"row_weights gave {tuple(weights_Q.shape)} weights of sum {total} for {len(embeds_QD)} rows of text:"
                " expected one per row, none negative, not all zero"
            )
        self._weights_Q = ranks.first((weights_Q / total).contiguous())

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float, part: tuple[int, int] | None = None) -> None:
        """Collect from one layer. Raises StopForward after `depth` layers; does not change the pass otherwise.

        query (1, H * G, Q, D) and key (1, H, K, D) are rotated. The rows are the last of the keys.

        part: Where several passes read the rows, in order: number of the rows before these, and number of all rows.
        """
        _, heads, count, _ = query.shape
        before, total = part or (0, count)
        ends = before + count == total
        if self.whole or (self.last_row and ends):
            given = query[0].unflatten(0, (key.shape[1], -1)), key[0], scaling, self.video_index
            weights_Q = None if self._weights_Q is None else self._weights_Q[before : before + count]
            sums = attention_sums(*given, 0 if self.whole else count - 1, weights_Q)
            heads_HN, last_N, weighted_N = (values.to(self.video_index.device) for values in sums)
            if self.heads:
                _add(self._heads, layer, heads_HN / (heads // len(heads_HN) * total))
            if self.rows:
                _add(self._mean, layer, heads_HN.sum(0) / (heads * total))
            if self.last_row and ends:
                self._last[layer] = last_N / heads
            if self.weigh is not None:
                _add(self._weighted, layer, weighted_N / heads)
        if layer == self.keys and ends:
            norms_K = key[0].to(torch.promote_types(key.dtype, torch.float32)).abs().sum((0, 2))
            self._norms[layer] = norms_K.to(self.video_index.device)
        if self.depth is not None and layer + 1 >= self.depth:
            raise StopForward

    def see(self, start: int, hidden_QD: Tensor) -> None:
        """Collect last hidden states from a finished pass, if `hidden` is set. start: slot of its first row."""
        if self.hidden:
            inside = (self.video_index >= start) & (self.video_index < start + len(hidden_QD))
            rows_ND = hidden_QD[(self.video_index[inside] - start).to(hidden_QD.device)]
            self._hidden.append(normalize(rows_ND.float(), dim=-1).to(rows_ND.dtype))

    def video_hidden(self) -> Tensor:
        """(N, D) last hidden states of the video tokens, scaled to unit length."""
        self._hidden = [torch.cat(self._hidden)]  # frees the parts
        return self._hidden[0]

    def gather(self, ranks: ProcessGroup) -> None:
        """Average the means over ranks, which have equally many heads, and add up the norms. `per_head` stays local."""
        if ranks.size == 1:
            return
        for kept, count in ((self._mean, ranks.size), (self._last, ranks.size), (self._weighted, ranks.size), (self._norms, 1)):
            if kept:
                all_LN = ranks.sum(torch.stack([kept[layer] for layer in sorted(kept)]) / count)
                kept.update(zip(sorted(kept), all_LN, strict=True))

    def per_layer(self) -> Tensor:
        """(L, N) mean over heads and rows."""
        return torch.stack([self._mean[layer] for layer in sorted(self._mean)])

    def per_head(self) -> Tensor:
        """(L, H, N) mean over rows and query heads, for each KV head of this rank."""
        all_LHN = torch.stack([self._heads[layer] for layer in sorted(self._heads)])
        self._heads = dict(zip(sorted(self._heads), all_LHN, strict=True))  # frees the parts
        return all_LHN

    def last_rows(self) -> Tensor:
        """(L, N) attention of the last row, mean over heads."""
        return torch.stack([self._last[layer] for layer in sorted(self._last)])

    def weighted(self) -> Tensor:
        """(L, N) mean over heads, weighted mean over rows."""
        return torch.stack([self._weighted[layer] for layer in sorted(self._weighted)])

    def key_norms(self) -> tuple[Tensor, Tensor]:
        """L1 norms of keys over all heads: (N,) of the video tokens, (T,) of the text after the last video token."""
        (norms_K,) = self._norms.values()
        return norms_K[self.video_index], norms_K[int(self.video_index[-1]) + 1 :]


def _add(kept: dict[int, Tensor], layer: int, values: Tensor) -> None:
    """Add a pass's values to what was collected from a layer before."""
    kept[layer] = kept[layer] + values if layer in kept else values


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    collector: AttentionCollector | None = None,
    parts: Callable[[int], Iterable[Part]] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention. Without a mask it is causal, and the queries are those of the last keys.

    parts: Of a joined pass: maps a layer to one `Part` per request, which replace `key`, `value` and `attention_mask`.
    """
    if parts is not None:
        apart = (attend(module, query[:, :, part.rows], *part[1:], scaling) for part in parts(int(module.layer_idx)))  # type: ignore[arg-type]
        return torch.cat([out for out, _ in apart], 1), None
    rows, keys = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < rows < keys:
        out = _causal_after_prefix(query, key, value, scaling)
    else:
        causal, grouped = attention_mask is None and rows > 1, key.shape[1] != query.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    if collector is not None:
        collector.observe(int(module.layer_idx), query, key, float(scaling or query.shape[-1] ** -0.5))  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def _causal_after_prefix(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the last Q of K tokens: row i attends to the first K - Q + i + 1 keys.

    `is_causal` of scaled_dot_product_attention aligns the triangle at the upper left. The flash kernel aligns it at the
    lower right, reads grouped keys in place and needs no mask. It is called through the operator
    that torch.nn.attention.bias.causal_lower_right uses (the same in torch 2.11 to 2.13). That class is a prototype,
    pads odd head dimensions by copying all keys, and without flash prefers an efficient-attention kernel to a mask.

    Where flash has no kernel (CPU, float32, float64, some head dimensions), an exact (Q, K) mask is used.
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


def register() -> None:
    """Register IMPLEMENTATIONS with Hugging Face, and a mask function so that Hugging Face's `generate` works too."""
    for name, function in ((NAME, attend), (VISION, attend_windows)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
