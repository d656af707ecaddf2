"""Start a draft on a GPU of its own while the target's prefill runs, instead of after it.

The host first queues the target's prefill up to the end of the video, which is nearly all of its work. While the
target's GPU is busy with that, the host queues the draft's start on the draft's GPU: the vision tower and, if the
pruner can choose by then, the prefill of the pruned prompt. The pruner can choose if it needs no signals of the
target's layers, or only those of the first layers. These also need the text after the video. So once the video has
passed those layers, the text runs through them ahead of the prefill, which later runs it again.

Shape suffixes: N video tokens, T tokens after the last video, D hidden size, A rotary axes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from specvlm.decoding.collect import collector_for, layers_read
from specvlm.decoding.selection import Selection, View
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import CacheLease, KVCache
from specvlm.models.pauses import Pauses
from specvlm.models.placement import apart
from specvlm.models.side_stream import Mark, SideStream
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import CODEC_SIGNALS, DraftContext, DraftPrefill
from specvlm.types import Features, GenerationOptions, KeepSet, VideoPrompt

T = TypeVar("T")
Inputs = tuple[Tensor | Features, Tensor]  # embeddings and positions


def has_own_gpu(draft: VideoLM, target: VideoLM) -> bool:
    """Whether a draft has a GPU of its own, and one process runs both draft and target."""
    return draft.device.type == "cuda" and target.ranks.size == 1 and apart(draft, target)


def early_start(
    selection: Selection,
    prompt: VideoPrompt,
    view: View,
    options: GenerationOptions,
    generator: torch.Generator,
    rows: int,
    free: bool,
) -> EarlyStart | None:
    """Make the early start of a request's draft, from the arguments of `EarlyStart`.

    Returns None if the draft has no GPU of its own, the drafter prefills or chooses tokens itself, or there is no
    video.
    """
    drafter, draft = selection.drafter, selection.drafting
    if draft is None or drafter.model != "draft" or drafter.prefills is not True or view.own or not prompt.cut:
        return None
    if not has_own_gpu(draft, selection.target):
        return None
    return EarlyStart(selection, draft, prompt, view, options, generator, selection.caches.lease(drafter=True), rows, free)


@dataclass(frozen=True)
class Ahead:
    """Input of a target's prefill beside which a draft starts.

    Attributes:
        features_ND: The target's video features.
        collector: Collector of the prefill's signals, if any are read.
        cache: The target's cache.
        text: Embeddings (T, D) and positions (A, T) of the tokens after the last video, on the target's device.
    """

    features_ND: Tensor | Features
    collector: AttentionCollector | None
    cache: KVCache
    text: Inputs


@dataclass(eq=False)
class EarlyStart(DraftPrefill, AbstractContextManager["EarlyStart"]):
    """Starts a request's draft. What has not been done early is done when the draft's session starts.

    The pruner keeps the same tokens as it would after the target's prefill. An exception is an exact engine, which runs
    the text in another way, so that signals of first layers may be rounded differently. Features computed before the
    pruner has chosen are those of all frames; later ones, those of the frames with kept tokens.

    Attributes:
        selection: Chooses the tokens to keep.
        draft: The draft.
        prompt: The prompt.
        view: How many tokens the drafter sees, and who chooses them.
        options: The request's options.
        generator: The request's random generator.
        lease: Holds the draft's cache until the session takes it over.
        rows: Slots of the draft's cache after those of prompt and answer.
        free: Whether the output is the same whatever is drafted (lossless, and greedy or coupled), so that the draft's
            values may be rounded differently from request to request.
        keep: The tokens that were kept, on the host, once they have been chosen early.
    """

    selection: Selection
    draft: VideoLM
    prompt: VideoPrompt
    view: View
    options: GenerationOptions
    generator: torch.Generator
    lease: CacheLease
    rows: int
    free: bool
    keep: KeepSet | None = None

    def __post_init__(self) -> None:
        pruner, target = self.selection.pruner, self.selection.target
        self._needs = pruner.needs if self.view.pruned else frozenset[str]()
        self._layers = layers_read(pruner, target) if self.view.pruned else 0
        self._at_once = not self._needs - CODEC_SIGNALS  # the choice waits for nothing
        # Signals of a later stage of a pipeline lie on another device.
        self._early = self._layers < target.layers and (not self._layers or len(target.stages) == 1)
        self._side = SideStream(target.device)
        self._inner: DraftPrefill | None = None
        self._target_ND: Tensor | Features | None = None
        self._collector: AttentionCollector | None = None
        self._ready: Mark | None = None
        self._can_choose = False  # whether the pruner's signals are there, or queued
        self._all = False  # whether features of all frames are computed
        self._features: Tensor | Features | None = None
        self._cache: KVCache | None = None

    def __exit__(self, *_: object) -> None:
        self._target_ND = self._collector = self._features = self._cache = None
        self.lease.release()

    # ---- beside the target's prefill

    def beside(self, passing: Pauses[T], ahead: Ahead, inner: DraftPrefill, rounds: bool) -> Pauses[T]:
        """Run the target's prefill, and start the draft once the video is queued through the last layer.

        Args:
            passing: The prefill, from its first layer on. Its pauses are yielded, and its result is returned.
            ahead: Its input.
            inner: Computes the draft's features and rows.
            rounds: Whether the draft's values may differ in their last bits from those of a later request that takes
                the same videos from the prefix store. If False, no features are computed before the pruner has chosen,
                and no layer is run ahead for its signals.
        """
        target, queued = self.selection.target, None
        self._inner, self._target_ND = inner, ahead.features_ND
        self._early = self._early and (rounds or not self._layers)
        self._all = rounds and not (self._early and self._at_once)
        if self._early:
            self._collector, self._can_choose = self._own_collector(ahead), not self._layers
            self._ready = None if self._at_once else Mark(target.device)
        try:
            while True:
                try:
                    pause = next(passing)
                except StopIteration as end:
                    return end.value
                if pause.layer and ahead.cache.length + pause.rows == self.prompt.cut:  # in the last pass before the text
                    if pause.layer == self._layers and self._early:
                        self._look_ahead(ahead)
                    queued = Mark(pause.device) if pause.layer == target.layers else None
                yield pause
                if queued is not None:
                    self._begin(queued)
                    queued = None
        finally:
            passing.close()

    def _look_ahead(self, ahead: Ahead) -> None:
        """Run the text after the video through the first layers, which the video's rows have just passed."""
        target, states = self.selection.target, None if ahead.collector is None else ahead.collector.states
        if self._collector is not None and states is not None:
            self._collector.states = states.ahead()
        target.look_ahead(*ahead.text, ahead.cache, self._collector, self.prompt.cut, self._layers)
        self._ready, self._can_choose = Mark(target.device), True

    def _own_collector(self, ahead: Ahead) -> AttentionCollector | None:
        """Make a separate collector for the pruner's signals.

        It shares the vision tower's signals and the row weights of the prefill's collector, which are known before the
        first layer.
        """
        found = collector_for(self.selection.pruner, self.selection.target, self.prompt) if self._needs else None
        if found is not None and ahead.collector is not None:
            found.sight = ahead.collector.sight
            found.weigh_alike(ahead.collector)
        return found

    def _begin(self, queued: Mark) -> None:
        """Do the steps of the draft's start that are possible. Stops when the target's GPU has no queued work left."""
        for step in self._steps():
            if queued.passed:  # the host must go on with the target
                return
            step()

    def _steps(self) -> list[Callable[[], None]]:
        """Return the steps that do not need the end of the target's prefill."""
        if not self._can_choose:
            return [self._encode] if self._all else []
        return [self._encode, self._choose, self._fill] if self._all else [self._choose, self._encode, self._fill]

    def _choose(self) -> None:
        """Ask the pruner, on a side stream: it waits only for the signals, not for what the target has queued since."""
        assert self._target_ND is not None
        given = (self.prompt, self.view, self._collector, self._target_ND, self.generator, self._features)
        with self._side.after(self._ready):
            self.keep = self.selection.select(*given).cpu()
        self._collector = None

    def _encode(self) -> None:
        """Compute the draft's video features."""
        assert self._inner is not None
        keep = KeepSet.everything(len(self.prompt.video_index)) if self._all or self.keep is None else self.keep
        self._features = self._inner.features(self.draft, self.prompt, keep)

    def _fill(self) -> None:
        """Fill a cache with the pruned prompt."""
        assert self._inner is not None and self.keep is not None and self._features is not None
        inputs = self.draft.pruned(self.prompt, self._features, self.keep, self.options.positions)
        slots = len(inputs[0]) + self.options.max_new_tokens + self.rows
        cache = self.lease.take("draft", self.draft, slots)
        self._inner.fill(self.draft, inputs, cache, self.prompt, self.keep)
        self._cache = cache

    # ---- after it

    def chosen(self) -> KeepSet | None:
        """Return the tokens to keep; None if they must be chosen after the target's prefill.

        That is so if the pruner reads later layers, if no layer could be run ahead (the target has several stages, or
        rounding must not differ), or if `beside` was not called.
        """
        if self.keep is None and self._can_choose:
            self._choose()
        self._target_ND = None
        return self.keep

    @property
    def begun(self) -> bool:
        """Whether `beside` was called. It is not if the target's rows of the videos were known."""
        return self._inner is not None

    def features(self, model: VideoLM, prompt: VideoPrompt, keep: KeepSet) -> Tensor | Features:
        assert self._inner is not None
        if model is not self.draft or not (self._all or keep is self.keep):
            return self._inner.features(model, prompt, keep)
        if self._features is None:  # the same frames, early or late
            self._encode()
        features, self._features = self._features, None
        assert features is not None
        return features

    def fill(self, model: VideoLM, inputs: Inputs, cache: KVCache, prompt: VideoPrompt, keep: KeepSet) -> None:
        assert self._inner is not None
        self._inner.fill(model, inputs, cache, prompt, keep)

    def start(self, ctx: DraftContext, model: VideoLM, rows: int) -> KVCache:
        cache, self._cache = self._cache, None
        if cache is None or model is not self.draft or ctx.keep is not self.keep or rows > self.rows:
            return super().start(ctx, model, rows)
        self._features = None
        self.lease.hand_over("draft", ctx.caches)
        return cache
