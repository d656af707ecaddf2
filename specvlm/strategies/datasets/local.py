"""Base class of data sets on disk: where they are, and which samples are used, in which order, with which question.

Nothing is downloaded. Lists are read whole. A video is opened only when its sample is decoded; samples whose video is
missing are skipped then.
"""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path, PurePath
from string import ascii_uppercase
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from specvlm.errors import UserError, check_choice, check_range, line
from specvlm.parsing.bounds import parse
from specvlm.parsing.files import json_of, read_bytes, read_text
from specvlm.strategies import Dataset, Sample
from specvlm.types import Within

# The question of VideoDetailCaption, which SpecVLM (arXiv 2508.16201) asks of its other three data sets, too.
CAPTION = "Please provide a detailed description of the video, focusing on the main subjects, their actions, and the background scenes."  # noqa: E501
PROMPTS = ("own", "caption")
SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")  # tried if a list names videos without a suffix
GUIDE = "docs/guides/datasets.md"
MOST_LIST = 512 * 2**20  # maximum size in bytes of a file that lists samples
T = TypeVar("T")


@dataclass(frozen=True)
class LocalDataset(Dataset):
    """Base class of data sets in their published layout.

    Attributes:
        layout: Content of `root`, for error messages.
        choices: Allowed values of each restricted field.
        root: Folder of the data set.
        limit: Maximum number of samples; null for all.
        shuffle: Seed of the order in which `limit` takes samples, as in Hugging Face's `Dataset.shuffle`; null keeps
            the listed order.
        prompt: `own` asks the data set's questions; `caption` asks for a long description of every video, and no
            right answer is known.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    layout: ClassVar[str]
    choices: ClassVar[Mapping[str, Iterable[object]]] = {}
    root: str
    limit: Annotated[int | None, Within(1, 10_000_000)] = None
    shuffle: Annotated[int | None, Within(0, 2**63 - 1)] = None
    prompt: str = "own"

    def __post_init__(self) -> None:
        for field, allowed in {"prompt": PROMPTS, **self.choices}.items():
            chosen = getattr(self, field)
            for value in [chosen] if isinstance(chosen, str) else chosen:
                check_choice(field, str(value), map(str, allowed))
        check_range("limit", 1 if self.limit is None else self.limit, 1)
        check_range("shuffle", self.shuffle or 0, 0)

    @abstractmethod
    def lists(self) -> list[Path]:
        """Return the files that list the samples."""

    @abstractmethod
    def listed(self) -> Iterable[Sample]:
        """Read every sample of `lists`, with the data set's question."""

    @property
    def folder(self) -> Path:
        """`root` with ~ expanded."""
        return Path(os.path.expanduser(self.root))

    @cached_property
    def version(self) -> str:
        """Checksum of the files that list the samples: the first 12 digits of their SHA-256."""
        digest = hashlib.sha256()
        for path in self.lists():
            digest.update(_content(path, self.layout, read_bytes))
        return f"sha256:{digest.hexdigest()[:12]}"

    def samples(self) -> Sequence[Sample]:
        samples = _distinct(self.listed())
        if not samples:
            raise UserError(f"{self.folder} has no sample for this choice: {self!r}")
        if self.shuffle is not None:
            samples = [samples[place] for place in np.random.default_rng(self.shuffle).permutation(len(samples))]
        chosen = samples[: self.limit]
        if self.prompt == "caption":
            return [replace(sample, question=CAPTION, answer=None, options=()) for sample in chosen]
        return chosen

    def video(self, below: Path, name: object) -> Path:
        """Return the path of a video that a list names. The file need not exist.

        Lists may come from strangers, so paths with ".." and absolute paths are refused. Symbolic links in the folder
        are followed: they are the user's own.

        Args:
            below: The folder of videos.
            name: Path relative to it, as listed.

        Raises:
            UserError: The name is not a path below the folder.
        """
        text = name if isinstance(name, str) else ""
        parts = PurePath(text).parts
        if not parts or ".." in parts or PurePath(text).is_absolute() or "\0" in text:
            raise UserError(f"video={line(repr(name))}: expected a path below {below}")
        return below / text

    def place(self, *names: str) -> Path:
        """Return the first of these subfolders of `root` that exists. Raises UserError if none does."""
        for name in names:
            if os.path.isdir(self.folder / name):  # also False for names that no folder can have
                return self.folder / name
        raise UserError(f"no folder {self.folder / names[0]}: expected {self.layout}, see {GUIDE}")

    def entries(self, path: Path, kind: Any) -> list[dict[str, Any]]:
        """Read a JSON list of objects.

        Args:
            path: The file.
            kind: TypedDict that each object must match.

        Raises:
            UserError: The file cannot be read, is larger than MOST_LIST, or is not a JSON list of such objects.
        """
        try:
            found = json_of(_content(path, self.layout, read_bytes))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); if git cloned it without LFS, download it again") from None
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise UserError(f"{path}: expected a list of objects")
        return self._typed(found, kind, path)

    def _typed(self, found: list[dict[str, Any]], kind: Any, path: Path) -> list[dict[str, Any]]:
        """Return the entries of a list unchanged, after checking each against a TypedDict."""
        for number, entry in enumerate(found):
            try:
                parse(kind, entry, f"{self.folder}: an entry of {path.name}")
            except UserError as error:
                raise UserError(f"{error}: expected {self.layout}, see {GUIDE} (entry {number})") from None
        return found

    def rows(self, path: Path, kind: Any) -> list[dict[str, Any]]:
        """Read the rows of a Parquet file.

        Args:
            path: The file.
            kind: TypedDict that each row must match.

        Raises:
            UserError: The file cannot be read, is larger than MOST_LIST, is not Parquet, has a row that does not
                match `kind`, or PyArrow is not installed.
        """
        content = _content(path, self.layout, read_bytes)
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"reading {path.name} takes PyArrow: pip install 'specvlm[datasets]'") from None
        try:
            table = parquet.ParquetFile(arrow.BufferReader(content)).read()
        except (arrow.ArrowInvalid, OSError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{path} is not Parquet ({why}); if git cloned it without LFS, download it again") from None
        return self._typed(table.to_pylist(), kind, path)


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """Format a multiple-choice question as LLaVA does: the question, one lettered option per line, the instruction."""
    choices = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, *choices, "Answer with the option's letter from the given choices directly."])


def first_there(*places: Path) -> Path:
    """Return the first of these paths that exists. If none does, return the first, so that a later error names it."""
    return next((place for place in places if os.path.exists(place)), places[0])


def text_of(path: Path, layout: str) -> str:
    """Read a list as UTF-8 text. Raises UserError if it cannot be read or is larger than MOST_LIST.

    layout: What the data set's folder should contain, for the message.
    """
    return _content(path, layout, read_text)


def _content(path: Path, layout: str, read: Callable[[Path, int], T]) -> T:
    """Read a list with `read`. Raises UserError if it cannot be read; the message says what was expected."""
    try:
        return read(path, MOST_LIST)
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{path}: {why}: expected {layout}, see {GUIDE}") from None


def _distinct(samples: Iterable[Sample]) -> list[Sample]:
    """Make ids unique: if several samples have the same id, all but the first get the suffixes #2, #3 and so on."""
    named: dict[str, Sample] = {}
    for sample in samples:
        key = next(key for key in chain([sample.id], (f"{sample.id}#{n}" for n in count(2))) if key not in named)
        named[key] = sample if key == sample.id else replace(sample, id=key)
    return list(named.values())
