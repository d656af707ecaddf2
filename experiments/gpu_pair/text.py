"""Shape of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEXT = dict(
    max_position_embeddings=128000, rms_norm_eps=1e-6, use_sliding_window=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Shape of a language model.

    width: hidden size. mlp: width of the MLP. tied: the head is the embedding. experts: number of experts, how many a
    token has, and the width of each.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False
    experts: tuple[int, int, int] | None = None

    def config(self, **more: Any) -> dict[str, Any]:
        """Make the arguments of a Hugging Face text config."""
        sizes = dict(hidden_size=self.width, intermediate_size=self.mlp, vocab_size=self.vocabulary)
        counts = dict(
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_window_layers=self.layers,
        )  # fmt: skip
        return TEXT | sizes | counts | {"tie_word_embeddings": self.tied} | more
