"""Spread one model over several devices: split its layers into pipeline stages, or share each text layer among ranks.

A stage is a run of consecutive layers on one device. The embedding and the vision tower are on the first stage's
device, the final norm and the head on the last one's. Only what belongs to a pass (hidden states, mask, rotary angles)
moves between stages, through `cross` or into the inputs of a captured stage.

Shape suffixes: B sequences of a batch, Q rows of a pass, L levels of DeepStack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from specvlm.errors import UserError
from specvlm.models.fused import HUGGING_FACE, Forms
from specvlm.models.layer_kinds import language_model, name_of_text
from specvlm.models.pauses import Pause, Pauses, finished
from specvlm.models.vision_probe import HiddenStateProbe


@dataclass(frozen=True)
class Stage:
    """Pipeline stage: layers start..end-1 of a language model, counted from 0, and their device."""

    device: torch.device
    start: int
    end: int

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.end - self.start


def stages_of(text: Any) -> tuple[Stage, ...]:
    """Find the stages of a language model from the devices of its layers."""
    devices = [layer.input_layernorm.weight.device for layer in text.layers]
    found, start = [], 0
    for device, same in groupby(devices):
        end = start + len(list(same))
        found.append(Stage(device, start, end))
        start = end
    return tuple(found)


def cross(device: torch.device, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Move tensors to a stage's device without waiting on the host; the streams of two GPUs wait for each other."""
    return tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)


def through(*rows: Any, **more: Any) -> Tensor:
    """Run a language model's layers as `layer_by_layer` does, without a pause. Returns the hidden states."""
    return finished(layer_by_layer(*rows, **more))


def layer_by_layer(
    stages: Sequence[Stage],
    text: Any,
    hidden: Tensor,
    position_ids: Tensor,
    cache: Any,
    mask: Tensor | None,
    extra: dict[str, Any],
    states: HiddenStateProbe | None = None,
    added_QLD: Tensor | None = None,
    forms: Forms = HUGGING_FACE,
) -> Pauses[Tensor]:
    """Run a language model's layers and final norm as its own forward does, moving rows between devices.

    Returns the hidden states after the norm. Pauses after each layer: another request's rows may then go through the
    same layers.

    The model's own forward builds its mask itself, and not every family accepts the mask of a tree. accelerate's hooks
    could move the rows too, but slowly: they inspect every argument of every layer in every pass.

    Args:
        stages: The stages, in order.
        text: The language model.
        hidden: (B, Q, D) rows that enter the first layer.
        position_ids: Rotary positions.
        cache: Keys and values, to which the rows are written. Has the `update` of a Hugging Face cache.
        mask: Attention mask, or None.
        extra: Other arguments of each layer.
        states: Receives the embeddings and every layer's output, for B = 1.
        added_QLD: Rows that are added to the outputs of the first L layers (DeepStack), for B = 1.
        forms: The forms in which layers run.
    """
    angles = text.rotary_emb(hidden, position_ids)
    if states is not None:
        states.enter(hidden[0])
    for stage in stages:
        hidden, mask, *angles = cross(stage.device, hidden, mask, *angles)
        # `islice`, since a slice of a ModuleList builds a module, which takes longer than a small layer's own overhead.
        for number, layer in enumerate(islice(text.layers, stage.start, stage.end), start=stage.start + 1):
            with forms.of(layer):
                hidden = layer(
                    hidden,
                    attention_mask=mask,
                    position_embeddings=tuple(angles),
                    position_ids=None,
                    past_key_values=cache,
                    use_cache=True,
                    **extra,
                )
            if states is not None:  # before anything is added, as in Hugging Face's hidden states
                states.observe(number, hidden[0])
            if added_QLD is not None and number <= added_QLD.shape[1]:
                hidden = hidden + added_QLD[:, number - 1].to(hidden.device)
            yield Pause(stage.device, layer=number, rows=hidden.shape[1])
    with forms.of(text.norm):
        return text.norm(hidden)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one in a block, since our own kernels launch on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def split(layers: int, room: Sequence[float]) -> list[int]:
    """Split layers over devices in proportion to the devices' free memory, with at least one layer on each.

    Args:
        layers: Number of layers.
        room: Memory for layers on each device, in any unit.

    Returns:
        Number of layers per device.

    Raises:
        UserError: There are more devices than layers.
    """
    if layers < len(room):
        raise UserError(f"{layers} layers cannot be split over {len(room)} devices: use at most {layers} of them")
    total, ends = sum(room), [0]
    for number in range(1, len(room) + 1):
        end = round(layers * sum(room[:number]) / total)
        ends.append(min(max(end, ends[-1] + 1), layers - (len(room) - number)))
    return [end - start for start, end in pairwise(ends)]


def device_map(hf: Any, counts: Sequence[int], devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Make Hugging Face's `device_map`, from names of modules and parameters to devices. No entry contains another.

    Args:
        hf: The model, which may be on meta.
        counts: Number of layers on each device.
        devices: The devices, in the order of the layers.
    """
    own, first, last = name_of_text(hf), devices[0], devices[-1]
    placed = {f"model.{name}": first for name, _ in hf.model.named_children() if name != own}
    placed |= {f"model.{name}": first for name, _ in hf.model.named_parameters(recurse=False)}
    inside = [name for name, _ in language_model(hf).named_children() if name not in ("layers", "norm")]
    placed |= {f"model.{own}.{name}": first for name in inside}
    lie = [device for count, device in zip(counts, devices, strict=True) for _ in range(count)]
    placed |= {f"model.{own}.layers.{number}": device for number, device in enumerate(lie)}
    return placed | {f"model.{own}.norm": last, "lm_head": last}


# Tensor-parallel style of each linear layer that ranks share.
SHARED = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), "colwise"),
    **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "rowwise"),
}


def tensor_plan(config: Any, ranks: int, own: str = "language_model") -> dict[str, str]:
    """Make Hugging Face's `tp_plan`, from names of layers to how ranks share them. own: see `name_of_text`.

    Every rank holds the whole embedding and vision tower, and the whole head if it is tied to the embedding or its rows
    cannot be divided evenly. The plan "auto" is not used, since releases differ in what it shards of these.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    text = config.get_text_config()
    plan = {f"model.{own}.layers.*.{name}": style for name, style in SHARED.items()}
    whole = [f"model.{own}.embed_tokens"]
    if config.tie_word_embeddings or text.tie_word_embeddings or text.vocab_size % ranks:
        whole.append("lm_head")
    else:
        plan["lm_head"] = "colwise_gather_output"
    # transformers 5.23 merges the plan into the class's own, which shards both; 5.17 replaces it, and lacks this style.
    return plan | (dict.fromkeys(whole, "replicate") if "replicate" in ALL_PARALLEL_STYLES else {})


def check_linear(hf: Any) -> None:
    """Raise UserError if the layers have linear parts that `tensor_plan` does not name, such as fused projections."""
    for name, module in language_model(hf).layers.named_modules():
        part = name.partition(".")[2]
        if isinstance(module, nn.Linear) and part not in SHARED:
            raise UserError(f"parallel=tensor: ranks cannot share {part} of its layers; use parallel=layers, or leave it out")


def check_shares(config: Any, ranks: int, asked: str, instead: str) -> None:
    """Raise UserError if ranks cannot divide heads or MLP columns evenly, or the model is a mixture of experts.

    Args:
        config: The model's configuration.
        ranks: Number of ranks.
        asked: The setting that asks for the ranks, which begins the message.
        instead: Advice, which ends the message.
    """
    text = config.get_text_config()
    if getattr(text, "num_experts", 0):
        raise UserError(f"{asked}: a mixture of experts cannot be shared by ranks; {instead}")
    counts = {"KV heads": text.num_key_value_heads, "query heads": text.num_attention_heads}
    counts["MLP columns"] = text.intermediate_size
    fits = [n for n in range(2, ranks + 1) if not any(count % n for count in counts.values())]
    if ranks not in fits:
        what = next(what for what, count in counts.items() if count % ranks)
        hint = f"use --nproc-per-node {fits[-1]}, or {instead}" if fits else instead
        raise UserError(f"{asked}: {counts[what]} {what} cannot be shared by {ranks} ranks; {hint}")
