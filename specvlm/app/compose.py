"""Compose and check configurations from command-line overrides; Hydra's errors become one line each."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, ValueType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from specvlm import config
from specvlm.app import job_names as names
from specvlm.app.explain import explained
from specvlm.app.quoting import FOLDERS, quoted_text
from specvlm.config import RunConfig
from specvlm.errors import UserError, did_you_mean, first_line, line
from specvlm.parsing.files import read_yaml
from specvlm.strategies import registry

OWN_SAMPLE = ("video", "image", "question")  # keys of a run without a data set
MOST_JOBS = 1000  # most jobs of a sweep


# The table of strategies that Hydra knows. A list changed in place, since `integrity` undoes assignments to globals.
_registered: list[object] = []


def register() -> None:
    """Register everything that conf/config.yaml refers to with Hydra. Safe to call again."""
    table = registry.collect()
    if not any(known is table for known in _registered):
        registry.store()
        names.register()
        _registered[:] = [table]


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose and check the configuration of one run.

    Args:
        overrides: As on the command line, such as `["pruner=uniform", "ratio=0.5"]`.

    Raises:
        UserError: An override is wrong, or the configuration cannot run.
    """
    return jobs(overrides, sweep=False)[0].cfg


@dataclass(frozen=True)
class Job:
    """A run of one video, or a job over samples, ready to start.

    Attributes:
        cfg: The checked configuration.
        run_dir: Output folder, if the job is not part of a sweep.
        folder: Output folder of a job over samples, relative to that of the command. None for a run of one video.
        label: Name shown to the user.
        place: Output folder in a sweep, relative to the sweep's. None without a sweep, or if its name contains the
            job's number, which is not known yet.
    """

    cfg: RunConfig
    run_dir: Path
    folder: Path | None = None
    label: str = ""
    place: str | None = None


def jobs(overrides: Sequence[str], sweep: bool, folder: Path | None = None) -> list[Job]:
    """Compose and check every job. The jobs of a sweep are those that Hydra's basic sweeper makes.

    Args:
        overrides: As on the command line.
        sweep: Whether this is a sweep (`-m`), in which commas separate values.
        folder: Additional folder of YAML files (`--config-dir`).

    Raises:
        UserError: An override is wrong, or a configuration cannot run.
    """
    with hydra(folder):
        if not sweep:
            return [job_of(composed([*overrides, *searchpath(folder)], RunMode.RUN), sweep)]
        master = composed([*overrides, *searchpath(folder)], RunMode.MULTIRUN)
        (batch,) = BasicSweeper.split_arguments(_parsed(arguments_of(master)), None)
        return jobs_of([_loader().load_sweep_config(master, words) for words in batch])


@contextmanager
def hydra(folder: Path | None = None, main: Path | None = None) -> Iterator[None]:
    """Initialise Hydra for a block, and turn Hydra's errors in it into UserError.

    Args:
        folder: Additional folder of YAML files (`--config-dir`). It is only checked here; `searchpath` adds it.
        main: Folder to use instead of conf/.

    Raises:
        UserError: `folder` is missing, a YAML file in it is damaged or too large, or Hydra reports an error.
    """
    if folder and not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    for path in folder.rglob("*.yaml") if folder else ():
        read_yaml(path)  # refuses alias bombs, which Hydra would expand
    with explained(), initialize_config_dir(str(main or config.conf_dir()), job_name="specvlm", version_base="1.3"):
        register()
        yield


def searchpath(folder: Path | None) -> list[str]:
    """Override that adds `folder` to Hydra's search path, in a list; an empty list without a folder."""
    return [f"hydra.searchpath=[{quoted_text(f'file://{folder.resolve()}')}]"] if folder else []


def composed(words: Sequence[str], mode: RunMode, name: str = "config") -> DictConfig:
    """Compose the configuration of a run, or the one that all jobs of a sweep share. Includes Hydra's own part.

    Raises UserError if Hydra cannot read a word, a sweep has too many jobs, or a folder name is not valid.
    """
    _refuse_lists(words, mode)
    try:
        with warnings.catch_warnings():
            # Our preset for Ray's launcher has the name that the package gives its own.
            warnings.filterwarnings("ignore", "(?s).*is validated against ConfigStore schema")
            cfg = _loader().load_configuration(name, list(words), mode, from_shell=False)
        if mode == RunMode.MULTIRUN:
            _refuse_too_many(cfg)
        folders = {key: str(OmegaConf.select(cfg, key)) for key in FOLDERS}
    except (AssertionError, AttributeError, TypeError, LookupError) as err:  # Hydra raises these for some of its own keys
        own = " ".join(word for word in words if "hydra." in word)
        raise UserError(f"Hydra cannot read {own} ({first_line(err)}): leave out its own keys, or write them in full") from err
    for key, where in folders.items():
        if "\0" in where:
            raise UserError(f"{key}={where}: a folder name cannot contain a null character")
    return cfg


def arguments_of(master: DictConfig) -> list[str]:
    """Overrides of a sweep: `hydra.sweeper.params` of the configuration, then those of the command line, which win."""
    own = OmegaConf.select(master, "hydra.sweeper.params") or {}
    return [*(f"{key}={value}" for key, value in own.items()), *master.hydra.overrides.task]


def jobs_of(configs: Sequence[DictConfig]) -> list[Job]:
    """Check all jobs of a sweep before any starts. Raises UserError if one cannot run or two would share a folder."""
    found = [job_of(cfg, sweep=True) for cfg in configs]
    _refuse_shared(found)
    return found


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create(config_loader=_loader()).parse_overrides(list(words))


def _refuse_lists(words: Sequence[str], mode: RunMode) -> None:
    """Raise UserError for a list as a group's value, and for several values of a key without -m.

    Hydra would merge the options in such a list. Only several experiments may be merged.
    """
    for override in _parsed(words):
        group, value = override.key_or_group, override.value()
        names = value if isinstance(value, list) and group == "experiment" else [value]
        one = override.is_sweep_override() or all(isinstance(name, str | dict | None) for name in names)
        if group in config.GROUPS and not one:
            raise UserError(f"{override.input_line}: expected one by name, as in {group}=NAME")
        if mode == RunMode.RUN and override.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
            why = "several values are a sweep, which needs -m (one list is written key=[a,b])"
            raise UserError(f"{override.input_line}: {why}")


def _refuse_too_many(master: DictConfig) -> None:
    """Raise UserError for an interval, for a pattern that matches nothing, and for more than MOST_JOBS jobs.

    Checks nothing if the user has chosen another sweeper than Hydra's basic one.
    """
    if not is_basic(master.hydra.sweeper):
        return
    count: dict[str, int] = {}
    for override in _parsed(arguments_of(master)):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: an interval needs a sampling sweeper, such as hydra/sweeper=optuna")
        if _length(override) > MOST_JOBS:
            raise UserError(f"{override.input_line} has more than {MOST_JOBS} values, more than a sweep may have jobs")
        values = len(list(override.sweep_string_iterator())) if override.is_sweep_override() else 1
        if not values:
            raise UserError(f"{override.input_line}: nothing matches")
        count[override.get_key_element()] = values
    if (jobs := math.prod(count.values())) > MOST_JOBS:
        raise UserError(f"this sweep has {jobs} jobs, at most {MOST_JOBS} are allowed: split it into several")


def is_basic(plugin: DictConfig) -> bool:
    """Whether this launcher or sweeper is Hydra's own basic one."""
    return str(plugin._target_).startswith("hydra._internal.")


def job_of(cfg: DictConfig, sweep: bool) -> Job:
    """Check a composed configuration and make its job. Raises UserError if it cannot run."""
    words = list(cfg.hydra.overrides.task)
    sampled = OmegaConf.select(cfg, "dataset") is not None
    place = _subdir(cfg, sampled) if sweep else None
    folder = Path(place or "") if sampled else None  # relative: ${now} differs between jobs
    own = {str(key) for key in OmegaConf.select(cfg, "hydra.sweeper.params") or ()}
    if left := own - {word.lstrip("+").partition("=")[0] for word in words}:
        how = "give it alone" if sweep else "it needs -m"
        preset = cfg.hydra.runtime.choices.get("experiment")
        raise UserError(f"experiment={preset} is a sweep, over {', '.join(sorted(left))}: {how}")
    run = frozen(cfg)
    if run.dataset is not None:
        _refuse_own_sample(words, run.dataset.name)
    for kind in registry.KINDS:
        if getattr(run, kind) is not None:
            try:
                registry.build(kind, getattr(run, kind))
            except Exception as error:  # in a sweep, a constructor that raises fails its own job only
                if isinstance(error, UserError) or not sweep:
                    raise
    return Job(run, Path(cfg.hydra.run.dir), folder, names.label(words), place)


def frozen(cfg: DictConfig) -> RunConfig:
    """Check a composed configuration, and return it without Hydra's own part. Raises UserError if it is wrong."""
    for key in map(str, cfg):
        if key not in (*config.KEYS, "hydra"):
            raise UserError(f'there is no key "{key}"; choose from {", ".join(config.NAMES)}.{did_you_mean(key, config.NAMES)}')
    for key in config.KEYS:
        if key not in cfg or OmegaConf.is_missing(cfg, key):
            raise UserError(f"{key} has no value: give {key}=…")
    for key, example in (("dataset", "synthetic"), ("metric", "accuracy"), ("tracker", "wandb")):
        if cfg[key] is not None and not (isinstance(cfg[key], DictConfig) and isinstance(cfg[key].get("name"), str)):
            raise UserError(f"{key}={line(str(cfg[key]))}: expected null, or one by name, as in {key}={example}")
    for side in ("target", "draft"):
        if OmegaConf.is_missing(cfg[side], "path"):
            raise UserError(f"{side}.path has no value: give {side}.path=FOLDER, a folder written by save_pretrained")
    kinds = [kind for kind in registry.KINDS if kind not in registry.OPTIONAL or cfg[kind] is not None]
    chosen = {kind: registry.settings(kind, cfg[kind]) for kind in kinds}
    values: dict[str, Any] = {
        key: OmegaConf.to_object(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key] for key in config.KEYS
    }
    run = RunConfig(**values | chosen)
    config.validate(run)
    return run


def _refuse_own_sample(words: Sequence[str], dataset: str) -> None:
    """Raise UserError if an override sets a key of OWN_SAMPLE although there is a data set. Defaults do not count."""
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if key in OWN_SAMPLE:
            how = f"leave {key} out, or use your own with dataset=folder dataset.root=FOLDER"
            raise UserError(f"{word} does not go with dataset={dataset}, which has its own videos and questions: {how}")


def _refuse_shared(found: Sequence[Job]) -> None:
    """Raise UserError if two jobs of a sweep would write into the same folder. Shards of a job may share one."""
    seen: dict[tuple[str, str | None], int] = {}
    for number, job in enumerate(found, start=1):
        if job.place is None:
            continue
        key = os.path.normpath(job.place), job.cfg.shard
        if key in seen:
            raise UserError(
                f"jobs {seen[key]} and {number} of this sweep would both write into {key[0]}: "
                "give each value once, and let hydra.sweep.subdir tell the jobs apart"
            )
        seen[key] = number


def _subdir(cfg: DictConfig, sampled: bool) -> str | None:
    """Return the folder of a job, relative to the sweep's; None if its name has the job's number, not known yet.

    Raises UserError if the name of a job over samples has a number.
    """
    try:
        return str(cfg.hydra.sweep.subdir)
    except OmegaConfBaseException as err:
        if not sampled:
            return None
        raise UserError("hydra.sweep.subdir: a job over samples has no number: name it by its overrides") from err


def _length(override: Override) -> float:
    """Number of values in a `range` or a choice, without listing them; 1 for any other override."""
    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        start, stop, step = (float(number or 0) for number in (sweep.start, sweep.stop, sweep.step))
        return (stop - start) / step if step else math.inf
    return len(sweep.list) if isinstance(sweep, ChoiceSweep) else 1
