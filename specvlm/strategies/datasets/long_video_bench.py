"""LongVideoBench: multiple choice on web videos of 8 seconds to an hour."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from specvlm.parsing.bounds import Count, Seconds
from specvlm.strategies import Sample
from specvlm.strategies.datasets.local import LocalDataset, multiple_choice

LISTS = {"val": "lvb_val.json", "test": "lvb_test_wo_gt.json"}
DURATIONS = (15, 60, 600, 3600)


class Entry(TypedDict):
    """An entry of lvb_val.json or lvb_test_wo_gt.json."""

    candidates: list[str]
    id: str
    video_path: str
    question: str
    correct_choice: NotRequired[Count]
    duration: Seconds
    duration_group: int
    question_category: Any
    topic_category: Any
    level: Any


@dataclass(frozen=True)
class LongVideoBenchDataset(LocalDataset):
    """LongVideoBench: multiple choice on videos of 8 seconds to an hour.

    arXiv 2407.15754; Hugging Face: longvideobench/LongVideoBench. Layout: lvb_val.json (1337 questions),
    lvb_test_wo_gt.json (5341 without answers), and videos/. As in the publishers' code, only the first `duration`
    seconds of a video are used. Subtitles, which many questions quote, are left out, so use this data set to
    measure speed rather than accuracy.

    Attributes:
        split: `val` or `test`.
        durations: Groups of videos to use, each named by its maximum duration in seconds: 15, 60, 600, 3600; empty for
            all.
    """

    name = "long_video_bench"
    layout = "lvb_val.json, lvb_test_wo_gt.json and videos/ of huggingface.co/datasets/longvideobench/LongVideoBench"
    choices = {"split": LISTS, "durations": DURATIONS}
    split: str = "val"
    durations: tuple[int, ...] = ()

    def lists(self) -> list[Path]:
        return [self.folder / LISTS[self.split]]

    def listed(self) -> Iterator[Sample]:
        videos = self.place("videos")
        for entry in self.entries(self.lists()[0], Entry):
            if self.durations and entry["duration_group"] not in self.durations:
                continue
            options = tuple(entry["candidates"])
            place = entry.get("correct_choice")
            answer = options[place] if place is not None and place < len(options) else None
            meta = {key: entry[key] for key in ("duration_group", "question_category", "topic_category", "level")}
            question = multiple_choice(entry["question"], options)
            video = self.video(videos, entry["video_path"])
            yield Sample(entry["id"], video, question, answer, options, meta, end=entry["duration"])
