"""Is the output the target's own? Compares it with `autoregressive`, and explains the first difference.

A check of several rows and a pass of one row add numbers in another order. In float32 that hardly ever shows; in
bfloat16 two tokens whose logits (almost) tie may change places. Such a tie is measured, never assumed:

1. The run is decoded again from its draft trees, by code that shares neither mask, nor positions, nor cache moves,
   nor the rule with it. An engine repeats its bits, so every token and every round must come out again.
2. What that decoding and the run do share is the model's pass over masked rows. It must lie as near the one-row pass
   as a plain causal pass over the same tokens does, on average over the whole answer.
3. No token may lie further below the target's one-row choice than rounding moves logits.

`tests/campaign/planted_faults.py` plants 42 faults on 40 prompts of real footage. Of the outputs that they changed, 3
of 977 were excused in bfloat16 and 0 of 920 in float32; of 130 genuine ties on CPU and H200 none was called a mismatch.

Limit: a fault that every pass of several rows shares, plain causal ones too, is seen from DRIFT on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.engine import Engine
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models.kv_cache import CacheLease, CachePool, KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import Verifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, GenerationOptions, Step, VideoPrompt

GREEDY = GreedyVerifier()
NEAR = 8  # best tokens whose logits, against each other, tell how far two passes lie apart
# Passes over guesses move logits as far as causal passes do: 0.4 to 1.1 times as far in all ties seen on CPU and H200
# (the embedded pairs and random 7B weights, both engines). A hidden slot or a wrong position moves them 1.3 to 10 times
# as far in bfloat16, 2,000 times in float32. RATIO is that of whole answers; SPREAD / sqrt(tokens) are three standard
# deviations of short ones.
RATIO, SPREAD = 1.2, 1.2
GAP = 12  # of a token below the one-row choice, over the drift: 6.0 at most in the same ties
LEAST = 0.125  # of a rounding of the largest logit: what the drift is taken for where a few tokens happen to move less
PIECES = 4  # of a prefill, where a third right pass is wanted
# What no drift may pass, relative to the largest logit. Seen in 16 bits: 0.3 of a rounding in the embedded pairs, 1.1
# in a 7B model; in float32 2.6. It grows with the root of the number of layers.
DRIFT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Comparison:
    """verdict: identical, tie or mismatch. token: index of the first difference, or of the first fault.

    candidates: what came out there, and what the target prefers in a one-row pass; gap, gap_many_rows: by how much it prefers
    the second to the first in a one-row and in a many-row pass, in logits (below 0 where the latter decides for the first);
    drift: how far rounding moves a logit against the others, on average over the answer. ties: tokens of the output that
    are not the target's one-row choice. exact: by the engine's arithmetic no tree changes a bit of the target's rows.
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


@torch.inference_mode()
def compare(
    target: VideoLM,
    prompt: VideoPrompt,
    baseline: Sequence[int],
    output: Sequence[int],
    caches: CachePool | None = None,
    engine: Engine | None = None,
    steps: Sequence[Step] = (),
    verifier: Verifier = GREEDY,
    options: GenerationOptions = GenerationOptions(),  # noqa: B008
) -> Comparison:
    """Tie: a right decoding of the same draft trees gives this very output, and rounding explains where it differs.

    Costs nothing when identical; else a prefill, a one-row pass a token, a pass over the answer and a pass a round, and
    where these look like a fault the first two again.

    Args:
        caches: memory to use again.
        engine: the one that the output came from, since its arithmetic is what is judged: one that rounds rows to 8 bits
            is another model's.
        steps: the run's, whose tokens are the output. Without them a pass over the answer stands for those of the run: a
            fault that moves logits no further than rounding does is then taken for a tie.
        verifier: the run's.
        options: what the run asked for.
    """
    first, exact = alike(output, baseline), bool(engine and engine.exact(target))
    if first == len(output) == len(baseline):
        return Comparison("identical", exact=exact)
    if first == min(len(output), len(baseline)):
        return Comparison("mismatch", first, reason=f"{len(output)} tokens came out, the target alone gives {len(baseline)}")
    if steps and [token for step in steps for token in step.tokens] != list(output):
        return Comparison("mismatch", first, reason="the rounds do not add up to the output")
    if exact:
        why = f"{output[first]} came out, the target alone gives {baseline[first]}, and this engine is exact by construction"
        return Comparison("mismatch", first, reason=why, candidates=(output[first], baseline[first]))
    stop_ids = options.stop_ids_or(target.stop_ids)
    ended = output[-1] in stop_ids
    if stop_ids & set(output[:-1]) or (not ended and len(output) < len(baseline)):
        return Comparison("mismatch", first, reason="the output does not end where it should")
    with (caches or CachePool()).lease() as lease:
        passes = _Passes(target, prompt, output, steps, lease, engine or Engine(), options.repetition_penalty)
        return passes.judge(baseline[first], first, verifier)


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers begin with in common."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


class _Wrong(Exception):
    """A token, or a round, that a right decoding does not have: at which token, and why."""


class _Passes:
    """The output's logits by several passes behind one prefill, with the penalty.

    Shape suffixes: T tokens of the output, M tree nodes, K watched tokens, V vocabulary.
    """

    def __init__(
        self,
        target: VideoLM,
        prompt: VideoPrompt,
        output: Sequence[int],
        steps: Sequence[Step],
        caches: CacheLease,
        engine: Engine,
        penalty: float | None,
    ) -> None:
        self.target, self.prompt, self.output, self.engine, self.steps = target, prompt, list(output), engine, steps
        self.penalty = penalty
        widest = max((len(step.tree) for step in steps if step.tree is not None), default=0)
        self.cache = caches.take("target", target, len(prompt) + len(output) + widest)
        self.inputs = target.embed(prompt, target.features(prompt)), target.positions(prompt)
        self.first_1V = target.head(target.prefill(*self.inputs, self.cache, prompt.cut)[None])

    def judge(self, preferred: int, first: int, verifier: Verifier) -> Comparison:
        """preferred: the baseline's token, at the first one that differs."""
        ids_TK, one_TK, scale = list[list[int]](), list[Tensor](), 0.0
        for at, row_V in enumerate(self._penalised(self._one_row())):
            best = preferred if at == first else int(row_V.argmax())
            ids_TK.append([self.output[at], best, *row_V.topk(min(NEAR, len(row_V))).indices.tolist()])
            one_TK.append(row_V[ids_TK[-1]])
            scale = max(scale, float(row_V.abs().max()))
        causal_TK = [row_V[ids] for row_V, ids in zip(self._penalised(self._causal()), ids_TK, strict=True)]
        many_TK, wrong = list[Tensor](), None
        try:
            for row_V in self._replayed(verifier) if self.steps else ():
                many_TK.append(row_V[ids_TK[len(many_TK)]])
        except _Wrong as found:
            wrong = found.args
        tables = _table(one_TK), _table(causal_TK), _table(many_TK if self.steps else causal_TK)
        return _Evidence(ids_TK, *tables, first, wrong).verdict(scale, self.target.dtype, self._prefilled_otherwise)

    def _prefilled_otherwise(self, ids_TK: list[list[int]]) -> Tensor:
        """(T, K) by one-row passes behind a prefill in other pieces, whose keys and values are rounded otherwise."""
        self.cache.clear()
        self.target.prefill(*self.inputs, self.cache, self.prompt.cut, chunk=max(1, len(self.prompt) // PIECES))
        return _table([row_V[ids] for row_V, ids in zip(self._penalised(self._one_row()), ids_TK, strict=True)])

    def _penalised(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """(V,) a token, which have seen the prompt and the output before it."""
        penalty = RepetitionPenalty.of(self.target, self.prompt, self.penalty)
        for row_V, token in zip(rows, self.output, strict=True):
            yield penalty(row_V[None])[0]
            penalty.add(torch.tensor([token]))

    def _behind_the_prompt(self) -> KVCache:
        self.cache.length = len(self.prompt)
        return self.cache

    def _one_row(self) -> Iterator[Tensor]:
        cache = self._behind_the_prompt()
        yield self.first_1V[0]
        for token in self.output[:-1]:
            yield self.engine.append(self.target, torch.tensor([token]), cache)[0]

    def _causal(self) -> Iterator[Tensor]:
        cache = self._behind_the_prompt()
        yield self.first_1V[0]
        if len(self.output) > 1:
            yield from self.engine.append(self.target, torch.tensor(self.output[:-1]), cache)

    def _replayed(self, verifier: Verifier) -> Iterator[Tensor]:
        """The rows that a right decoding of the same trees goes by. Raises _Wrong behind one that says another token."""
        penalty = RepetitionPenalty.of(self.target, self.prompt, self.penalty)

        def said(logits_V: Tensor) -> Iterator[Tensor]:
            row_V = penalty(logits_V[None])[0]
            yield row_V
            if (token := int(row_V.argmax())) != self.output[at]:
                raise _Wrong(at, f"the same pass, done again, gives token {token}")
            penalty.add(torch.tensor([token]))

        cache, at = self._behind_the_prompt(), 0
        yield from said(self.first_1V[0])
        for step in self.steps[1:]:
            base, spelled = cache.length, self.output[at : at + len(step.tokens)]
            tree = DraftTree(torch.tensor(spelled[:1]), (-1,)) if step.tree is None else step.tree
            tokens, ways = tree.tokens.tolist(), map(tree.way_to, range(len(tree)))
            way = max((w for w in ways if [tokens[node] for node in w] == spelled[: len(w)]), key=len, default=())
            if not way:
                raise _Wrong(at + 1, "its round did not begin with the last token")
            logits_MV = self.engine.rescore(self.target, tree.to(self.target.device), cache)
            for node in way:
                at += 1
                yield from said(logits_MV[node])
            if len(way) < len(spelled):
                raise _Wrong(at + 1, "it was not guessed, and comes out of no row")
            more = (tokens[node] for node, parent in enumerate(tree.parents) if parent == way[-1])
            if step.full and type(verifier) is GreedyVerifier and self.output[at] in more:
                raise _Wrong(at, "its round ends though the guess behind it was right")
            _keep(cache, base, way)


def _keep(cache: KVCache, base: int, way: Sequence[int]) -> None:
    """As `KVCache.keep`, whose slips it does not share."""
    for store in cache.stores:
        for tensor in store:
            tensor[:, :, :, base : base + len(way)] = tensor[:, :, :, [base + node for node in way]]
    cache.length = base + len(way)


def _table(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([row_K.double().cpu() for row_K in rows])


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Logits of some tokens by three passes, (T, K) each, with ids: what came out, what is preferred, the best ones.

    first: the token that first differs. wrong: where the run did not come out again, and why; many_TK ends there.
    """

    ids_TK: list[list[int]]
    one_TK: Tensor
    causal_TK: Tensor
    many_TK: Tensor
    first: int
    wrong: tuple[int, str] | None

    def drift(self, other_TK: Tensor) -> float:
        """How far the best tokens' logits moved against each other from the one-row pass, on average over the answer."""
        moved_TK = (other_TK - self.one_TK[: len(other_TK)])[1:, 2:]  # the first token comes of the prefill
        return float((moved_TK - moved_TK.mean(1, True)).square().mean(1).sqrt().mean()) if len(moved_TK) else 0.0

    def verdict(self, scale: float, dtype: torch.dtype, otherwise: Callable[[list[list[int]]], Tensor]) -> Comparison:
        """scale: the largest logit. otherwise: gives one more right pass, where that is needed."""
        many, room = self.drift(self.many_TK), RATIO + SPREAD / max(1, len(self.one_TK) - 1) ** 0.5
        drift = max(self.drift(self.causal_TK), torch.finfo(dtype).eps * scale * LEAST)
        if self.wrong is None and many > drift * room:
            drift = max(drift, self.drift(otherwise(self.ids_TK)))
        wrong = self.wrong or self._excess(many, drift, room, DRIFT[dtype] * scale)
        at, why = wrong or (self.first, "")
        got, preferred = self.ids_TK[at][:2]
        gap = float(self.one_TK[at, 2:].max() - self.one_TK[at, 0])
        lead = float(self.many_TK[at, 1] - self.many_TK[at, 0]) if at < len(self.many_TK) else None
        ties = sum(token != best for token, best, *_ in self.ids_TK)
        return Comparison("mismatch" if wrong else "tie", at, gap, drift, why, (got, preferred), lead, ties)

    def _excess(self, many: float, drift: float, room: float, most: float) -> tuple[int, str] | None:
        """What rounding does not explain, and where. many, drift: of passes over guesses, and of others."""
        if not (drift <= most and many <= most):
            return self.first, f"passes over several rows move logits by {max(drift, many):.1g}, more than rounding does"
        if not many <= drift * room:
            return self.first, f"passes over guesses move logits by {many:.1g}, rounding explains {drift:.1g}"
        below_T = torch.stack([table[:, 2:].max(1).values - table[:, 0] for table in (self.one_TK, self.many_TK)]).max(0).values
        below_T[self.first] = max(below_T[self.first], self.one_TK[self.first, 2:].max() - self.one_TK[self.first, 1])
        if not bool((below_T <= GAP * drift).all()):
            at = int(below_T.argmax())
            return at, f"the target prefers another token by {below_T[at]:.1g}, rounding explains {drift:.1g}"
        return None
