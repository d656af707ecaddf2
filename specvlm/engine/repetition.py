"""The repetition penalty that a checkpoint's generation config asks for, applied to tree nodes as `generate` applies it.

Released Qwen2.5-VL checkpoints ask for 1.05, so without it the output would not be the model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.process.memo import remembered
from specvlm.types import DraftTree, VideoPrompt, ancestor_mask

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


class RepetitionPenalty:
    """Logits of tokens seen in prompt, output or above in the tree: positive ones divided by it, negative ones multiplied.

    Source: CTRL (arXiv 1909.05858), section 4.1, in Hugging Face's form. factor 1 changes nothing and costs nothing.
    """

    def __init__(self, factor: float, seen_V: Tensor) -> None:
        """seen_V: bool, which tokens stand already; written to."""
        self.factor, self.seen_V = factor, seen_V

    @classmethod
    def of(cls, target: VideoLM, prompt: VideoPrompt, factor: float | None = None) -> RepetitionPenalty:
        """With the prompt seen. factor: None for what `target` asks for."""
        made = cls(
            target.repetition_penalty if factor is None else factor,
            torch.zeros(target.vocabulary, dtype=torch.bool, device=target.head_device),
        )
        made.add(prompt.tokens)
        return made

    def add(self, tokens: Tensor) -> None:
        """Tokens that stand from now on."""
        if self.factor != 1:
            self.seen_V[tokens.to(self.seen_V.device)] = True

    def __call__(self, logits_MV: Tensor, tree: DraftTree | None = None, above_MM: Tensor | None = None) -> Tensor:
        """(M, V), a row a tree node, which has seen itself and its ancestors; without a tree no row has seen more.

        above_MM: these, in float32, in a step captured for trees of every shape.
        """
        if self.factor == 1:
            return logits_MV
        seen_MV = self.seen_V.expand(len(logits_MV), -1)
        if tree is not None:
            own_MV = torch.zeros_like(logits_MV, dtype=torch.bool)
            own_MV.scatter_(1, tree.tokens.to(own_MV.device)[:, None], True)
            if above_MM is None:
                above_MM = tree.kept(_above)(tree.parents, logits_MV.device)
            seen_MV = seen_MV | (above_MM @ own_MV.float() > 0)
        penalised_MV = torch.where(logits_MV < 0, logits_MV * self.factor, logits_MV / self.factor)
        return torch.where(seen_MV, penalised_MV, logits_MV)


@remembered()  # never let go: captured steps know the addresses
def _above(parents: tuple[int, ...], device: torch.device) -> Tensor:
    """(M, M) a tree's ancestors in float32, on the device, since shapes recur in every round."""
    return ancestor_mask(parents).to(device, torch.float32)
