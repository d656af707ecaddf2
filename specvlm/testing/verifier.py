"""Contract checks for verifiers, on random logits. Needs no model and no drafter.

Shape suffixes: M tree nodes, V vocabulary, N video tokens, D feature size.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specvlm.strategies import Sampling, Verifier, VerifyContext, uniform
from specvlm.testing.contract import devices, made, other_global_state, seeded
from specvlm.types import DraftTree, TreeShape, Verdict

V = 6  # size of the vocabulary
RUNS = 1200  # verdicts per test of a distribution
# Operations of torch that read the value of a tensor on the host.
READS = ("_local_scalar_dense", "nonzero", "masked_select")

SHAPES: dict[str, tuple[int, ...]] = {
    "one node": (-1,),
    "a chain": (-1, 0, 1, 2, 3),
    "siblings": (-1, 0, 0, 0),
    "the paper's tree": TreeShape.parse("paper").parents,
    "an uneven tree": (-1, 0, 0, 2, 2, 4, 1, 0),
}


def check_verifier(verifier: type[Verifier] | Verifier, **fields: Any) -> None:
    """Check that a verifier keeps the contract of `Verifier`.

    Cases: random logits in float32, float64 and bfloat16; trees of one node, chains, siblings (some with the same
    token) and uneven trees, without q and, for a temperature above 0, with it.

    Checks: the verdict is a path from the root and a token of the vocabulary; it is the same for the same context and
    seed, regardless of what was verified before and of torch's global generator; inputs are not changed;
    `decide`, if implemented, gives the same verdict from as many random numbers as `dice` says, and does not read the
    value of a tensor. Calls of `.tolist()` in `decide` are not detected: only a capture on a GPU refuses them.

    Lossless verifiers have further checks. At temperature 0, accepted tokens, the bonus and the token that `first`
    returns are the argmax. Above 0, the token after the root and after every accepted guess has the distribution that
    `sampling` gives (chi-square test over RUNS verdicts per shape of tree, with fixed seeds). A chain that the target
    is certain of is accepted in full.

    Args:
        verifier: A class or an instance. The class must work without arguments.
        **fields: Values of the verifier's fields.

    Raises:
        AssertionError: The verifier breaks the contract.
    """
    verifier = made(verifier, Verifier, fields)
    assert isinstance(verifier.lossless, bool), f"{verifier!r}: lossless must be True or False, got {verifier.lossless!r}"
    assert isinstance(verifier.sampling, Sampling), f"{verifier!r}: sampling must be a Sampling, got {verifier.sampling!r}"
    for ctx, where in _contexts(verifier):
        inputs = (ctx.logits_MV, ctx.tree.tokens, ctx.tree.q)
        before = [None if t is None else t.clone() for t in inputs]
        verdict = _verify(verifier, ctx, where)
        _check_verdict(verifier, ctx, verdict, where)
        _check_pure(verifier, ctx, verdict, where)
        for name, now, then in zip(("logits", "tokens", "q"), inputs, before, strict=True):
            same = now is None or then is None or torch.equal(now, then)
            assert same, f"{verifier!r} changed its input {name} on {where}"
        if verifier.on_device:
            _check_decide(verifier, ctx, verdict, where)
        if verifier.lossless and verifier.sampling.temperature == 0:
            _check_greedy(verifier, ctx, verdict, where)
    if verifier.lossless:
        _check_certain(verifier)
    if verifier.lossless and verifier.sampling.temperature > 0:
        _check_first(verifier)
        _check_distribution(verifier, "one node", drawn=True)  # without guesses, drawn=False is the same test
        for shape, drawn in product(("a chain", "siblings", "an uneven tree"), (True, False)):
            _check_distribution(verifier, shape, drawn)


def _contexts(verifier: Verifier) -> Iterator[tuple[VerifyContext, str]]:
    """Yield every case as a context, with a description for messages."""
    kinds, dtypes = ("mixed", "equal tokens", "flat", "drawn"), (torch.float64, torch.float32, torch.bfloat16)
    for device, (seed, (shape, parents)), kind, dtype in product(devices(), enumerate(SHAPES.items()), kinds, dtypes):
        chance, count = seeded(seed), len(parents)
        # With few ids, guesses are often right and siblings often equal.
        tokens = torch.randint(3, (count,), generator=chance)
        logits = torch.randn(count, V, generator=chance, dtype=torch.float64)
        logits[:, :3] += 1.0
        q = None
        if kind == "equal tokens":
            tokens = torch.full_like(tokens, 1)
        elif kind == "flat":
            logits = torch.zeros_like(logits)
        elif kind == "drawn" and verifier.sampling.temperature > 0:
            q = torch.rand(count, V, generator=chance, dtype=torch.float64)
            q /= q.sum(-1, keepdim=True)
        tree = DraftTree(tokens, parents, q).to(device)
        hidden, video = (torch.rand(rows, 8, generator=chance).to(device) for rows in (count, 9))
        key_2 = _key(verifier, seed, device)
        context = VerifyContext(tree, logits.to(device, dtype), seeded(), hidden_MD=hidden, video_ND=video, key_2=key_2)
        yield context, f"{shape}, {kind}, logits of {dtype} on {device}"


def _key(verifier: Verifier, seed: int, device: torch.device | None = None) -> Tensor | None:
    """Return `VerifyContext.key_2` for the first token of an answer; None unless the verifier's rule is coupled."""
    return torch.tensor([seed, 0], device=device) if verifier.sampling.coupled else None


def _first(verifier: Verifier, logits_V: Tensor, chance: torch.Generator, seed: int) -> int:
    """Call `first`, with a key only if the rule is coupled."""
    key_2 = _key(verifier, seed, logits_V.device)
    return verifier.first(logits_V, chance) if key_2 is None else verifier.first(logits_V, chance, key_2)


def _again(ctx: VerifyContext, **fields: Any) -> VerifyContext:
    """Return a copy of a context with a fresh generator, and with these fields replaced."""
    return dataclasses.replace(ctx, generator=seeded(), **fields)


def _verify(verifier: Verifier, ctx: VerifyContext, where: str) -> Verdict:
    try:
        return verifier.verify(ctx)
    except Exception as error:
        raise AssertionError(f"{verifier!r} failed on {where}: {type(error).__name__}: {error}") from error


def _check_verdict(verifier: Verifier, ctx: VerifyContext, verdict: Verdict, where: str) -> None:
    """Check that a verdict is a path of the tree from its root, and a token of the vocabulary."""
    what, parents = f"{verifier!r} on {where}", ctx.tree.parents
    assert isinstance(verdict, Verdict), f"{what}: verify returned {type(verdict).__name__}, not a Verdict"
    path = verdict.path
    whole = len(path) > 0 and path[0] == 0 and path == ctx.tree.way_to(path[-1])
    assert whole, f"{what}: path must lead from the root to a node, got {path} in a tree of parents {parents}"
    possible = isinstance(verdict.bonus, int) and 0 <= verdict.bonus < ctx.logits_MV.shape[-1]
    assert possible, f"{what}: the bonus must be a token of the target's, got {verdict.bonus!r}"


def _check_pure(verifier: Verifier, ctx: VerifyContext, verdict: Verdict, where: str) -> None:
    """Check that the verdict is the same after verifying something else, with another state of the global generator."""
    other = DraftTree(torch.zeros(1, dtype=torch.int64, device=ctx.tree.tokens.device), (-1,))
    assert ctx.hidden_MD is not None
    # Verify something else in between.
    verifier.verify(_again(ctx, tree=other, logits_MV=-ctx.logits_MV[:1], hidden_MD=ctx.hidden_MD[:1]))
    with other_global_state(f"{verifier!r} on {where}"):
        again = verifier.verify(_again(ctx))
    assert again == verdict, f"{verifier!r} on {where}: {again} for the same context and seed as {verdict}"


class _NoReads(TorchDispatchMode):
    """Mode of torch that raises AssertionError for the operations in READS, which read a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"it reads the value of a tensor ({name}), which a captured step cannot: write `verify`"
        return func(*args, **(kwargs or {}))


def _check_decide(verifier: Verifier, ctx: VerifyContext, verdict: Verdict, where: str) -> None:
    """Check that `decide`, given random numbers drawn ahead, agrees with `verify`, and reads no tensor on the host."""
    what, count = f"{verifier!r} on {where}", verifier.dice(len(ctx.tree))
    numbers = uniform(count, seeded()).to(ctx.logits_MV.device)
    before = _again(ctx, dice=numbers)
    try:
        with _NoReads():  # type: ignore[no-untyped-call]
            decision = verifier.decide(before)
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"{what}: decide: {error}") from error
    fits = decision.shape == (2,) and not decision.is_floating_point() and decision.device == ctx.logits_MV.device
    assert fits, f"{what}: decide must return two integers on the logits' device, got {decision!r}"
    last, bonus = decision.tolist()
    same = verifier.verdict(last, bonus, ctx.tree)
    assert same == verdict, f"{what}: {same} with random numbers drawn ahead, {verdict} without"


def _check_greedy(verifier: Verifier, ctx: VerifyContext, verdict: Verdict, where: str) -> None:
    """Check that accepted tokens, the bonus and the token that `first` returns are the argmax of the logits."""
    best, tokens = ctx.logits_MV.argmax(-1).tolist(), ctx.tree.tokens.tolist()
    what = f"{verifier!r} on {where} is not lossless"
    for above, node in zip(verdict.path, verdict.path[1:], strict=False):
        right = tokens[node] == best[above]
        assert right, f"{what}: it accepts token {tokens[node]} where the target's own is {best[above]}"
    last = verdict.path[-1]
    assert verdict.bonus == best[last], f"{what}: the bonus is {verdict.bonus}, the target's own is {best[last]}"
    alone = verifier.first(ctx.logits_MV[0], seeded())
    assert alone == best[0], f"{what}: `first` gives {alone}, the target's own is {best[0]}"


def _check_certain(verifier: Verifier) -> None:
    """Check that a chain that the target is certain of is accepted in full."""
    parents, tokens = SHAPES["a chain"], torch.tensor([0, 1, 2, 3, 4])
    logits = torch.full((5, V), -1e4).scatter(1, (tokens[:, None] + 1) % V, 1e4)
    context = VerifyContext(DraftTree(tokens, parents), logits, seeded(), key_2=_key(verifier, 0))
    verdict = _verify(verifier, context, "a certain chain")
    whole = verdict == Verdict((0, 1, 2, 3, 4), 5)
    assert whole, f"{verifier!r}: a chain that the target is certain of must be accepted in full, got {verdict}"


def _check_distribution(verifier: Verifier, shape: str, drawn: bool) -> None:
    """Check the distribution of the token that follows each accepted node. A node's logits depend only on its token.

    drawn: Draw the guesses from q, and give q to the verifier. If false, draw them from q + 1, and give it no q.
    """
    parents, chance, rule = SHAPES[shape], seeded(5), verifier.sampling
    target, draft = (torch.randn(V, V, generator=chance, dtype=torch.float64) for _ in "pq")
    p_VV, q_VV = rule.probabilities(target), rule.probabilities(draft)
    counts: dict[int, Tensor] = defaultdict(lambda: torch.zeros(V, dtype=torch.float64))
    for run in range(RUNS):
        tokens = [0] * len(parents)
        for node in range(len(parents)):
            below = [child for child, parent in enumerate(parents) if parent == node]
            if below:
                # 1e-300 lets other tokens be drawn if q has fewer than there are children.
                weights = q_VV[tokens[node]] + (1e-300 if drawn else 1.0)
                guesses = torch.multinomial(weights, len(below), generator=chance).tolist()
                for child, guess in zip(below, guesses, strict=True):
                    tokens[child] = guess
        tree = DraftTree(torch.tensor(tokens), parents, q_VV[tokens] if drawn else None)
        verdict = verifier.verify(VerifyContext(tree, target[tokens], chance, key_2=_key(verifier, run)))
        for node, following in zip(verdict.path, [*(tokens[n] for n in verdict.path[1:]), verdict.bonus], strict=True):
            counts[tokens[node]][following] += 1
    how = "drawn from q" if drawn else "given"
    for token, seen_V in counts.items():
        _plausible(seen_V, p_VV[token], f"{verifier!r} on {shape} with guesses {how}, the token after {token}")


def _check_first(verifier: Verifier) -> None:
    """Check the distribution of the first token, which follows the prompt."""
    chance, seen_V = seeded(5), torch.zeros(V, dtype=torch.float64)
    target_V = torch.randn(V, generator=chance, dtype=torch.float64)
    for run in range(RUNS):
        seen_V[_first(verifier, target_V, chance, run)] += 1
    _plausible(seen_V, verifier.sampling.probabilities(target_V[None])[0], f"{verifier!r}, its `first`")


def _plausible(seen_V: Tensor, p_V: Tensor, what: str) -> None:
    """Check counts against a distribution by chi-square; a correct verifier fails this once in millions of tests."""
    never = seen_V[p_V == 0].sum()
    assert never == 0, f"{what} is one that the target never gives"
    expected_V = p_V * seen_V.sum()
    common = expected_V >= 5
    if int(common.sum()) < 2:
        return
    chi = float(((seen_V - expected_V)[common] ** 2 / expected_V[common]).sum())
    degrees = int(common.sum())
    most = degrees + 5.5 * (2 * degrees) ** 0.5 + 10
    assert chi < most, (
        f"{what} does not have the target's distribution: {seen_V.tolist()}, expected {expected_V.round(decimals=1).tolist()}"
    )
