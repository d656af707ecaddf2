"""Is the output the target's own? Compares it with `autoregressive` and explains the first difference.

A check of several rows and a pass of one row add numbers in another order. In float32 that hardly ever shows; in
bfloat16 two tokens whose logits (almost) tie may change places. Such a tie is measured, never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.models.video_lm import VideoLM
from specvlm.types import VideoPrompt

# How far two orders of summation may drift apart, relative to the largest logit, before it is a fault and no rounding.
DRIFT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """verdict: identical, tie or mismatch. token: index of the first difference; gap: by how much the target prefers
    its own token there, in logits; drift: largest change of any logit between one-row and many-row passes."""

    verdict: str
    token: int | None = None
    gap: float | None = None
    drift: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.verdict == "identical":
            return "identical"
        if self.verdict == "tie":
            return f"numeric tie at token {self.token} (gap {self.gap:.1g})"
        return f"MISMATCH at token {self.token}: {self.reason}"


@torch.inference_mode()
def compare(target: VideoLM, prompt: VideoPrompt, baseline: Sequence[int], output: Sequence[int]) -> Comparison:
    """Tie: the gap is within what the two ways of computing the same logits differ by, and that difference is rounding."""
    shorter = min(len(output), len(baseline))
    at = next((i for i in range(shorter) if output[i] != baseline[i]), shorter)
    if at == len(output) == len(baseline):
        return Comparison("identical")
    if at == shorter:
        return Comparison("mismatch", at, reason=f"{len(output)} tokens came out, the target alone gives {len(baseline)}")
    if at == 0:
        return Comparison("mismatch", at, reason="the first token comes from the same prefill in both")
    one_row_V, many_rows_V = (_logits_after(target, prompt, baseline[:at], step) for step in (1, at))
    scale, epsilon = float(one_row_V.abs().max()), torch.finfo(target.dtype).eps
    drift = float((one_row_V - many_rows_V).abs().max())
    gap = float(one_row_V[baseline[at]] - one_row_V[output[at]])
    if drift > DRIFT[target.dtype] * scale:
        return Comparison(
            "mismatch", at, gap, drift, f"one-row and many-row passes differ by {drift:.1g}, more than rounding explains"
        )
    if gap > 4 * drift + epsilon * scale:
        return Comparison(
            "mismatch", at, gap, drift, f"the target prefers its own token by {gap:.1g}, rounding explains {drift:.1g}"
        )
    return Comparison("tie", at, gap, drift)


def _logits_after(target: VideoLM, prompt: VideoPrompt, tokens: Sequence[int], step: int) -> Tensor:
    """(V,) in float64, behind prompt and tokens, the tokens fed `step` rows a pass."""
    cache = target.new_cache(len(prompt) + len(tokens))
    target.prefill(target.embed(prompt, target.features(prompt)), target.positions(prompt), cache, prompt.cut)
    logits = torch.empty(0)
    for start in range(0, len(tokens), step):
        rows = torch.tensor(tokens[start : start + step])
        seen = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        logits = target.append(rows, range(len(rows)), seen, cache)[-1]
    return logits.double()
