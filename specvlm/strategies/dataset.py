"""Base class of data sets, and the samples that they list."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from specvlm.strategies.base import Strategy

if TYPE_CHECKING:
    from specvlm.video.video import Clip


@dataclass(frozen=True, eq=False)
class Sample:
    """One video, or several, with a question.

    Attributes:
        id: Stable identifier within the data set.
        video: A file, or a function that returns a clip of all frames. It is opened or called only when the sample is
            decoded.
        question: The full question as put to the model, including the options if it is multiple choice.
        answer: The right answer; None if unknown.
        options: The possible answers, written like `answer`.
        meta: Values to group results by, such as category or duration. Plain JSON.
        start: Start of the video section, in seconds.
        end: End of the video section, in seconds; None for the end of the video.
        more: Further videos of the prompt, after the first.
        images: Image files of the prompt, before the videos.
    """

    id: str
    video: Path | Callable[[], Clip]
    question: str
    answer: str | None = None
    options: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    start: float = 0.0
    end: float | None = None
    more: tuple[Path | Callable[[], Clip], ...] = ()
    images: tuple[Path, ...] = ()


class Dataset(Strategy, ABC):
    """Base class of data sets: samples in a fixed order, the same on every machine.

    `split` and `version` are recorded with every result.

    Attributes:
        metrics: Names of the metrics that score its answers unless the user chooses one with `metric=…`.
    """

    kind = "dataset"
    metrics: ClassVar[tuple[str, ...]] = ()

    @property
    def split(self) -> str:
        """The publisher's name of this part, such as "test". May be a class attribute or a field."""
        return ""

    @property
    def version(self) -> str:
        """Version of the data set: a date, a commit or a checksum. May be a class attribute or a field."""
        return ""

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """List all samples, without opening a video.

        Returns:
            The samples in their fixed order.

        Raises:
            UserError: A file that lists the samples cannot be read. The message says which files are expected where.
        """
