"""MVBench: twenty tasks on short clips from eleven public data sets."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from specvlm.parsing.bounds import Seconds
from specvlm.strategies import Sample
from specvlm.strategies.datasets.local import LocalDataset, first_there, multiple_choice
from specvlm.video.frames import read_frames

FRAMES, FRAMES_PER_SECOND = "tvqa/frames_fps3_hq", 3.0  # here, a video is a folder of frames
# Folder of each task's videos below video/.
FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": FRAMES,
    "counterfactual_inference": "clevrer/video_validation",
}
# Tasks whose questions are about the section from `start` to `end` of a longer video.
PARTS = frozenset({"action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning"})
# Folders in the repository's branch `video`, where sections are already cut out and frames are joined into videos.
CUT = {
    "star/Charades_v1_480": "star/Charades_segment",
    "sta/sta_video": "sta/sta_video_segment",
    FRAMES: "tvqa/video_fps3_hq_segment",
    "ssv2_video": "ssv2_video_mp4",
    "nturgbd": "nturgbd_convert",
}


class Entry(TypedDict):
    """An entry of json/TASK.json."""

    video: str
    question: str
    candidates: list[str]
    answer: str
    start: NotRequired[Seconds | None]
    end: NotRequired[Seconds | None]


@dataclass(frozen=True)
class MVBenchDataset(LocalDataset):
    """MVBench: multiple choice, 20 tasks of 200 questions on short clips.

    arXiv 2311.17005; Hugging Face: OpenGVLab/MVBench. Layout: json/TASK.json, and video/ with the archives unpacked in
    it (some videos are below video/data0613/). The layout of the repository's branch `video` works, too. Questions of
    five tasks are about a section of the video; one task has folders of frames as videos. The 320 NTU RGB+D videos are
    not in the repository; without them, the samples of fine_grained_pose are skipped.

    Attributes:
        tasks: Names of the tasks to use, out of 20; empty for all.
    """

    name = "mvbench"
    split = "test"
    layout = "json/ and video/, its archives unpacked, of huggingface.co/datasets/OpenGVLab/MVBench"
    choices = {"tasks": FOLDERS}
    tasks: tuple[str, ...] = ()

    def lists(self) -> list[Path]:
        return [self.folder / "json" / f"{task}.json" for task in self.tasks or FOLDERS]

    def listed(self) -> Iterator[Sample]:
        cut = os.path.isdir(self.folder / "star")  # the branch `video` has its folders next to json/
        videos = self.folder if cut else self.place("video")
        for task, path in zip(self.tasks or FOLDERS, self.lists(), strict=True):
            for number, entry in enumerate(self.entries(path, Entry)):
                yield _sample(self, f"{task}-{number:03d}", task, entry, videos, cut)


def _sample(data: MVBenchDataset, key: str, task: str, entry: dict[str, Any], videos: Path, cut: bool) -> Sample:
    """Convert an entry to a sample. cut: True if the videos are those of the branch `video`."""
    folder = CUT.get(FOLDERS[task], FOLDERS[task]) if cut else FOLDERS[task]
    path = first_there(*(data.video(videos / below / folder, entry["video"]) for below in (".", "data0613")))
    options = tuple(entry["candidates"])
    part = task in PARTS and not cut
    return Sample(
        key,
        partial(read_frames, path, FRAMES_PER_SECOND) if folder == FRAMES else path,
        multiple_choice(entry["question"], options),
        entry["answer"],
        options,
        {"task": task},
        float(entry.get("start") or 0.0) if part else 0.0,
        entry.get("end") if part else None,
    )
