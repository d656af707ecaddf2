"""Copy and restore what a Hugging Face cache cannot cut back: the states of recurrent layers. Rows of attention are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class Saved:
    """A point to go back to: the number of tokens, and for each recurrent layer copies of its states."""

    length: int
    states: dict[int, dict[str, dict[int, Tensor | None]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        kinds = [by_index for layer in self.states.values() for by_index in layer.values()]
        return sum(state.nbytes for by_index in kinds for state in by_index.values() if state is not None)


KINDS = ("conv_states", "recurrent_states")


def save(cache: DynamicCache, length: int) -> Saved:
    """Copy the states of all recurrent layers. length: tokens that the cache holds."""
    states = {
        number: {kind: {i: None if x is None else x.clone() for i, x in getattr(layer, kind).items()} for kind in KINDS}
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
    }
    return Saved(length, states)


def restore(cache: DynamicCache, saved: Saved) -> None:
    """Go back to a point. The copies stay good for another time."""
    for number, layer in enumerate(cache.layers):
        for kind, by_index in saved.states.get(number, {}).items():
            for index, state in by_index.items():
                if state is not None:
                    getattr(layer, kind)[index].copy_(state)
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys[..., : saved.length, :], layer.values[..., : saved.length, :]


def row_bytes(cache: DynamicCache) -> int:
    """Bytes of one token in the attention layers: a row of keys and one of values in each."""
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(x.nbytes // x.shape[-2] for layer in held for x in (layer.keys, layer.values))


def published(config: Any, itemsize: int = 2) -> tuple[int, int]:
    """Return the bytes of a state and of a row of KV of a configuration like Qwen3.5's, without making a model.

    Recurrent states are float32, as transformers keeps them; `itemsize` is that of all else.
    """
    text = config.get_text_config()
    full = text.layer_types.count("full_attention")
    keys, values = (
        heads * width
        for heads, width in (
            (text.linear_num_key_heads, text.linear_key_head_dim),
            (text.linear_num_value_heads, text.linear_value_head_dim),
        )
    )
    conv = (2 * keys + values) * text.linear_conv_kernel_dim * itemsize
    state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim * 4
    return (len(text.layer_types) - full) * (conv + state), full * 2 * text.num_key_value_heads * text.head_dim * itemsize
