"""Prefill in which the number of rows after the last video or image does not change a bit of any of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from specvlm.engine.base import Inputs
from specvlm.engine.lean import ROWS, LeanText, Watch, run_pass
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass
from specvlm.models.pauses import Pause, Pauses
from specvlm.types import VideoPrompt

if TYPE_CHECKING:
    from specvlm.models.attention import AttentionCollector
    from specvlm.models.video_lm import VideoLM


def exact_prefilling(
    lean: LeanText,
    target: VideoLM,
    prompt: VideoPrompt,
    inputs: Inputs,
    cache: KVCache,
    collector: AttentionCollector | None,
    refill: Callable[[], None] | None,
) -> Pauses[Tensor]:
    """Fill a cache with a prompt that has text after the last video or image. Returns the next token's logits, (1, V).

    Hugging Face's modules run what comes before that text, in passes whose borders are fixed by slot. The lean pass
    runs the text by the arithmetic of steps, in slices whose borders are fixed by slot too. So a row's bits depend on
    its token, its position and the rows before it alone: where another question about a video, or a longer chat, begins
    with the same text, its rows are the same. Signals of the text are read from all of its slices, in order, so they
    are the same too.

    Arguments are those of `Engine.prefilling`.
    """
    (embeds_SD, positions_AS), begin, start = inputs, cache.length, prompt.text
    offset = int(positions_AS[:, -1].max()) + 1 - len(prompt)
    reads = collector is not None and collector.reads_text
    sliced = collector if reads and reads_slices(prompt, collector) else None
    end = len(prompt) if reads and sliced is None else start
    if end > begin:
        rows = slice(end - begin)
        watched = collector if sliced is None else sliced.without_text()
        given = (embeds_SD[rows], positions_AS[:, rows], cache, prompt.cut, watched)
        yield from target.prefilling(*given, joints=prompt.joints)
    cache.offset, cache.length = offset, start
    if refill is not None and sliced is None:
        refill()
    start, total = cache.length, len(prompt)
    for first, end in pairwise([start, *range(start // ROWS * ROWS + ROWS, total, ROWS), total]):
        watch = None if sliced is None else watching(sliced, lean, cache, (first - start, total - start))
        cache.length, tokens_Q = end, prompt.tokens[first:end]
        one = Pass(target, cache, tokens_Q, range(len(tokens_Q)), None, first, offset)
        rows_of = run_pass(lean, one, watch)
        if end < total:
            yield Pause(target.device)
    return rows_of.logits(1)


def reads_slices(prompt: VideoPrompt, collector: AttentionCollector | None) -> bool:
    """Whether signals of the text can be read from its slices. If not, Hugging Face's modules run the text for them first.

    The lean pass has queries and keys of text, but neither hidden states nor rows of an image.
    """
    return collector is not None and collector.by_steps and prompt.text == prompt.cut


def watching(collector: AttentionCollector, lean: LeanText, cache: KVCache, part: tuple[int, int]) -> Watch:
    """Return the function that passes each layer of a slice to a collector. The slice ends at the cache's length.

    part: As in `AttentionCollector.observe`.
    """

    def watch(layer: int, q_QHD: Tensor) -> None:
        keys, _ = cache.layer(layer)
        collector.observe(layer, q_QHD.transpose(0, 1)[None], keys[:, :, : cache.length], lean.width**-0.5, part)

    return watch
