"""Accept the guesses that equal the target's argmax.

Shape suffixes: M tree nodes, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.process.memo import remembered
from specvlm.strategies import Verifier, VerifyContext
from specvlm.types import DraftTree, ancestor_mask


@dataclass(frozen=True)
class GreedyVerifier(Verifier):
    """Accept the longest path on which every token is the target's argmax after its parent.

    Node i is accepted if tokens[j] = argmax logits[parents[j]] for every j on the path from the root to i, including i.
    The deepest such node wins; of equally deep ones (possible if siblings share a token) the one of lowest number.
    For trees this is SpecInfer's greedy verification (arXiv 2305.09781), for chains that of Stern et al. (1811.03115).
    Deviations: none.

    Of equal logits the lowest id wins, in trees as in `first`, so both agree on exact ties, which bfloat16 often gives.
    The output equals the autoregressive one if the logits of both do: the forward pass of a tree may round differently
    from that of a single token.

    Cost: an argmax over (M, V), an (M, M) reduction, and a copy of two integers to the host.
    """

    name = "greedy"
    paper = "SpecInfer (arXiv 2305.09781)"
    fidelity = "exact"

    def tables(self, parents: tuple[int, ...]) -> tuple[Tensor, ...]:
        return _layout.__wrapped__(parents, torch.device("cpu"))  # type: ignore[attr-defined]

    def decide(self, ctx: VerifyContext) -> Tensor:
        """Mark the nodes whose whole path matches the target's argmax, and take the deepest."""
        best_M = ctx.logits_MV.argmax(-1)
        last_1 = deepest(ctx, best_M)
        return torch.cat([last_1, best_M.index_select(0, last_1)])

    def follow(self, parents: Sequence[int], tokens: Sequence[int], best: Sequence[int]) -> tuple[int, int]:
        depths = [0] * len(parents)  # of accepted nodes; of others -1
        for node in range(1, len(parents)):
            above = parents[node]
            depths[node] = depths[above] + 1 if depths[above] >= 0 and tokens[node] == best[above] else -1
        last = depths.index(max(depths))
        return last, best[last]


def deepest(ctx: VerifyContext, best_M: Tensor) -> Tensor:
    """Find the deepest node that is reached by following the target's choices from the root.

    Args:
        ctx: The tree. Its tables are None or start with those of `GreedyVerifier.tables`.
        best_M: (M,) the target's choice of the token after each node.

    Returns:
        (1,) number of that node.
    """
    layout = ctx.tables or ctx.tree.kept(_layout)(ctx.tree.parents, best_M.device)
    up_M, root_M, beside_MM, order_M = layout[:4]
    fits_M = root_M | (ctx.tree.tokens.to(best_M.device) == best_M.index_select(0, up_M))  # the root is accepted already
    accepted_M = (fits_M | beside_MM).all(-1)
    return (order_M * accepted_M).argmax(0, keepdim=True)  # no rejected node wins: the root is accepted, and has the least key


@remembered()  # never freed: captured steps refer to them by address
def _layout(parents: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Build the tensors that depend only on a tree's shape; cached, since shapes recur.

    Returns:
        (M,) parent of each node, the root's being itself; (M,) True for the root; (M, M) True if the column is not on
        the path from the root to the row; (M,) distinct sort keys, higher for deeper nodes, then for lower numbers.
    """
    count = len(parents)
    depths = DraftTree(torch.empty(0), parents).depths
    order = [depth * count + count - 1 - node for node, depth in enumerate(depths)]
    return (
        torch.tensor(parents, device=device).clamp(min=0),
        torch.tensor([parent < 0 for parent in parents], device=device),
        ~ancestor_mask(parents).to(device),
        torch.tensor(order, device=device),
    )
