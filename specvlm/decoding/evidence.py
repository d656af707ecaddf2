"""Classify an output's difference from the target's own as a numeric tie or a mismatch, by logits of several passes.

Shape suffixes: T tokens of the output, K watched tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.strategies import Sampling, gumbel

# Passes over guesses move logits about as far as causal passes do: 0.4 to 1.1 times as far in all ties seen on CPU and
# H200 (the embedded pairs and random 7B weights, both engines). A hidden slot or a wrong position moves them 1.3 to 10
# times as far in bfloat16, 2,000 times in float32. RATIO limits this quotient for long answers; SPREAD / sqrt(tokens)
# adds three standard deviations for short ones.
RATIO, SPREAD = 1.2, 1.2
GAP = 12  # largest distance of a token below the one-row choice, in units of drift; 6.0 was the largest in the same ties
LEAST = 0.125  # lower bound of the drift, in roundings (eps) of the largest logit: a few tokens may move less by chance
# Largest drift allowed, relative to the largest logit. Seen in 16 bits: 0.3 of a rounding in the embedded pairs and 1.1
# in a 7B model; in float32: 2.6. The drift grows with the square root of the number of layers.
DRIFT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Comparison:
    """Result of comparing an output with the target's own.

    The gaps and the drift are None if the verdict needed no passes.

    Attributes:
        verdict: "identical", "tie" or "mismatch".
        token: Index of the output's first difference, or of the token that rounding cannot explain. None if identical.
        gap: Logit of the target's best token less that of the output's token there, in a one-row pass. Under a coupled
            rule: how far logits must move for the rule to choose the output's token.
        drift: How far rounding moves a logit relative to the others, on average over the answer.
        reason: Why the verdict is "mismatch"; empty otherwise.
        candidates: The output's token there, and the target's choice in a one-row pass.
        gap_many_rows: Logit of the second candidate less that of the first, in a pass over several rows (under a
            coupled rule, the first one's gap less the second's). None if the replay did not reach that token.
        ties: Number of output tokens that are not the target's one-row choice.
        exact: True if the output is identical by construction: the engine computes the rows of a tree bit for bit as
            sequential steps would. False for every other verdict.
    """

    verdict: str
    token: int | None = None
    gap: float | None = None
    drift: float | None = None
    reason: str = ""
    candidates: tuple[int, int] | None = None
    gap_many_rows: float | None = None
    ties: int = 0
    exact: bool = False

    def __str__(self) -> str:
        if self.verdict == "identical":
            return "identical (exact by construction)" if self.exact else "identical"
        if self.verdict == "tie":
            return f"numeric tie at token {self.token} (gap {self.gap:.1g})"
        return f"MISMATCH at token {self.token}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The target's rule for choosing a token: the largest logit, or logit plus noise. Shares no code with verifiers.

    Attributes:
        sampling: Greedy, or coupled.
        seed: The request's seed, for a coupled rule.
    """

    sampling: Sampling
    seed: int

    def scored(self, logits_V: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Return scores in units of logits and whether each token may be chosen, both (V,). at: index in the answer."""
        logits_V = logits_V.double()
        if not self.sampling.coupled:
            return logits_V, torch.ones_like(logits_V, dtype=torch.bool)
        key_2 = torch.tensor([self.seed % 2**63, at], device=logits_V.device)
        noise_V = gumbel(key_2, len(logits_V))[0] * self.sampling.temperature
        return logits_V + noise_V, self.sampling.warped(logits_V).isfinite()

    def choice(self, logits_V: Tensor, at: int) -> int:
        """Choose the token at index `at` of the answer from its (V,) logits."""
        scores_V, may_V = self.scored(logits_V, at)
        return int(scores_V.where(may_V, -torch.inf).argmax())

    def gap(self, logits_V: Tensor, at: int, token: int) -> float:
        """Return the smallest change of logits for which `token` is chosen; 0 if it is already.

        After the change, top-k and top-p must keep `token`, and each other token must score less or be removed.
        """
        scores_V, may_V = self.scored(logits_V, at)
        ahead_V, spare_V = scores_V - scores_V[token], torch.full_like(scores_V, torch.inf)
        lacking = 0.0
        if not bool(may_V.all()):
            logits_V = logits_V.double()
            spare_V = logits_V - logits_V[~may_V].max()  # until the first removed token takes its place
            lacking = 0.0 if may_V[token] else float(logits_V[may_V].min() - logits_V[token])
        return max(lacking, float(torch.minimum(ahead_V, spare_V).max()))


@dataclass(frozen=True, eq=False)
class Evidence:
    """Gaps (see `Choice.gap`) and logits of a few watched tokens from three kinds of pass over the output.

    Attributes:
        ids_TK: Watched tokens of each row: the output's, the target's choice, then the best ones of the one-row pass
            (`lossless.NEAR` of them).
        one_TK: From passes of one row: the gaps of the first two watched tokens, then the logits of the others.
        causal_TK: The same from one causal pass over the whole output.
        many_TK: The same from a replay of the draft trees; equal to causal_TK if the run's steps are not known.
        first: Index of the first difference.
        wrong: Where and why the replay differs from the run; many_TK then ends there. None if they agree.
    """

    ids_TK: list[list[int]]
    one_TK: Tensor
    causal_TK: Tensor
    many_TK: Tensor
    first: int
    wrong: tuple[int, str] | None

    def drift(self, other_TK: Tensor) -> float:
        """Measure how far logits are from those of the one-row pass: RMS over the best tokens, averaged over rows.

        The mean distance of a row is subtracted first, since it does not change the order of tokens.
        """
        moved_TK = (other_TK - self.one_TK[: len(other_TK)])[1:, 2:]  # the first token comes from the prefill
        return float((moved_TK - moved_TK.mean(1, True)).square().mean(1).sqrt().mean()) if len(moved_TK) else 0.0

    def verdict(self, scale: float, dtype: torch.dtype, otherwise: Callable[[list[list[int]]], Tensor]) -> Comparison:
        """Classify the difference.

        Args:
            scale: Largest absolute logit.
            dtype: Dtype of the target.
            otherwise: Maps ids_TK to (T, K) gaps and logits from one-row passes after another prefill. Called only if
                the replayed logits are too far off for the causal pass to explain.
        """
        many, room = self.drift(self.many_TK), RATIO + SPREAD / max(1, len(self.one_TK) - 1) ** 0.5
        drift = max(self.drift(self.causal_TK), torch.finfo(dtype).eps * scale * LEAST)
        if self.wrong is None and many > drift * room:
            drift = max(drift, self.drift(otherwise(self.ids_TK)))
        wrong = self.wrong or self._excess(many, drift, room, DRIFT[dtype] * scale)
        at, why = wrong or (self.first, "")
        got, preferred = self.ids_TK[at][:2]
        gap = float(self.one_TK[at, 0])
        lead = float(self.many_TK[at, 0] - self.many_TK[at, 1]) if at < len(self.many_TK) else None
        ties = sum(token != best for token, best, *_ in self.ids_TK)
        return Comparison("mismatch" if wrong else "tie", at, gap, drift, why, (got, preferred), lead, ties)

    def _excess(self, many: float, drift: float, room: float, most: float) -> tuple[int, str] | None:
        """Return where and why rounding cannot explain the output; None if it can.

        many: drift of the replay. drift: drift of the other correct passes. room: limit on many / drift. most: limit on
        many and on drift.
        """
        if not (drift <= most and many <= most):
            return self.first, f"passes over several rows move logits by {max(drift, many):.1g}, more than rounding does"
        if not many <= drift * room:
            return self.first, f"passes over guesses move logits by {many:.1g}, rounding explains {drift:.1g}"
        below_T = torch.maximum(self.one_TK[:, 0], self.many_TK[:, 0])
        below_T[self.first] = max(below_T[self.first], self.one_TK[self.first, 1])
        if not bool((below_T <= GAP * drift).all()):
            at = int(below_T.argmax())
            return at, f"the target prefers another token by {below_T[at]:.1g}, rounding explains {drift:.1g}"
        return None
