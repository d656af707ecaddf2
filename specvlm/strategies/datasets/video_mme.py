"""Video-MME: multiple choice on 900 videos of 11 seconds to an hour."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from typing_extensions import TypedDict

from specvlm.strategies import Sample
from specvlm.strategies.datasets.local import SUFFIXES, LocalDataset, first_there, multiple_choice

DURATIONS = ("short", "medium", "long")


class Entry(TypedDict):
    """A row of the Parquet file."""

    question_id: str
    videoID: str
    question: str
    options: list[str]
    answer: str
    duration: str
    domain: Any
    sub_category: Any
    task_type: Any


@dataclass(frozen=True)
class VideoMMEDataset(LocalDataset):
    """Video-MME: multiple choice, 2700 questions on 900 videos of 11 seconds to an hour.

    arXiv 2405.21075; Hugging Face: lmms-lab/Video-MME. Layout: videomme/test-00000-of-00001.parquet, data/VIDEOID.mp4.
    Questions are asked without subtitles.

    Attributes:
        durations: Groups of videos to use: `short`, `medium`, `long`; empty for all.
    """

    name = "video_mme"
    split = "test"
    layout = "videomme/test-00000-of-00001.parquet and data/ of huggingface.co/datasets/lmms-lab/Video-MME"
    choices = {"durations": DURATIONS}
    durations: tuple[str, ...] = ()

    def lists(self) -> list[Path]:
        return [self.folder / "videomme" / "test-00000-of-00001.parquet"]

    def listed(self) -> Iterator[Sample]:
        videos = self.place("data")
        for row in self.rows(self.lists()[0], Entry):
            if self.durations and row["duration"] not in self.durations:
                continue
            # The options come with their letters: "A. An apple."
            lettered = zip(ascii_uppercase, row["options"], strict=False)
            options = tuple(option.removeprefix(f"{letter}.").strip() for letter, option in lettered)
            place = ascii_uppercase.find(row["answer"])
            answer = options[place] if 0 <= place < len(options) else None
            video = first_there(*(self.video(videos, f"{row['videoID']}{suffix}") for suffix in SUFFIXES))
            meta = {key: row[key] for key in ("duration", "domain", "sub_category", "task_type")}
            yield Sample(row["question_id"], video, multiple_choice(row["question"], options), answer, options, meta)
