"""Prefill the target with a prompt, reusing the beginning that earlier requests have computed.

Shape suffixes: S prompt tokens, Q tokens to run, N video tokens, A rotary axes, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

from torch import Tensor

from specvlm.decoding.draft_prefix import ReusedDraftPrefill
from specvlm.decoding.early_start import Ahead, EarlyStart
from specvlm.decoding.prefix_entries import Ending, Entry, Match
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.timing import Clock
from specvlm.engine import Engine
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import KVCache
from specvlm.models.pauses import Pauses, finished
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import DraftPrefill, Pruner
from specvlm.strategies.fence import inside
from specvlm.types import Features, Reused, VideoPrompt, joined
from specvlm.types.pixels import LateVideo


@dataclass(frozen=True, eq=False)
class Prefill:
    """One request's prefill.

    Attributes:
        target: The target.
        prompt: The prompt.
        cache: The target's cache for the request, empty.
        clock: Times the stages.
        engine: Runs the passes.
        collector: Collects signals on the way; None if none are needed.
        prefixes: What earlier requests have computed; None to compute all and to keep nothing.
        early: Starts the draft while the target computes the video's rows; not used if these are known. None: the draft
            starts after the prefill.
    """

    target: VideoLM
    prompt: VideoPrompt
    cache: KVCache
    clock: Clock
    engine: Engine
    collector: AttentionCollector | None = None
    prefixes: PrefixStore | None = None
    early: EarlyStart | None = None

    def run(self) -> Pauses[Prefilled]:
        """Fill the cache, with pauses in between, and return the result."""
        store = self.prefixes
        if store is None or self.target.ranks.size > 1:  # ranks may find different prefixes, and would wait for each other
            return Prefilled(*(yield from self._computed(None)))
        keys = store.keys(self.target, self.prompt, self.engine)
        yield from store.wait(keys, self.target.device)
        with store.match(keys, self.collector, self.engine.exact(self.target)) as match:
            reused = store.count(match, match.slots if match.ending else self._known(match))
            features_ND, logits_1V = yield from store.computing(match, self._computed(match))
            made = [] if match.ending else store.keep(match, self.cache, self.collector, logits_1V)
        last = match.last if match.ending else next((one for one in made if one.ending), None)
        return Prefilled(features_ND, logits_1V, reused, Kept(store, match, last, made))

    def _computed(self, match: Match | None) -> Pauses[tuple[Tensor | Features, Tensor]]:
        """Compute the part of the prompt that is not known. Returns the video features and the next token's logits."""
        features_ND = joined((yield from self._features(match)) or [self.target.blank(0)])
        if match is not None and match.ending is not None:
            return features_ND, self._copied(match, match.ending)
        return features_ND, (yield from self._run_rest(features_ND, match))

    def _known(self, match: Match) -> int:
        """Number of leading rows that need not be computed. Signals of the text need all rows of the text."""
        reads = self.collector is not None and self.collector.reads_text
        return min(match.slots, self.prompt.cut) if reads else match.slots

    def _features(self, match: Match | None) -> Pauses[list[Tensor | Features]]:
        """Return the features of each video: kept ones, or new ones, which are then kept."""
        sight, found = None if self.collector is None else self.collector.sight, list[Tensor | Features]()
        recorded = 0 if match is None else len(match.videos)  # of these videos, the tower's signals are known
        if match is not None and self.collector is not None and self.collector.of_video and recorded:
            self.collector.resume(self._begin(match), [entry.recorded() for entry in match.videos])
        for number in range(len(self.prompt.videos)):
            probe = sight if number >= recorded else None
            kept = None if match is None or probe is not None else self._kept_features(match, number)
            if kept is None:
                kept = yield from self.target.encoding(self.prompt, number, probe)
                if match is not None:
                    self._keep_features(match, number, kept)
            found.append(kept)
        return found

    def _feature_key(self, match: Match, number: int) -> bytes:
        assert self.prefixes is not None
        return sha256(f"features {self.prefixes.number(self.target)} {match.keys.videos[number]}".encode()).digest()

    def _kept_features(self, match: Match, number: int) -> Tensor | Features | None:
        assert self.prefixes is not None
        kept = self.prefixes.other(self._feature_key(match, number))
        return None if kept is None else kept[0] if len(kept) == 1 else Features(*kept)

    def _keep_features(self, match: Match, number: int, features: Tensor | Features) -> None:
        assert self.prefixes is not None
        parts = (features.rows, features.added) if isinstance(features, Features) else (features,)
        size = sum(part.nbytes for part in parts)
        self.prefixes.keep_other(self._feature_key(match, number), lambda: [part.clone() for part in parts], size)

    def _begin(self, match: Match) -> int:
        """First slot to pass to the engine. An exact one gets all rows after the last video, and skips known ones."""
        return min(match.slots, self.prompt.cut) if self.engine.exact(self.target) else self._known(match)

    def _run_rest(self, features_ND: Tensor | Features, match: Match | None) -> Pauses[Tensor]:
        """Run the target over the rows that are not known. Returns the next token's logits, (1, V)."""
        target, prompt, cache = self.target, self.prompt, self.cache
        begin = 0 if match is None else self._begin(match)
        positions_AS = target.positions(prompt) if match is None else match.keys.positions_AS
        if match is not None and begin:
            match.write(cache, 0, begin)
        if begin and begin >= prompt.text:
            embeds_QD = target.embed_text(prompt.tokens[begin:])
        else:
            embeds_QD = target.embed(prompt, features_ND)[begin:]
        if self.collector is not None:
            with inside(getattr(self.collector.weigh, "__self__", "pruner")):
                rows_TD = embeds_QD[max(0, prompt.cut - begin) :]
                self.collector.weigh_rows(rows_TD, features_ND, target.ranks)
        self.clock.mark("embed")
        more = match is not None and match.slots > prompt.cut
        refill = (lambda: match.write(cache, prompt.cut, match.slots)) if more and match is not None else None
        inputs = (embeds_QD, positions_AS[:, begin:])
        passing = self.engine.prefilling(target, prompt, inputs, cache, self.collector, refill)
        if self.early is not None and begin < prompt.cut:
            rows = embeds_QD[prompt.cut - begin :], positions_AS[:, prompt.cut :].to(target.device)
            inner = DraftPrefill() if match is None else self._reused(match, self.early)
            ahead = Ahead(features_ND, self.collector, cache, rows)
            passing = self.early.beside(passing, ahead, inner, self.early.free or match is None)
        return (yield from passing)

    def _reused(self, match: Match, early: EarlyStart) -> DraftPrefill:
        """Return the draft's prefill, which computes only what the store does not have."""
        assert self.prefixes is not None
        return ReusedDraftPrefill(self.prefixes, match.keys, self.engine, early.selection.pruner, early.free)

    def _copied(self, match: Match, ending: Ending) -> Tensor:
        """Reuse the whole prefill of the same prompt. Returns the next token's logits, (1, V)."""
        match.write(self.cache, 0, len(self.prompt))
        self.cache.offset = int(match.keys.positions_AS[:, -1].max()) + 1 - len(self.prompt)
        if self.collector is not None and ending.collector is not None:
            self.collector.adopt(ending.collector)
        self.clock.mark("embed")
        return ending.logits_1V.clone()  # a verifier may write to them


def prefill(
    target: VideoLM, prompt: VideoPrompt, cache: KVCache, clock: Clock, collector: AttentionCollector | None = None,
    engine: Engine | None = None,
) -> tuple[Tensor | Features, Tensor]:  # fmt: skip
    """Fill the target's cache with a prompt. Returns the video features (N, D) and the next token's logits (1, V)."""
    filled = finished(Prefill(target, prompt, cache, clock, engine or Engine(), collector).run())
    return filled.features_ND, filled.logits_1V


class Kept(NamedTuple):
    """The entries of a store for a request's prompt.

    Attributes:
        store: The store.
        match: The part of the prompt that was known, and the prompt's keys.
        last: Entry with the prompt's last row; None if it was not kept.
        made: Entries that the request has added.
    """

    store: PrefixStore
    match: Match
    last: Entry | None
    made: Sequence[Entry]


class Prefilled(NamedTuple):
    """Result of a prefill, besides the rows in the cache.

    Attributes:
        features_ND: Video features.
        logits_1V: Logits of the next token.
        reused: How much of the prompt was known; None without a store.
        kept: The store's entries for the prompt; None without a store.
    """

    features_ND: Tensor | Features
    logits_1V: Tensor
    reused: Reused | None = None
    kept: Kept | None = None

    def copy(self, prompt: VideoPrompt) -> VideoPrompt:
        """Copy the prompt for strategies. If its videos were known, pixels are copied only when needed."""
        if self.kept is None or not self.reused or self.reused.tokens < prompt.cut:
            return prompt.copy()
        pairs = zip(prompt.videos, self.kept.match.keys.videos, strict=True)
        return replace(prompt, videos=tuple(LateVideo.of(video, digest) for video, digest in pairs)).copy()

    def timed(self, times_s: Mapping[str, float]) -> dict[str, float]:
        """Store in each new entry the time that computing its rows took. Returns a copy of the times.

        times_s: Seconds of each stage of the prefill (`Clock.lap`).
        """
        made = () if self.kept is None else self.kept.made
        rows = sum(entry.end - entry.start for entry in made)
        for entry in made:
            entry.seconds = (times_s.get("embed", 0.0) + times_s.get("prefill", 0.0)) * (entry.end - entry.start) / rows
        return dict(times_s)

    def drafting(self, engine: Engine, pruner: Pruner, free: bool) -> DraftPrefill:
        """Return the prefill of the drafter's model, which reuses the store if there is one.

        Args:
            engine: Runs the text behind kept rows.
            pruner: Chooses the tokens to keep.
            free: Whether no guess can change the output.
        """
        if self.kept is None:
            return DraftPrefill()
        return ReusedDraftPrefill(self.kept.store, self.kept.match.keys, engine, pruner, free)

    def keep_answer(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep the rows of the answer, for the next turn of a chat."""
        if self.kept is not None:
            self.kept.store.keep_answer(self.kept.match, self.kept.last, tokens, cache)
