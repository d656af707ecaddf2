"""Load a checkpoint folder as a VideoLM, and check that two models form a pair."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specvlm.errors import UserError, did_you_mean, explained, first_line
from specvlm.models import attention, checkpoint, families
from specvlm.models.chat import tokenizer_of
from specvlm.models.generation import generation_of
from specvlm.models.guard import is_builtin
from specvlm.models.layer_kinds import check_states, check_windows, language_model, name_of_text
from specvlm.models.padding import pad_tower, pays
from specvlm.models.partition import check_linear, device_map, tensor_plan
from specvlm.models.plugins import traced
from specvlm.models.quantize import KINDS, left_full, quantize_text
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard
from specvlm.video.video import Clip


def family_of(folder: Path, config: Any) -> type[VideoLM]:
    """Return the model family of a configuration. Raises UserError if it is not supported."""
    try:
        return families.find(config.model_type)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


class Checkpoint(NamedTuple):
    """Everything in a checkpoint folder except the weights. method: quantisation method of its files, if any."""

    folder: Path
    config: Any
    family: type[VideoLM]
    method: str | None
    tokenizer: Any
    generation: Any


def opened(path: str | Path, weights: bool, revision: str | None = None) -> Checkpoint:
    """Read everything in a checkpoint folder except the weights.

    From the hub, the weight files are downloaded only if `weights` is set, or if config.json gives no dtype. A missing
    weight file is an error if the weights are needed, or if a local folder holds some of them. If they are not needed,
    a local folder may lack all of them.

    Raises:
        UserError: Something in the folder cannot be used.
    """
    folder = checkpoint.folder_of(path, weights, revision)
    config = checkpoint.config_of(folder)
    check_states(folder, config)
    family = family_of(folder, config)
    check_windows(folder, config)
    method = checkpoint.method_of(config) if checkpoint.quantizer_of(folder, config) else None
    if config.dtype is None and not Path(path).exists():
        folder = checkpoint.folder_of(path, weights=True, revision=revision)
    if weights or config.dtype is None or (Path(path).exists() and any(folder.glob("*.safetensors*"))):
        checkpoint.weight_files(folder, config)
        config.dtype = checkpoint.dtype_in(folder, config, "auto")
    return Checkpoint(folder, config, family, method, tokenizer_of(folder), generation_of(folder))


def skeleton(path: str | Path, mrope: str = "hf", revision: str | None = None) -> VideoLM:
    """Load a model without its weights, to make prompts, check a pair or plan memory.

    Args:
        path: Folder, or name on the hub.
        mrope: As in `VideoLM`.
        revision: Branch, tag or commit, for a name on the hub.

    Raises:
        UserError: The folder cannot be used.
    """
    found = opened(path, weights=False, revision=revision)
    with explained(f"{found.folder}: no model can be built from its config.json"):
        hf = _on_meta(found.config).eval()
        hf.generation_config = found.generation or hf.generation_config
        model = found.family(hf, found.tokenizer, found.folder, mrope)
        model.check_settings()
    if not found.method and any(found.folder.glob("*.safetensors")):
        check_size(model, checkpoint.weight_files(found.folder, found.config))
    return model


def _on_meta(config: Any) -> Any:
    """Make the Hugging Face model on the meta device, without weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def check_size(model: VideoLM, files: Sequence[Path]) -> None:
    """Raise UserError if the model has over twice as many weights as its files hold, before memory is allocated.

    If only a few tensors are missing, `load` reports them.
    """
    held = sum(count for file in files for _, count in checkpoint.tensors_in(file).values())
    wanted = sum(weight.numel() for weight in model.hf.parameters())
    if wanted > 2 * held:
        raise UserError(
            f"{model.folder}: config.json describes a model of {wanted:,} weights, but the files hold {held:,}: "
            "check that the checkpoint is complete and config.json belongs to it"
        )


def dtype_of(model: VideoLM, dtype: str) -> torch.dtype:
    """Return the dtype in which `load` holds the weights. "auto" is the checkpoint's own."""
    return checkpoint.dtype_in(model.folder, model.hf.config, dtype)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype as in the configuration, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def kind_of(weights: str | None, dtype: torch.dtype, key: str = "weights", quantised: str | None = None) -> str | None:
    """Return the kind of quantisation of linear layers; None for no quantisation.

    Args:
        weights: Value of the key: null, "bf16" or one of KINDS.
        dtype: Dtype of the weights.
        key: Name of the key, for messages.
        quantised: Quantisation method of the checkpoint's own files, if any.

    Raises:
        UserError: The value is unknown, or contradicts the dtype or the files.
    """
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
    revision: str | None = None,
) -> VideoLM:
    """Load a checkpoint as a VideoLM. Reads safetensors weights only and runs no remote code.

    To quantise on one device, the checkpoint is read into host memory, and its text part is moved to `device` block by
    block and quantised there. So the device never holds much more than the final weights. With `ranks`, each rank reads
    its whole share onto its device before quantising: its peak memory is that of the unquantised share.

    Args:
        path: Folder, or name on the hub.
        dtype: Dtype of the weights; "auto" is the checkpoint's own.
        device: Device of the whole model. Not used with `split` or several `ranks`.
        mrope: As in `VideoLM`.
        weights: "fp8", "int8" or "int4" quantises the text part (see `quantize_text`). "bf16" only checks that the
            dtype is bfloat16.
        progress: Show Hugging Face's progress bars.
        split: (number of layers, device) pairs that replace `device`, for Hugging Face's `device_map`. Needs
            accelerate. Split layers cannot be quantised.
        ranks: Processes that share every layer, by Hugging Face's `tp_plan`. Needs accelerate.
        revision: Branch, tag or commit, for a name on the hub.

    Raises:
        UserError: The checkpoint or an argument cannot be used.
    """
    if dtype != "auto" and dtype not in checkpoint.DTYPES:
        raise UserError(f"dtype={dtype} is none of auto, {', '.join(checkpoint.DTYPES)}")
    found = opened(path, weights=True, revision=revision)
    held_in = checkpoint.dtype_in(found.folder, found.config, dtype)
    kind = kind_of(weights, held_in, quantised=found.method)
    attention.register()
    spread = spread_of(found.config, split, ranks, kind, device if found.method else None)
    what = f"is quantised by {found.method}, which cannot be loaded here" if found.method else "the weights cannot be loaded"
    with explained(f"{path}: {what}"), nullcontext() if progress else _no_bars():
        hf, info = _read(found, held_in, spread)
        hf.set_attn_implementation(attention.IMPLEMENTATIONS)
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
    if pays(model.dtype, model.device):
        pad_tower(hf)
    if not split and ranks.size == 1:
        try_out(model)
    return model


def try_out(model: VideoLM) -> None:
    """Run one small frame and some text through Hugging Face's own forward pass.

    So errors in config.json that no weight's shape reveals, such as a wrong number of heads, show before the first
    request. Some libraries unpack quantised weights in this first pass. Raises UserError if it fails.
    """
    clip = Clip(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), (0.0, 1.0), 1.0, "", 2, 1.0)
    what = f"{model.folder}: the config.json does not fit the weights"
    with explained(what):
        grid, video = model.process_video(clip)
        ids = [0, *(model.video_token for _ in model.runs(grid, video)), 0]
        inputs = model.generate_inputs(model.expand(ids, [grid], [video]))
    with explained(what) if is_builtin(type(model)) else _blame_family(model):
        model.hf(**inputs, **last_logits(model.hf, 1))


@contextmanager
def _blame_family(model: VideoLM) -> Iterator[None]:
    """Turn an error of Hugging Face's forward on inputs that a plugin's family made into a PluginError."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        said = f"{model.folder}: transformers' own forward fails ({first_line(error)})"
        gives = f"check what {type(model).__module__}.{type(model).__qualname__}.hf_inputs returns, and that config.json"
        raise traced(f"{said}: {gives} fits the weights", error) from error


def last_logits(hf: Any, count: int) -> dict[str, int]:
    """Return the argument that makes a model compute only the last `count` logits; empty if it always computes all."""
    return {"logits_to_keep": count} if "logits_to_keep" in signature(hf.forward).parameters else {}


def _read(found: Checkpoint, dtype: torch.dtype, spread: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read the weights; returns the Hugging Face model and its loading info. spread: see `spread_of`."""
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
    """Make the device arguments of `from_pretrained`. quantised_on: device, if the checkpoint's files are quantised.

    Raises UserError if the combination is not supported, or if it needs accelerate, which is not installed.
    """
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
        return {"device_map": device_map(_on_meta(config), [n for n, _ in split], [device for _, device in split])}
    from transformers.distributed import DistributedConfig

    hf = _on_meta(config)
    check_linear(hf)
    plan = tensor_plan(config, ranks.size, name_of_text(hf))
    return {"distributed_config": DistributedConfig(tp_size=ranks.size, tp_plan=plan)}


def make_plain(hf: Any) -> None:
    """Turn replicated DTensor parameters back into plain tensors; tied ones stay tied."""
    plain: dict[int, torch.nn.Parameter] = {}
    for module in hf.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            if all(placement.is_replicate() for placement in getattr(held, "placements", ())):
                if id(held) not in plain:
                    plain[id(held)] = torch.nn.Parameter(local_shard(held.detach()), requires_grad=False)
                module._parameters[name] = plain[id(held)]


def settle(hf: Any) -> None:
    """Remove accelerate's hooks, since our passes move tensors themselves, and put a tied head on the last device."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(hf)
    last = language_model(hf).norm.weight.device
    if hf.lm_head.weight.device != last:
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.to(last), requires_grad=False)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turn Hugging Face's progress bars off in this block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_pair(target: VideoLM, draft: VideoLM) -> int:
    """Check that a draft can draft for a target.

    Vocabularies may be padded to different sizes. The tokenizers must be equal, since the models exchange token ids.

    Returns:
        The number of token ids that both models know.

    Raises:
        UserError: The families, tokenizers or vision settings of the two differ.
    """
    if (target.lineage or target.family) != (draft.lineage or draft.family):
        names = f"target {target.folder} is {target.family} but draft {draft.folder} is {draft.family}"
        raise UserError(f"{names}: a pair needs one family")
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
