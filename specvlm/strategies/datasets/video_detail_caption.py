"""VideoDetailCaption: long descriptions of 499 videos. SpecVLM's main figures are measured on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from specvlm.strategies import Sample
from specvlm.strategies.datasets.local import SUFFIXES, LocalDataset, first_there


class Entry(TypedDict):
    """A row of the Parquet file."""

    video_name: str
    question: str
    answer: str | None


@dataclass(frozen=True)
class VideoDetailCaptionDataset(LocalDataset):
    """VideoDetailCaption: describe each of 499 videos in detail; long answers, SpecVLM's main data set.

    The videos are those of Video-ChatGPT's test set, each with a reference answer. All samples ask the same question.
    Hugging Face: lmms-lab/VideoDetailCaption. Layout: data/test-00000-of-00001.parquet (video_name, question, answer),
    Test_Videos/NAME.mp4. SpecVLM's code uses the 100 samples that shuffle=42 and limit=100 give.
    """

    name = "video_detail_caption"
    split = "test"
    metrics = ()  # its own script asks GPT-3.5; metric=rouge_l compares with the reference
    layout = "data/test-00000-of-00001.parquet and Test_Videos/ of huggingface.co/datasets/lmms-lab/VideoDetailCaption"

    def lists(self) -> list[Path]:
        return [self.folder / "data" / "test-00000-of-00001.parquet"]

    def listed(self) -> Iterator[Sample]:
        videos = self.place("Test_Videos", "evaluation/Test_Videos")
        for row in self.rows(self.lists()[0], Entry):
            name = row["video_name"]
            video = first_there(*(self.video(videos, f"{name}{suffix}") for suffix in SUFFIXES))
            yield Sample(name, video, row["question"], row["answer"])
