"""The result of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specvlm.decoding.text import AnswerText
from specvlm.models.video_lm import VideoLM
from specvlm.results import metrics
from specvlm.session.inputs import Reading
from specvlm.types import GenerationOptions, Step, TokenLogprobs


@dataclass(frozen=True)
class GenerationResult:
    """An answer and its statistics.

    Attributes:
        text: The answer, without special tokens and stop text.
        token_ids: Its token ids, including the stop id, or the tokens of the stop text.
        finish_reason: "stop" if a stop id or a stop text ended it, "length" if the token limit did.
        statistics: Numbers of tokens, frames and rounds, acceptance and times, under the same keys as in
            `summary.json`. Times are those of the request's own work; while several requests run, they include
            waiting for each other. `frames` is the number of frames read, None if the pixels were given processed.
        verdict: "identical", "numeric tie at token …" or "MISMATCH at token …: …", compared with the target alone;
            "sampled" or "lossy" if there is nothing to compare with; "not checked" without `check=True`.
        logprobs: Log-probabilities of each token by the target's plain logits, if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    statistics: dict[str, Any]
    verdict: str = "not checked"
    logprobs: tuple[TokenLogprobs, ...] | None = None


def result_of(
    target: VideoLM,
    reading: Reading,
    options: GenerationOptions,
    steps: Sequence[Step],
    verdict: str = "not checked",
) -> GenerationResult:
    """Build the result of a finished request."""
    tokens, text = metrics.tokens_of(steps), AnswerText(target.tokenizer, options.stop)
    pieces = [*(text.put(token) for token in tokens), text.end()]
    stopped = text.stopped or (bool(tokens) and tokens[-1] in options.stop_ids_or(target.stop_ids))
    reason = "stop" if stopped else "length"
    logprobs = steps[-1].logprobs if steps else None
    return GenerationResult("".join(pieces), tokens, reason, statistics_of(reading, steps), verdict, logprobs)


def statistics_of(reading: Reading, steps: Sequence[Step]) -> dict[str, Any]:
    """Compute `GenerationResult.statistics`."""
    times, count = metrics.times_of(steps), len(metrics.tokens_of(steps))
    return {
        "prompt_tokens": len(reading.prompt),
        "video_tokens": len(reading.prompt.video_index),
        "kept_tokens": next((len(step.keep) for step in steps if step.keep is not None), None),
        "frames": reading.frames,
        **metrics.reuse_of(steps),
        "new_tokens": count,
        **metrics.acceptance_of(steps),
        **metrics.speed(times, count),
        "times_s": times,
    }
