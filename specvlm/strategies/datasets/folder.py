"""Your own videos: a folder with videos and a file of questions."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from specvlm.config import listed
from specvlm.errors import UserError, line
from specvlm.parsing.files import json_of, nested
from specvlm.strategies import Sample
from specvlm.strategies.datasets.local import CAPTION, LocalDataset, multiple_choice, text_of
from specvlm.types import Within
from specvlm.video.frames import read_frames

NUMBER = Within(0, 1_000_000_000)  # seconds, or frames per second
OWN = ("id", "video", "image", "question", "answer", "options", "start", "end", "fps")
NUMBERS = ("start", "end", "fps")


@dataclass(frozen=True)
class FolderDataset(LocalDataset):
    """Your own videos and questions, one question per line in questions.jsonl.

    A line is {"video": "talk.mp4", "question": "What is shown?"}, with the path relative to `root`. Optional keys: id
    (default: the path), answer, options (a list, for multiple choice), start and end (seconds), image (a file). "video"
    and "image" may be lists of files. Without a question, a detailed description is asked for. A video that is a folder
    of pictures needs fps, its frames per second. Any other key is kept with the results.

    Attributes:
        questions: Name of the file with the questions, in `root`. A .csv file has the keys in its first row, and |
            between options.
    """

    name = "folder"
    layout = 'videos and questions.jsonl, a line {"video": "talk.mp4", "question": "What is shown?"} each'
    questions: str = "questions.jsonl"

    def lists(self) -> list[Path]:
        return [self.folder / self.questions]

    def listed(self) -> Iterator[Sample]:
        path = self.lists()[0]
        text = text_of(path, self.layout)
        for where, entry in _csv(text, path) if path.suffix == ".csv" else _jsonl(text, path):
            try:
                yield self._sample(entry)
            except ValueError as error:
                raise UserError(f"{path}, line {where}: {error}") from None

    def _sample(self, entry: dict[str, Any]) -> Sample:
        """Convert an entry to a sample. Raises UserError if one of its values is invalid."""
        names: list[Any] = listed(entry.get("video")) or [entry.get("video")]
        name, *others = names
        path, more = self.video(self.folder, name), tuple(self.video(self.folder, other) for other in others)
        images = tuple(self.video(self.folder, image) for image in listed(entry.get("image")))
        if entry.get("image") is not None and not images:
            raise UserError(f"image={line(repr(entry['image']))}: expected a file or a list of files")
        options = () if entry.get("options") is None else entry["options"]
        if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
            raise UserError(f"options={line(repr(options))}: expected a list of texts")
        question = CAPTION if entry.get("question") is None else entry["question"]
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"question={line(repr(question))}: expected a text, or no question for the generic caption")
        key, answer = _word("id", entry.get("id", name)), entry.get("answer")
        start, end = _number(entry, "start") or 0.0, _number(entry, "end")
        if end is not None and not end > start:
            raise UserError(f"end={end}: expected seconds after start={start}")
        fps = _number(entry, "fps")
        if os.path.isdir(path) and fps is None:
            raise UserError(f"{name} is a folder of frames: add the frames per second, as in fps=3")
        return Sample(
            key,
            path if fps is None else partial(read_frames, path, fps),
            multiple_choice(question, options) if options else question,
            None if answer is None else _word("answer", answer),
            tuple(options),
            {key: _not_nested(key, value) for key, value in entry.items() if key not in OWN},
            start,
            end,
            more,
            images,
        )


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parse JSON objects, one per line. Yields the line number and the object. Raises UserError for an invalid line."""
    for number, words in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may contain other breaks
        if not words.strip():
            continue
        try:
            entry = json_of(words)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f'{path}, line {number}: expected an object like {{"video": "talk.mp4"}}')
        yield number, entry


def _csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parse a .csv file. Yields the line number, and the row as an entry without its empty cells.

    Raises UserError if the file is not valid CSV.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            entry: dict[str, Any] = {key: value for key, value in row.items() if key and value not in (None, "")}
            if "options" in entry:
                entry["options"] = entry["options"].split("|")
            yield reader.line_num, entry | {key: _number_or_text(entry[key]) for key in NUMBERS if key in entry}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: {error}") from None


def _number_or_text(text: str) -> float | str:
    """Convert a cell of a .csv file to a number; return it unchanged if it is not one."""
    try:
        return float(text)
    except ValueError:
        return text


def _word(key: str, value: object) -> str:
    """Return a text or number as text. Raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{key}={line(repr(value))}: expected a text or a number")
    return str(value)


def _not_nested(key: str, value: object) -> object:
    """Return the value unchanged. Raises UserError if it is nested too deeply for a results file."""
    if nested(value):
        raise UserError(f"{line(key)} is nested too deeply to be kept with the results")
    return value


def _number(entry: dict[str, Any], key: str) -> float | None:
    """Return a number of an entry; None if it is absent. Raises UserError if it is not a number within bounds."""
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in NUMBER:
        raise UserError(f"{key}={line(repr(value))}: expected a number from {NUMBER.low}, {NUMBER.most}")
    return float(value)
