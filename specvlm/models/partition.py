"""How one model is spread over several devices: its layers split into stages, or every layer shared by ranks.

Split: neighbouring layers on one device, a stage each; the embedding and the vision tower are with the first stage, the last
norm and the head with the last. Only the rows of a pass go from stage to stage, through `cross` or into the inputs of a
captured stage.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.kv_cache import KVCache
from specvlm.models.vision_probe import HiddenStateProbe


@dataclass(frozen=True)
class Stage:
    """Layers start..end-1 of a language model, and where they are."""

    device: torch.device
    start: int
    end: int

    @property
    def layers(self) -> int:
        return self.end - self.start


def stages_of(text: Any) -> tuple[Stage, ...]:
    """As the weights of a language model lie."""
    devices = [layer.input_layernorm.weight.device for layer in text.layers]
    found, start = [], 0
    for device, same in groupby(devices):
        end = start + len(list(same))
        found.append(Stage(device, start, end))
        start = end
    return tuple(found)


def cross(device: torch.device, *tensors: Tensor | None) -> tuple[Any, ...]:
    """To the next stage's device. The streams of both wait for one another, the host for neither."""
    return tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)


def through(
    stages: Sequence[Stage],
    text: Any,
    embeds_QD: Tensor,
    position_ids: Tensor,
    cache: KVCache,
    mask: Tensor | None,
    extra: dict[str, Any],
    states: HiddenStateProbe | None = None,
) -> Tensor:
    """(Q, D) hidden states: what a language model's own forward does with its layers, with a crossing between two devices'.

    states: told what every layer puts out. accelerate's hooks would do as well, at the price of Python's looking at every
    argument of every layer in every pass.
    """
    hidden = embeds_QD[None]
    angles = text.rotary_emb(hidden, position_ids)
    if states is not None:
        states.enter(embeds_QD)
    for stage in stages:
        hidden, mask, *angles = cross(stage.device, hidden, mask, *angles)
        for number, layer in enumerate(text.layers[stage.start : stage.end], start=stage.start + 1):
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=tuple(angles),
                position_ids=None,
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
            if states is not None:
                states.observe(number, hidden[0])
    return text.norm(hidden)[0]


def current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels of our own are launched on the current device, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def split(layers: int, room: Sequence[float]) -> list[int]:
    """Layers of each device, by the room that each has for them: every device gets its share, each at least one layer.

    Raises UserError where there are more devices than layers.
    """
    if layers < len(room):
        raise UserError(f"{layers} layers cannot be split over {len(room)} devices: use at most {layers} of them")
    total, ends = sum(room), [0]
    for number in range(1, len(room) + 1):
        end = round(layers * sum(room[:number]) / total)
        ends.append(min(max(end, ends[-1] + 1), layers - (len(room) - number)))
    return [end - start for start, end in pairwise(ends)]


def device_map(hf: Any, counts: Sequence[int], devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Hugging Face's `device_map` for so many layers on each device. No name stands above another. hf: may lie on meta."""
    text, first, last = hf.model.language_model, devices[0], devices[-1]
    placed = {f"model.{name}": first for name, _ in hf.model.named_children() if name != "language_model"}
    placed |= {f"model.{name}": first for name, _ in hf.model.named_parameters(recurse=False)}
    placed |= {f"model.language_model.{name}": first for name, _ in text.named_children() if name not in ("layers", "norm")}
    lie = [device for count, device in zip(counts, devices, strict=True) for _ in range(count)]
    placed |= {f"model.language_model.layers.{number}": device for number, device in enumerate(lie)}
    return placed | {"model.language_model.norm": last, "lm_head": last}


SHARED = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), "colwise"),
    **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "rowwise"),
}


def tensor_plan(config: Any, ranks: int) -> dict[str, str]:
    """Hugging Face's `tp_plan`, written out, since releases differ in whether "auto" shares embedding and head.

    Whole on every rank: embedding, vision tower, and a head that is the embedding or whose rows the ranks do not divide.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    text = config.get_text_config()
    plan = {f"model.language_model.layers.*.{name}": style for name, style in SHARED.items()}
    whole = ["model.language_model.embed_tokens"]
    if config.tie_word_embeddings or text.tie_word_embeddings or text.vocab_size % ranks:
        whole.append("lm_head")
    else:
        plan["lm_head"] = "colwise_gather_output"
    # In 5.23 a plan is laid over the class's own, which shares both; in 5.17 it stands for it, and knows no such style.
    return plan | (dict.fromkeys(whole, "replicate") if "replicate" in ALL_PARALLEL_STYLES else {})


def check_shares(config: Any, ranks: int, asked: str, instead: str) -> None:
    """Raises UserError for a model whose heads or MLP the ranks do not divide. asked: the words for it; instead: others."""
    text = config.get_text_config()
    counts = {"KV heads": text.num_key_value_heads, "query heads": text.num_attention_heads}
    counts["MLP columns"] = text.intermediate_size
    fits = [n for n in range(2, ranks + 1) if not any(count % n for count in counts.values())]
    if ranks not in fits:
        what = next(what for what, count in counts.items() if count % ranks)
        hint = f"use --nproc-per-node {fits[-1]}, or {instead}" if fits else instead
        raise UserError(f"{asked}: {counts[what]} {what} cannot be shared by {ranks} ranks; {hint}")
