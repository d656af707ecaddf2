"""Check that an output is the target's own: compare it with `autoregressive` and explain the first difference.

A pass over several rows sums in another order than a pass over one row. In float32 the difference rarely shows; in
bfloat16 two tokens with (nearly) equal logits may swap places. Such a numeric tie is measured, never assumed:

1. The run is replayed from its draft trees, by code that does not share its mask, positions, cache moves or
   acceptance rule. An engine is deterministic, so the replay must give the same tokens in every round.
2. The replay and the run share only the model's pass over masked rows. On average over the answer, its logits must be
   as close to those of the one-row pass as the logits of a plain causal pass over the same tokens are.
3. No token of the output may lie further below the target's one-row choice than rounding moves logits.

`tests/campaign/planted_faults.py` plants 42 faults, on 40 prompts of real footage. Of the outputs that they changed, 3
of 977 were called ties in bfloat16 and 0 of 920 in float32. Of 130 genuine ties on CPU and H200, none was called a
mismatch.

Limit: a fault common to all passes over several rows, plain causal ones included, is only detected beyond DRIFT.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.engine import Engine
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models.kv_cache import CacheLease, CachePool, KVCache
from specvlm.models.video_lm import CHUNK, VideoLM
from specvlm.strategies import Verifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, GenerationOptions, Step, VideoPrompt

GREEDY = GreedyVerifier()
NEAR = 8  # number of best tokens over whose logits, less their mean, the distance of two passes is measured
# Passes over guesses move logits about as far as causal passes do: 0.4 to 1.1 times as far in all ties seen on CPU and
# H200 (the embedded pairs and random 7B weights, both engines). A hidden slot or a wrong position moves them 1.3 to 10
# times as far in bfloat16, 2,000 times in float32. RATIO is the limit for long answers; SPREAD / sqrt(tokens) adds
# three standard deviations for short ones.
RATIO, SPREAD = 1.2, 1.2
GAP = 12  # most that a token may lie below the one-row choice, in units of drift; 6.0 was the most in the same ties
LEAST = 0.125  # lower bound of the drift, in roundings of the largest logit: a few tokens may happen to move less
PIECES = 4  # chunks of the prefill when a third correct pass is needed
# Largest drift allowed, relative to the largest logit. Seen in 16 bits: 0.3 of a rounding in the embedded pairs and 1.1
# in a 7B model; in float32: 2.6. The drift grows with the square root of the number of layers.
DRIFT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        verdict: identical, tie or mismatch.
        token: Index of the first difference, or of the first fault.
        gap: Logit of the target's best token less that of the output's token there, in a one-row pass.
        drift: How far rounding moves a logit relative to the others, on average over the answer.
        reason: Why it is a mismatch; empty otherwise.
        candidates: The output's token there, and the target's choice in a one-row pass.
        gap_many_rows: Logit of the second candidate less that of the first, in a pass over several rows. None if the
            replay did not reach that token.
        ties: Number of output tokens that are not the target's one-row choice.
        exact: Whether the engine computes the rows of a tree bit for bit as sequential steps would.
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
    """Compare an output with the target's own and classify the first difference as a numeric tie or a mismatch.

    It is a tie if a correct replay of the same draft trees gives the same output and rounding explains the difference.
    With an engine that is exact by construction, every difference is a mismatch.

    Free when the two are identical. Otherwise it costs a prefill, a one-row pass per token, a pass over the answer and
    a pass per round. If these look like a fault, the prefill and the one-row passes are repeated.

    Args:
        target: The model whose output is checked.
        prompt: The request's prompt.
        baseline: Tokens of `autoregressive`.
        output: Tokens of the run.
        caches: Caches to reuse.
        engine: The engine that made the output. It also runs the passes of the check, so its arithmetic counts as that
            of the target: an engine that rounds activations to 8 bits computes a different model.
        steps: The run's steps, whose tokens are the output. Without them a plain causal pass stands in for the replay,
            and a fault that moves logits no further than rounding does is called a tie.
        verifier: The run's verifier.
        options: The run's options.
    """
    first, exact = alike(output, baseline), _exact(engine, target, prompt)
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


def _exact(engine: Engine | None, target: VideoLM, prompt: VideoPrompt) -> bool:
    """Whether no tree may change a bit. A longer question may be prefilled in other pieces by a run whose pruner watches."""
    return engine is not None and engine.exact(target) and len(prompt) - prompt.cut <= CHUNK


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two answers."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


class _ReplayError(Exception):
    """The replay differs from the run. Arguments: the index of the token, and the reason."""


class _Passes:
    """Computes logits of the output in several kinds of pass after one prefill, with the repetition penalty applied.

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
        """Run the passes and compare. preferred: the baseline's token at `first`, the index of the first difference."""
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
        except _ReplayError as found:
            wrong = found.args
        tables = _table(one_TK), _table(causal_TK), _table(many_TK if self.steps else causal_TK)
        return _Evidence(ids_TK, *tables, first, wrong).verdict(scale, self.target.dtype, self._prefilled_otherwise)

    def _prefilled_otherwise(self, ids_TK: list[list[int]]) -> Tensor:
        """(T, K) logits of one-row passes after a prefill in other chunks, whose keys and values round differently."""
        self.cache.clear()
        self.target.prefill(*self.inputs, self.cache, self.prompt.cut, chunk=max(1, len(self.prompt) // PIECES))
        return _table([row_V[ids] for row_V, ids in zip(self._penalised(self._one_row()), ids_TK, strict=True)])

    def _penalised(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Apply the repetition penalty to the (V,) logits of each token, given the prompt and the output before it."""
        penalty = RepetitionPenalty.of(self.target, self.prompt, self.penalty)
        for row_V, token in zip(rows, self.output, strict=True):
            yield penalty(row_V[None])[0]
            penalty.add(torch.tensor([token]))

    def _rewound_cache(self) -> KVCache:
        """Return the cache, cut back to the prompt."""
        self.cache.length = len(self.prompt)
        return self.cache

    def _one_row(self) -> Iterator[Tensor]:
        """(V,) logits of each token, from passes of one row."""
        cache = self._rewound_cache()
        yield self.first_1V[0]
        for token in self.output[:-1]:
            yield self.engine.append(self.target, torch.tensor([token]), cache)[0]

    def _causal(self) -> Iterator[Tensor]:
        """(V,) logits of each token, from one causal pass over the whole output."""
        cache = self._rewound_cache()
        yield self.first_1V[0]
        if len(self.output) > 1:
            yield from self.engine.append(self.target, torch.tensor(self.output[:-1]), cache)

    def _replayed(self, verifier: Verifier) -> Iterator[Tensor]:
        """Replay the draft trees and yield the logits that give each token. Raises _ReplayError if a token differs."""
        penalty = RepetitionPenalty.of(self.target, self.prompt, self.penalty)

        def checked(logits_V: Tensor) -> Iterator[Tensor]:
            """Yield the penalised logits of token `at`, then check that they give this token."""
            row_V = penalty(logits_V[None])[0]
            yield row_V
            if (token := int(row_V.argmax())) != self.output[at]:
                raise _ReplayError(at, f"replaying the round gives token {token}")
            penalty.add(torch.tensor([token]))

        cache, at = self._rewound_cache(), 0
        yield from checked(self.first_1V[0])
        for step in self.steps[1:]:
            base, added = cache.length, self.output[at : at + len(step.tokens)]
            tree = DraftTree(torch.tensor(added[:1]), (-1,)) if step.tree is None else step.tree
            tokens, paths = tree.tokens.tolist(), map(tree.way_to, range(len(tree)))
            path = max((p for p in paths if [tokens[node] for node in p] == added[: len(p)]), key=len, default=())
            if not path:
                raise _ReplayError(at + 1, "its round did not begin with the last token")
            logits_MV = self.engine.rescore(self.target, tree.to(self.target.device), cache)
            for node in path:
                at += 1
                yield from checked(logits_MV[node])
            if len(path) < len(added):
                raise _ReplayError(at + 1, "it was not guessed, so no row of the pass gives it")
            more = (tokens[node] for node, parent in enumerate(tree.parents) if parent == path[-1])
            if step.full and type(verifier) is GreedyVerifier and self.output[at] in more:
                raise _ReplayError(at, "its round ends although the next guess was right")
            _keep(cache, base, path)


def _keep(cache: KVCache, base: int, path: Sequence[int]) -> None:
    """Do what `KVCache.keep` does, independently of it, so that a fault there shows."""
    for store in cache.stores:
        for tensor in store:
            tensor[:, :, :, base : base + len(path)] = tensor[:, :, :, [base + node for node in path]]
    cache.length = base + len(path)


def _table(rows: Sequence[Tensor]) -> Tensor:
    """(T, K) float64 on the host, from rows (K,)."""
    return torch.stack([row_K.double().cpu() for row_K in rows])


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Logits of the watched tokens from three kinds of pass, (T, K) each: one row, causal, many rows.

    The watched tokens of a row are the output's, the preferred one, then the NEAR best. first: index of the first
    difference. wrong: where and why the replay differs from the run, if it does; many_TK then ends there.
    """

    ids_TK: list[list[int]]
    one_TK: Tensor
    causal_TK: Tensor
    many_TK: Tensor
    first: int
    wrong: tuple[int, str] | None

    def drift(self, other_TK: Tensor) -> float:
        """Mean over rows of the RMS distance of the best tokens' logits from the one-row pass, less the row's mean."""
        moved_TK = (other_TK - self.one_TK[: len(other_TK)])[1:, 2:]  # the first token comes from the prefill
        return float((moved_TK - moved_TK.mean(1, True)).square().mean(1).sqrt().mean()) if len(moved_TK) else 0.0

    def verdict(self, scale: float, dtype: torch.dtype, otherwise: Callable[[list[list[int]]], Tensor]) -> Comparison:
        """Classify the difference. scale: the largest logit. otherwise: runs one more correct pass, if needed."""
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
        """Return where and why rounding cannot explain the output, else None.

        many: drift of the passes over guesses. drift: drift of the other correct passes. room: limit on
        many / drift. most: limit on many and on drift.
        """
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
