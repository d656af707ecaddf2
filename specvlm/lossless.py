"""Is the output the target's own? Compares it with `autoregressive`, and explains the first difference.

A check of several rows and a pass of one row add numbers in another order. In float32 that hardly ever shows; in
bfloat16 two tokens whose logits (almost) tie may change places. Such a tie is measured, never assumed, and behind one
every further token is held to the target's choice given the output so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.cache import CachePool
from specvlm.engine import Engine
from specvlm.models.video_lm import VideoLM
from specvlm.penalty import RepetitionPenalty
from specvlm.types import VideoPrompt

# How far two orders of summation may drift apart, relative to the largest logit, before it is a fault and no rounding.
DRIFT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """verdict: identical, tie or mismatch. token: index of the first difference, or of the first fault behind it.

    candidates: what came out there, and what the target prefers in a one-row pass; gap, gap_many_rows: by how much it prefers
    the second to the first in a one-row and in a many-row pass, in logits (below 0 where the latter decides for the first);
    drift: largest change of any logit between the two.
    """

    verdict: str
    token: int | None = None
    gap: float | None = None
    drift: float | None = None
    reason: str = ""
    candidates: tuple[int, int] | None = None
    gap_many_rows: float | None = None

    def __str__(self) -> str:
        if self.verdict == "identical":
            return "identical"
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
) -> Comparison:
    """Tie: from the first difference on, every token is the target's choice within what rounding does to that choice.

    Costs nothing when identical; else two prefills and a one-row pass a token. caches: memory to use again. engine: the one
    that the output came from, since its arithmetic is what is judged: one that rounds rows to 8 bits is another model's.
    """
    shorter = min(len(output), len(baseline))
    first = next((i for i in range(shorter) if output[i] != baseline[i]), shorter)
    if first == len(output) == len(baseline):
        return Comparison("identical")
    if first == shorter:
        return Comparison("mismatch", first, reason=f"{len(output)} tokens came out, the target alone gives {len(baseline)}")
    ended = output[-1] in target.stop_ids
    if target.stop_ids & set(output[:-1]) or (not ended and len(output) < len(baseline)):
        return Comparison("mismatch", first, reason="the output does not end where it should")
    tie = Comparison("identical")
    for at, one_row_V, many_rows_V in _both_ways(target, prompt, output, first, caches or CachePool(), engine or Engine()):
        scale, epsilon = float(one_row_V.abs().max()), torch.finfo(target.dtype).eps
        drift = float((one_row_V - many_rows_V).abs().max())
        got, preferred = output[at], baseline[at] if at == first else int(one_row_V.argmax())
        gap, gap_many = float(one_row_V.max() - one_row_V[got]), float(many_rows_V[preferred] - many_rows_V[got])
        seen = ((got, preferred), gap_many)
        if drift > DRIFT[target.dtype] * scale:
            why = f"one-row and many-row passes differ by {drift:.1g}, more than rounding explains"
            return Comparison("mismatch", at, gap, drift, why, *seen)
        if gap > 4 * drift + epsilon * scale:
            why = f"the target prefers another token by {gap:.1g}, rounding explains {drift:.1g}"
            return Comparison("mismatch", at, gap, drift, why, *seen)
        if at == first:
            tie = Comparison("tie", at, gap, drift, "", *seen)
    return tie


def _both_ways(
    target: VideoLM, prompt: VideoPrompt, output: Sequence[int], first: int, pool: CachePool, engine: Engine
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each token of the output from `first` on: its index and the logits (V,) before it, by one-row and by
    many-row passes, in float64."""
    penalty = RepetitionPenalty.of(target, prompt)
    embeds_SD, positions_AS = target.embed(prompt, target.features(prompt)), target.positions(prompt)
    caches = [pool.take(role, target, len(prompt) + len(output)) for role in ("target", "draft")]
    hiddens = [target.prefill(embeds_SD, positions_AS, cache, prompt.cut) for cache in caches]
    one_V, tokens = target.head(hiddens[0]), torch.tensor(output)
    rows = len(output) - 1
    many_TV = target.head(hiddens[1])[None]
    if rows:
        many_TV = torch.cat([many_TV, engine.append(target, tokens[:-1], caches[1])])
    for at in range(len(output)):
        if at >= first:
            yield at, penalty(one_V[None])[0].double(), penalty(many_TV[at][None])[0].double()
        if at < rows:
            penalty.add(tokens[at])
            one_V = engine.append(target, tokens[at : at + 1], caches[0])[0]
