"""Use a Hugging Face model that the caller has loaded, without changing it."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specvlm.errors import UserError, explained
from specvlm.models import attention, checkpoint, families
from specvlm.models.chat import tokenizer_of
from specvlm.models.layer_kinds import check_states, check_windows, language_model
from specvlm.models.load import settle
from specvlm.models.partition import stages_of
from specvlm.models.video_lm import VideoLM


def adopted(hf: Any, folder: str | Path | None = None, mrope: str = "hf") -> VideoLM:
    """Wrap a loaded Hugging Face model as a VideoLM that shares its weights.

    The modules are copied without their tensors, since ours need a different attention function. So move the model to
    its device first, and do not replace its modules afterwards.

    Args:
        hf: The model, in eval mode.
        folder: Folder or hub name to read the tokenizer and preprocessing settings from; by default the one that the
            model was loaded from.
        mrope: As in `VideoLM`.

    Raises:
        UserError: The model's family is not supported, the model is wrapped or hooked (`check_plain`), or the folder
            cannot be used.
    """
    model_type = getattr(getattr(hf, "config", None), "model_type", None)
    if model_type is None or not hasattr(hf, "generation_config"):
        raise UserError(f"{type(hf).__name__} is not a Hugging Face model: give one, a folder, or a name on the hub")
    check_states(type(hf).__name__, hf.config)
    family = families.find(model_type)
    check_plain(hf)
    held = _folder_of(hf, folder)
    check_windows(held, hf.config)
    attention.register()
    own = twin(hf)
    with explained(f"{held}: this {type(hf).__name__} cannot be used"):
        own.set_attn_implementation(attention.IMPLEMENTATIONS)
        if len(stages_of(language_model(own))) > 1:
            settle(own)
        model = family(own, tokenizer_of(held), held, mrope)
        model.check_settings()
    return model


def check_plain(hf: Any) -> None:
    """Raise UserError unless a copy of the model's modules computes what the model does, now and later.

    Our passes call its layers one by one, so wrappers, hooks and adapters that can be switched off would have no
    effect. Hooks of transformers and accelerate are allowed, since they change no result.
    """
    if not isinstance(hf, PreTrainedModel):
        raise UserError(f"a {type(hf).__name__} wraps a model and may change what it computes: give the model itself")
    if hf.training:
        raise UserError("the model is in training mode: call its eval() first")
    if lost := [name for name, tensor in hf.named_parameters() if tensor.is_meta]:
        raise UserError(f"{len(lost)} weights are not on a device, {lost[0]} first: load the model without offloading")
    for name, module in hf.named_modules():
        if _package(type(module)) == "peft":
            raise UserError(f"the module {name} is an adapter: merge it into the weights first")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_package(hook) not in ("transformers", "accelerate") for hook in hooks):
            raise UserError(f"the module {name or 'at the root'} has a forward hook, which would not be called: remove it")


def _package(of: Any) -> str:
    return str(getattr(of, "__module__", "")).partition(".")[0]


def twin(hf: Any) -> Any:
    """Copy a model's modules and settings; its weights and buffers are shared, not copied."""
    shared = {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    return copy.deepcopy(hf, shared).eval()


def _folder_of(hf: Any, folder: str | Path | None) -> Path:
    """Return the folder with the model's tokenizer and settings. Raises UserError if it is not known."""
    revision = None
    if folder is None:
        folder = getattr(hf.config, "_name_or_path", "") or ""
        revision = None if Path(folder).exists() else getattr(hf.config, "_commit_hash", None)
    if not str(folder):
        raise UserError("the model was not loaded from a folder: name one with a tokenizer and processor settings")
    return checkpoint.folder_of(folder, revision=revision)
