"""Entries of a `PrefixStore`, and the entries that match the beginning of a prompt.

Shape suffixes: N video tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from specvlm.decoding.prefix_keys import PromptKeys
from specvlm.decoding.shelf import Item
from specvlm.models.attention import AttentionCollector
from specvlm.models.kept import write_rows
from specvlm.models.kv_cache import KVCache
from specvlm.types import VideoPrompt


class Ending(NamedTuple):
    """End of a prefill, for later requests with the same whole prompt.

    Attributes:
        logits_1V: Logits of the next token.
        collector: Signals recorded on the way, or None.
    """

    logits_1V: Tensor
    collector: AttentionCollector | None


@dataclass(eq=False)
class Entry(Item):
    """Kept rows of a target's cache: slots `start` to `end` - 1 of a prompt or answer.

    Attributes:
        start: First slot.
        end: Slot after the last one.
        tail: Tokens of the text after the last video, up to `end`. Empty for the rows of a video and what precedes it.
        signals: Names of the signals recorded for the video tokens; their tensors follow those of the rows.
        seconds: Time that the target took to compute these rows.
        ending: End of the prefill, if these rows are its last.
    """

    start: int = 0
    end: int = 0
    tail: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    signals: tuple[str, ...] = ()
    seconds: float = 0.0
    ending: Ending | None = None

    def write(self, cache: KVCache, start: int, end: int) -> None:
        """Write those of these rows that lie in slots `start` to `end` - 1 to a cache."""
        start, end = max(start, self.start), min(end, self.end)
        if start < end:
            rows = self.kept.tensors[: len(self.kept.tensors) - len(self.signals)]
            write_rows(cache, rows, self.start, start, end)

    def recorded(self) -> dict[str, Tensor]:
        """Return the signals that a collector recorded for these rows' video tokens."""
        return dict(zip(self.signals, self.kept.tensors[len(self.kept.tensors) - len(self.signals) :], strict=True))


@dataclass(eq=False)
class Match:
    """The longest beginning of a prompt whose rows are kept.

    Attributes:
        keys: Keys of the prompt.
        videos: Entries up to the end of each video that is known, in order.
        texts: Pairs for the text after the last video, in order: an entry, and the slot up to which it is used.
        slots: Number of slots whose rows are known.
        ending: End of the prefill, if the whole prompt is known.
        held: Entries that may not move while the match is used.
    """

    keys: PromptKeys
    videos: list[Entry] = field(default_factory=list)
    texts: list[tuple[Entry, int]] = field(default_factory=list)
    slots: int = 0
    ending: Ending | None = None
    held: list[Entry] = field(default_factory=list)

    @property
    def alike(self) -> bool:
        """Whether only text follows the last video, so that each row after it depends only on earlier rows."""
        return self.keys.prompt.text == self.keys.prompt.cut

    @property
    def entries(self) -> list[Entry]:
        """All entries."""
        return [*self.videos, *(entry for entry, _ in self.texts)]

    @property
    def last(self) -> Entry | None:
        """The entry with the last known row."""
        return next(reversed(self.entries), None)

    def write(self, cache: KVCache, start: int, end: int) -> None:
        """Write the known rows of slots `start` to `end` - 1 to a cache, and set its length to `end`."""
        for entry in self.videos:
            entry.write(cache, start, end)
        for entry, upto in self.texts:
            entry.write(cache, start, min(end, upto))
        cache.length = end

    def seconds(self, slots: int) -> float:
        """Return the seconds that the target took to compute the known rows before slot `slots`."""
        spans = [*((entry, entry.end) for entry in self.videos), *self.texts]
        sizes = [(entry, min(upto, slots) - entry.start) for entry, upto in spans]
        return sum(entry.seconds * max(0, size) / (entry.end - entry.start) for entry, size in sizes)


def split_by_video(collector: AttentionCollector | None, prompt: VideoPrompt) -> list[dict[str, Tensor]]:
    """Split a collector's records of the video tokens by video."""
    recorded = {} if collector is None else collector.recorded()
    sizes = [len(grid) for grid in prompt.grids]
    split = {name: values.split(sizes) for name, values in recorded.items()}
    return [{name: parts[number] for name, parts in split.items()} for number in range(len(sizes))]
