"""Data types that the models and strategies of a run exchange. Imports no model code.

Shape suffixes, here and elsewhere: S prompt tokens, N video tokens, K kept video tokens, M tree nodes (root included),
V vocabulary, F frames, P tokens per frame, A rotary axes (3 for M-RoPE, 1 otherwise), D hidden size.
"""

from specvlm.parsing.bounds import Within
from specvlm.types.features import Features, entering, joined, merged
from specvlm.types.options import GenerationOptions
from specvlm.types.step import Reused, Step, TokenLogprobs
from specvlm.types.tree import DEEPEST, MOST_GUESSES, PAPER_TREE, DraftTree, TreeShape, Verdict, ancestor_mask, children_of
from specvlm.types.video import KeepSet, TokenGrid, VideoPrompt

__all__ = [
    "DEEPEST", "MOST_GUESSES", "PAPER_TREE", "DraftTree", "Features", "GenerationOptions", "KeepSet", "Reused", "Step",
    "TokenGrid", "TokenLogprobs", "TreeShape", "Verdict", "VideoPrompt", "Within", "ancestor_mask", "children_of",
    "entering", "joined", "merged",
]  # fmt: skip
