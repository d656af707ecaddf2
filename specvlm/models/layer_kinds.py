"""Find the language model of a Hugging Face model, and refuse kinds of layers that are not supported.

Checked guesses that are rejected are cut from the KV cache. A layer that keeps one state for all tokens, instead of a
row for each, cannot be cut back: docs/architecture-recurrent.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specvlm.errors import UserError

FULL = {"full_attention", "attention"}
FIELDS = ("layer_types", "layers_block_type", "block_types")  # the kind of each layer, in a configuration
STATE = ("linear", "mamba", "ssm", "conv", "recurrent", "hybrid", "rwkv", "delta", "retention")  # kinds that keep a state
WHY = "they keep one state instead of a row for each token, so a rejected guess cannot be cut back"


def language_model(hf: Any) -> Any:
    """Return the language model of a Hugging Face model."""
    return hf.model.get_submodule(name_of_text(hf))


def name_of_text(hf: Any) -> str:
    """Return the name of the language model in `hf.model`, such as `language_model`."""
    text = hf.get_decoder()
    for name, module in hf.model.named_children():
        if module is text:
            return name
    raise UserError(f"{type(hf).__name__} has no language model among the modules of its `model`")


def check_states(path: str | Path, config: Any) -> None:
    """Raise UserError if a layer keeps a state that cannot be cut back. Reads the configuration, no weights."""
    text = _text_of(config)
    kinds = kinds_of(text)
    if states := [kind for kind in kinds if any(word in kind for word in STATE)]:
        raise UserError(f"{path}: {len(states)} of its {len(kinds)} layers are {_words(states)}: {WHY}")
    if _stateful(text) and not _windows(kinds):
        raise UserError(f"{path}: the layers of {text.model_type} are recurrent: {WHY}")


def check_windows(path: str | Path, config: Any) -> None:
    """Raise UserError if a layer attends to less than all earlier tokens: our passes make no mask of that kind."""
    if others := _windows(kinds_of(_text_of(config))):
        raise UserError(f"{path}: has layers of {_words(others)}, which are not supported")


def _text_of(config: Any) -> Any:
    """Return the configuration of the language model; the whole configuration if it has several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def _windows(kinds: Sequence[str]) -> list[str]:
    """Return the kinds of layers that neither have full attention nor keep a state."""
    return [kind for kind in kinds if kind not in FULL and not any(word in kind for word in STATE)]


def kinds_of(text: Any) -> list[str]:
    """Return the kind of each layer of a text configuration; empty if it names none."""
    for field in FIELDS:
        if kinds := getattr(text, field, None):
            count = getattr(text, "num_hidden_layers", None) or len(kinds)
            return [str(kinds[number % len(kinds)]) for number in range(count)]  # block_types repeat
    # Configurations without types of layers, such as Mistral's, have one window for all.
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return ["sliding_attention"] if window else []


def _stateful(text: Any) -> bool:
    """Whether transformers marks the model class of this configuration as keeping a state. Builds no model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return type(text) in MODEL_MAPPING and bool(getattr(MODEL_MAPPING[type(text)], "_is_stateful", False))


def _words(kinds: Sequence[str]) -> str:
    """Join the names of layer kinds for a message."""
    return " and ".join(sorted({kind.replace("sliding_", "sliding-window ").replace("_", " ") for kind in kinds}))
