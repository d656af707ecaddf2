"""Lean pass: a language model's forward pass over a few text tokens, without host reads, so that it can be captured.

The pass uses the parameters of Hugging Face's modules, of language models like Qwen2's (arXiv 2407.10671) and Qwen3's
(arXiv 2505.09388): RMSNorm, grouped-query attention with rotary positions, norms of queries and keys if there are any,
and a gated MLP or a mixture of experts. A text token has the same position on all axes of M-RoPE, which then equals
plain rotary embedding.

Shape suffixes: Q rows of the pass, T slots from `base` on, P nodes of the longest path, V vocabulary, D hidden size,
S parts of a linear layer's output, N its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from specvlm.engine import ops as plain
from specvlm.engine.contexts import Contexts, on_device
from specvlm.engine.ops import Experts, Weight
from specvlm.models.kv_cache import KVCache
from specvlm.models.partition import cross, current
from specvlm.models.passes import Pass, Rows
from specvlm.models.quantize import QuantizedExperts, QuantizedLinear
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import local_shard

Watch: TypeAlias = Callable[[int, Tensor], None]
ROWS = 64  # maximum number of rows per pass that the kernels are tuned for
JOINED = 128  # the same for passes of several requests
# Modules of transformers with the language models that the pass computes. In others, equal layer names prove nothing:
# Granite scales what its layers add, Gemma's norms multiply by 1 + weight.
KNOWN = frozenset(
    f"transformers.models.{name}.modeling_{name}"
    for name in ("llama", "mistral", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl", "qwen3_vl_moe")
)


def why_not(model: VideoLM) -> str | None:
    """Say why the lean pass cannot replace this model's own; None if it can."""
    if model.quantised:
        return f"its checkpoint is quantised by {model.quantised}"
    text, config = model.text, model.hf.config.get_text_config()
    if why := _why_not_classes(text.norm, text.rotary_emb) or next(filter(None, map(_why_not_layer, text.layers)), None):
        return why
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rotary.get("rope_type") or rotary.get("type") or "default"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if kind not in ("default", "mrope"):
        return f"its rotary positions are scaled ({kind})"
    if getattr(config, "use_sliding_window", False):
        return "its attention has a sliding window"
    return _why_not_parts([model.hf.lm_head])


def _norms_of(attention: nn.Module) -> tuple[Any, ...]:
    """Return the norms of queries and keys; empty if there are none."""
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()


def _why_not_classes(*modules: nn.Module) -> str | None:
    """Say which module's class the lean pass does not know; None if it knows all."""
    names = [type(m).__name__ for m in modules if type(m).__module__ not in KNOWN and type(m) is not QuantizedExperts]
    return f"one of its layers is a {names[0]}" if names else None


def _why_not_layer(layer: Any) -> str | None:
    """Say why the lean pass cannot replace a decoder layer; None if it can."""
    # A class that is not known may lack the parts of the next line.
    if why := _why_not_classes(layer) or _why_not_classes(layer.self_attn, layer.mlp):
        return why
    attention, mlp = layer.self_attn, layer.mlp
    experts = () if hasattr(mlp, "gate_proj") else (mlp.gate, mlp.experts)
    if why := _why_not_classes(layer.input_layernorm, layer.post_attention_layernorm, *_norms_of(attention), *experts):
        return why
    if not all(weight.is_contiguous() for module in experts for weight in module.parameters()):
        return "the weights of its experts are not contiguous"  # the pass would hold a copy
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        if type(part) not in (nn.Linear, QuantizedLinear):
            return f"one of its layers is a {type(part).__name__}"
    dense = (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if hasattr(mlp, "gate_proj") else ()
    return _why_not_parts([attention.o_proj, *dense])


def _why_not_parts(parts: Iterable[nn.Module]) -> str | None:
    """Say why the lean pass cannot run layers that must have no bias; None if it can."""
    for part in parts:
        if type(part) not in (nn.Linear, QuantizedLinear):
            return f"one of its layers is a {type(part).__name__}"
        if part.bias is not None:
            return "one of its output layers has a bias"
    return None


class Sight(NamedTuple):
    """Which slots from `base` on each row of a pass attends to. All rows attend to all slots before `base`.

    Given either as a mask or as paths. With paths and the Triton kernels, a row's result is bit-identical to that of a
    pass of one row.

    Attributes:
        seen_QT: (Q, T) int8 mask, which includes the row's own slot.
        ways_QP: (Q, P) rows on each row's path, from the first row of the tree to the row itself; the rest is padding.
        above_Q: (Q,) number of rows above each row on its path.
    """

    seen_QT: Tensor | None = None
    ways_QP: Tensor | None = None
    above_Q: Tensor | None = None


class Place(NamedTuple):
    """Where the rows of one request's pass lie: row i is in slot base + at + i. Tensors are on one stage's device.

    Attributes:
        cache: The request's cache.
        base: (1,) slot number. All rows attend to all slots before it.
        at: First slot of the rows, relative to `base`.
        sight: Which slots each row attends to.
        watch: Called with each layer's number and queries, once its keys are in the cache.
    """

    cache: KVCache
    base: Tensor
    at: int
    sight: Sight
    watch: Watch | None = None

    def rope(
        self, ops: ModuleType, index: int, parts_SQN: Tensor, turns: tuple[Tensor, Tensor], layer: Any, heads: int
    ) -> Tensor:
        """Rotate queries and keys, and write keys and values to cache layer `index`. Returns queries (Q, H, D).

        turns: Cosines and sines of the rotary angles.
        """
        keys, values = (store[0] for store in self.cache.layer(index))
        given = (keys, values, self.base, self.at, heads, layer.norms, layer.eps)
        q_QHD: Tensor = ops.rope(parts_SQN, layer.biases, *turns, *given)
        if self.watch is not None:
            self.watch(index, q_QHD)
        return q_QHD

    def attend(self, ops: ModuleType, index: int, q_QHD: Tensor, scale: float, kind: str) -> Any:
        """Attend from each row to the slots of layer `index` that it sees."""
        keys, values = (store[0] for store in self.cache.layer(index))
        seen_QT, ways_QP, above_Q = self.sight
        if ways_QP is None:
            return ops.attention(q_QHD, keys, values, self.base, seen_QT, scale, kind)
        return ops.path_attention(q_QHD, keys, values, self.base, above_Q, ways_QP, scale, kind)


class Places(NamedTuple):
    """Where the rows of several requests' joined pass are. Needs the Triton kernels. Same methods as `Place`."""

    contexts: Contexts

    def rope(
        self, ops: ModuleType, index: int, parts_SQN: Tensor, turns: tuple[Tensor, Tensor], layer: Any, heads: int
    ) -> Tensor:
        return ops.rope_many(parts_SQN, layer.biases, *turns, self.contexts, index, heads, layer.norms, layer.eps)

    def attend(self, ops: ModuleType, index: int, q_QHD: Tensor, scale: float, kind: str) -> Any:
        return ops.path_attention_many(q_QHD, self.contexts, index, scale, kind)


class LeanText:
    """A VideoLM's language model as a function of device tensors, one per pipeline stage.

    In a tensor-parallel model, the outputs of attention and MLP are all-reduced, rounded as in Hugging Face's modules,
    and logits are gathered.

    Args:
        model: Model whose parameters to use. Nothing is copied.
        ops: Module with the operations: `engine.ops` or `engine.kernels`.
    """

    def __init__(self, model: VideoLM, ops: ModuleType = plain) -> None:
        self.ops, self.text, self.ranks = ops, model.text, model.ranks
        self.layers = [_Layer(layer) for layer in model.text.layers]
        self.head = Weight.of(model.hf.lm_head)
        self.norm = model.text.norm
        self.vocabulary, self.width = model.vocabulary, model.head_dim
        self.heads = self.layers[0].qkv[0].outputs // self.width  # of this rank
        self.hidden, self.dtype = int(model.text.config.hidden_size), model.text.embed_tokens.weight.dtype
        self.stages = model.stages
        # Maximum number of rows of a joined pass.
        self.most = ROWS if any(layer.experts is not None for layer in self.layers) else JOINED
        self.turns = [model.text.rotary_emb.inv_freq.to(stage.device) for stage in model.stages]

    def __call__(
        self,
        tokens_Q: Tensor,
        depths_Q: Tensor,
        at: int,
        sight: Sight,
        base: Tensor,
        offset: Tensor,
        cache: KVCache,
        watch: Watch | None = None,
    ) -> Tensor:
        """Run rows through all stages, writing their keys and values to slots base + at + row.

        Args:
            tokens_Q: (Q,) token ids.
            depths_Q: (Q,) position of each row, relative to that of slot `base`.
            at: First slot written, relative to `base`.
            sight: Which slots each row attends to.
            base: (1,) slot number, on the device.
            offset: (1,) position minus slot, on the device.
            cache: The model's KV cache.
            watch: As in `Place`.

        Returns:
            (Q, D) hidden states after the final norm.
        """
        x = self.enter(tokens_Q)
        for number, stage in enumerate(self.stages):
            with current(stage.device):
                x, depths_Q, base, offset, *tables = cross(stage.device, x, depths_Q, base, offset, *sight)
                x = self.run(number, x, base + offset + depths_Q, Place(cache, base, at, Sight(*tables), watch))
        return x

    def enter(self, tokens_Q: Tensor) -> Tensor:
        """Embed tokens to the (Q, D) input of the first stage. Ids outside the vocabulary are clamped into it."""
        return self.text.embed_tokens(tokens_Q.clamp(0, self.vocabulary - 1))

    def run(self, number: int, x: Tensor, positions_Q: Tensor, place: Place | Places) -> Tensor:
        """Run (Q, D) rows through one stage; the last one adds the final norm. Tensors are on the stage's device."""
        ops, scale, stage = self.ops, self.width**-0.5, self.stages[number]
        angles = positions_Q.float()[:, None] * self.turns[number].float()
        turns = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        parts = None
        for index in range(stage.start, stage.end):
            layer = self.layers[index]
            kind, before, after = layer.kind, layer.before, layer.after
            x, y = self._add_norm(x, parts, before, kind)
            q = place.rope(ops, index, ops.linear(y, layer.qkv), turns, layer, self.heads)
            read = place.attend(ops, index, q, scale, kind)
            x, y = self._add_norm(x, ops.linear(read, layer.o), after, layer.mlp_kind)
            if layer.experts is not None:
                parts = ops.experts(y, layer.experts)
            else:
                parts = ops.linear(ops.gated(y, *layer.gate_up, x.dtype, layer.mlp_kind), layer.down)
        if number + 1 < len(self.stages):
            return x if parts is None else x + ops.whole(parts, torch.empty_like(x))
        return self._add_norm(x, parts, self.norm, self.head.kind)[1]

    def _add_norm(self, x: Tensor, parts_SQN: Tensor | None, norm: nn.Module, kind: str) -> tuple[Tensor, Any]:
        """Add a linear layer's parts, if any, summed over ranks, to the residual stream x. Returns sum and norm."""
        given = (norm.weight, norm.variance_epsilon, kind)
        if parts_SQN is None or self.ranks.size == 1:
            return self.ops.add_norm(x, parts_SQN, *given)
        return self.ops.all_reduce_add_norm(self.ranks, x, parts_SQN, *given)

    def weights(self) -> Iterator[Weight]:
        """Iterate over the weights of all linear layers."""
        for layer in self.layers:
            yield from (*layer.qkv, *layer.o)
            experts = layer.experts
            yield from (*layer.gate_up, *layer.down) if experts is None else (experts.router, experts.gate_up, experts.down)
        yield self.head

    def logits(self, hidden_QD: Tensor) -> Tensor:
        """Compute the (Q, V) logits of hidden states that a pass returned, at most JOINED rows at a time."""
        count = hidden_QD.data.shape[0]  # of a tensor, or of rows in 8 bits
        pieces = [hidden_QD] if count <= JOINED else [hidden_QD[at : at + JOINED] for at in range(0, count, JOINED)]
        with current(self.stages[-1].device):
            found = [self.ops.linear(piece, (self.head,), whole=self.dtype)[0] for piece in pieces]
        mine_QV = found[0] if len(found) == 1 else torch.cat(found)
        return mine_QV if self.head.outputs == self.vocabulary else self.ranks.gather(mine_QV)


class _Layer:
    """References to the parameters of one decoder layer. Nothing is copied."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.after = layer.input_layernorm, layer.post_attention_layernorm
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = tuple(map(Weight.of, projections))
        self.biases = tuple(local_shard(p.bias) for p in projections if p.bias is not None)
        self.o = (Weight.of(attention.o_proj),)
        norms = _norms_of(attention)
        self.norms = tuple(norm.weight for norm in norms)
        self.eps = norms[0].variance_epsilon if norms else 0.0
        self.experts = Experts.of(mlp)
        if self.experts is None:
            self.gate_up, self.down = (Weight.of(mlp.gate_proj), Weight.of(mlp.up_proj)), (Weight.of(mlp.down_proj),)
        self.kind = self.o[0].kind
        self.mlp_kind = self.kind if self.experts is None else "full"


def run_pass(lean: LeanText, one: Pass, watch: Watch | None = None) -> Rows:
    """Run one pass through the lean pass, without reading its device tensors on the host. watch: as in `Place`."""
    device = lean.stages[0].device
    base, offset, depths_Q = (on_device(numbers, device) for numbers in (one.base, one.offset, one.depths_Q))
    if one.seen_QT is None and not one.at:  # causal: a row's path is all rows up to it
        above_Q = torch.arange(len(one), device=device)
        sight = Sight(None, above_Q.expand(len(one), -1).contiguous(), above_Q)
    else:
        sight = Sight(one.seen(device, torch.int8))
    hidden_QD = lean(one.tokens_Q.to(device), depths_Q, one.at, sight, base, offset, one.cache, watch)
    return Rows(hidden_QD, lean.logits, lean.ops.top)


def run_tree(lean: LeanText, tokens_M: Tensor, depths_M: Tensor, ways_MP: Tensor, cache: KVCache) -> Any:
    """Run a tree uncaptured, ROWS rows at a time, and append its rows to the cache. Returns hidden states (M, D)."""
    base, offset = torch.tensor([[cache.length], [cache.offset]], device=tokens_M.device)
    found = []
    for at in range(0, len(tokens_M), ROWS):
        depths, ways = depths_M[at : at + ROWS], ways_MP[at : at + ROWS]
        found.append(lean(tokens_M[at : at + ROWS], depths, at, Sight(None, ways, depths), base, offset, cache))
    cache.advance(len(tokens_M))
    return _joined(found)


def _joined(found: Sequence[Any]) -> Any:
    """Join the rows of several passes: tensors, or rows in 8 bits where the head is quantised."""
    if len(found) == 1:
        return found[0]
    return torch.cat(list(found)) if isinstance(found[0], Tensor) else type(found[0]).joined(found)
