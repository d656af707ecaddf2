"""Collect what the drafter saw of a sample: frames, kept tokens, attention, and accepted and refused words.

Reads the frames again from the sample's video, as the job did. That needs the target's folder (configuration and
tokenizer, no weights). If the video, the sample or that folder is missing, the report says so and continues.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from specvlm.app.prepare import frames_of, own_sample
from specvlm.config import model_folder
from specvlm.decoding.text import spell
from specvlm.errors import UserError, line, message
from specvlm.models.load import skeleton
from specvlm.models.video_lm import VideoLM
from specvlm.parsing.bounds import parse
from specvlm.report.reading import Job, Row
from specvlm.results.folder import attention_file
from specvlm.results.records import Round as RoundRecord
from specvlm.results.thumbnails import bits, data_uri, picture
from specvlm.strategies import Sample, registry
from specvlm.types import TokenGrid
from specvlm.video.video import SAMPLINGS

ROW_KEYS = ("verdict", "text", "kept_tokens", "video_tokens", "accepted_per_round", "new_tokens")  # keys for the player


@dataclass(frozen=True)
class Round:
    """Texts of a round: accepted guesses, refused ones, and the target's own token after them.

    Round 0 has only `own`, the target's token. `own` is None if the round was cut off before that token.
    """

    accepted: list[str]
    refused: list[str]
    own: str | None


@dataclass(frozen=True, eq=False)
class View:
    """One job's view of a sample.

    Attributes:
        job: The job.
        row: Line of samples.jsonl that the job wrote for the sample.
        kept: Indices of the video tokens that the drafter saw; None if no pruner was used.
        heat: The target's attention to each video token, (N,), in multiples of its mean; None if not recorded.
        rounds: Texts of each round.
    """

    job: Job
    row: Row
    kept: Sequence[int] | None = None
    heat: NDArray[np.float32] | None = None
    rounds: list[Round] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Seen:
    """A sample with the views of several jobs.

    Attributes:
        sample: Id of the sample.
        question: The question.
        answer: The data set's reference answer, if any.
        grid: Layout of the video's tokens.
        frames: Pictures of the frames listed in `shown`.
        shown: Indices of the grid's frames that are shown.
        seconds: Time in the video of each frame shown.
        views: One view per job.
        problem: Why frames or words are missing; empty if they are not.
    """

    sample: str
    question: str = ""
    answer: str | None = None
    grid: TokenGrid | None = None
    frames: list[Image.Image] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    problem: str = ""

    def packed(self, numbers: Mapping[Job, int]) -> dict[str, Any]:
        """Encode for the page's player: pictures as data URIs, kept tokens as bits, heat as bytes.

        numbers: index of each job in the report.
        """
        grid = self.grid
        # All jobs share the target, so its attention is stored once.
        heat, top = next((scaled(view.heat) for view in self.views if view.heat is not None), (None, None))
        return {
            "sample": self.sample,
            "question": self.question,
            "answer": self.answer,
            "problem": self.problem,
            "grid": grid and [grid.frames, grid.height, grid.width, grid.newline],
            "frames": [data_uri(frame) for frame in self.frames],
            "shown": self.shown,
            "seconds": self.seconds,
            "heat": heat,
            "top": top,
            "views": [
                {"job": numbers[view.job], "kept": None if view.kept is None or not grid else bits(view.kept, len(grid))}
                | {"rounds": [[one.accepted, one.refused, one.own] for one in view.rounds]}
                | {key: view.row[key] for key in ROW_KEYS}
                for view in self.views
            ],
        }


def see(sample: str, jobs: Sequence[Job], most: int) -> Seen:
    """Collect the views of a sample by all jobs with the same token grid.

    Args:
        sample: Id of the sample.
        jobs: The first that has finished the sample decides on the grid.
        most: Limit on the frames to show.

    Raises:
        UserError: No job has finished the sample, or a job's rounds or attention are damaged.
    """
    did = {job: row for job in jobs if (row := job.row(sample))}
    if not did:
        raise UserError(f"{'; '.join(job.label for job in jobs)}: sample {sample} is not done")
    first = next(iter(did))
    cfg: Any = SimpleNamespace(**first.config)  # plain values, nothing to resolve
    if cfg.dataset:
        cfg.dataset = SimpleNamespace(**cfg.dataset)
    try:
        target, asked = target_of(cfg.target["path"], cfg.mrope), sample_of(cfg, sample)
        if asked.more:
            raise UserError("its prompt has several videos, which are not shown")
        clip = frames_of(cfg, target, asked)
        grid, _ = target.process_video(clip, cfg.max_pixels)
        if did[first]["video_tokens"] != len(grid):
            had = did[first]["video_tokens"]
            raise UserError(f"the video now makes {len(grid)} tokens, but the job had {had}: has it changed?")
    except (UserError, OSError) as error:
        return Seen(sample, views=[View(*pair) for pair in did.items()], problem=" ".join(str(error).split()))
    # Leave out jobs with other frames or another model: their tokens have another grid.
    alike = [pair for pair in did.items() if pair[1]["video_tokens"] == len(grid) and looks(pair[0]) == looks(first)]
    places = SAMPLINGS["uniform"](grid.frames, min(most, grid.frames))
    frames = [place * len(clip.frames) // grid.frames for place in places]
    return Seen(
        sample,
        asked.question,
        asked.answer,
        grid,
        [picture(clip.frames[place]) for place in frames],
        places,
        [clip.times[place] for place in frames],
        [view(*pair, target.tokenizer) for pair in alike],
    )


def looks(job: Job) -> tuple[Any, ...]:
    """Return the settings that determine a sample's token grid, the layout of its video tokens."""
    return tuple(
        job.settings.get(key) for key in ("target.path", "video", "image", "question", "frames", "fps", "max_pixels", "reader")
    )


@cache
def target_of(path: str, mrope: str) -> VideoLM:
    """Load the target without weights. Raises UserError if its folder is not on this machine or cannot be used."""
    folder = model_folder(path)
    if not folder.is_dir():  # never download what a results folder names
        raise UserError(f"{path}: no such model folder here")
    return skeleton(folder, mrope)


def sample_of(cfg: Any, name: str) -> Sample:
    """Find a sample in the data set of `cfg`. Raises UserError if it is missing or the data set cannot be read.

    Without a data set, returns the video and question of the configuration.
    """
    if not cfg.dataset:
        return own_sample(cfg)
    found = next((sample for sample in samples_of(json.dumps(vars(cfg.dataset))) if sample.id == name), None)
    if found is None:
        raise UserError(f"the data set {cfg.dataset.name} has no sample {name} here: is it another version?")
    return found


@cache
def samples_of(fields: str) -> Sequence[Sample]:
    """Read the samples of a data set. fields: its configuration as JSON text, which can be a key of the cache."""
    return registry.build("dataset", json.loads(fields)).samples()


def view(job: Job, row: Row, tokenizer: Any) -> View:
    """Collect one job's view of a sample.

    Raises UserError if its rounds or attention are damaged, or do not match the sample's number of video tokens.
    """
    steps, total = job.steps[row["sample"]], row["video_tokens"]
    for step in steps:
        parse(RoundRecord, step, f"{job.folder}, a round of {line(row['sample'])}")
    kept = next((step["kept"] for step in steps if "kept" in step), None)
    if kept and max(kept) >= total:
        raise UserError(f"{job.folder} lists token {max(kept)} of {total} as kept: its files do not match")
    return View(job, row, kept, heat_of(attention_file(job.folder, row["index"]), total), rounds_of(steps, tokenizer))


def heat_of(file: Path, total: int) -> NDArray[np.float32] | None:
    """Read the recorded attention of a sample, (N,); None if there is none.

    Raises UserError if the file is damaged, or is not about `total` tokens.
    """
    if not file.is_file():
        return None
    try:
        heat: NDArray[np.float32] = load_file(file)["verifier_attention"].float().numpy()
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} is not an attention file ({message(error)}): run it again with record=true") from None
    if heat.shape != (total,) or not np.isfinite(heat).all():
        raise UserError(f"{file} has the attention of {heat.size} tokens, not of {total}: run it again with record=true")
    return heat


def rounds_of(steps: Sequence[Row], tokenizer: Any) -> list[Round]:
    """Decode the texts of each round: accepted guesses, refused ones, and the target's own token unless cut off."""
    before: list[int] = []
    rounds = []
    for step in steps:
        taken, new = step["accepted"], step["tokens"]
        guesses, own = new[:taken], new[taken:]
        accepted = spell(tokenizer, before, guesses)
        refused = spell(tokenizer, before + guesses, step.get("refused", []), skip=False)  # also shows a guessed end
        rounds.append(Round(accepted, refused, spell(tokenizer, before + guesses, own)[0] if own else None))
        before += new
    return rounds


def scaled(heat: NDArray[np.float32]) -> tuple[str, float]:
    """Encode heat as base64, one byte per token; also returns the heat that byte 255 stands for.

    It is the 99th percentile: if it were the maximum, a few outliers would dim the rest.
    """
    top = max(float(np.quantile(heat, 0.99)), 1e-6)
    return base64.b64encode((heat / top * 255).clip(0, 255).astype(np.uint8).tobytes()).decode(), top
