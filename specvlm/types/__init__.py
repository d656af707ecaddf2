"""What the parts of a decoding graph hand each other. Needs torch, nothing else.

Shape suffixes, here and elsewhere: S prompt tokens, N video tokens, K kept video tokens, M tree nodes (root included),
V vocabulary, F frames, P tokens of one frame, A rotary axes (3 for M-RoPE, 1 otherwise), D width.
"""

from specvlm.types.step import Step
from specvlm.types.tree import PAPER_TREE, DraftTree, TreeShape, Verdict, ancestor_mask
from specvlm.types.video import KeepSet, TokenGrid, VideoPrompt

__all__ = [
    "PAPER_TREE",
    "DraftTree",
    "KeepSet",
    "Step",
    "TokenGrid",
    "TreeShape",
    "Verdict",
    "VideoPrompt",
    "ancestor_mask",
]
