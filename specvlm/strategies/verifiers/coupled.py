"""Sample with noise that the drafter shares: a seed gives the same output with any drafter, and with none.

Shape suffixes: M tree nodes, L levels of the tree, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.process.memo import remembered
from specvlm.strategies import Sampling, Verifier, VerifyContext, gumbel
from specvlm.strategies.verifiers.greedy import GreedyVerifier, deepest
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import DraftTree


@dataclass(frozen=True)
class CoupledVerifier(SamplingVerifier):
    """Gumbel-max: each token is the one with the largest sum of warped logit and noise.

    The noise of a token is a function of the request's seed, the token's index in the answer and its id. A sum of logit
    and Gumbel noise is largest for token x with probability p(x), so each token has the distribution p, warped by
    temperature, top_k and top_p. Given the seed the choice is fixed: guesses are accepted where they equal it, as in
    `greedy`. So the output is exactly the sequence that the target alone samples with this seed, with any pruner,
    ratio, drafter and tree. A run with a baseline compares the two outputs.

    Built-in drafters that run a model rank guesses by that model's logits plus the same noise, unless set otherwise.
    If the draft model's distribution is q, the best guess is then accepted with probability
    sum_i 1 / sum_j max(p_j / p_i, q_j / q_i). This is at least (1 - d) / (1 + d), where d is the total variation
    distance of p and q. `sampling` accepts a guess drawn from q with probability 1 - d.

    Daliri, Musco and Suresh (arXiv 2408.07978), drafter-invariant coupling. Deviations: trees as well as chains; the
    noise is hashed (SplitMix64), so no table of random numbers is shared.

    Cost: hashes and logarithms in float64 for each level of the tree and id of the vocabulary, and as in `greedy` an
    argmax over (M, V). A drafter that ranks by the noise computes the same for each of its passes.
    Limits: without an engine that is exact by construction, rounding may change a choice, as in `greedy`. The noise in
    float64 may differ in its last bit between devices.

    Attributes:
        temperature: Divides the logits; above 0.
        top_k: Keep this many of the most likely tokens, and those that tie with the last of them; 0 is off.
        top_p: Keep the fewest most likely tokens whose probabilities sum to at least this, in (0, 1]; 1 is off.

    Raises:
        ValueError: A field is out of range, `VerifyContext.key_2` is missing, or the logits give no distribution (NaN,
            +inf).
    """

    name = "coupled"
    paper = "Daliri et al. (arXiv 2408.07978)"
    fidelity = "adapted"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, coupled=True)

    def dice(self, nodes: int) -> int:
        return 0

    def tables(self, parents: tuple[int, ...]) -> tuple[Tensor, ...]:
        depths_M = torch.tensor(DraftTree(torch.empty(0), parents).depths)
        return (*GreedyVerifier().tables(parents), depths_M)

    def decide(self, ctx: VerifyContext) -> Tensor:
        """Choose the token of highest score after every node, and follow the choices from the root."""
        if ctx.key_2 is None:
            raise ValueError("verifier=coupled needs the seed and the index of the next token: set VerifyContext.key_2")
        key_2, vocabulary = ctx.key_2.to(ctx.logits_MV.device), ctx.logits_MV.shape[-1]
        if ctx.tables:
            noise_MV = gumbel(key_2, vocabulary, ctx.tables[-1])
        else:
            depths_M, levels_L = ctx.tree.kept(_levels)(ctx.tree.parents, ctx.logits_MV.device)
            noise_MV = gumbel(key_2, vocabulary, levels_L)[depths_M]
        most_M, best_M = self.sampling.scores(ctx.logits_MV, noise_MV).max(-1)
        last_1 = deepest(ctx, best_M)
        return torch.cat([last_1, best_M.where(most_M.isfinite(), -1)[last_1]])


def own_rule(sampling: Sampling) -> Verifier:
    """Return the built-in verifier that is exact for these settings: `greedy`, `coupled` or `sampling`."""
    if not sampling.temperature > 0:
        return GreedyVerifier()
    rule = CoupledVerifier if sampling.coupled else SamplingVerifier
    return rule(sampling.temperature, sampling.top_k, sampling.top_p)


@remembered()  # never freed: captured steps refer to them by address
def _levels(parents: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Build the (M,) depths of the nodes and the (L,) depths that occur. Cached."""
    depths = DraftTree(torch.empty(0), parents).depths
    return torch.tensor(depths, device=device), torch.arange(max(depths) + 1, device=device)
