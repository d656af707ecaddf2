"""What is decoded, where that is more than one clip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specvlm.strategies.base import Strategy

if TYPE_CHECKING:
    from specvlm.video.video import Clip


@dataclass(frozen=True, eq=False)
class Sample:
    """One video and what is asked about it.

    id: names it in its data set, today and in a year. video: a file, or a function that makes a clip of every frame there is;
    neither is opened or called before it is the sample's turn. start, end: the part of it that is meant, in seconds; None: to
    its end. question: as the model is asked, options and all. answer: the right one, if one is known, and `options` those to
    choose from, as `answer` has them. meta: what rows may be grouped by, such as category or duration; plain JSON.
    """

    id: str
    video: Path | Callable[[], Clip]
    question: str
    answer: str | None = None
    options: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    start: float = 0.0
    end: float | None = None


class Dataset(Strategy, ABC):
    """Samples in a fixed order, the same on every machine. `split` and `version` are recorded with every result."""

    kind = "dataset"

    @property
    def split(self) -> str:
        """Which part of the data set this is, by its publishers' name for it. A class attribute or a field will do."""
        return ""

    @property
    def version(self) -> str:
        """Which edition of it: a date, a commit, a checksum. A class attribute or a field will do."""
        return ""

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """Every sample. Cheap: reads lists, opens no video. Raises UserError where the list cannot be read, saying what to
        fetch and where to put it.
        """
