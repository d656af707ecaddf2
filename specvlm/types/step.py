"""Record of one decoding round."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from specvlm.types.tree import DraftTree, Verdict
from specvlm.types.video import KeepSet


class TokenLogprobs(NamedTuple):
    """The target's own log-probabilities at one token of the answer.

    Attributes:
        token: Token id.
        logprob: Its log-probability.
        top: The most likely token ids in its place, best first, with their log-probabilities.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Reused(NamedTuple):
    """Part of a prompt that was not computed again, since the KV cache rows of earlier requests were kept.

    Attributes:
        tokens: Number of prompt tokens in that part; 0 if none was found.
        seconds: Time that the earlier requests took to compute it.
    """

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """One decoding round: the draft tree, the verdict on it, and the tokens it adds to the output.

    Attributes:
        tokens: Tokens added to the output, cut at the token limit and after the first stop id (which is included).
            Round 0 is the prefill: one token, nothing drafted.
        tree: The verified draft tree, copied to the host without the values of `q` (see `DraftTree.on_host`). None in
            round 0, and if the target decodes alone.
        verdict: The verifier's verdict, before the output was cut. None if `tree` is.
        times_s: Seconds per stage since the previous step, without the caller's time in between. The stages are embed,
            prefill, prune, draft_prefill, draft, verify, and capture when the engine captured a CUDA graph. If a draft
            on a GPU of its own starts while the target's prefill runs, prune and draft_prefill are only the time spent
            after the first token.
        keep: Video tokens that the drafter sees. Set only in the first drafted step, and only if the drafter runs a
            model and does not choose the tokens itself.
        attention: (N,) attention of the question to each video token in the target. Set in the first drafted step if
            the request has `record`.
        logprobs: Log-probabilities of all tokens of the answer. Set only in the last step, if the request asks for
            them.
        lossless: Whether the verifier claims to be lossless. Guesses that a lossy verifier accepts do not show what the
            target would have chosen.
        ahead: Number of levels of this round's tree that were drafted while the previous tree was checked; 0 if none
            was ready in time, or the outcome of the check was not guessed. None if the drafter does not draft during
            checks.
        reused: Part of the prompt that earlier requests had computed. Set only in round 0, and only if prompts are kept
            for reuse.
    """

    tokens: tuple[int, ...]
    tree: DraftTree | None = None
    verdict: Verdict | None = None
    times_s: dict[str, float] = field(default_factory=dict)
    keep: KeepSet | None = None
    attention: Tensor | None = None
    lossless: bool = True
    logprobs: tuple[TokenLogprobs, ...] | None = None
    ahead: int | None = None
    reused: Reused | None = None

    @property
    def drafted(self) -> int:
        """Number of guesses verified."""
        return len(self.tree) - 1 if self.tree else 0

    @property
    def depth(self) -> int:
        """Depth of the draft tree: the maximum number of guesses on one path. 0 without a tree."""
        return max(self.tree.depths) if self.tree else 0

    @property
    def accepted(self) -> int:
        """Number of guesses accepted, counted before the output was cut."""
        return self.verdict.accepted if self.verdict else 0

    @property
    def full(self) -> bool:
        """Whether the round's output is complete, not cut by a stop id or the token limit."""
        return self.verdict is None or len(self.tokens) == self.verdict.accepted + 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each accepted guess among the drafter's best guesses for its place, from 0.

        Empty without a tree, if guesses were drawn at random, or if the verifier is lossy.
        """
        return self._ranks_and_widths[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of best guesses that were tried below the root, and below each accepted guess.

        It is w if the guesses of ranks 0 to w - 1 were in the tree, and that of rank w was not. Empty without a tree,
        if guesses were drawn at random, or if the verifier is lossy.
        """
        return self._ranks_and_widths[1]

    @cached_property
    def _ranks_and_widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Compute `ranks` and `widths` together."""
        if self.tree is None or self.verdict is None or not self.lossless:
            return (), ()
        return self.tree.ranks_on(self.verdict.path)

    @property
    def refused(self) -> tuple[int, ...]:
        """Tokens of the best guesses that follow the accepted path and were rejected (see `DraftTree.refused`).

        Empty without a tree, or if the output was cut.
        """
        return self.tree.refused(self.verdict.path) if self.tree and self.verdict and self.full else ()
