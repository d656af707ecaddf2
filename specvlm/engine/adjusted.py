"""Change the target's logits by a request's own rule, at tree nodes exactly as at single tokens.

Shape suffixes: M tree nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.engine.repetition import RepetitionPenalty
from specvlm.types import DraftTree, GenerationOptions, VideoPrompt
from specvlm.types.options import LogitsRule

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


class AdjustedLogits(RepetitionPenalty):
    """Repetition penalty, then the request's own rule, which sees the answer up to each node.

    A rule is a function of the answer so far and the logits. So each node gets exactly the logits that the target alone
    would get there, and the output stays the target's own. The drafter does not know the rule.
    """

    captures = False  # a rule runs on the host, node by node

    def __init__(self, factor: float, seen_V: Tensor, adjust: LogitsRule) -> None:
        super().__init__(factor, seen_V)
        self._adjust = adjust
        self._answer: list[int] = []

    def add(self, tokens: Sequence[int] | Tensor) -> None:
        """Append tokens to the answer."""
        super().add(tokens)
        self._answer += torch.as_tensor(tokens).tolist()

    def __call__(self, logits_MV: Tensor, tree: DraftTree | None = None, above_MM: Tensor | None = None) -> Tensor:
        logits_MV = super().__call__(logits_MV, tree, above_MM)
        if tree is None:
            return torch.stack([self._adjust(self._answer, logits_V) for logits_V in logits_MV])
        tokens = tree.tokens.tolist()
        ways = ([tokens[above] for above in tree.way_to(node)[1:]] for node in range(len(tree)))  # the root is in the answer
        rows = [self._adjust([*self._answer, *way], row_V) for way, row_V in zip(ways, logits_MV, strict=True)]
        return torch.stack(rows)


def penalty_for(target: VideoLM, prompt: VideoPrompt, options: GenerationOptions) -> RepetitionPenalty:
    """Make the callable that applies a request's penalty and rule to logits. The prompt's tokens count as seen."""
    plain = RepetitionPenalty.of(target, prompt, options.repetition_penalty)
    return plain if options.adjust is None else AdjustedLogits(plain.factor, plain.seen_V, options.adjust)
