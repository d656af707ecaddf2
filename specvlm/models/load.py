"""How a checkpoint folder becomes a VideoLM, and when two of them make a pair."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specvlm.errors import UserError, did_you_mean, explained
from specvlm.models import attention, checkpoint
from specvlm.models.chat import tokenizer_of
from specvlm.models.generation import generation_of
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.partition import device_map, tensor_plan
from specvlm.models.quantize import KINDS, left_full, quantize_text
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard

FAMILIES: dict[str, type[VideoLM]] = {cls.family: cls for cls in (Qwen2_5_VL, LlavaOneVision)}


def family_of(folder: Path, config: Any) -> type[VideoLM]:
    """Raises UserError when the configuration is of none that there is."""
    if config.model_type not in FAMILIES:
        raise UserError(f"{folder}: model type {config.model_type!r} is not supported; there is {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type]


class Checkpoint(NamedTuple):
    """A folder that everything but its weights was read of. method: by which its files are quantised, None for not at all."""

    folder: Path
    config: Any
    family: type[VideoLM]
    method: str | None
    tokenizer: Any
    generation: Any


def opened(path: str | Path, weights: bool) -> Checkpoint:
    """Read all of a folder but its weights, which are fetched if they are wanted, or tell the dtype. Where they lie is checked
    even so, unless the folder is one without any, as a report needs it. Raises UserError.
    """
    folder = checkpoint.folder_of(path, weights)
    config = checkpoint.config_of(folder)
    family = family_of(folder, config)
    method = checkpoint.method_of(config) if checkpoint.quantizer_of(folder, config) else None
    if config.dtype is None and not Path(path).exists():
        folder = checkpoint.folder_of(path, weights=True)
    if weights or config.dtype is None or (Path(path).exists() and any(folder.glob("*.safetensors*"))):
        checkpoint.weight_files(folder, config)
        config.dtype = checkpoint.dtype_in(folder, config, "auto")
    return Checkpoint(folder, config, family, method, tokenizer_of(folder), generation_of(folder))


def skeleton(path: str | Path, mrope: str = "hf") -> VideoLM:
    """The model without weights: makes prompts, checks a pair, plans memory. Raises UserError for a bad folder."""
    found = opened(path, weights=False)
    with explained(f"{found.folder}: no model can be made of its config.json"):
        hf = _bare(found.config).eval()
        hf.generation_config = found.generation or hf.generation_config
        model = found.family(hf, found.tokenizer, found.folder, mrope)
        model.check_settings()
    if not found.method and any(found.folder.glob("*.safetensors")):
        check_size(model, checkpoint.weight_files(found.folder, found.config))
    return model


def _bare(config: Any) -> Any:
    """The Hugging Face model on meta."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def check_size(model: VideoLM, files: Sequence[Path]) -> None:
    """Raise UserError, before room is made, for a model far larger than its files. Few missing tensors come later."""
    held = sum(count for file in files for _, count in checkpoint.tensors_in(file).values())
    wanted = sum(weight.numel() for weight in model.hf.parameters())
    if wanted > 2 * held:
        raise UserError(
            f"{model.folder}: config.json describes a model of {wanted:,} weights, and the files hold {held:,}: "
            "are both of one checkpoint, and is it whole?"
        )


def dtype_of(model: VideoLM, dtype: str) -> torch.dtype:
    """What `load` will hold the weights in: the checkpoint's own dtype under "auto"."""
    return checkpoint.dtype_in(model.folder, model.hf.config, dtype)


def name_of(dtype: torch.dtype) -> str:
    """As the configuration has it: `float32`."""
    return str(dtype).removeprefix("torch.")


def kind_of(weights: str | None, dtype: torch.dtype, key: str = "weights", quantised: str | None = None) -> str | None:
    """What linear layers are quantised to, if at all. Raises UserError, naming `key`, if dtype or files gainsay it."""
    if weights is not None and quantised:
        raise UserError(f"{key}={weights}, but the checkpoint is quantised already, by {quantised}: leave {key} out")
    if weights not in (None, "bf16", *KINDS):
        raise UserError(f"{key}={weights}: expected one of null, bf16, {', '.join(KINDS)}.{did_you_mean(weights, KINDS)}")
    if weights == "bf16" and dtype != torch.bfloat16:
        raise UserError(f"{key}=bf16, but dtype comes out as {name_of(dtype)}: give dtype=bfloat16 as well, or leave {key} out")
    return weights if weights in KINDS else None


def load(
    path: str | Path,
    dtype: str = "auto",
    device: str = "cpu",
    mrope: str = "hf",
    weights: str | None = None,
    progress: bool = False,
    split: Sequence[tuple[int, torch.device]] = (),
    ranks: ProcessGroup = SINGLE,
) -> VideoLM:
    """A folder, or a name of the hub, as a VideoLM: weights from safetensors alone, no remote code.

    dtype: "auto" is the checkpoint's own. weights: "fp8", "int8" or "int4" quantises the text part (see `quantize_text`);
    "bf16" does not, and wants a dtype that is bfloat16. For one device the checkpoint is read into the host's memory, from
    where `device` gets its text part block by block, quantised on arrival: it holds little more than it will keep, and does
    the arithmetic.
    progress: let Hugging Face draw its bars, where they are not turned off.
    split: how many layers on which device, each read into its own, by Hugging Face's `device_map`; instead of `device`.
    ranks: who shares every layer, by its `tp_plan`; each rank reads its share onto its device, all of it, and quantises it
    there: while it loads, that takes what the share does unquantised. Both need accelerate; weights of split layers cannot be
    quantised.
    Raises UserError when anything of it cannot be used.
    """
    if dtype != "auto" and dtype not in checkpoint.DTYPES:
        raise UserError(f"dtype={dtype} is none of auto, {', '.join(checkpoint.DTYPES)}")
    found = opened(path, weights=True)
    held_in = checkpoint.dtype_in(found.folder, found.config, dtype)
    kind = kind_of(weights, held_in, quantised=found.method)
    attention.register()
    spread = spread_of(found.config, split, ranks, kind, device if found.method else None)
    what = f"is quantised by {found.method}, which cannot be loaded here" if found.method else "the weights cannot be loaded"
    with explained(f"{path}: {what}"), nullcontext() if progress else _no_bars():
        hf, info = _read(found, held_in, spread)
        hf.set_attn_implementation(attention.IMPLEMENTATIONS)
    if "sliding_attention" in (getattr(hf.config.get_text_config(), "layer_types", None) or ()):
        raise UserError(f"{path}: has layers of sliding-window attention, which are not supported")
    if lost := sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}):
        raise UserError(f"{path}: the weights lack {len(lost)} tensors that the model needs, {lost[0]} first")
    hf.generation_config = found.generation or hf.generation_config
    left = ""
    if kind is not None:
        quantize_text(hf, kind, device, ranks)
        left = left_full(hf, kind)
    hf = hf.eval().requires_grad_(False)
    if split:
        settle(hf)
    if ranks.size > 1:
        make_plain(hf)
    model = found.family(hf if spread else hf.to(device), found.tokenizer, found.folder, mrope, ranks=ranks)
    model.left_full = left
    if not split and ranks.size == 1:
        with explained(f"{path}: the config.json does not fit the weights"):
            model.try_out()
    return model


def _read(found: Checkpoint, dtype: torch.dtype, spread: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForImageTextToText

    asked: dict[str, Any] = {"config": found.config, "dtype": dtype, "output_loading_info": True}
    return AutoModelForImageTextToText.from_pretrained(found.folder, **asked, **spread, **checkpoint.SAFELY)


def spread_of(
    config: Any,
    split: Sequence[tuple[int, torch.device]],
    ranks: ProcessGroup,
    kind: str | None,
    quantised_on: str | None = None,
) -> dict[str, Any]:
    """What `from_pretrained` is told of devices. quantised_on: where quantised files go. Raises UserError."""
    if not split and ranks.size == 1 and not quantised_on:
        return {}
    if quantised_on and (split or ranks.size > 1):
        raise UserError("a checkpoint whose files are quantised runs on one device: leave parallel out")
    if kind and split:
        raise UserError(f"weights={kind} does not go with layers split over devices: leave weights out, or parallel")
    if importlib.util.find_spec("accelerate") is None:
        needs = "a quantised checkpoint needs" if quantised_on else "several devices need"
        raise UserError(f"{needs} accelerate: pip install 'specvlm[parallel]'")
    if quantised_on:
        return {"device_map": {"": quantised_on}}
    if split:
        return {"device_map": device_map(_bare(config), [n for n, _ in split], [device for _, device in split])}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=ranks.size, tp_plan=tensor_plan(config, ranks.size))}


def make_plain(hf: Any) -> None:
    """Parameters that every rank holds in full are tensors like any other again, tied ones still tied."""
    plain: dict[int, torch.nn.Parameter] = {}
    for module in hf.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            if all(placement.is_replicate() for placement in getattr(held, "placements", ())):
                if id(held) not in plain:
                    plain[id(held)] = torch.nn.Parameter(local_shard(held.detach()), requires_grad=False)
                module._parameters[name] = plain[id(held)]


def settle(hf: Any) -> None:
    """Take off accelerate's hooks, since our passes cross devices by themselves; and a tied head goes to the last one."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(hf)
    last = hf.model.language_model.norm.weight.device
    if hf.lm_head.weight.device != last:
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.to(last), requires_grad=False)


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_pair(target: VideoLM, draft: VideoLM) -> int:
    """The number of token ids both models know. Raises UserError for two that cannot draft for one another.

    Padded vocabularies may differ in size; the tokenizers may not differ at all, since ids are what the two exchange.
    """
    if target.family != draft.family:
        families = f"target {target.folder} is {target.family} but draft {draft.folder} is {draft.family}"
        raise UserError(f"{families}: a pair needs one family")
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        token = next(t for t in [*ours, *theirs] if ours.get(t) != theirs.get(t))
        raise UserError(
            f"target {target.folder} and draft {draft.folder} have different tokenizers "
            f"({len(ours)} and {len(theirs)} tokens; {token!r} is {ours.get(token)} and {theirs.get(token)}): "
            "they cannot draft for one another"
        )
    for what in ("patch_size", "spatial_merge_size", "temporal_patch_size", "image_size"):
        ours, theirs = (getattr(model.hf.config.vision_config, what, None) for model in (target, draft))
        if ours != theirs and not (what == "image_size" and target.axes > 1):
            raise UserError(
                f"target {target.folder} and draft {draft.folder} see videos differently: {what} is {ours} and {theirs}"
            )
    return min(target.vocabulary, draft.vocabulary)
