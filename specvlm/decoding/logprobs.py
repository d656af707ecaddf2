"""Log-probabilities of an answer's tokens, from the target's own logits.

Shape suffixes: T tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specvlm.decoding.output import Output
from specvlm.engine.base import Request
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Jobs, Pass, Rows
from specvlm.models.video_lm import VideoLM
from specvlm.types import Step, TokenLogprobs

AT_ONCE = 64  # rows whose logits are held at once


def with_logprobs(step: Step, output: Output, request: Request, logits_1V: Tensor, count: int | None) -> Jobs[Step]:
    """Add the log-probabilities of the answer to its last step; return any other step unchanged.

    logits_1V: Logits of the prefill. count: As in `logprobs_of`; None adds none.
    """
    if count is None or not output.done:
        return step
    target, cache = request.target, request.cache
    return replace(step, logprobs=(yield from logprobs_of(target, cache, request.start, logits_1V, output.tokens, count)))


def logprobs_of(
    target: VideoLM, cache: KVCache, start: int, logits_1V: Tensor, tokens: Sequence[int], count: int
) -> Jobs[tuple[TokenLogprobs, ...]]:
    """Run the target over an answer once more, in one causal pass, and return the log-probabilities of its tokens.

    They are taken from the plain logits, without penalty, temperature or other settings.

    Args:
        target: The target.
        cache: Its cache, which holds the prompt. The rows after it are overwritten.
        start: Number of tokens in the prompt.
        logits_1V: Logits of the prefill.
        tokens: The answer.
        count: Number of most likely tokens to return for each position.
    """
    rows = None
    if len(tokens) > 1:
        ids = torch.tensor(tokens[:-1])
        rows = yield Pass(target, cache, ids, range(len(ids)), None, start, cache.offset)
    found = []
    for token, logits_V in zip(tokens, _logits(logits_1V, rows), strict=True):
        logprobs_V = torch.log_softmax(logits_V.to(torch.promote_types(logits_V.dtype, torch.float32)), -1)
        values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(TokenLogprobs(token, float(logprobs_V[token]), top))
    return tuple(found)


def _logits(first_1V: Tensor, rows: Rows | None) -> Iterator[Tensor]:
    """Yield the (V,) logits of each token, computed a few rows at a time, since (T, V) values may take gigabytes."""
    yield from first_1V
    if rows is not None:
        for hidden_QD in rows.hidden_QD.split(AT_ONCE):
            yield from rows.head(hidden_QD)
