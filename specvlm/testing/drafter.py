"""Contract checks for drafters: are trees valid and repeatable, and is the output the target's own?

Shape suffixes: M tree nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

import torch

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.decoding.lossless import alike
from specvlm.models.passes import Work, driven
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import SIGNALS, DraftContext, Drafter, DraftSession, Verifier, VerifyContext
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.testing import tiny
from specvlm.testing.contract import made, other_global_state
from specvlm.types import DraftTree, GenerationOptions, Step, Verdict

LIMIT = 24
RATIOS = (0.0, 0.9, 1.0)


def check_drafter(drafter: type[Drafter] | Drafter, **fields: Any) -> None:
    """Check that a drafter keeps the contract of `Drafter`. Takes seconds; does not judge the quality of the guesses.

    Runs the decoding loop on tiny random models of two families, in float64 on the CPU.

    Cases: ratios 0, 0.9 and 1; as the draft model: a good one, the target itself, and ones with a smaller and a larger
    vocabulary than the target's; answers of 1, 2, 5 and 24 tokens; two interleaved requests; sessions in which the
    nodes of the trees are accepted in turn, right or wrong; a verifier that samples.

    Checks: every tree has parents[i] < i, the last accepted token at its root, at most `max_nodes` nodes, and tokens
    that both models know; under the greedy verifier the output equals that of `autoregressive`; the same seed gives the
    same trees, for any state of torch's global generator; q, if given, has one row per node, and the children
    could have been drawn from it without replacement.

    Args:
        drafter: A class or an instance. The class must work without arguments.
        **fields: Values of the drafter's fields.

    Raises:
        AssertionError: The drafter breaks the contract.
    """
    drafter = made(drafter, Drafter, fields)  # type: ignore[type-abstract]
    what = repr(drafter)
    assert drafter.model in ("draft", "target", None), f"{what}: model must be draft, target or None, got {drafter.model!r}"
    most = drafter.max_nodes
    assert isinstance(most, int) and most >= 1, f"{what}: max_nodes must be an int from 1, root included, got {most!r}"
    unknown = sorted(drafter.needs - SIGNALS.keys()) + sorted(name for name in drafter.needs if name.startswith("draft_"))
    assert not unknown, (
        f"{what} needs {unknown}, but the target has only {sorted(n for n in SIGNALS if not n.startswith('draft_'))}"
    )
    for family in tiny.FAMILIES:
        target = tiny.model(family)
        alone = tokens_of(list(autoregressive(target, tiny.prompt(family), LIMIT, GreedyVerifier())))
        for (kind, draft), ratio in product(_drafts(family, drafter), RATIOS):
            where = f"a tiny {family}, {kind}, ratio {ratio}"
            steps, _ = _decode(drafter, family, draft, ratio, GreedyVerifier(), where)
            _same(what, where, tokens_of(steps), alone)
        _check_short(drafter, family, alone)
        _check_repeatable(drafter, family)
        _check_turns(drafter, family, alone)
        _check_every_verdict(drafter, family)


def _drafts(family: str, drafter: Drafter) -> list[tuple[str, VideoLM | None]]:
    """List the draft models to try, each with a description; if the drafter takes none, the only one is None."""
    if drafter.model != "draft":
        return [("no draft model", None)]
    drafts: list[tuple[str, VideoLM | None]] = [
        ("a good draft", tiny.noisy(family)),
        ("the target as draft", tiny.model(family)),
    ]
    return drafts + [(f"a draft of {size} tokens", tiny.model(family, 3, size)) for size in (94, 128)]


def _watched(drafter: Drafter, where: str) -> tuple[Drafter, list[DraftTree]]:
    """Return a copy of the drafter whose trees are checked and recorded, and the list of them."""
    trees: list[DraftTree] = []
    start = {"start": lambda _, ctx: _WatchedSession(drafter, where, trees, ctx)}
    values = {f.name: getattr(drafter, f.name) for f in fields(drafter) if f.init}  # type: ignore[arg-type]
    return type("_Watched", (type(drafter),), start)(**values), trees


class _WatchedSession(DraftSession):
    """Checks and records the trees of another session."""

    def __init__(self, drafter: Drafter, where: str, trees: list[DraftTree], ctx: DraftContext) -> None:
        self.drafter, self.where, self.trees, self.ctx, self.session = drafter, where, trees, ctx, drafter.start(ctx)
        assert isinstance(self.session, DraftSession), f"{drafter!r}: start returned {type(self.session).__name__}"

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        root = self.ctx.bonus if last is None else last.bonus
        tree = yield from driven(self.session.propose(last))
        _check_tree(self.drafter, tree, root, self.ctx, f"{self.drafter!r} on {self.where}")
        self.trees.append(replace(tree, tokens=tree.tokens.clone()))
        return tree

    def guess_on(self, done: Callable[[], bool]) -> Work[None] | None:
        return self.session.guess_on(done)

    @property
    def drafted_ahead(self) -> int | None:  # type: ignore[override]
        return self.session.drafted_ahead


def _check_tree(drafter: Any, tree: DraftTree, root: int, ctx: DraftContext, what: str) -> None:
    """Check that a proposal is a valid tree with this token at its root."""
    assert isinstance(tree, DraftTree), f"{what}: propose returned {type(tree).__name__}, not a DraftTree"
    count, parents = len(tree), tree.parents
    assert isinstance(parents, tuple), f"{what}: parents must be a tuple of integers, got {type(parents).__name__}"
    ordered = count > 0 and parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(parents) if node)
    assert ordered, f"{what}: parents must be -1 for the root and parents[i] < i for the others, got {parents}"
    assert count <= drafter.max_nodes, f"{what}: {count} nodes exceed max_nodes={drafter.max_nodes}"
    tokens = tree.tokens
    fits = tokens.shape == (count,) and tokens.dtype == torch.int64
    assert fits, f"{what}: tokens must be ({count},) int64, got {tuple(tokens.shape)} {tokens.dtype}"
    assert int(tokens[0]) == root, f"{what}: the root is {int(tokens[0])}, the last accepted token is {root}"
    known = count == 1 or 0 <= int(tokens[1:].min()) <= int(tokens[1:].max()) < ctx.vocabulary
    assert known, f"{what}: guesses must lie within 0..{ctx.vocabulary - 1}, ids known to both models, got {tokens.tolist()}"
    if tree.q is not None:
        _check_q(tree, what)


def _check_q(tree: DraftTree, what: str) -> None:
    """Check that the children could have been drawn from q one after the other, without replacement."""
    assert tree.q is not None
    assert len(tree.q) == len(tree), f"{what}: q must have a row for each of the {len(tree)} nodes, got {len(tree.q)}"
    for parent in sorted(set(tree.parents[1:])):
        q_V, below = tree.q[parent].double(), [node for node, above in enumerate(tree.parents) if above == parent]
        total = float(q_V.sum())
        fine = bool((q_V >= 0).all()) and abs(total - 1) < 1e-3
        assert fine, f"{what}: row {parent} of q is not a distribution (its sum is {total})"
        guesses = tree.tokens[below].tolist()
        assert len(set(guesses)) == len(guesses), f"{what}: children of node {parent} repeat a token, drawn without replacement"
        possible = int((q_V > 0).sum())
        never = [token for token in guesses if not q_V[token] > 0]
        assert not never or len(guesses) > possible, f"{what}: children {never} of node {parent} cannot have been drawn from q"


def _decode(
    drafter: Drafter, family: str, draft: VideoLM | None, ratio: float, verifier: Verifier, where: str, limit: int = LIMIT
) -> tuple[list[Step], list[DraftTree]]:
    """Decode up to `limit` tokens. Returns the steps and the trees, each of which was checked."""
    watched, trees = _watched(drafter, where)
    graph = DecodingGraph(tiny.model(family), draft, UniformPruner(), watched, verifier, GenerationOptions(ratio=ratio))
    try:
        return list(graph.decode(tiny.prompt(family), limit)), trees
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{drafter!r} failed on {where}: {type(error).__name__}: {error}") from error


def _same(what: str, where: str, got: list[int], alone: list[int]) -> None:
    """Check that an output equals `alone`, the one that the target gives without a drafter."""
    if got == alone:
        return
    where = f"{where}: the output differs from the target's own at token {alike(got, alone)}"
    raise AssertionError(f"{what} on {where} (got {got}, expected {alone})")


def _check_short(drafter: Drafter, family: str, alone: list[int]) -> None:
    """Check answers of 1, 2 and 5 tokens, since a tree may be deeper than the answer is long."""
    draft = _drafts(family, drafter)[0][1]
    for limit in (1, 2, 5):
        where = f"a tiny {family}, {limit} tokens"
        steps, _ = _decode(drafter, family, draft, 0.9, GreedyVerifier(), where, limit)
        _same(repr(drafter), where, tokens_of(steps), alone[:limit])


def _check_repeatable(drafter: Drafter, family: str) -> None:
    """Check that the same seed gives the same trees, with a greedy and with a sampling verifier."""
    draft = _drafts(family, drafter)[0][1]
    rules: tuple[Verifier, ...] = (GreedyVerifier(), SamplingVerifier(temperature=0.8, top_k=20))
    for verifier in rules:
        where = f"a tiny {family} under {verifier!r}"
        _, first = _decode(drafter, family, draft, 0.5, verifier, where)
        with other_global_state(repr(drafter)):
            _, second = _decode(drafter, family, draft, 0.5, verifier, where)
        alike = len(first) == len(second) and all(
            one.parents == two.parents and torch.equal(one.tokens, two.tokens) for one, two in zip(first, second, strict=True)
        )
        assert alike, f"{drafter!r} on {where} drafted different trees for the same seed"


def _check_turns(drafter: Drafter, family: str, alone: list[int]) -> None:
    """Check that an interleaved request changes nothing: state must be in the session, not in the drafter."""
    draft, where = _drafts(family, drafter)[0][1], f"a tiny {family}, two requests in turns"
    watched, _ = _watched(drafter, where)
    graph = DecodingGraph(tiny.model(family), draft, UniformPruner(), watched, GreedyVerifier(), GenerationOptions(ratio=0.5))
    first, second = (graph.decode(tiny.prompt(family, seed), LIMIT) for seed in range(2))
    tokens: list[int] = []
    for step in first:
        tokens += step.tokens
        next(second, None)
    _same(repr(drafter), where, tokens, alone)


@dataclass(frozen=True)
class _Forced(Verifier):
    """Accepts one node after the other, regardless of the logits, with bonus tokens from the whole vocabulary."""

    name = "forced"
    lossless = False
    start: int = 0
    seen: list[int] = field(default_factory=list)

    def verify(self, ctx: VerifyContext) -> Verdict:
        if len(ctx.tree) == 1 and not self.seen:  # the first token, after the prefill
            self.seen.append(0)
            return Verdict((0,), 7)
        turn = self.start + len(self.seen)
        self.seen.append(turn)
        return Verdict(ctx.tree.way_to(turn % len(ctx.tree)), (31 * turn + 11) % ctx.logits_MV.shape[-1])


def _check_every_verdict(drafter: Drafter, family: str) -> None:
    """Check the trees of sessions in which the verifier accepts one node after the other, regardless of the logits.

    An answer has too few rounds for all nodes of a large tree, so several sessions start at different nodes.
    """
    where = f"a tiny {family}, verdicts of every path"
    for draft in {draft for _, draft in _drafts(family, drafter)}:
        for start in range(0, drafter.max_nodes, 6):
            _decode(drafter, family, draft, 0.5, _Forced(start), where, limit=LIMIT)
