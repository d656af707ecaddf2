"""MLVU: nine tasks on videos of three minutes to two hours, two of them with long answers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from specvlm.errors import check_choice
from specvlm.strategies import Sample
from specvlm.strategies.datasets.local import LocalDataset, multiple_choice

TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning", "sub_scene", "summary")
DEV = {task: f"{number}_{task}" for number, task in enumerate(TASKS, start=1)}
TEST = ("test_multi_choice_tasks.json", "test_generation_tasks.json")
ANSWERS = tuple(f"test-ground-truth/test_{kind}_gt.json" for kind in ("mcq", "ssc", "vs"))


class Answer(TypedDict):
    """An entry of an answer file of the test split."""

    video: str
    question: str
    candidates: NotRequired[list[str] | None]
    answer: NotRequired[str | None]


class Entry(Answer):
    """An entry of a list of the dev split."""

    duration: Any


class Asked(Entry):
    """An entry of a list of the test split."""

    question_type: str
    question_id: NotRequired[str | None]


@dataclass(frozen=True)
class MLVUDataset(LocalDataset):
    """MLVU: videos of minutes to hours; multiple choice, and sub_scene and summary with long answers.

    arXiv 2406.04264; Hugging Face: MLVU/MVLU (their spelling). Layout of dev: MLVU/json/1_plotQA.json …,
    MLVU/video/1_plotQA/ …. Layout of test (MLVU/MLVU_Test, with tasks of its own): test_multi_choice_tasks.json,
    test_generation_tasks.json, MLVU_Test/video/, and optionally the answers: test-ground-truth/test_mcq_gt.json,
    …_ssc_gt.json, …_vs_gt.json.

    Attributes:
        split: `dev` or `test`.
        tasks: Names of the tasks to use, out of those of the split; empty for all.
    """

    name = "mlvu"
    layout = (
        "MLVU/json/ and MLVU/video/ of huggingface.co/datasets/MLVU/MVLU, or with dataset.split=test"
        " test_multi_choice_tasks.json, test_generation_tasks.json and MLVU_Test/video/ of MLVU/MLVU_Test"
    )
    split: str = "dev"
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, ("dev", "test"))
        for task in self.tasks if self.split == "dev" else ():
            check_choice("tasks", task, DEV)

    def lists(self) -> list[Path]:
        if self.split == "dev":
            return [self.folder / self._inner / "json" / f"{DEV[task]}.json" for task in self.tasks or DEV]
        return [self.folder / name for name in TEST]

    def listed(self) -> Iterator[Sample]:
        return self._listed_dev() if self.split == "dev" else self._listed_test()

    @property
    def _inner(self) -> str:
        """Folder of the dev split in `root`: the subfolder MLVU, as in the repository, or `root` itself."""
        return "." if os.path.isdir(self.folder / "json") else "MLVU"

    def _listed_dev(self) -> Iterator[Sample]:
        videos = self.place(f"{self._inner}/video")
        for task, path in zip(self.tasks or DEV, self.lists(), strict=True):
            for number, entry in enumerate(self.entries(path, Entry)):
                video = self.video(videos / DEV[task], entry["video"])
                yield _sample(f"{task}-{number:04d}", video, entry, task, entry.get("answer"))

    def _listed_test(self) -> Iterator[Sample]:
        """Read the samples of the test split, with answers from those answer files that exist."""
        given = [path for path in (self.folder / name for name in ANSWERS) if path.exists()]
        answers = {_asked(entry): entry.get("answer") for path in given for entry in self.entries(path, Answer)}
        videos = self.place("MLVU_Test/video", "video")
        entries = [entry for path in self.lists() for entry in self.entries(path, Asked)]
        there = sorted({entry["question_type"] for entry in entries})
        for task in self.tasks:
            check_choice("tasks", task, there)
        for number, entry in enumerate(entries):
            task = entry["question_type"]
            if not self.tasks or task in self.tasks:
                key = entry.get("question_id") or f"{task}-{number:04d}"
                yield _sample(key, self.video(videos, entry["video"]), entry, task, answers.get(_asked(entry)))


def _asked(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return a key that matches a question with its published answer, since not all tasks have a common id for both."""
    return entry["video"], entry["question"], *(entry.get("candidates") or ())


def _sample(key: str, video: Path, entry: dict[str, Any], task: str, answer: str | None) -> Sample:
    options = tuple(entry.get("candidates") or ())
    question = multiple_choice(entry["question"], options) if options else entry["question"]
    return Sample(key, video, question, answer, options, {"task": task, "duration": entry["duration"]})
