"""Repetition penalty from a checkpoint's generation config, applied to tree nodes as `generate` applies it to tokens.

Released Qwen2.5-VL checkpoints set it to 1.05, so without it the output would differ from the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.process.memo import remembered
from specvlm.types import DraftTree, VideoPrompt, ancestor_mask

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


class RepetitionPenalty:
    """Divides positive logits of the tokens seen so far by a factor, and multiplies negative ones by it.

    A tree node has seen the tokens of the prompt, the output, and its path from the root.

    Source: CTRL (arXiv 1909.05858), section 4.1, in Hugging Face's form. A factor of 1 changes nothing, at no cost.
    """

    captures = True  # whether a captured step can apply it

    def __init__(self, factor: float, seen_V: Tensor) -> None:
        """seen_V: (V,) bool, True for tokens of the prompt and the output so far; `add` updates it in place."""
        self.factor, self.seen_V = factor, seen_V

    @classmethod
    def of(cls, target: VideoLM, prompt: VideoPrompt, factor: float | None = None) -> RepetitionPenalty:
        """Create a penalty that has seen the prompt. factor: None takes that of the target's generation config."""
        made = cls(
            target.repetition_penalty if factor is None else factor,
            torch.zeros(target.vocabulary, dtype=torch.bool, device=target.head_device),
        )
        made.add(prompt.tokens)
        return made

    def add(self, tokens: Sequence[int] | Tensor) -> None:
        """Mark tokens as seen."""
        if self.factor != 1:
            self.seen_V[torch.as_tensor(tokens, device=self.seen_V.device)] = True

    def __call__(self, logits_MV: Tensor, tree: DraftTree | None = None, above_MM: Tensor | None = None) -> Tensor:
        """Apply the penalty to the logits of each tree node.

        Args:
            logits_MV: (M, V) logits.
            tree: Draft tree, whose nodes have also seen their own tokens and their ancestors'. None: all rows have seen
                only the prompt and the output so far.
            above_MM: (M, M) float32, 1 where the column is the row's node or an ancestor of it. Given in steps that are
                captured for all trees of one size; by default made from the tree.

        Returns:
            (M, V) logits; with a factor other than 1 in float32 at least, as in `generate`: in 16 bits, logits that the
            penalty brings close would round to the same number.
        """
        if self.factor == 1:
            return logits_MV
        logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        seen_MV = self.seen_V.expand(len(logits_MV), -1)
        if tree is not None:
            own_MV = torch.zeros_like(logits_MV, dtype=torch.bool)
            own_MV.scatter_(1, tree.tokens.to(own_MV.device)[:, None], True)
            if above_MM is None:
                above_MM = tree.kept(_above)(tree.parents, logits_MV.device)
            seen_MV = seen_MV | (above_MM @ own_MV.float() > 0)
        penalised_MV = torch.where(logits_MV < 0, logits_MV * self.factor, logits_MV / self.factor)
        return torch.where(seen_MV, penalised_MV, logits_MV)


@remembered()  # never evicted: captured graphs read these addresses
def _above(parents: tuple[int, ...], device: torch.device) -> Tensor:
    """(M, M) float32 `ancestor_mask` on the device, cached because tree shapes recur every round."""
    return ancestor_mask(parents).to(device, torch.float32)
