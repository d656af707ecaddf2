"""Keep rows and features of prompts, for later requests whose prompts begin the same way.

Shape suffixes: S prompt tokens, N video tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from threading import RLock
from time import monotonic, sleep
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specvlm.decoding.prefix_entries import Ending, Entry, Match, split_by_video
from specvlm.decoding.prefix_keys import PromptKeys, common
from specvlm.decoding.shelf import Item, Shelf
from specvlm.engine import Engine
from specvlm.models.attention import AttentionCollector
from specvlm.models.kept import Kept, rows_of
from specvlm.models.kv_cache import KVCache
from specvlm.models.pauses import Pause, Pauses
from specvlm.models.video_lm import VideoLM
from specvlm.types import Reused, VideoPrompt

T = TypeVar("T")
STALE_S = 5.0  # how long a request waits for another's prefill that makes no progress
NAP_S = 0.002  # seconds that a waiting request sleeps if it has nothing else to do


class PrefixStore:
    """Keeps rows of KV caches and video features within a budget of bytes; drops the least recently used first.

    It keeps, for each video of a prompt, the target's rows up to the video's end, including all that precedes it; the
    rows of the text after the last video, earlier answers included; and the video features of target and draft. A later
    request finds the longest beginning that its prompt shares, and copies the rows into its own cache. Only rows that
    the target computed from accepted tokens are kept.

    A key stands for model, engine, tokens, rotary positions and pixels (`PromptKeys`). Beginnings end with a video or
    inside the text after the last one. On an exact engine (`Engine.exact`), a prompt without a video is found only as a
    whole: it is prefilled eagerly, and then the number of rows in a pass changes how each row rounds.

    Signals of a pruner that come from the text after the video are computed again, from all rows of that text:
    attention to the video, key norms, hidden states of the text. Those recorded while the video's own rows are computed
    (hidden states of video tokens, attention and keys of the vision tower) are kept with the rows. If a request needs
    one that was not recorded, it computes the video's rows again.

    Weights that are changed in place are not noticed: then call `empty`. Threads may share a store.

    Args:
        device_bytes: Most bytes on the models' devices.
        host_bytes: Most bytes in host memory, to which less recently used rows move from a GPU.

    Attributes:
        hits: Requests that found a beginning of their prompt.
        misses: Requests that found none.
        tokens: Prompt tokens whose rows were found.
        seconds: Time that computing these rows took.
    """

    def __init__(self, device_bytes: int, host_bytes: int = 0) -> None:
        self.shelf = Shelf(device_bytes, host_bytes)
        self.hits = self.misses = self.tokens = 0
        self.seconds, self._frozen = 0.0, 0
        self._lock = RLock()
        self._models: WeakKeyDictionary[VideoLM, int] = WeakKeyDictionary()
        self._numbers = count()
        self._videos: dict[bytes, Entry] = {}
        self._texts: dict[bytes, list[Entry]] = {}  # by key of the prompt before the text
        self._endings: dict[bytes, Entry] = {}  # by key of the whole prompt
        self._others: dict[bytes, Item] = {}  # video features and a draft's rows
        self._claims: dict[bytes, list[int]] = {}  # prefills in progress, with their progress counters

    def keys(self, target: VideoLM, prompt: VideoPrompt, engine: Engine) -> PromptKeys:
        """Return the keys of a prompt."""
        root = f"{self.number(target)} {engine.runs(target)} {engine.exact(target)}"
        return PromptKeys(prompt, target.positions(prompt), root.encode())

    def known(self, target: VideoLM, prompt: VideoPrompt, engine: Engine) -> int:
        """Return the number of a prompt's tokens whose rows are known."""
        with self.match(self.keys(target, prompt, engine), None, engine.exact(target)) as match:
            return match.slots

    def number(self, model: VideoLM) -> int:
        """Return the number that stands for a model in keys."""
        with self._lock:
            if model not in self._models:
                self._models[model] = next(self._numbers)
            return self._models[model]

    def resize(self, size: int) -> None:
        """Set the maximum of bytes kept on devices. Moves or drops the least recently used rows that no longer fit."""
        with self._lock:
            self.shelf.device_bytes = size
            self.shelf.make_room(0)
            self._forget_dropped()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Context manager in which no request adds to the store, for warm-ups and for requests that are compared."""
        with self._lock:
            self._frozen += 1
        try:
            yield
        finally:
            with self._lock:
                self._frozen -= 1

    @property
    def keeps(self) -> bool:
        """Whether requests add to the store now."""
        return not self._frozen

    def empty(self) -> None:
        """Drop everything."""
        with self._lock:
            self.shelf.empty()
            self._forget_dropped()

    # ---- finding

    @contextmanager
    def match(self, keys: PromptKeys, collector: AttentionCollector | None, exact: bool) -> Iterator[Match]:
        """Find the longest kept beginning of a prompt. Its entries may not move until the block ends.

        Args:
            keys: Keys of the prompt.
            collector: Collector of the request's signals, whose records of the videos must be known.
            exact: Whether the engine is exact (`Engine.exact`).
        """
        match = Match(keys)
        try:
            with self._lock:
                self._find(match, collector, exact)
            yield match
        finally:
            with self._lock:
                for entry in match.held:
                    entry.users -= 1

    def _find(self, match: Match, collector: AttentionCollector | None, exact: bool) -> None:
        keys, prompt = match.keys, match.keys.prompt
        needed = frozenset[str]() if collector is None else collector.of_video
        for key in keys.keys if self._videos else ():
            entry = self._videos.get(key)
            if entry is None or not needed <= set(entry.signals) or not self._hold(match, entry):
                return
            match.videos.append(entry)
            match.slots = entry.end
        if len(match.videos) < len(keys.joints):
            return
        if (whole := self._endings.get(keys.whole)) is not None and whole.ending is not None:
            spec = None if whole.ending.collector is None else whole.ending.collector.spec
            if spec == (None if collector is None else collector.spec) and self._use(match, whole, len(prompt)):
                match.ending = whole.ending
                return
        if match.alike and (prompt.cut or not exact):  # without a video, exact engines prefill eagerly
            tail = keys.tail[:-1]  # the last row is computed in any case
            sizes = [(common(entry.tail, tail), entry) for entry in self._texts.get(keys.base, ())]
            size, best = max(sizes, key=lambda pair: pair[0], default=(0, None))
            if best is not None and size:
                self._use(match, best, prompt.cut + size)

    def _use(self, match: Match, entry: Entry, slots: int) -> bool:
        """Add an entry of text and its parents to a match, up to slot `slots`. False if one cannot be loaded."""
        spans, upto, one = list[tuple[Entry, int]](), slots, entry
        while one.end > match.keys.prompt.cut:
            if upto > one.start:
                spans.append((one, upto))
                upto = one.start
            if not isinstance(one.parent, Entry):
                break
            one = one.parent
        if not all(self._hold(match, one) for one, _ in reversed(spans)):
            return False
        match.texts, match.slots = spans[::-1], slots
        return True

    def _hold(self, match: Match, entry: Entry) -> bool:
        """Load an entry and keep it in place while the match is used. Returns False if it cannot be loaded."""
        if not self._load(entry):
            return False
        entry.users += 1
        match.held.append(entry)
        return True

    def _load(self, item: Item) -> bool:
        if self.shelf.load(item):
            self.shelf.touch(item)
            return True
        self._forget_dropped()
        return False

    def _forget_dropped(self) -> None:
        """Forget the keys of items that were dropped."""
        there = self.shelf.items
        self._videos = {key: entry for key, entry in self._videos.items() if entry in there}
        self._texts = {key: kept for key, texts in self._texts.items() if (kept := [one for one in texts if one in there])}
        self._endings = {key: entry for key, entry in self._endings.items() if entry in there}
        self._others = {key: item for key, item in self._others.items() if item in there}

    # ---- waiting for a request that computes the same

    def wait(self, keys: PromptKeys, device: torch.device) -> Pauses[None]:
        """Pause while another request computes the same rows, until it makes no progress for STALE_S seconds."""
        progress, since = -1, monotonic()
        while True:
            with self._lock:
                known = self._videos.keys() | self._endings.keys()
                claims = [self._claims[key] for key in (*keys.keys, keys.whole) if key in self._claims and key not in known]
            if not claims or (claims[0][0] == progress and monotonic() - since > STALE_S):
                return
            if claims[0][0] == progress:
                sleep(NAP_S)
            else:
                progress, since = claims[0][0], monotonic()
            yield Pause(device, waits=True)

    def computing(self, match: Match, work: Pauses[T]) -> Pauses[T]:
        """Run a prefill, and let requests that need the same rows wait for it."""
        keys, claim = match.keys, [0]
        with self._lock:
            mine = [key for key in (*keys.keys[len(match.videos) :], keys.whole) if key not in self._claims]
            self._claims |= dict.fromkeys(mine, claim)
        try:
            while True:
                try:
                    pause = next(work)
                except StopIteration as end:
                    return end.value
                claim[0] += 1
                yield pause
        finally:
            with self._lock:
                for key in mine:
                    del self._claims[key]

    # ---- keeping

    def keep(self, match: Match, cache: KVCache, collector: AttentionCollector | None, logits_1V: Tensor) -> list[Entry]:
        """Keep the rows of a prefill that were not known. Returns the new entries.

        Args:
            match: The part of the prompt that was known.
            cache: The target's cache after the prefill.
            collector: Collector of the request's signals.
            logits_1V: Logits of the next token.
        """
        keys, made, before = match.keys, list[Entry](), match.last
        names = () if collector is None else tuple(sorted(collector.of_video))
        with self._lock:
            known = len(match.videos)
            records = split_by_video(collector, keys.prompt) if names and known < len(keys.joints) else []
            for number in range(known, len(keys.joints)):
                start, end = 0 if before is None else before.end, keys.joints[number]
                new = Entry(Kept(()), before, start=start, end=end, signals=names)
                if not self._put(new, cache, [records[number][name] for name in names]):
                    return made
                if (old := self._videos.get(keys.keys[number])) is not None:
                    self.shelf.drop(old)
                self._videos[keys.keys[number]] = new
                made.append(new)
                before = new
            start = match.slots if match.texts else keys.prompt.cut
            more = logits_1V.nbytes + (0 if collector is None else collector.nbytes)
            new = Entry(Kept(()), before, more, start=start, end=len(keys.prompt), tail=keys.tail)
            if self._put(new, cache):
                new.ending = Ending(logits_1V.clone(), None if collector is None else collector.copy())
                self._endings[keys.whole] = new
                if match.alike:
                    self._texts.setdefault(keys.base, []).append(new)
                made.append(new)
            self._forget_dropped()
            return made

    def count(self, match: Match, slots: int) -> Reused:
        """Count a request that reuses the rows up to a slot, and return what it found."""
        found = Reused(slots, match.seconds(slots))
        with self._lock:
            self.hits += bool(found.tokens)
            self.misses += not found.tokens
            self.tokens += found.tokens
            self.seconds += found.seconds
        return found

    def keep_answer(self, match: Match, last: Entry | None, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep the rows of an answer.

        Args:
            match: The part of the prompt that was known.
            last: Entry with the prompt's last row; None if it was not kept.
            tokens: The answer. The rows of its last tokens may not be in the cache.
            cache: The target's cache.
        """
        keys, start = match.keys, len(match.keys.prompt)
        count = min(len(tokens), cache.length - start)
        with self._lock:
            if last is None or last not in self.shelf.items or count < 1 or not match.alike:
                return
            tail = torch.cat([keys.tail, torch.tensor(tokens[:count])])
            new = Entry(Kept(()), last, start=start, end=start + count, tail=tail)
            if any(common(entry.tail, tail) == len(tail) for entry in self._texts.get(keys.base, ())):
                return
            if self._put(new, cache):
                self._texts.setdefault(keys.base, []).append(new)
            self._forget_dropped()

    def _put(self, entry: Entry, cache: KVCache, more: Sequence[Tensor] = ()) -> bool:
        """Copy an entry's rows and put it on the shelf, if there is room."""
        size = cache.nbytes * (entry.end - entry.start) // cache.capacity + sum(part.nbytes for part in more) + entry.more
        if not self.keeps or not self.shelf.make_room(size, entry.parent):
            return False
        entry.kept = Kept([*rows_of(cache, entry.start, entry.end), *(part.clone() for part in more)])
        self.shelf.put(entry)
        return True

    # ---- tensors that are not rows of the target's cache

    def other(self, key: bytes) -> tuple[Tensor, ...] | None:
        """Return the tensors kept under a key; None if there are none, or no longer. Do not write to them."""
        with self._lock:
            item = self._others.get(key)
            return item.kept.tensors if item is not None and self._load(item) else None

    def keep_other(self, key: bytes, make: Callable[[], Sequence[Tensor]], size: int) -> None:
        """Replace the tensors kept under a key. Keeps none without room. make: copies them. size: their bytes."""
        with self._lock:
            if self.keeps:
                if (old := self._others.pop(key, None)) is not None:
                    self.shelf.drop(old)
                if self.shelf.make_room(size):
                    self._others[key] = item = Item(Kept(make()))
                    self.shelf.put(item)
            self._forget_dropped()
