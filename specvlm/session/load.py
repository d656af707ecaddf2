"""Load a pair of models as a session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from specvlm.config import EMBEDDED, model_folder
from specvlm.engine import engine_for
from specvlm.errors import UserError, did_you_mean
from specvlm.models.adopt import adopted
from specvlm.models.load import check_pair, load
from specvlm.models.video_lm import VideoLM
from specvlm.session.options import Options
from specvlm.session.session import Session


def load_pair(
    target: Any,
    draft: Any = None,
    *,
    processor: str | Path | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    draft_device: str | None = None,
    weights: str | None = None,
    draft_weights: str | None = None,
    engine: str = "auto",
    mrope: str = "hf",
    **options: Any,
) -> Session:
    """Load a target and its draft.

    Args:
        target: Folder, name on the hub, or a Hugging Face model in eval mode, which is used as it is and not changed.
            "embedded:qwen2_5_vl" is a small pair that comes with specvlm, draft included.
        draft: The draft, given alike. None leaves drafters that need no draft model.
        processor: Folder or name on the hub with tokenizer and processor settings, for loaded models; by default where
            each was loaded from.
        revision: Branch, tag or commit of the target on the hub.
        draft_revision: The same of the draft.
        dtype: Dtype of the weights; "auto" is the checkpoint's own, and float32 for the embedded pairs.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        draft_device: The draft's device; by default that of the target.
        weights: Quantise the target's text layers: "fp8", "int8" or "int4".
        draft_weights: The same of the draft.
        engine: "auto", "eager" or "graphs".
        mrope: As in `VideoLM`.
        options: Default options of calls, see `Options`.

    Returns:
        The session.

    Raises:
        UserError: A model or an option cannot be used, or the two models are no pair.
    """
    target, draft, dtype = _embedded(target, draft, dtype)
    first = _device(device)
    ours = _model("target", target, (revision, processor), dtype, first, weights, mrope)
    theirs = None
    if draft is not None:
        at = first if draft_device is None else _device(draft_device)
        theirs = _model("draft", draft, (draft_revision, processor), dtype, at, draft_weights, mrope)
    vocabulary = ours.vocabulary if theirs is None else check_pair(ours, theirs)
    default: Mapping[str, Any] = {} if theirs is not None else {"drafter": "prompt_lookup"}
    if ours.device.type == "cuda":
        torch.cuda.set_device(ours.device)  # graphs are captured on the current device
    return Session(ours, theirs, vocabulary, engine_for(engine, ours.device), Options(**default).asked(options))


def _embedded(target: Any, draft: Any, dtype: str) -> tuple[Any, Any, str]:
    """Resolve the name of an embedded pair. Returns other arguments as they are."""
    if not isinstance(target, str) or not target.startswith(EMBEDDED):
        return target, draft, dtype
    name = target.removeprefix(EMBEDDED)
    if "/" not in name:
        known = sorted(path.parent.name for path in model_folder(EMBEDDED).glob("*/target"))
        if name not in known:
            raise UserError(
                f"{target}: there is no such embedded pair; there is {', '.join(known)}.{did_you_mean(name, known)}"
            )
        target, draft = f"{target}/target", f"{target}/plain" if draft is None else draft
    return target, draft, "float32" if dtype == "auto" else dtype


def _model(
    side: str,
    given: Any,
    places: tuple[str | None, str | Path | None],
    dtype: str,
    device: torch.device,
    weights: str | None,
    mrope: str,
) -> VideoLM:
    """Load one model, or take a loaded one. places: revision and processor. Raises UserError if it cannot be used."""
    revision, processor = places
    if isinstance(given, VideoLM):
        return given
    if isinstance(given, str | Path):
        return load(model_folder(str(given)), dtype, str(device), mrope, weights, revision=revision)
    for name, value in (("dtype", None if dtype == "auto" else dtype), ("revision", revision), ("weights", weights)):
        if value is not None:
            raise UserError(f"{name}={value}: the {side} is loaded already: leave it out, or give a folder")
    return adopted(given, processor, mrope)


def _device(name: str) -> torch.device:
    """Parse the name of a device. Raises UserError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r}: wanted auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
