"""Prefill the target with a prompt, once for a request or once for several that share the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

from torch import Tensor

from specvlm.decoding.timing import Clock
from specvlm.engine import Engine
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import CachePool, KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.strategies.fence import inside
from specvlm.types import Features, VideoPrompt


class Prefilled(NamedTuple):
    """What a shared prefill leaves besides the rows in the cache.

    Attributes:
        features_ND: Video features.
        logits_1V: Logits of the next token.
        collector: Signals recorded on the way, or None.
    """

    features_ND: Tensor | Features
    logits_1V: Tensor
    collector: AttentionCollector | None


def prefill(
    target: VideoLM, prompt: VideoPrompt, cache: KVCache, clock: Clock, collector: AttentionCollector | None = None,
    engine: Engine | None = None,
) -> tuple[Tensor | Features, Tensor]:  # fmt: skip
    """Fill the target's cache with the prompt. Returns the video features (N, D) and the next token's logits (1, V)."""
    features_ND = target.features(prompt, sight=collector.sight) if collector and collector.sight else target.features(prompt)
    embeds_SD = target.embed(prompt, features_ND)
    if collector is not None:
        with inside(getattr(collector.weigh, "__self__", "pruner")):
            collector.weigh_rows(embeds_SD[prompt.cut :], features_ND, target.ranks)
    clock.mark("embed")
    return features_ND, (engine or Engine()).prefill(target, prompt, (embeds_SD, target.positions(prompt)), cache, collector)


class SharedPrefill:
    """One prefill of the target for `count` requests that share prompt and strategies.

    The first request fills a cache of its own, from which each of them copies. The cache is given back after the last
    copy, or by `close` if a request ended before it began.
    """

    def __init__(self, target: VideoLM, caches: CachePool, count: int) -> None:
        self._target, self._left = target, count
        self._lease, self._closed = caches.lease(), False
        self._held: tuple[KVCache, Prefilled] | None = None

    def fill(
        self,
        cache: KVCache,
        slots: int,
        make: Callable[[KVCache], tuple[Tensor | Features, Tensor]],
        collector: AttentionCollector | None,
    ) -> Prefilled:
        """Fill a request's cache.

        Args:
            cache: The request's cache, empty.
            slots: Number of tokens in the prompt.
            make: Runs `prefill` on an empty cache.
            collector: What `make` collects signals with.
        """
        if self._closed:  # the request is about to be cancelled, or the last one had its copy
            return Prefilled(*make(cache), collector)
        try:
            if (held := self._held) is None:
                source = self._lease.take("prefix", self._target, slots)
                held = self._held = source, Prefilled(*make(source), collector)
            source, found = held
            cache.copy(source)
            self._left -= 1
        except BaseException:
            self._held = None
            self._lease.release()
            raise
        if self._left == 0 or self._closed:  # another thread may have closed it meanwhile
            self.close()
        return found._replace(logits_1V=found.logits_1V.clone())  # a verifier may write to them

    def close(self) -> None:
        """Give the cache back."""
        self._closed, self._held = True, None
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
