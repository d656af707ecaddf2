"""Check that an output is the target's own: compare it with `autoregressive` and explain the first difference.

A pass over several rows sums in a different order than a pass over one row. In float32 the difference rarely shows; in
bfloat16 two tokens with (nearly) equal logits may swap places. Such a numeric tie is measured, never assumed:

1. The run is replayed from its draft trees, by other code for masks, positions, cache moves and acceptance (except
   the noise and warping of a coupled rule). An engine is deterministic, so the replay must give the same tokens in
   every round.
2. For the logits, replay and run share only the model's pass over masked rows and the repetition penalty. On average
   over the answer, the replayed logits must be about as close to those of one-row passes as the logits of a plain
   causal pass over the same tokens are (`evidence.RATIO`).
3. No token of the output may be further below the target's choice, in the one-row passes or in the replay, than a
   multiple (`evidence.GAP`) of the distance that rounding moves logits on average.

`tests/campaign/planted_faults.py` plants 42 faults, on 40 prompts of real footage. Of the outputs that they changed, 3
of 977 were called ties in bfloat16 and 0 of 920 in float32. Of 130 genuine ties on CPU and H200, none was called a
mismatch.

Limit: a fault common to all passes over several rows, plain causal ones included, is detected only if it moves logits
further than `evidence.DRIFT`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specvlm.decoding.evidence import Choice, Comparison, Evidence
from specvlm.decoding.output import Output
from specvlm.engine import Engine
from specvlm.engine.adjusted import penalty_for
from specvlm.models.kv_cache import CacheLease, CachePool, KVCache
from specvlm.models.text_passes import CHUNK
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import Sampling, Verifier
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, GenerationOptions, Step, VideoPrompt

GREEDY = GreedyVerifier()
ARGMAX = Sampling()
NEAR = 8  # number of best tokens of a row whose logits measure how far two passes differ
PIECES = 4  # approximate number of chunks of the repeated prefill


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
    sampling: Sampling = ARGMAX,
) -> Comparison:
    """Compare an output with the target's own and classify the first difference as a numeric tie or a mismatch.

    The difference is a tie if a correct replay of the same draft trees gives the same output and rounding explains it.
    With an engine that is exact by construction, every difference is a mismatch.

    Free if the two are identical, or if the tokens alone show the mismatch. Otherwise the check costs a prefill, a
    one-row pass per token, a pass over the answer and a pass per round. If the replayed logits are too far off, the
    prefill and the one-row passes are repeated.

    Args:
        target: The model whose output is checked.
        prompt: The request's prompt.
        baseline: Tokens of `autoregressive`.
        output: Tokens of the run.
        caches: Caches to reuse; new ones by default.
        engine: The engine that made the output; the eager one by default. It also runs the passes of the check, so its
            arithmetic counts as that of the target: an engine that rounds activations to 8 bits computes a different
            model.
        steps: The run's steps, whose tokens are the output. Without them a plain causal pass stands in for the replay,
            and a fault that moves logits no further than rounding does is called a tie.
        verifier: The run's verifier.
        options: The run's options.
        sampling: The run's rule: greedy, or coupled.

    Returns:
        The verdict "identical", "tie" or "mismatch", with the index of the first difference and the reason.
    """
    first, exact = alike(output, baseline), _exact(engine, target, prompt)
    if first == len(output) == len(baseline):
        return Comparison("identical", exact=exact)
    if first == min(len(output), len(baseline)):
        return Comparison("mismatch", first, reason=f"{len(output)} tokens, where the target alone gives {len(baseline)}")
    if steps and [token for step in steps for token in step.tokens] != list(output):
        return Comparison("mismatch", first, reason="the rounds do not add up to the output")
    if exact:
        why = f"got token {output[first]}, the target alone gives {baseline[first]}, and this engine is exact by construction"
        return Comparison("mismatch", first, reason=why, candidates=(output[first], baseline[first]))
    end = Output.of(target, replace(options, max_new_tokens=len(output) + 1))
    if len(end.take(output)) < len(output) or (not end.done and len(output) < len(baseline)):
        return Comparison("mismatch", first, reason="the output does not end where it should")
    with (caches or CachePool()).lease() as lease:
        rule = Choice(sampling, options.seed)
        passes = _Passes(target, prompt, output, steps, lease, engine or Engine(), options, rule)
        return passes.judge(baseline[first], first, verifier)


def _exact(engine: Engine | None, target: VideoLM, prompt: VideoPrompt) -> bool:
    """Whether any difference is an error: the engine is exact, and prefills this prompt the same way in every run.

    An exact engine runs the text after the last video or image in fixed slices. Rows between the last video and that
    text, or all rows if there is no video, are prefilled in passes of at most CHUNK rows, but in a single pass if a run
    collects the attention of all rows. So with more than CHUNK such rows, two runs may round differently.
    """
    once = 0 < prompt.cut == prompt.text or len(prompt) - prompt.cut <= CHUNK
    return engine is not None and engine.exact(target) and once


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two answers."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


class _ReplayError(Exception):
    """The replay differs from the run. Arguments: the index of the output's token, and the reason."""


class _Passes:
    """Computes logits of the output in several kinds of pass, with the request's changes to logits applied.

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
        options: GenerationOptions,
        rule: Choice,
    ) -> None:
        self.rule = rule
        self.target, self.prompt, self.output, self.engine, self.steps = target, prompt, list(output), engine, steps
        self.options = options
        widest = max((len(step.tree) for step in steps if step.tree is not None), default=0)
        self.cache = caches.take("target", target, len(prompt) + len(output) + widest)
        self.inputs = target.embed(prompt, target.features(prompt)), target.positions(prompt)
        self.first_1V = engine.prefill(target, prompt, self.inputs, self.cache)

    def judge(self, preferred: int, first: int, verifier: Verifier) -> Comparison:
        """Run the passes and compare. preferred: the baseline's token at `first`, the index of the first difference."""
        ids_TK, one_TK, scale = list[list[int]](), list[Tensor](), 0.0
        for at, row_V in enumerate(self._penalised(self._one_row())):
            best = preferred if at == first else self.rule.choice(row_V, at)
            ids_TK.append([self.output[at], best, *row_V.topk(min(NEAR, len(row_V))).indices.tolist()])
            one_TK.append(self._watched(row_V, at, ids_TK[at]))
            scale = max(scale, float(row_V.abs().max()))
        rows = enumerate(self._penalised(self._causal()))
        causal_TK = [self._watched(row_V, at, ids) for (at, row_V), ids in zip(rows, ids_TK, strict=True)]
        many_TK, wrong = list[Tensor](), None
        try:
            for row_V in self._replayed(verifier) if self.steps else ():
                many_TK.append(self._watched(row_V, len(many_TK), ids_TK[len(many_TK)]))
        except _ReplayError as found:
            wrong = found.args
        tables = _table(one_TK), _table(causal_TK), _table(many_TK if self.steps else causal_TK)
        return Evidence(ids_TK, *tables, first, wrong).verdict(scale, self.target.dtype, self._prefilled_otherwise)

    def _prefilled_otherwise(self, ids_TK: list[list[int]]) -> Tensor:
        """Repeat the one-row passes after a prefill in other chunks, whose keys and values round differently.

        Returns (T, K) gaps and logits, as in `Evidence`.
        """
        self.cache.clear()
        self.target.prefill(*self.inputs, self.cache, self.prompt.cut, chunk=max(1, len(self.prompt) // PIECES))
        rows = enumerate(self._penalised(self._one_row()))
        return _table([self._watched(row_V, at, ids) for (at, row_V), ids in zip(rows, ids_TK, strict=True)])

    def _watched(self, row_V: Tensor, at: int, ids_K: list[int]) -> Tensor:
        """Measure the watched tokens of a row, (K,): gaps of the first two, logits of the others.

        ids_K: The output's token, the preferred token, and the row's best tokens.
        """
        gaps = [self.rule.gap(row_V, at, token) for token in ids_K[:2]]
        return torch.cat([torch.tensor(gaps, dtype=torch.float64), row_V[ids_K[2:]].double().cpu()])

    def _penalised(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Apply the repetition penalty to the (V,) logits of each token, given the prompt and the output before it."""
        penalty = penalty_for(self.target, self.prompt, self.options)
        for row_V, token in zip(rows, self.output, strict=True):
            yield penalty(row_V[None])[0]
            penalty.add(torch.tensor([token]))

    def _rewound_cache(self) -> KVCache:
        """Return the cache, cut back to the prompt."""
        self.cache.length = len(self.prompt)
        return self.cache

    def _one_row(self) -> Iterator[Tensor]:
        """Yield the (V,) logits of each token: the first from the prefill, the others from passes of one row."""
        cache = self._rewound_cache()
        yield self.first_1V[0]
        for token in self.output[:-1]:
            yield self.engine.append(self.target, torch.tensor([token]), cache)[0]

    def _causal(self) -> Iterator[Tensor]:
        """Yield the (V,) logits of each token: the first from the prefill, the others from one causal pass."""
        cache = self._rewound_cache()
        yield self.first_1V[0]
        if len(self.output) > 1:
            yield from self.engine.append(self.target, torch.tensor(self.output[:-1]), cache)

    def _replayed(self, verifier: Verifier) -> Iterator[Tensor]:
        """Replay the draft trees and yield the penalised (V,) logits that give each token.

        Raises _ReplayError if a token differs, or if a round does not fit its tree.
        """
        penalty = penalty_for(self.target, self.prompt, self.options)

        def checked(logits_V: Tensor) -> Iterator[Tensor]:
            """Yield the penalised logits of the output's token `at`, then check that they give this token."""
            row_V = penalty(logits_V[None])[0]
            yield row_V
            if (token := self.rule.choice(row_V, at)) != self.output[at]:
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
            if step.full and type(verifier) in (GreedyVerifier, CoupledVerifier) and self.output[at] in more:
                raise _ReplayError(at, "its round ends although the next guess was right")
            _keep(cache, base, path)


def _keep(cache: KVCache, base: int, path: Sequence[int]) -> None:
    """Move rows as `KVCache.keep` does. Shares no code with it, so that the replay reveals its bugs."""
    for store in cache.stores:
        for tensor in store:
            tensor[:, :, :, base : base + len(path)] = tensor[:, :, :, [base + node for node in path]]
    cache.length = base + len(path)


def _table(rows: Sequence[Tensor]) -> Tensor:
    """Stack (K,) rows to a (T, K) table."""
    return torch.stack(list(rows))
