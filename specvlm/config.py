"""Types and limits of the keys of a run, except for those of strategies, which come from their fields (`registry.py`).

conf/config.yaml has the defaults, and a comment that explains each key.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING, DictConfig, OmegaConf

from specvlm.errors import UserError, line
from specvlm.parsing.bounds import KEY, Within, check

EMBEDDED = "embedded:"
CHECKS = ("hf", "generate")  # check=…, by Hugging Face's own model: one pass over the answer, or its `generate`
THREADS = max(64, 4 * (os.cpu_count() or 1))  # limit of threads=…: no machine gains by more; far more crash torch
SHARDS = 4096  # limit of N in shard=K/N
MOST_GIB = 4096  # limit of prefixes=…
BATCH = 256  # limit of batch=…
# Keys whose value names a strategy or a preset; Hydra calls them groups.
GROUPS = ("pruner", "drafter", "verifier", "dataset", "metric", "tracker", "pair", "experiment")

# Choices are read and written by name, which equals the value.
Positions = StrEnum("Positions", "original reindexed")
Mrope = StrEnum("Mrope", "hf reference")
Reader = StrEnum("Reader", "auto pyav decord")
Dtype = StrEnum("Dtype", "auto float32 float64 bfloat16 float16")
EngineKind = StrEnum("EngineKind", "auto eager graphs")
Weights = StrEnum("Weights", "bf16 fp8 int8 int4")  # how the text layers and head of target or draft are stored
TargetParallel = StrEnum("TargetParallel", "layers tensor")
DraftParallel = StrEnum("DraftParallel", "tensor")


@dataclass(frozen=True)
class ModelConfig:
    """Keys that target and draft share.

    Attributes:
        path: A folder written by `save_pretrained`, `owner/name` on the hub, or `embedded:…` for one in the package.
        weights: Quantisation of the text layers and the head. None: not quantised. `bf16`: not quantised, and loading
            fails if the dtype is not bfloat16.
    """

    path: str = MISSING
    weights: Weights | None = None


@dataclass(frozen=True)
class TargetConfig(ModelConfig):
    """Keys `target.…`. parallel: how to split the target over several GPUs; None for one device."""

    parallel: TargetParallel | None = None


@dataclass(frozen=True)
class DraftConfig(ModelConfig):
    """Keys `draft.…`.

    Attributes:
        parallel: With target.parallel=tensor: split the draft over the ranks like the target. None: rank 0 holds it.
        device: Device for the draft alone. None: the first device of the target.
    """

    parallel: DraftParallel | None = None
    device: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """All keys of a run. It serves as Hydra's schema, and later holds the checked values.

    In the checked values, pruner, drafter, verifier, dataset, metric and tracker are results of `registry.settings`.
    """

    pruner: Any = MISSING
    drafter: Any = MISSING
    verifier: Any = MISSING
    dataset: Any = None
    metric: Any = None
    tracker: Any = None
    target: TargetConfig = field(default_factory=TargetConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    ratio: Annotated[float, Within(0, 1, "a share of the video tokens to drop")] = MISSING
    positions: Positions = MISSING
    mrope: Mrope = MISSING
    video: Any = MISSING
    image: Any = None
    question: str | None = MISSING
    frames: Annotated[int | None, Within(1, 16_384)] = MISSING
    fps: Annotated[float | None, Within(0, 1000, above=True)] = MISSING
    max_pixels: Annotated[int | None, Within(1, 2**26)] = MISSING
    reader: Reader = MISSING
    max_new_tokens: Annotated[int, Within(1, 131_072)] = MISSING
    repetition_penalty: Annotated[float | None, Within(0.01, 100)] = MISSING
    seed: Annotated[int, Within(0, 2**63 - 1)] = MISSING
    device: str = MISSING
    dtype: Dtype = MISSING
    engine: EngineKind = MISSING
    threads: Annotated[int | None, Within(1, THREADS)] = MISSING
    check: str | None = MISSING
    baseline: bool = MISSING
    baselines: str | None = MISSING
    resume: bool = MISSING
    fail_fast: bool = MISSING
    shard: str | None = MISSING
    turn: Annotated[int, Within(1, 1_000_000)] = MISSING
    batch: Annotated[int, Within(1, BATCH)] = MISSING
    prefetch: Any = MISSING
    prefixes: Any = MISSING
    record: bool = MISSING


KEYS = tuple(f.name for f in fields(RunConfig))
NAMES = tuple(dict.fromkeys((*GROUPS, *KEYS)))  # the keys that may come before "=" on the command line


def schema(frozen: type) -> Any:
    """Make a writable OmegaConf node of a frozen dataclass; OmegaConf itself would make it read-only."""

    def thaw(node: DictConfig) -> None:
        OmegaConf.set_readonly(node, None)
        for key in node:
            if isinstance(part := node._get_node(key), DictConfig):
                thaw(part)

    node: DictConfig = OmegaConf.structured(frozen)
    thaw(node)
    return node


def plain(value: Any) -> Any:
    """Convert a configuration or a part of it to dicts and lists of plain values; choices become their names."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.name if isinstance(value, Enum) else value


def word(value: Any) -> str:
    """Format a value as Hydra's command line takes it, such as `null` or `[1,2]`. Does not quote strings."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(word, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return value.name if isinstance(value, Enum) else str(value)


def validate(cfg: RunConfig) -> None:
    """Raise UserError for mistakes that types do not show: numbers out of bounds, malformed texts, conflicting keys."""
    check(RunConfig, vars(cfg), KEY)
    _expect(cfg, "check", cfg.check in (None, *CHECKS), f"null, {' or '.join(CHECKS)}")
    check_prefixes(cfg.prefixes)
    _expect(cfg, "prefetch", cfg.prefetch in ("auto", True, False), "auto, true or false")
    shard = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", "0/1" if cfg.shard is None else cfg.shard)
    of = f"0/4, 1/4, 2/4 or 3/4, of at most {SHARDS}, or null"
    _expect(cfg, "shard", shard is not None and int(shard[1]) < int(shard[2]) <= SHARDS, of)
    mirrored = (cfg.tracker, f"tracker={getattr(cfg.tracker, 'name', None)} mirrors jobs over")
    parts = ((cfg.shard, "shard divides"), (cfg.resume, "resume continues"), mirrored)
    joint = (cfg.batch > 1, f"batch={cfg.batch} decodes together")
    for asked, what in (*parts, joint, (cfg.metric, "metric scores answers to")):
        if asked and cfg.dataset is None:
            raise UserError(f"{what} the samples of a data set: give dataset=…, or leave it out")
    _expect(cfg, "device", re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", cfg.device) is not None, "auto, cpu, cuda or cuda:1")
    _expect(cfg, "video", bool(listed(cfg.video)), "a file or the name of an embedded clip, or a list of these")
    _expect(cfg, "image", cfg.image is None or bool(listed(cfg.image)), "an image file, a list of these, or null")
    _expect(cfg, "baselines", "\0" not in (cfg.baselines or ""), "a folder name without null characters")
    if cfg.target.parallel == "layers" and cfg.target.weights not in (None, "bf16"):
        wish = f"target.weights={cfg.target.weights}"
        raise UserError(f"target.parallel=layers cannot be combined with {wish}: use tensor, or one device")
    if cfg.draft.parallel and cfg.target.parallel != "tensor":
        raise UserError("draft.parallel=tensor needs target.parallel=tensor")
    if cfg.batch > 1 and cfg.target.parallel == "tensor":
        raise UserError(f"batch={cfg.batch} cannot be combined with target.parallel=tensor yet: leave one of them out")
    own = cfg.draft.device
    if own is not None and (cfg.draft.parallel or re.fullmatch(r"cpu|cuda:[0-9]{1,2}", own) is None):
        raise UserError(f"draft.device={own}: expected cuda:1, cpu or null, and no draft.parallel")


def check_prefixes(value: object) -> None:
    """Raise UserError for a value of `prefixes` other than auto, false or a number of GiB."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_GIB
    if not (number or value is False or value == "auto"):
        raise UserError(f"prefixes={line(str(value))}: expected auto, false, or the GiB to keep, at most {MOST_GIB:,}")


def listed(value: Any) -> list[str]:
    """Return the names in a value of `video` or `image`; empty if it is neither a name nor a list of names."""
    names = value if isinstance(value, list | tuple) else [value]
    return list(names) if all(isinstance(name, str) and name.strip() for name in names) else []


def model_folder(path: str) -> Path:
    """Resolve `target.path` or `draft.path`: `embedded:…` to a folder inside the package; expand ~ in any other path.

    The result may still be a name on the hub.
    """
    if path.startswith(EMBEDDED):
        return Path(__file__).parent / "assets" / path.removeprefix(EMBEDDED)
    return home(path)


def home(path: str) -> Path:
    """Expand ~ in a path. The ~ of an unknown user is kept, and opening the path fails later."""
    return Path(os.path.expanduser(path))


def conf_dir() -> Path:
    """Find conf/, the folder of YAML files: inside the package in a wheel, beside it in a checkout.

    Raises FileNotFoundError if it is in neither place.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {here} or beside it: specvlm is not installed completely")


def _expect(cfg: RunConfig, key: str, holds: bool, allowed: str) -> None:
    """Raise UserError for the value of `key` unless `holds`."""
    if not holds:
        raise UserError(f"{key}={line(str(getattr(cfg, key)))}: expected {allowed}")
