"""Prefill in which the rows after the video do not depend on how many they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from specvlm.engine.base import Engine, Inputs
from specvlm.engine.lean import ROWS
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass
from specvlm.models.pauses import Pauses
from specvlm.types import VideoPrompt

if TYPE_CHECKING:
    from specvlm.models.attention import AttentionCollector
    from specvlm.models.video_lm import VideoLM


def exact_prefilling(
    engine: Engine,
    target: VideoLM,
    prompt: VideoPrompt,
    inputs: Inputs,
    cache: KVCache,
    collector: AttentionCollector | None,
    refill: Callable[[], None] | None,
) -> Pauses[Tensor]:
    """Fill a cache with a prompt that has text after the last video or image. Returns the next token's logits, (1, V).

    Hugging Face's modules run what comes before that text, in passes whose borders are fixed by slot. They also run the
    text itself if signals are read from it. Then the engine runs it by the arithmetic of steps, in slices whose borders
    are fixed by slot too. So a row's bits depend on its token, its position and the rows before it alone: the text of a
    kept video with another question, or of a longer chat, has the same bits.

    Arguments are those of `Engine.prefilling`.
    """
    (embeds_SD, positions_AS), begin, start = inputs, cache.length, prompt.text
    offset = int(positions_AS[:, -1].max()) + 1 - len(prompt)
    end = start if collector is None or not collector.reads_text else len(prompt)
    if end > begin:
        rows = slice(end - begin)
        given = (embeds_SD[rows], positions_AS[:, rows], cache, prompt.cut, collector)
        yield from target.prefilling(*given, joints=prompt.joints)
    cache.offset, cache.length = offset, start
    if refill is not None:
        refill()
    start = cache.length
    for first, end in pairwise([start, *range(start // ROWS * ROWS + ROWS, len(prompt), ROWS), len(prompt)]):
        tokens_Q = prompt.tokens[first:end]
        (rows_of,) = engine.run([Pass(target, cache, tokens_Q, range(len(tokens_Q)), None, first, cache.offset)])
    return rows_of.logits(1)
