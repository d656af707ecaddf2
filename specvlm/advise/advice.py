"""Predict the times of configurations from costs and acceptance, and recommend one or none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from specvlm.advise.acceptance import Known
from specvlm.advise.costs import Costs, rows_of
from specvlm.app.console import seconds
from specvlm.types import TreeShape

WORTH = 0.98  # speculation pays if it takes less than this share of the target's own time
PRUNING_WORTH = 0.97  # pruning pays if a token takes less than this share of its time without pruning


@dataclass(frozen=True)
class Candidate:
    """One configuration with its predicted times; measured times for a drafter without a fixed shape.

    Attributes:
        drafter: Name of the drafter.
        shape: Tree shape; empty for a drafter without a fixed one.
        ratio: Share of video tokens to drop; None if no pruner is used.
        accepted: Guesses accepted per round, without the bonus token.
        source: Where `accepted` comes from, for the table.
        draft_ms: Draft time per round.
        check_ms: Time per round of the verification and of work on the host.
        start_s: Seconds until the first round, including both prefills.
        changes: Overrides for those fields of the drafter that differ from their defaults.
    """

    drafter: str
    shape: str
    ratio: float | None
    accepted: float
    source: str
    draft_ms: float
    check_ms: float
    start_s: float
    changes: tuple[str, ...] = ()

    @property
    def round_ms(self) -> float:
        """Milliseconds per round."""
        return self.draft_ms + self.check_ms

    @property
    def token_ms(self) -> float:
        """Milliseconds per token, without prefills."""
        return self.round_ms / (self.accepted + 1)

    def end_to_end_s(self, tokens: int) -> float:
        """Seconds for an answer of `tokens` tokens, including prefills."""
        return self.start_s + (tokens - 1) * self.token_ms / 1000

    @property
    def words(self) -> list[str]:
        """Overrides that select this configuration."""
        tree = [f"drafter.shape={self.shape}"] if self.shape else self.changes
        return [f"drafter={self.drafter}", *tree, *([] if self.ratio is None else [f"ratio={self.ratio:g}"])]

    def __str__(self) -> str:
        return " ".join(self.words)


def candidates(costs: Costs, known: Known, trees: Mapping[str, tuple[Sequence[str], Sequence[float]]]) -> list[Candidate]:
    """Predict every shape × ratio of every drafter, using the acceptance known at the nearest ratio.

    trees: Shapes and ratios by drafter.
    """
    found = []
    for drafter, (shapes, ratios) in trees.items():
        for shape, ratio in product(shapes, ratios):
            at = min((at for name, at in known if name == drafter), key=lambda at: abs(at - ratio))
            guess, start = known[drafter, at], costs.start(drafter, ratio)
            source = guess.source if at == ratio else f"{guess.source}, as at {at:g}"
            accepted = guess.accepted(TreeShape.parse(shape))
            times = costs.draft_ms(drafter, shape, ratio), costs.check_ms(shape), start.first_s + start.draft_s
            found.append(Candidate(drafter, shape, ratio, accepted, source, *times))
    return found


def alone_s(costs: Costs, tokens: int) -> float:
    """Seconds that the target alone takes for an answer of `tokens` tokens, prefill included."""
    return costs.alone_first_s + (tokens - 1) * costs.alone_ms / 1000


def recommend(costs: Costs, found: Sequence[Candidate], tokens: int) -> tuple[Candidate | None, list[str]]:
    """Recommend the candidate that is fastest end to end for `tokens` tokens; None if speculation does not pay.

    Also returns the reasons, as lines of text.
    """
    quickest = min(found, key=lambda c: c.token_ms)
    best = min(found, key=lambda c: c.end_to_end_s(tokens))
    figures = f"{quickest.token_ms:.2f} ms per token, the target alone {costs.alone_ms:.2f} ms"
    if quickest.token_ms >= WORTH * costs.alone_ms:
        return None, [f"Do not speculate here: at best, with {quickest}, {figures}. {why(costs, quickest)}"]
    took, alone = best.end_to_end_s(tokens), alone_s(costs, tokens)
    if took > WORTH * alone:
        extra_s = quickest.start_s - costs.alone_first_s
        needed = 2 + 1000 * (quickest.start_s - WORTH * costs.alone_first_s) / (WORTH * costs.alone_ms - quickest.token_ms)
        return None, [
            f"Do not speculate here for {tokens} tokens: decoding alone would gain ({quickest}: {figures}), but the start of "
            f"its drafter, {seconds(extra_s)} for pruning, vision tower and prefill, pays only from {int(needed)} tokens on."
        ]
    text = [
        f"Use {best}: {best.token_ms:.2f} ms per token, the target alone {costs.alone_ms:.2f} ms: "
        f"{costs.alone_ms / best.token_ms:.2f} x; {tokens} tokens end to end in {seconds(took)}, the target alone "
        f"{seconds(alone)}: {alone / took:.2f} x."
    ]
    if best != quickest:
        text.append(f"In decoding alone {quickest} is the fastest ({figures}), but it starts later.")
    return best, text + pruning(found, tokens)


def why(costs: Costs, candidate: Candidate) -> str:
    """Say what a candidate's round costs and yields, and what makes it expensive."""
    steps = candidate.round_ms / costs.alone_ms
    text = f"A round costs {steps:.2f} of the target's own steps and yields {candidate.accepted + 1:.2f} tokens"
    if not candidate.shape:
        return f"{text}: drafting takes {candidate.draft_ms:.2f} ms of it, the check {candidate.check_ms:.2f} ms."
    passes, rows = len(rows_of(candidate.shape)), len(TreeShape.parse(candidate.shape))
    share = candidate.draft_ms / passes / costs.alone_ms
    drafting = f"drafting, {passes} passes of {candidate.draft_ms / passes:.2f} ms, each {share:.0%} of a step of the target"
    checking = f"the check, {candidate.check_ms:.2f} ms for {rows} rows"
    # A check replaces one step of the target, so only its excess counts.
    return f"{text}; its largest cost is {drafting if candidate.draft_ms > candidate.check_ms - costs.alone_ms else checking}."


def pruning(found: Sequence[Candidate], tokens: int) -> list[str]:
    """Say whether pruning pays for drafter=tree, in one line; no line if there is nothing to compare."""
    trees = [c for c in found if c.drafter == "tree" and c.ratio is not None and c.ratio < 1]
    whole, pruned = [c for c in trees if not c.ratio], [c for c in trees if c.ratio]
    if not (whole and pruned):
        return []
    full, best = (min(part, key=lambda c: c.token_ms) for part in (whole, pruned))
    ends = [min(c.end_to_end_s(tokens) for c in part) for part in (whole, pruned)]
    guessed = " (assuming that as many guesses are accepted)" if "as at" in full.source + best.source else ""
    pays = "pays" if best.token_ms < PRUNING_WORTH * full.token_ms else "does not pay"
    return [
        f"Pruning {pays} in decoding here: {full.token_ms:.2f} ms per token with nothing dropped, {best.token_ms:.2f} ms at "
        f"ratio {best.ratio:g}{guessed}; end to end {seconds(ends[0])} and {seconds(ends[1])}."
    ]
