"""Linear layers whose weights are stored in 8 or 4 bits, and how a model's text part gets them.

Round to nearest, weights only, no calibration: activations, embeddings, norms and the vision tower keep their dtype. The
storage is our own, because the graphs engine's kernels read it as it lies, inside a captured graph, and it costs no dependency.
Read about, not measured: torchao, whose weight tensors get their speed from torch.compile, and bitsandbytes, whose 8-bit layer
could not be captured in a CUDA graph (vLLM pull request 15611); transformers' quantization_config leads to the likes of them.

Shape suffixes: N output features, K input features, J = K/2 bytes, G groups of K, B rows of one block.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_of

from specvlm.errors import UserError
from specvlm.models.partition import tensor_plan
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard

KINDS = ("fp8", "int8", "int4")
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}  # what the largest weight of a scale's reach is stored as
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
GROUP = 128  # most weights of a row that share an int4 scale
BLOCK = 1024  # rows quantised at once: bounds the float32 copies, 121 MB each at the widest layer of a 72B model


class QuantizedLinear(nn.Module):
    """A linear layer with weights in 8 or 4 bits: w = q * scale, each rounded to the nearest.

    fp8: qweight (N, K) float8_e4m3fn, scale (N,) = absmax/448 of the row. Error of w: at most 2^-4 of |w| or, near zero,
    scale * 2^-10.
    int8: qweight (N, K) int8 in -127..127, scale (N,) = absmax/127 of the row. Error: at most scale/2, 1/254 of absmax.
    int4: qweight (N, K/2) uint8; byte j holds k = j in its low nibble and k = j + K/2 in its high one, each q + 8 with q in
    -7..7; scale (N, G) = absmax/7 of `group` neighbours along K, 128 of them or the largest power of two below that divides
    K/2. Error: at most scale/2, 1/14 of the group's absmax.

    Scales are float32 whatever the activations are; bias, where there is one, is the layer's own. The error that rounding the
    result to a dtype adds (2^-9 of |w| in bfloat16) comes on top. Raises UserError for a kind not in KINDS, and for int4 with
    an odd K.
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
        """Weights of a row that share a scale: all of them, except in int4."""
        half = self.in_features // 2
        return min(GROUP, half & -half) if self.kind == "int4" else self.in_features

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(N, K) dequantised: the product is taken in float32 or wider and rounded to `dtype` once."""
        q_NK = unpack(self.qweight) if self.kind == "int4" else self.qweight
        w_NK = q_NK.to(dtype)  # exact in every dtype there is
        w_NK.view(self.out_features, -1, self.group).mul_(self.scale.view(self.out_features, -1, 1))
        return w_NK

    def forward(self, x: Tensor) -> Tensor:
        """Dequantises the whole weight first: right for the many rows of a prefill, slow for the few of a decoding step."""
        return linear_of(x, self.weight_in(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kind={self.kind}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to`, `.cuda` and the like: moves everything, but casts the bias alone.

        A float8 weight and its float32 scale are floating point to torch, so `.to(dtype)` would cast them; it leaves integers
        as they are, so integers of the same width is what it gets to see.
        """
        local_shard = {id(buffer) for buffer in (self.qweight, self.scale)}
        bits = {1: torch.uint8, 4: torch.int32}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in local_shard:
                return fn(tensor)
            return fn(tensor.view(bits[tensor.itemsize])).view(tensor.dtype)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


def pack(q_NK: Tensor) -> Tensor:
    """(N, J) bytes of integers in -8..7: the first half of a row in the low nibbles, the second in the high ones."""
    low_NJ, high_NJ = (q_NK + 8).to(torch.uint8).chunk(2, dim=1)
    return low_NJ | high_NJ << 4


def unpack(bytes_NJ: Tensor) -> Tensor:
    """(N, K) int8 in -8..7."""
    return torch.cat([bytes_NJ & 15, bytes_NJ >> 4], dim=1).view(torch.int8).sub_(8)


def quantize(linear: nn.Linear, kind: str, device: torch.device | str | None = None) -> QuantizedLinear:
    """The same layer with weights in `kind`; `linear` itself is left as it is, and shares its bias.

    device: where it shall lie (default: where `linear` does). Rows are taken there block by block, so that it never holds the
    weight in full.
    """
    where = linear.weight.device if device is None else torch.device(device)
    bias = linear.bias if linear.bias is None else nn.Parameter(linear.bias.to(where), linear.bias.requires_grad)
    layer = QuantizedLinear(linear.in_features, linear.out_features, kind, bias, where)
    for start in range(0, 0 if where.type == "meta" else linear.out_features, BLOCK):
        rows = slice(start, start + BLOCK)
        weight_BGK = linear.weight.detach()[rows].to(where).float().unflatten(1, (-1, layer.group))
        # A row of zeros gets the smallest normal number: dividing by it is harmless.
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
    """This rank's share of a layer that ranks hold together (see partition.py), quantised by itself, with the collective
    that its kind of share needs. A row cut through has a scale on each rank: not quite the model that one device would have.
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
    """Replace every nn.Linear of a Hugging Face model's text layers, and its head, by its quantised self, in place.

    Layer by layer, and an old weight is let go before the next is touched: beside the quantised weights there is never more
    than one block in full on `device` (see `quantize`). A head tied to the embedding is untied: the embedding keeps its weight
    and its dtype.
    """
    for parent, name in _text_linears(hf):
        linear = getattr(parent, name)
        setattr(parent, name, quantize(linear, kind, device) if ranks.size == 1 else quantize_share(linear, kind, name, ranks))
    hf.config.tie_word_embeddings = False


def left_full(hf: Any, kind: str) -> str:
    """A sentence on weights that `quantize_text` left in full, such as experts held as one tensor; empty if none."""
    layers = hf.model.language_model.layers
    left = {name: weight for name, weight in layers.named_parameters() if weight.dim() > 1}
    if not left:
        return ""
    size, beside = (sum(local_shard(x).nbytes for x in found) / 2**20 for found in (left.values(), layers.buffers()))
    name = max(left, key=lambda name: left[name].numel())
    return f"weights={kind} leaves {size:.1f} MiB in full beside {beside:.1f} MiB quantised: {name} is no linear layer"


class Stored(NamedTuple):
    """A parameter as a loaded model holds it. key: the same for two names of one tensor; nbytes: on one rank."""

    name: str
    key: object
    nbytes: int


def stored(hf: Any, dtype: torch.dtype, kind: str | None = None, ranks: int = 1) -> Iterator[Stored]:
    """The parameters of `hf`, which may lie on meta, in `dtype`, its text part quantised to `kind` and shared by ranks."""
    styles = tensor_plan(hf.config, ranks) if ranks > 1 else {}
    quantised = {id(getattr(parent, name)) for parent, name in _text_linears(hf)} if kind else set()
    for path, module in hf.named_modules():
        style = styles.get(re.sub(r"\.\d+(?=\.)", ".*", path), "")
        by_row, by_column = (ranks if style.startswith(cut) else 1 for cut in ("colwise", "rowwise"))  # of the weight (N, K)
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if id(module) in quantised and leaf == "weight":
                layer = QuantizedLinear(
                    module.in_features // by_column, module.out_features // by_row, str(kind), device="meta"
                )
                yield Stored(name, name, sum(buffer.nbytes for buffer in layer.buffers()))
            else:
                share = by_row * (by_column if leaf == "weight" else 1)
                yield Stored(name, id(weight), weight.numel() // share * dtype.itemsize)


def _text_linears(hf: Any) -> list[tuple[nn.Module, str]]:
    """What `quantize_text` replaces: owner and name, since whoever held the layers would keep their weights alive."""
    owners = [module for module in hf.model.language_model.layers.modules() if not isinstance(module, nn.Linear)]
    return [*((o, name) for o in owners for name, child in o.named_children() if isinstance(child, nn.Linear)), (hf, "lm_head")]
