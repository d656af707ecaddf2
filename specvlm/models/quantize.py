"""Weight-only quantisation of a model's text part to 8 or 4 bits.

Rounds to nearest, without calibration. Activations, embeddings, norms and the vision tower keep their dtype.

The storage format is our own: the kernels of the graphs engine read it in place inside a captured graph, and it adds no
dependency. We have read about the alternatives but not measured them: torchao's weight tensors rely on torch.compile
for speed; bitsandbytes' 8-bit layer could not be captured in a CUDA graph (vLLM pull request 15611). transformers'
quantization_config leads to libraries of this kind.

Shape suffixes: N output features, K input features (or those of one group), J = K/2 bytes, G groups of input features
that share a scale, B rows of one block.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_of

from specvlm.errors import UserError
from specvlm.models.layer_kinds import language_model, name_of_text
from specvlm.models.partition import tensor_plan
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard

KINDS = ("fp8", "int8", "int4")
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}  # stored for the largest weight among those that share a scale
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
GROUP = 128  # maximum number of weights of a row that share an int4 scale
# Hugging Face's classes with weights gate_up_proj (E, 2 F, K) and down_proj (E, K, F), for E experts of width F.
EXPERTS = ("Qwen3VLMoeTextExperts",)
BLOCK = 1024  # rows quantised at once: bounds the float32 copies, 121 MB each at the widest layer of a 72B model


class QuantizedLinear(nn.Module):
    """Linear layer with 8- or 4-bit weights: w = q * scale, rounded to nearest.

    - fp8: qweight (N, K) float8_e4m3fn, scale (N,) = absmax/448 of the row. Error of w: at most 2^-4 of |w|, or
      scale * 2^-10 near zero.
    - int8: qweight (N, K) int8 in -127..127, scale (N,) = absmax/127 of the row. Error: at most scale/2, which is 1/254
      of absmax.
    - int4: qweight (N, K/2) uint8. Byte j holds k = j in its low nibble and k = j + K/2 in its high nibble, each as
      q + 8 with q in -7..7. scale (N, G) = absmax/7 of a group of `group` weights along K: 128, or the largest smaller
      power of two that divides K/2. Error: at most scale/2, which is 1/14 of the group's absmax.

    Scales are always float32. A bias is not quantised. Rounding the dequantised weight to a dtype adds its own error
    (2^-9 of |w| in bfloat16).

    Args:
        in_features: K.
        out_features: N.
        kind: One of KINDS.
        bias: Bias of the layer, which is kept as it is.
        device: Device of the weights, which are empty until `quantize` fills them.

    Raises:
        UserError: The kind is not in KINDS, or K is odd for int4.
    """

    qweight: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"weights={kind} is none of {', '.join(KINDS)}")
        if kind == "int4" and in_features % 2:
            raise UserError(f"weights=int4 packs inputs in pairs, and there is a layer of {in_features}: use int8 or fp8")
        self.kind, self.in_features, self.out_features = kind, in_features, out_features
        columns = in_features // 2 if kind == "int4" else in_features
        self.register_buffer("qweight", torch.empty(out_features, columns, dtype=STORED[kind], device=device))
        groups = (in_features // self.group,) if kind == "int4" else ()
        self.register_buffer("scale", torch.empty(out_features, *groups, dtype=torch.float32, device=device))
        self.bias = bias

    @property
    def group(self) -> int:
        """Number of weights of a row that share a scale: the whole row, except for int4."""
        half = self.in_features // 2
        return min(GROUP, half & -half) if self.kind == "int4" else self.in_features

    def weight_in(self, dtype: torch.dtype, outputs: slice = slice(None)) -> Tensor:
        """Return the dequantised weight (N, K), or its rows for some outputs.

        q * scale is computed in float32 or wider and rounded to `dtype` once.
        """
        stored, scale = self.qweight[outputs], self.scale[outputs]
        q_NK = unpack(stored) if self.kind == "int4" else stored
        w_NK = q_NK.to(dtype)  # exact in every supported dtype
        w_NK.view(len(w_NK), -1, self.group).mul_(scale.view(len(w_NK), -1, 1))
        return w_NK

    def forward(self, x: Tensor) -> Tensor:
        """Dequantise the whole weight, then multiply: fine for the many rows of a prefill, slow for a decoding step."""
        return linear_of(x, self.weight_in(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kind={self.kind}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the layer for `.to`, `.cuda` and the like; only the bias is cast to another dtype.

        `.to(dtype)` would cast the float8 weights and float32 scales too. So `fn` gets these as integers of the same
        width, which it does not cast.
        """
        quantised = {id(buffer) for buffer in (self.qweight, self.scale)}
        bits = {1: torch.uint8, 4: torch.int32}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in quantised:
                return fn(tensor)
            return fn(tensor.view(bits[tensor.itemsize])).view(tensor.dtype)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


class QuantizedExperts(nn.Module):
    """Experts of a mixture with 8- or 4-bit weights. Replaces a Hugging Face module whose class is in EXPERTS.

    The weights of all E experts are stored one after another, as one layer: gate_up (E * 2 F, K), down (E * K, F).
    """

    def __init__(self, experts: Any, kind: str, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.count, self.act_fn = experts.gate_up_proj.shape[0], experts.act_fn
        self.gate_up = quantize(_flat(experts, "gate_up_proj"), kind, device)
        experts.gate_up_proj = None  # free it
        self.down = quantize(_flat(experts, "down_proj"), kind, device)

    def forward(self, hidden_QK: Tensor, ids_QX: Tensor, weights_QX: Tensor) -> Tensor:
        """Add up the outputs of each row's X experts. Dequantises one expert at a time."""
        found_QK = torch.zeros_like(hidden_QK)
        for expert in ids_QX.unique().tolist():
            rows, slots = torch.where(ids_QX == expert)
            gate, up = linear_of(hidden_QK[rows], self._weight(self.gate_up, expert, hidden_QK.dtype)).chunk(2, -1)
            part = linear_of(self.act_fn(gate) * up, self._weight(self.down, expert, hidden_QK.dtype))
            found_QK.index_add_(0, rows, (part * weights_QX[rows, slots, None]).to(found_QK.dtype))
        return found_QK

    def _weight(self, stack: QuantizedLinear, expert: int, dtype: torch.dtype) -> Tensor:
        each = stack.out_features // self.count
        return stack.weight_in(dtype, slice(expert * each, (expert + 1) * each))


def _flat(experts: Any, name: str) -> nn.Linear:
    """View the weights of all experts as one linear layer, without a copy."""
    weight = getattr(experts, name).detach().flatten(0, 1)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def pack(q_NK: Tensor) -> Tensor:
    """Pack integers in -8..7 into (N, J) bytes: the first half of a row in the low nibbles, the second in the high."""
    low_NJ, high_NJ = (q_NK + 8).to(torch.uint8).chunk(2, dim=1)
    return low_NJ | high_NJ << 4


def unpack(bytes_NJ: Tensor) -> Tensor:
    """Unpack bytes to (N, K) int8 in -8..7."""
    return torch.cat([bytes_NJ & 15, bytes_NJ >> 4], dim=1).view(torch.int8).sub_(8)


def quantize(linear: nn.Linear, kind: str, device: torch.device | str | None = None) -> QuantizedLinear:
    """Quantise a linear layer. `linear` is not changed. Its bias is shared, or copied to another device.

    Args:
        linear: Layer to quantise; on meta, the result is on meta too.
        kind: One of KINDS.
        device: Device of the result; by default that of `linear`. From another device, rows are moved block by block,
            so that `device` never holds the whole unquantised weight.

    Raises:
        UserError: The kind is not in KINDS, or the number of inputs is odd for int4.
    """
    where = linear.weight.device if device is None else torch.device(device)
    bias = linear.bias if linear.bias is None else nn.Parameter(linear.bias.to(where), linear.bias.requires_grad)
    layer = QuantizedLinear(linear.in_features, linear.out_features, kind, bias, where)
    for start in range(0, 0 if where.type == "meta" else linear.out_features, BLOCK):
        rows = slice(start, start + BLOCK)
        weight_BGK = linear.weight.detach()[rows].to(where).float().unflatten(1, (-1, layer.group))
        # A row of zeros gets the smallest normal number as its scale, to avoid dividing by 0.
        scale_BG = (weight_BGK.abs().amax(-1) / LARGEST[kind]).clamp_min(torch.finfo(torch.float32).tiny)
        q_BK = (weight_BGK / scale_BG[..., None]).flatten(1)
        layer.scale[rows] = scale_BG.view(layer.scale[rows].shape)
        if kind == "fp8":
            layer.qweight[rows] = q_BK.to(torch.float8_e4m3fn)
        else:
            q_BK = q_BK.round().to(torch.int8)
            layer.qweight[rows] = pack(q_BK) if kind == "int4" else q_BK
    return layer


def quantize_share(linear: nn.Linear, kind: str, name: str, ranks: ProcessGroup) -> QuantizedLinear:
    """Quantise this rank's share of a tensor-parallel layer and add the collective that the layer needs.

    If each row of the weight is cut into parts for the ranks, every rank computes scales for its own parts. The weights
    then differ slightly from those quantised on one device.

    Args:
        linear: Layer whose weight is a DTensor, or replicated.
        kind: One of KINDS.
        name: Name of the layer in its parent; "lm_head" gathers its logits from all ranks.
        ranks: Processes that share the layer.
    """
    weight, bias = local_shard(linear.weight.detach()), linear.bias
    share = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    share.weight = nn.Parameter(weight, requires_grad=False)
    share.bias = None if bias is None else nn.Parameter(local_shard(bias.detach()), requires_grad=False)
    layer = quantize(share, kind)
    if weight.shape[1] < linear.in_features:
        layer.register_forward_hook(lambda _module, _args, out: ranks.sum(out))
    elif name == "lm_head" and weight.shape[0] < linear.out_features:
        layer.register_forward_hook(lambda _module, _args, out: ranks.gather(out))
    return layer


def quantize_text(hf: Any, kind: str, device: torch.device | str | None = None, ranks: ProcessGroup = SINGLE) -> None:
    """Quantise every nn.Linear and all experts of a Hugging Face model's text layers, and its head, in place.

    Each weight is freed before the next layer is quantised. If the model is on another device than `device`, the latter
    holds at most one block of unquantised rows. A head tied to the embedding is untied: the embedding keeps its weight
    and dtype.
    """
    for parent, name in _quantisable(hf):
        layer = getattr(parent, name)
        if not isinstance(layer, nn.Linear):
            made: nn.Module = QuantizedExperts(layer, kind, device)
        else:
            made = quantize(layer, kind, device) if ranks.size == 1 else quantize_share(layer, kind, name, ranks)
        setattr(parent, name, made)
    hf.config.tie_word_embeddings = False


def left_full(hf: Any, kind: str) -> str:
    """Describe the weights of text layers that `quantize_text` left unquantised, such as experts of an unknown class.

    Empty if there are none. Routers, which are small, always keep their weights.
    """
    layers = language_model(hf).layers
    routers = {id(m.gate.weight) for m in layers.modules() if isinstance(getattr(m, "experts", None), QuantizedExperts)}
    left = {name: weight for name, weight in layers.named_parameters() if weight.dim() > 1 and id(weight) not in routers}
    if not left:
        return ""
    size, beside = (sum(local_shard(x).nbytes for x in found) / 2**20 for found in (left.values(), layers.buffers()))
    name = max(left, key=lambda name: left[name].numel())
    return f"weights={kind} leaves {size:.1f} MiB unquantised, beside {beside:.1f} MiB quantised: {name} is not a linear layer"


class Stored(NamedTuple):
    """A parameter as a loaded model stores it. key: equal for tied parameters. nbytes: size in bytes on one rank."""

    name: str
    key: object
    nbytes: int


def stored(hf: Any, dtype: torch.dtype, kind: str | None = None, ranks: int = 1) -> Iterator[Stored]:
    """Yield parameters as `load` would store them.

    Args:
        hf: The model, which may be on meta.
        dtype: Dtype of parameters that are not quantised.
        kind: Kind of quantisation of text layers and head; None for none.
        ranks: Number of ranks that share the model.
    """
    styles = tensor_plan(hf.config, ranks, name_of_text(hf)) if ranks > 1 else {}
    quantised = {id(getattr(parent, name)) for parent, name in _quantisable(hf)} if kind else set()
    for path, module in hf.named_modules():
        style = styles.get(re.sub(r"\.\d+(?=\.)", ".*", path), "")
        by_row, by_column = (ranks if style.startswith(cut) else 1 for cut in ("colwise", "rowwise"))  # of the weight (N, K)
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if id(module) in quantised and leaf != "bias":
                inputs = weight.shape[-1]
                outputs = weight.numel() // inputs  # of all experts
                layer = QuantizedLinear(inputs // by_column, outputs // by_row, str(kind), device="meta")
                yield Stored(name, name, sum(buffer.nbytes for buffer in layer.buffers()))
            else:
                share = by_row * (by_column if leaf == "weight" else 1)
                yield Stored(name, id(weight), weight.numel() // share * dtype.itemsize)


def _quantisable(hf: Any) -> list[tuple[nn.Module, str]]:
    """List the layers that `quantize_text` replaces, as (owner, name): references to them would keep the weights."""

    def whole(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or type(module).__name__ in EXPERTS

    owners = [module for module in language_model(hf).layers.modules() if not whole(module)]
    return [*((o, name) for o in owners for name, child in o.named_children() if whole(child)), (hf, "lm_head")]
