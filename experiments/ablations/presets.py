"""Which jobs an experiment has: those of its preset in conf/experiment, told by their configuration, not by their folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from experiments.strategies.report import TITLES
from specvlm.app import compose
from specvlm.report.reading import STRATEGIES, flat
from specvlm.results import rows

# What each job of an experiment is held against: the same job but for these settings.
BASES: dict[str, tuple[dict[str, Any], ...]] = {
    "main_table": ({"pruner.name": "none"}, {"pruner.name": "uniform"}, {"drafter.name": "tree"}),
    "ratio_by_pruner": ({"pruner.name": "none"},),
    "stage_one_mass": ({"pruner.mass": 0.4},),
    "positions": ({"positions": "original"},),
    "tree_shapes": ({"drafter.shape": "paper"},),
    "frames": ({"pruner.name": "none"},),
}
FRAMES = {"qwen2_5_vl": 32, "llava_onevision": 16}  # what frames=null takes of a scene
# What changes no accepted guess of a scene: how many scenes, how they were watched, and what they ran on.
APART = {"dataset.scenes", "dataset.first", "video", "question", "record", "baseline", "threads", "device", "engine",
         "target.path", "draft.path", "draft.device"}  # fmt: skip
Settings = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A job of an experiment. label: its name in rows and tables."""

    label: str
    settings: Settings


def family_of(config: Mapping[str, Any]) -> str | None:
    """Whose embedded pair with its plain draft the job had; None for any other pair."""
    paths = (config["target"]["path"], config["draft"]["path"])
    return next((name for name in TITLES if paths == (f"embedded:{name}/target", f"embedded:{name}/plain")), None)


def settings_of(config: Mapping[str, Any], family: str) -> Settings:
    """What tells a job's acceptance from another's. Where all or nothing is kept, no pruner chose, while positions still
    matter; frames: null for the family's own number.
    """
    told = ((key, repr(value) if isinstance(value, list | dict) else value) for key, value in flat(config))
    found = {key: value for key, value in told if key not in APART}
    found["frames"] = None if found.get("frames") == FRAMES[family] else found.get("frames")
    if found["pruner.name"] == "none" or found["ratio"] in (0, 1):
        ratio = 1.0 if found["ratio"] == 1 and found["pruner.name"] != "none" else 0.0
        found = {key: value for key, value in found.items() if not key.startswith("pruner.")}
        found |= {"pruner.name": "none" if ratio == 0 else "any", "ratio": ratio}
    return found


@cache
def standard() -> Settings:
    return settings_of(plain("dataset=synthetic", "drafter=tree", "pruner=two_stage", "ratio=0.9")[0], next(iter(FRAMES)))


@cache
def plain(*words: str) -> list[Mapping[str, Any]]:
    """The configurations that these words ask for, of any family."""
    return [rows.plain(job.cfg) for job in compose.jobs(list(words), sweep=True)]


def label_of(settings: Settings) -> str:
    """`two_stage 0.9 mass=0.2`: the pruner, the ratio, and all that is not standard."""
    usual, name = standard(), settings["pruner.name"]
    words = [name] if name == "none" else ["text only"] if name == "any" else [name, f"{settings['ratio']:g}"]
    for key, value in settings.items():
        kind, _, field = key.partition(".")
        mine = kind in STRATEGIES and field != "name"
        other = mine and settings[f"{kind}.name"] != usual[f"{kind}.name"]  # whose fields are its own
        if key not in ("pruner.name", "ratio") and value != usual.get(key) and not other:
            words.append(f"{field if mine else kind}={value}")
    return " ".join(words)


@cache
def planned(experiment: str, family: str) -> tuple[Planned, ...]:
    """In the order of the preset; jobs that are the same by `settings_of` once."""
    each = [settings_of(config, family) for config in plain(f"experiment={experiment}")]
    found = {label_of(settings): Planned(label_of(settings), settings) for settings in each}
    assert all(found[label_of(settings)].settings == settings for settings in each), f"{experiment}: one label, two jobs"
    return tuple(found.values())


def bases_of(experiment: str, job: Planned) -> dict[str, str | None]:
    """By the heading of a column the label of what the job is held against there; None: it is this job itself."""
    others = {str(next(iter(change.values()))): label_of(job.settings | change) for change in BASES[experiment]}
    return {heading: None if other == job.label else other for heading, other in others.items()}
