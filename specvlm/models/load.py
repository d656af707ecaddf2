"""How a checkpoint folder becomes a VideoLM, and when two of them make a pair."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from specvlm.errors import UserError, did_you_mean
from specvlm.models import attention
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.quantize import KINDS, quantize_text
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.spread import device_map, tensor_plan
from specvlm.models.video_lm import VideoLM
from specvlm.ranks import ALONE, Ranks, own

FAMILIES: dict[str, type[VideoLM]] = {cls.family: cls for cls in (Qwen2_5_VL, LlavaOneVision)}
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


def folder_of(path: str | Path, weights: bool = False) -> Path:
    """The checkpoint's folder; a name of the hub is fetched, its weights only if they are wanted. Raises UserError."""
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
        raise UserError(f"{path}: no such model folder")
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            wanted = ["*.json", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
            folder = Path(snapshot_download(str(path), allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no such model folder, and it cannot be fetched ({first_line(error)})") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: has no config.json, so it is not a Hugging Face model folder")
    return folder


def config_of(folder: Path) -> Any:
    """The checkpoint's configuration; raises UserError when it cannot be read or its family is unknown."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the checks inside raise types of their own
        raise UserError(f"{folder}: the config.json cannot be used ({first_line(error)})") from None
    if config.model_type not in FAMILIES:
        raise UserError(f"{folder}: model type {config.model_type!r} is not supported; there is {', '.join(sorted(FAMILIES))}")
    return config


def skeleton(path: str | Path, mrope: str = "hf") -> VideoLM:
    """The model without its weights: enough to make prompts, check a pair and plan memory."""
    from transformers import AutoModelForImageTextToText

    folder = folder_of(path)
    config = config_of(folder)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(config)
    return FAMILIES[config.model_type](hf.eval(), tokenizer_of(folder), folder, mrope)


def dtype_of(model: VideoLM, dtype: str) -> torch.dtype:
    """What `load` will hold the weights in: the checkpoint's own dtype under "auto"."""
    return _dtype_in(model.hf.config, dtype)


def name_of(dtype: torch.dtype) -> str:
    """As the configuration has it: `float32`."""
    return str(dtype).removeprefix("torch.")


def _dtype_in(config: Any, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    own = config.dtype or config.get_text_config().dtype or torch.float32
    return getattr(torch, own) if isinstance(own, str) else own


def kind_of(weights: str | None, dtype: torch.dtype, key: str = "weights") -> str | None:
    """What linear layers are quantised to, None for not at all. Raises UserError, naming `key`, if `dtype` gainsays "bf16"."""
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
    ranks: Ranks = ALONE,
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
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is none of auto, {', '.join(DTYPES)}")
    folder = folder_of(path, weights=True)
    config = config_of(folder)
    family, kind = FAMILIES[config.model_type], kind_of(weights, _dtype_in(config, dtype))
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{path}: has a config.json but no *.safetensors weights")
    attention.register()
    spread = spread_of(config, split, ranks, kind)
    try:
        with nullcontext() if progress else _no_bars():
            hf, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                **spread,
                output_loading_info=True,
                dtype=DTYPES.get(dtype, "auto"),
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: the weights cannot be loaded ({first_line(error)})") from None
    hf.set_attn_implementation(attention.IMPLEMENTATIONS)
    if "sliding_attention" in (getattr(hf.config.get_text_config(), "layer_types", None) or ()):
        raise UserError(f"{path}: has layers of sliding-window attention, which are not supported")
    if lost := sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}):
        raise UserError(f"{path}: the weights lack {len(lost)} tensors that the model needs, {lost[0]} first")
    if kind is not None:
        quantize_text(hf, kind, device, ranks)
    hf = hf.eval().requires_grad_(False)
    if split:
        settle(hf)
    if ranks.size > 1:
        make_plain(hf)
    return family(hf if spread else hf.to(device), tokenizer_of(folder), folder, mrope, ranks=ranks)


def spread_of(config: Any, split: Sequence[tuple[int, torch.device]], ranks: Ranks, kind: str | None) -> dict[str, Any]:
    """What `from_pretrained` wants to know of several devices. Raises UserError."""
    if not split and ranks.size == 1:
        return {}
    if kind and split:
        raise UserError(f"weights={kind} does not go with layers split over devices: leave weights out, or parallel")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("several devices need accelerate: pip install 'specvlm[parallel]'")
    if split:
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            bare = AutoModelForImageTextToText.from_config(config)
        return {"device_map": device_map(bare, [n for n, _ in split], [device for _, device in split])}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=ranks.size, tp_plan=tensor_plan(config, ranks.size))}


def make_plain(hf: Any) -> None:
    """Parameters that every rank holds in full are tensors like any other again, tied ones still tied."""
    plain: dict[int, torch.nn.Parameter] = {}
    for module in hf.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            if all(placement.is_replicate() for placement in getattr(held, "placements", ())):
                if id(held) not in plain:
                    plain[id(held)] = torch.nn.Parameter(own(held.detach()), requires_grad=False)
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


def tokenizer_of(folder: Path) -> Any:
    """The checkpoint's tokenizer, with the chat template that some keep in a file only their processor reads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser meets first
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from None
    template = folder / "chat_template.json"
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: the tokenizer has no chat template")
    return tokenizer


def check_pair(target: VideoLM, draft: VideoLM) -> int:
    """The number of token ids both models know. Raises UserError for two that cannot draft for one another.

    Padded vocabularies may differ in size; the tokenizers may not differ at all, since ids are what the two exchange.
    """
    if target.family != draft.family:
        raise UserError(
            f"target {target.folder} is {target.family} but draft {draft.folder} is {draft.family}: a pair needs one family"
        )
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


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
