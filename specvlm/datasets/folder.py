"""Videos of one's own: a folder and a file of questions."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from specvlm.data.frames import read_frames
from specvlm.datasets.local import CAPTION, LocalDataset, multiple_choice, text_of
from specvlm.errors import UserError, line
from specvlm.outside import json_of
from specvlm.strategy import Sample
from specvlm.types import Within

NUMBER = Within(0, 1_000_000_000)  # seconds, frames a second
OWN = ("id", "video", "question", "answer", "options", "start", "end", "fps")


@dataclass(frozen=True)
class FolderDataset(LocalDataset):
    """Your own videos and questions, the latter a line each in questions.jsonl.

    A line is {"video": "talk.mp4", "question": "What is shown?"}, with the path below `root`. Also an id (that path), an
    answer, options (a list: multiple choice), start and end (seconds); without a question the generic caption is asked. A
    video that is a folder of pictures needs fps. Any other key is kept with the results. questions: another file's name; .csv
    has these keys as its header, and | between options.
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
        name = entry.get("video")
        path = self.video(self.folder, name)
        options = entry.get("options") or ()
        if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
            raise UserError(f"options={line(repr(options))}: wanted a list of texts")
        question, key = entry.get("question") or CAPTION, entry.get("id", name)
        if not isinstance(question, str):
            raise UserError(f"question={line(repr(question))}: wanted a text")
        if not isinstance(key, str | int | float):
            raise UserError(f"id={line(repr(key))}: wanted a text or a number")
        answer = entry.get("answer")
        start, end = _number(entry, "start") or 0.0, _number(entry, "end")
        if end is not None and not end > start:
            raise UserError(f"end={end}: wanted seconds after start={start}")
        fps = _number(entry, "fps")
        if os.path.isdir(path) and fps is None:
            raise UserError(f"{name} is a folder of frames: say how many a second, as in fps=3")
        return Sample(
            str(key),
            path if fps is None else partial(read_frames, path, fps),
            multiple_choice(question, options) if options else question,
            None if answer is None else str(answer),
            tuple(options),
            {key: value for key, value in entry.items() if key not in OWN},
            start,
            end,
        )


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, words in enumerate(text.split("\n"), start=1):  # not splitlines: a JSON text may hold other breaks
        if not words.strip():
            continue
        try:
            entry = json_of(words)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f'{path}, line {number}: wanted an object like {{"video": "talk.mp4"}}')
        yield number, entry


def _rows(reader: csv.DictReader[str], path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: {error}") from None


def _csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in _rows(reader, path):
        entry: dict[str, Any] = {key: value for key, value in row.items() if key and value not in (None, "")}
        if "options" in entry:
            entry["options"] = entry["options"].split("|")
        yield reader.line_num, entry


def _number(entry: dict[str, Any], key: str) -> float | None:
    value = entry.get(key)
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if number is not None and number not in NUMBER:
        raise UserError(f"{key}={line(repr(value))}: wanted a number from {NUMBER.low}, {NUMBER.most}")
    return number
