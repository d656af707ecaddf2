"""Load a pair of models as a session."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specvlm.config import EMBEDDED, Mrope, check_prefixes, model_folder
from specvlm.decoding.prefix_budget import store_for
from specvlm.decoding.slices import STALL_S
from specvlm.engine import engine_for
from specvlm.errors import UserError, check_choice, check_range, did_you_mean
from specvlm.models.adopt import adopted
from specvlm.models.checkpoint import DTYPES
from specvlm.models.load import check_pair, dtype_of, kind_of, load, name_of, skeleton
from specvlm.models.memory_plan import Need
from specvlm.models.placement import device_of
from specvlm.models.video_lm import VideoLM
from specvlm.session.options import Options
from specvlm.session.room import check_models
from specvlm.session.session import Session


def load_pair(
    target: Any,
    draft: Any = None,
    *,
    processor: str | Path | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    draft_device: str | torch.device | None = None,
    weights: str | None = None,
    draft_weights: str | None = None,
    engine: str = "auto",
    mrope: str = "hf",
    prefixes: str | bool | float = "auto",
    stall_ms: float = 1000 * STALL_S,
    **options: Any,
) -> Session:
    """Load a target and its draft.

    Args:
        target: Folder, name on the hub, or a Hugging Face model in eval mode, whose weights are used and not changed.
            "embedded:qwen2_5_vl" is a small pair that comes with specvlm, draft included.
        draft: The draft, given in the same way. None: only drafters that need no draft model work.
        processor: Folder or name on the hub with tokenizer and processor settings, for loaded models; by default where
            each was loaded from.
        revision: Branch, tag or commit of the target on the hub.
        draft_revision: Branch, tag or commit of the draft on the hub.
        dtype: Dtype of the weights; "auto" is the checkpoint's own, and float32 for the embedded pairs.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1". Loaded models stay where they are.
        draft_device: The draft's device; by default that of the target.
        weights: Quantise the target's text layers: "fp8", "int8" or "int4".
        draft_weights: Quantise the draft's text layers, in the same way.
        engine: "eager", "graphs" (captures passes as CUDA graphs) or "auto" (graphs on devices where they were tested,
            else eager).
        mrope: As in `VideoLM`.
        prefixes: Memory for KV cache rows of prompts, which later calls with the same beginning reuse: "auto" is a
            quarter of the memory that is free after loading, on a CPU at most 4 GiB; a number is in GiB; False keeps
            nothing.
        stall_ms: Milliseconds that prefills of other calls may add to a round of a call that decodes. At least one
            layer of a prefill runs between rounds, even if it takes longer.
        options: Default options of calls, see `Options`.

    Returns:
        The session. Warns if the draft is larger than the target, if settings of the checkpoint are not applied, and if
        the engine cannot run here.

    Raises:
        UserError: A model or an option cannot be used, the two models do not form a pair, or they do not fit into
            memory.
    """
    check_choice("mrope", mrope, list(Mrope))
    name = name_of(dtype) if isinstance(dtype, torch.dtype) else dtype
    check_choice("dtype", name, ("auto", *DTYPES))
    check_prefixes(prefixes)
    check_range("stall_ms", stall_ms, 0)
    default = (Options() if draft is not None or _pair_of(target) else Options(drafter="prompt_lookup")).asked(options)
    target, draft = _embedded(target, draft)
    first, second = Side("target", target, revision, name, device, weights, mrope, processor), None
    if draft is None:
        _unused(draft_revision=draft_revision, draft_device=draft_device, draft_weights=draft_weights)
    else:
        at = draft_device or (first.place if isinstance(draft, str | Path) else "auto")
        second = Side("draft", draft, draft_revision, name, at, draft_weights, mrope, processor)
    session = paired(first, second, engine, default, prefixes, stall_ms)
    _warn(session)
    return session


def paired(
    first: Side,
    second: Side | None,
    engine: str,
    default: Options,
    prefixes: str | bool | float = False,
    stall_ms: float = 1000 * STALL_S,
) -> Session:
    """Load target and draft as a session. Raises what `load_pair` raises."""
    sides = (first,) if second is None else (first, second)
    needs = [(side.need(default.max_new_tokens), side.place) for side in sides]
    check_models([(need, place) for need, place in needs if need is not None])
    target, draft = first.load(), None if second is None else second.load()
    vocabulary = target.vocabulary if draft is None else check_pair(target, draft)
    target.check_template()
    if target.device.type == "cuda":
        torch.cuda.set_device(target.device)  # graphs are captured on the current device
    store = store_for([stage.device for stage in target.stages], prefixes)
    return Session(target, draft, vocabulary, engine_for(engine, target.device), default, store, stall_ms)


@dataclass(frozen=True)
class Side:
    """A model to load, or a loaded one, with its arguments.

    Attributes:
        name: "target" or "draft".
        given: Folder, name on the hub, or the loaded model.

    The other attributes are as in `load_pair`.

    Raises:
        UserError: An argument does not apply to a model given in this way.
    """

    name: str
    given: Any
    revision: str | None = None
    dtype: str = "auto"
    device: str | torch.device = "auto"
    weights: str | None = None
    mrope: str = "hf"
    processor: str | Path | None = None

    def __post_init__(self) -> None:
        if self.loads:
            if self.processor is not None:
                raise UserError(f"processor={self.processor} is for loaded models, the {self.name} is a folder: leave it out")
            return
        asked = {"dtype": None if self.dtype == "auto" else self.dtype, "revision": self.revision, "weights": self.weights}
        for name, value in asked.items():
            if value is not None:
                raise UserError(f"{name}={value}: the {self.name} is loaded already: leave it out, or give a folder")

    @property
    def loads(self) -> bool:
        """Whether the model is a folder or a name on the hub."""
        return isinstance(self.given, str | Path)

    @property
    def place(self) -> torch.device:
        """Device of the model. Raises UserError if there is no such device, or the model is elsewhere already."""
        there = None if self.loads else getattr(self.given, "device", None)
        if not isinstance(there, torch.device):
            return device_of(self.device)
        if self.device != "auto" and device_of(self.device) != there:
            raise UserError(f"device={self.device}: the {self.name} is loaded already, on {there}: leave it out")
        return there

    @property
    def _held_in(self) -> str:
        """The name of the dtype to load."""
        return "float32" if self.dtype == "auto" and str(self.given).startswith(EMBEDDED) else self.dtype

    def need(self, slots: int) -> Need | None:
        """Memory that the model and a cache of `slots` tokens need; None if it is loaded already. Reads no weights."""
        if not self.loads:
            return None
        bare = skeleton(model_folder(str(self.given)), self.mrope, self.revision)
        dtype = dtype_of(bare, self._held_in)
        return Need(
            bare,
            slots,
            dtype,
            kind_of(self.weights, dtype, "weights" if self.name == "target" else "draft_weights", bare.quantised),
        )

    def load(self) -> VideoLM:
        """Load the model, or take the loaded one."""
        if isinstance(self.given, VideoLM):
            return self.given
        if not self.loads:
            return adopted(self.given, self.processor, self.mrope)
        where = (model_folder(str(self.given)), self._held_in, str(self.place))
        return load(*where, self.mrope, self.weights, revision=self.revision)


def _pair_of(target: Any) -> bool:
    """Whether a target is the name of an embedded pair, whose draft comes with it."""
    return isinstance(target, str) and target.startswith(EMBEDDED) and "/" not in target


def _embedded(target: Any, draft: Any) -> tuple[Any, Any]:
    """Resolve the name of an embedded pair. Returns other arguments unchanged."""
    if not _pair_of(target):
        return target, draft
    name, known = target.removeprefix(EMBEDDED), sorted(path.parent.name for path in model_folder(EMBEDDED).glob("*/target"))
    if name not in known:
        raise UserError(f"{target}: no such embedded pair; choose from {', '.join(known)}.{did_you_mean(name, known)}")
    return f"{target}/target", f"{target}/plain" if draft is None else draft


def _unused(**arguments: Any) -> None:
    """Raise UserError for an argument of the draft that is set although there is no draft."""
    for name, value in arguments.items():
        if value is not None:
            raise UserError(f"{name}={value}, but there is no draft: give one, or leave it out")


def _warn(session: Session) -> None:
    """Warn of settings that cost speed, or make the answer differ from that of `generate`."""
    target, draft = session.target, session.draft
    sizes = [0 if one is None else sum(weight.numel() for weight in one.hf.parameters()) for one in (target, draft)]
    if sizes[1] > sizes[0]:
        what = f"the draft has {sizes[1]:,} weights and the target, whose answer is given, {sizes[0]:,}"
        warnings.warn(f"{what}: this is slow. Are the two swapped?", stacklevel=3)
    if target.ignored_settings:
        lost = ", ".join(map(str, target.ignored_settings))
        warnings.warn(f"{target.folder}: its generation config sets what is not applied here: {lost}", stacklevel=3)
    if session.engine.note:
        warnings.warn(session.engine.note, stacklevel=3)
