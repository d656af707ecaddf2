"""Accept what the target would have written itself with the highest logit at every step.

Shape suffixes: M tree nodes, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.process.memo import remembered
from specvlm.strategies import Verifier, VerifyContext
from specvlm.types import DraftTree, ancestor_mask


@dataclass(frozen=True)
class GreedyVerifier(Verifier):
    """The longest path on which every token is the target's argmax below its parent; then the argmax that follows.

    Node i stands when tokens[j] = argmax logits[parents[j]] for every j on the way from the root to i, i included. The
    deepest standing node wins, and the lowest number among equally deep ones, which needs siblings with one token.
    Exact match of a tree is SpecInfer's greedy verification (arXiv 2305.09781); of a chain, Stern et al. (1811.03115).
    Deviations: none.

    Equal logits go to the lowest id, in a tree as in the tree of one node that `first` is, so both decide alike where a
    model (bf16!) gives exact ties.
    The output is the autoregressive one as far as the logits of both are equal: a tree's forward pass may round
    differently from a one-token pass.

    Cost: an argmax over (M, V), an (M, M) reduction, and one copy of two integers to the host.
    """

    name = "greedy"
    paper = "SpecInfer (arXiv 2305.09781)"
    fidelity = "exact"

    def tables(self, parents: tuple[int, ...]) -> tuple[Tensor, ...]:
        return _layout.__wrapped__(parents, torch.device("cpu"))  # type: ignore[attr-defined]

    def decide(self, ctx: VerifyContext) -> Tensor:
        layout = ctx.tables or ctx.tree.kept(_layout)(ctx.tree.parents, ctx.logits_MV.device)
        up_M, root_M, beside_MM, order_M = layout
        best_M = ctx.logits_MV.argmax(-1)
        fits_M = root_M | (ctx.tree.tokens.to(best_M.device) == best_M[up_M])  # the root was accepted in the round before
        stands_M = (fits_M | beside_MM).all(-1)
        last_1 = torch.where(stands_M, order_M, -1).argmax(0, keepdim=True)
        return torch.cat([last_1, best_M[last_1]])


@remembered()  # never let go: captured steps know the addresses
def _layout(parents: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the shape of a tree alone decides, kept on the device: shapes recur in every round.

    (M,) parents with the root its own; (M,) is it the root; (M, M) is column *not* on the way from the root to row; (M,)
    keys without ties, higher for deeper nodes, then for lower numbers.
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
