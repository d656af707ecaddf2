"""The language model's pass over a few text rows, over Hugging Face's own parameters, with nothing the host must know.

Both families' language models are Qwen2's (arXiv 2407.10671): RMSNorm, grouped-query attention with rotary positions,
a gated MLP. Rows of text have one position on all of M-RoPE's axes, so there it is plain rotary embedding.

Shape suffixes: Q rows of this pass, T rows from slot `base` on, V vocabulary, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specvlm.engine import ops as plain
from specvlm.engine.ops import Weight
from specvlm.models.kv_cache import KVCache
from specvlm.models.partition import cross, current
from specvlm.models.quantize import QuantizedLinear
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import local_shard

ROWS = 64  # most rows of a pass the kernels are made for


def why_not(model: VideoLM) -> str | None:
    """Why the lean pass cannot stand for this model's own; None when it can."""
    config = model.hf.config.get_text_config()
    layer = model.text.layers[0]
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rotary.get("rope_type") or rotary.get("type") or "default"
    if model.quantised:
        return f"its checkpoint is quantised by {model.quantised}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if kind not in ("default", "mrope"):
        return f"its rotary positions are scaled ({kind})"
    if hasattr(layer.self_attn, "q_norm"):
        return "it normalises queries"
    missing = [name for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp") if not hasattr(layer, name)]
    if missing:
        return f"its layers have no {missing[0]}"
    if not hasattr(layer.mlp, "gate_proj"):
        return f"a layer of it is a {type(layer.mlp).__name__}"
    if getattr(config, "use_sliding_window", False):
        return "its attention has a sliding window"
    plain_parts = [layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, model.hf.lm_head]
    for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, *plain_parts):
        if type(part) not in (nn.Linear, QuantizedLinear):
            return f"a layer of it is a {type(part).__name__}"
    return "an output layer of it has a bias" if any(part.bias is not None for part in plain_parts) else None


class Sight(NamedTuple):
    """What the rows of a pass see behind the first `base` slots, which all of them see.

    seen_QT: int8, which of the slots from `base` on, its own among them. Or, of rows that stand from `base` on, ways_QP: the
    rows on each one's path from the first on, `above_Q` of them and itself. Then its bits are those of a pass of its own.
    """

    seen_QT: Tensor | None = None
    ways_QP: Tensor | None = None
    above_Q: Tensor | None = None


class LeanText:
    """The language model of a VideoLM as one function of device tensors, or as one a stage. ops: `ops` or `kernels`.

    Where ranks share the layers, what they add to the residual stream is summed over them, rounded as by Hugging Face's
    modules, and logits are gathered.
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
        self.turns = [model.text.rotary_emb.inv_freq.to(stage.device) for stage in model.stages]

    def __call__(
        self, tokens_Q: Tensor, depths_Q: Tensor, at: int, sight: Sight, base: Tensor, offset: Tensor, cache: KVCache
    ) -> Tensor:
        """(Q, D) normed hidden states of rows written to the slots base + at + row, through all stages.

        depths_Q: position of each row above that of slot `base`. base, offset: integers on the device; position = slot +
        offset.
        """
        x = self.enter(tokens_Q)
        for number, stage in enumerate(self.stages):
            with current(stage.device):
                x, depths_Q, base, offset, *tables = cross(stage.device, x, depths_Q, base, offset, *sight)
                x = self.run(number, x, depths_Q, at, Sight(*tables), base, offset, cache)
        return x

    def enter(self, tokens_Q: Tensor) -> Tensor:
        """(Q, D) rows as they enter the first stage."""
        return self.text.embed_tokens(tokens_Q.clamp(0, self.vocabulary - 1))

    def run(
        self, number: int, x: Tensor, depths_Q: Tensor, at: int, sight: Sight, base: Tensor, offset: Tensor, cache: KVCache
    ) -> Tensor:
        """(Q, D) rows as they leave a stage: normed behind the last one. All else as in a call; all on the stage's device."""
        ops, scale, stage = self.ops, self.width**-0.5, self.stages[number]
        angles = (base + offset + depths_Q).float()[:, None] * self.turns[number].float()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        parts = None
        for index in range(stage.start, stage.end):
            layer = self.layers[index]
            kind, before, after = layer.kind, layer.before, layer.after
            keys, values = (store[0] for store in cache.layer(index))
            x, y = self._add_norm(x, parts, before, kind)
            q = ops.rope(ops.linear(y, layer.qkv), layer.biases, cos, sin, keys, values, base, at, self.heads)
            if sight.ways_QP is None:
                read = ops.attention(q, keys, values, base, sight.seen_QT, scale, kind)
            else:
                read = ops.path_attention(q, keys, values, base, sight.above_Q, sight.ways_QP, scale, kind)
            x, y = self._add_norm(x, ops.linear(read, layer.o), after, kind)
            parts = ops.linear(ops.gated(y, layer.gate, layer.up, x.dtype, kind), layer.down)
        if number + 1 < len(self.stages):
            return x if parts is None else x + ops.whole(parts, torch.empty_like(x))
        return self._add_norm(x, parts, self.norm, self.head.kind)[1]

    def _add_norm(self, x: Tensor, parts_SQN: Tensor | None, norm: nn.Module, kind: str) -> tuple[Tensor, Any]:
        """The residual stream with a linear layer's parts over all ranks added, and its norm."""
        given = (norm.weight, norm.variance_epsilon, kind)
        if parts_SQN is None or self.ranks.size == 1:
            return self.ops.add_norm(x, parts_SQN, *given)
        return self.ops.all_reduce_add_norm(self.ranks, x, parts_SQN, *given)

    def weights(self) -> Iterator[Weight]:
        for layer in self.layers:
            yield from (*layer.qkv, *layer.o, layer.gate, layer.up, *layer.down)
        yield self.head

    def logits(self, hidden_QD: Tensor) -> Tensor:
        """(Q, V), of rows as a pass returned them."""
        with current(self.stages[-1].device):
            mine_QV = self.ops.linear(hidden_QD, (self.head,), whole=self.dtype)[0]
        return mine_QV if self.head.outputs == self.vocabulary else self.ranks.gather(mine_QV)


class _Layer:
    """Where a layer's parameters are. Nothing is copied."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.after = layer.input_layernorm, layer.post_attention_layernorm
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = tuple(map(Weight.of, projections))
        self.biases = tuple(local_shard(p.bias) for p in projections if p.bias is not None)
        self.o = (Weight.of(attention.o_proj),)
        self.gate, self.up = Weight.of(mlp.gate_proj), Weight.of(mlp.up_proj)
        self.down = (Weight.of(mlp.down_proj),)
        self.kind = self.gate.kind
