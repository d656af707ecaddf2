"""Accept guesses at random so that the output is distributed exactly as if the target alone had drawn it.

Shape suffixes: M tree nodes, V vocabulary (the larger one of target and drafter), n a subset of the nodes.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

from specvlm.process.memo import remembered
from specvlm.strategies import Sampling, Verifier, VerifyContext
from specvlm.types import DraftTree, Within, children_of


@dataclass(frozen=True)
class SamplingVerifier(Verifier):
    """Multi-branch rejection sampling: try the children of each node in order, then draw from the residual.

    With p the target's distribution at a node, warped by temperature, top_k and top_p, and q the distribution that its
    children were drawn from, a child x is accepted with probability min(1, p(x) / q(x)). Otherwise p becomes
    max(p - q, 0), x is removed from q, both are normalized, and the next child is tried. If all are rejected, and at a
    leaf, the next token is drawn from the remaining p. If the tree has no q, or q(x) = 0, q is the point mass at x: x
    is accepted with probability p(x), or else removed from p.

    One trial gives y with probability min(p, q)(y) + (1 - sum min(p, q)) * norm(max(p - q, 0))(y) = p(y). By induction
    over the trials the node has the distribution p, and by induction over the depth so does the path.

    Exact means: given everything before it, each token has the same distribution as without guesses
    (`Verifier.first`). This requires that the children were drawn from q without replacement, in node order, and that
    none was dropped or moved depending on the draw. If q has fewer tokens than the node has children, the rest may be
    any tokens. Siblings may share a token: the second one is never accepted. Ids that only one model knows have
    probability 0 in the other.

    Sources: Leviathan et al. (arXiv 2211.17192, section 2.3) and Chen et al. (2302.01318) for one guess; SpecInfer's
    multi-step speculative sampling (2305.09781) for several; Sequoia (2402.12374) without replacement, the rule used
    here. Deviations: none.

    Cost: all nodes are decided at once in float64: a few passes over (M, V), and one more over the siblings per trial.
    Two uniform numbers per node are drawn, whatever is accepted, on the generator's device, and moved to the device of
    the logits.
    Limits: a seed may give different output on two devices.

    Attributes:
        temperature: Divides the logits; above 0.
        top_k: Keep this many of the most likely tokens, and those that tie with the last of them; 0 is off.
        top_p: Keep the fewest most likely tokens whose probabilities sum to at least this, in (0, 1]; 1 is off.

    Raises:
        ValueError: A field is out of range, q has another length than the tree, or the logits give no distribution
            (NaN, +inf).
    """

    name = "sampling"
    paper = "Sequoia (arXiv 2402.12374)"
    fidelity = "exact"

    temperature: Annotated[float, Within(0.001, 100, "a number")] = 1.0
    top_k: Annotated[int, Within(0, 2**24)] = 0
    top_p: Annotated[float, Within(0, 1, above=True)] = 1.0

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise ValueError("temperature 0 always takes the best token: use verifier=greedy")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a number of tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def dice(self, nodes: int) -> int:
        return 2 * nodes

    def decide(self, ctx: VerifyContext) -> Tensor:
        """Decide all nodes at once, then follow the accepted children from the root."""
        p_MV = self.sampling.probabilities(ctx.logits_MV).double()
        accept_M, rest_MV = odds(ctx.tree, p_MV)
        next_M, bonus_M = _decide(ctx.tree, accept_M, rest_MV, ctx.numbers(2 * len(ctx.tree)))
        last_1 = torch.zeros_like(next_M[:1])
        for _ in range(max(ctx.tree.depths)):
            further_1 = next_M[last_1]
            last_1 = torch.where(further_1 > 0, further_1, last_1)
        return torch.cat([last_1, bonus_M[last_1]])


def odds(tree: DraftTree, p_MV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the rule's probabilities, before any random numbers.

    Args:
        tree: The draft tree.
        p_MV: The target's warped distribution at each node, float64.

    Returns:
        (M,) probability that a node is accepted, given that its parent is and its earlier siblings are not; (M, V)
        distribution of the token below a node, given that all its children are rejected.

    Raises:
        ValueError: `tree.q` has another length than the tree.
    """
    known = p_MV.shape[-1]
    width = known if tree.q is None else max(known, tree.q.shape[-1])
    # One extra column of probability 0 takes the ids beyond both vocabularies.
    tokens_M = tree.tokens.to(p_MV.device).clamp(max=width)
    p_MV = pad(p_MV / p_MV.sum(-1, keepdim=True), (0, width + 1 - known))
    q_MV = None
    if tree.q is not None:
        if len(tree.q) != len(tree):
            raise ValueError(f"DraftTree.q must have a row for each of the {len(tree)} nodes, got {len(tree.q)}")
        q_MV = pad(tree.q.to(p_MV), (0, width + 1 - tree.q.shape[-1]))
    accept_M = torch.ones_like(p_MV[:, 0])
    for above_n, child_n in tree.kept(_trials)(tree.parents, p_MV.device):
        x_n1, p_nV = tokens_M[child_n, None], p_MV[above_n]
        q_nV = _drawn_from(x_n1, p_nV, None if q_MV is None else q_MV[above_n])
        accept_M[child_n], p_MV[above_n] = _try(x_n1, p_nV, q_nV)
        if q_MV is not None:
            q_MV.index_put_((above_n, x_n1[:, 0]), q_MV.new_zeros(()))
    return accept_M, p_MV[:, :known]


def _drawn_from(x_n1: Tensor, p_nV: Tensor, q_nV: Tensor | None) -> Tensor:
    """Return the distribution that x was drawn from, (n, V): q normalized, or the point mass at x if q(x) = 0."""
    point_nV = torch.zeros_like(p_nV).scatter(-1, x_n1, 1.0)
    if q_nV is None:
        return point_nV
    # Sum q again: once all tokens are removed the sum is exactly 0, and x was not drawn from q.
    return torch.where(q_nV.gather(-1, x_n1) > 0, q_nV / q_nV.sum(-1, keepdim=True), point_nV)


def _try(x_n1: Tensor, p_nV: Tensor, q_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Run one trial. Returns the (n,) probability of accepting x, and (n, V) the distribution p after a rejection."""
    accept_n1 = (p_nV.gather(-1, x_n1) / q_nV.gather(-1, x_n1)).clamp(max=1.0)
    left_nV = (p_nV - q_nV).clamp(min=0.0)
    mass_n1 = left_nV.sum(-1, keepdim=True)
    # Nothing left means p = q: x is certainly accepted, and the quotient differs from 1 only by rounding.
    empty_n1 = mass_n1 <= 0
    return accept_n1.masked_fill(empty_n1, 1.0)[:, 0], torch.where(empty_n1, p_nV, left_nV / mass_n1)


def _decide(tree: DraftTree, accept_M: Tensor, rest_MV: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Decide every node as if the path reached it.

    Returns:
        The accepted child of each node, (M,), 0 if there is none; the bonus token below each node, (M,).
    """
    dice_M, dice_bonus_M = uniform.chunk(2)
    taken_M = dice_M < accept_M
    next_M = torch.zeros_like(taken_M, dtype=torch.int64)
    # Write from the last child to the first, so that the earliest accepted one remains.
    for above_n, child_n in reversed(tree.kept(_trials)(tree.parents, accept_M.device)):
        next_M[above_n] = torch.where(taken_M[child_n], child_n, next_M[above_n])
    return next_M, _draw(rest_MV, dice_bonus_M)


def _draw(p_nV: Tensor, uniform_n: Tensor) -> Tensor:
    """Draw one token per row, (n,), by inverting the cumulative sum of p; -1 if that sum is not finite.

    Only tokens with p > 0 count as hits: a parallel cumulative sum may grow by rounding where p is 0.
    """
    cumulated_nV = p_nV.cumsum(-1)
    total_n1 = cumulated_nV[:, -1:]
    hit_nV = (cumulated_nV > uniform_n[:, None] * total_n1) & (p_nV > 0)
    # No hit means that the uniform number was so close to 1 that the product rounded up to the total.
    token_n = torch.where(hit_nV.any(-1), hit_nV.to(torch.uint8).argmax(-1), p_nV.argmax(-1))
    return token_n.where(total_n1[:, 0].isfinite(), -1)


@remembered()  # never freed: captured steps refer to them by address
def _trials(parents: tuple[int, ...], device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """List, for each trial r from 0 on, the nodes with more than r children, and child r of each, both (n,). Cached."""
    below, trials = children_of(parents), list[Tensor]()
    for trial in range(max(map(len, below))):
        pairs = [(node, children[trial]) for node, children in enumerate(below) if len(children) > trial]
        trials.append(torch.tensor(pairs, device=device))
    return tuple((pairs_n2[:, 0], pairs_n2[:, 1]) for pairs_n2 in trials)
