"""From command-line words to checked configurations, with Hydra's errors turned into one line each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from specvlm import config, manual, names, registry
from specvlm.config import RunConfig
from specvlm.errors import UserError, did_you_mean, first_line, line
from specvlm.outside import escaped, read_yaml

TEXT_KEYS = ("question",)
HYDRAS_OWN = re.compile(r"""(['"]).*\1|null|\?\?\?|(choice|glob|shuffle)\(.*\)""", re.DOTALL)
UNQUOTED = re.compile(r"[\w/.%@?|*:+-]+", re.ASCII)  # what Hydra reads as it stands
OWN_SAMPLE = ("video", "question")  # of a run without a data set
PATH_KEYS = ("video", "target.path", "draft.path", "baselines", "dataset.root", "dataset.questions")
MOST_JOBS = 1000  # of a sweep
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")  # of a run, and of a sweep: each has one
AT_HOME = (*FOLDERS, "baselines", "dataset.root")  # Hydra cannot read a ~, which a shell leaves alone behind a =


_registered: object = None  # the table of strategies that Hydra knows


def register() -> None:
    """Make everything that conf/config.yaml refers to known to Hydra. Can be called again."""
    global _registered
    if _registered is not (table := registry.collect()):
        registry.store()
        manual.store()
        names.register()
        _registered = table


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of one run. Raises UserError."""
    return jobs(overrides, sweep=False)[0].cfg


@dataclass(frozen=True)
class Job:
    """One run as it would start. run_dir: where it would write; folder: of a job over samples, in the sweep's; place: of any
    job of a sweep, where it has no number in its name.
    """

    cfg: RunConfig
    run_dir: Path
    folder: Path | None = None
    label: str = ""
    place: str | None = None


def jobs(overrides: Sequence[str], sweep: bool, folder: Path | None = None) -> list[Job]:
    """Every job that the words ask for, checked; of a sweep those that Hydra's basic sweeper makes.

    folder: one more place for YAML files. Raises UserError.
    """
    with hydra(folder):
        if not sweep:
            return [job_of(composed([*overrides, *searchpath(folder)], RunMode.RUN), sweep)]
        master = composed([*overrides, *searchpath(folder)], RunMode.MULTIRUN)
        (batch,) = BasicSweeper.split_arguments(_parsed(arguments_of(master)), None)
        return jobs_of([_loader().load_sweep_config(master, words) for words in batch])


@contextmanager
def hydra(folder: Path | None = None, main: Path | None = None) -> Iterator[None]:
    """Hydra, ready to compose. folder: one more place for YAML files, main: another one than conf/. Raises UserError."""
    if folder and not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    for path in folder.rglob("*.yaml") if folder else ():
        read_yaml(path)  # Hydra would follow aliases without end
    with explained(), initialize_config_dir(str(main or config.conf_dir()), job_name="specvlm", version_base="1.3"):
        register()
        yield


def searchpath(folder: Path | None) -> list[str]:
    """The words that have Hydra look there, too."""
    return [f"hydra.searchpath=[{_text(f'file://{folder.resolve()}')}]"] if folder else []


def composed(words: Sequence[str], mode: RunMode, name: str = "config") -> DictConfig:
    """A run's configuration with Hydra's own part, or that which all jobs of a sweep have."""
    _refuse_lists(words, mode)
    try:
        cfg = _loader().load_configuration(name, list(words), mode, from_shell=False)
        if mode == RunMode.MULTIRUN:
            _refuse_too_many(cfg)
        folders = {key: str(OmegaConf.select(cfg, key)) for key in FOLDERS}
    except (AssertionError, AttributeError, TypeError, LookupError) as err:  # of Hydra, for some keys of its own
        own = " ".join(word for word in words if "hydra." in word)
        raise UserError(f"Hydra cannot read {own} ({first_line(err)}): leave out its own keys, or write them in full") from err
    for key, where in folders.items():
        if "\0" in where:
            raise UserError(f"{key}={where}: no folder has a null character in its name")
    return cfg


def arguments_of(master: DictConfig) -> list[str]:
    """What a sweep is over: what its preset says by `hydra.sweeper.params`, then the words, which win."""
    own = OmegaConf.select(master, "hydra.sweeper.params") or {}
    return [*(f"{key}={value}" for key, value in own.items()), *master.hydra.overrides.task]


def jobs_of(configs: Sequence[DictConfig]) -> list[Job]:
    """All jobs of a sweep, checked, so that none starts if one is wrong. Raises UserError."""
    found = [job_of(cfg, sweep=True) for cfg in configs]
    _refuse_shared(found)
    return found


def quoted(words: Sequence[str], sweep: bool) -> list[str]:
    """Quote free texts and paths for Hydra, whose grammar gives commas, brackets and apostrophes a meaning.

    In a sweep a comma in `video=a.mp4,b.mp4` separates values, unless a file of the whole name exists. Raises UserError for a
    folder to write to that is empty.
    """
    return [_quoted(word, sweep) for word in words]


@contextmanager
def explained() -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into a UserError of one line. Hydra raises a bare ValueError for some words."""
    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as err:
        raise UserError(explain(err)) from err
    except RecursionError:
        raise UserError("a value is nested too deeply to be read") from None


def explain(err: Exception) -> str:
    """What was wrong, what exists, "did you mean", without Hydra's own vocabulary."""
    cause = err if isinstance(err, OmegaConfBaseException) else err.__cause__
    if isinstance(err, MissingConfigException) and err.missing_cfg_file:
        group, _, name = err.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and name.partition("_")[0] in ("joblib", "submitit"):
            return f'{group}={name} is not installed: pip install "specvlm[launchers]"'
    if isinstance(err, MissingConfigException) and err.missing_cfg_file and err.options is not None:
        return registry.unknown(group, name, list(err.options))
    if isinstance(err, OverrideParseException):
        reason = err.message.removeprefix(f"Error parsing override '{err.override}'").strip().splitlines()[0]
        how = "write key=value, and quote special characters twice, as in \"key='a, b'\""
        return f'cannot read "{err.override}" ({reason}): {how}'
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return _unknown_key(str(cause.full_key), cause.object_type)
    if isinstance(cause, ValidationError) and cause.full_key:
        return _wrong_type(cause)
    details = re.compile(r"\s*(full_key|object_type|reference_type)[:=]")
    return " ".join(line.strip() for line in str(err).splitlines() if not details.match(line)).strip() or type(err).__name__


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create(config_loader=_loader()).parse_overrides(list(words))


def _refuse_lists(words: Sequence[str], mode: RunMode) -> None:
    """Hydra takes several options of a group, one over the other; what they would come to is no strategy. Presets may be
    several.
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
    """What Hydra's basic sweeper cannot do, or would do without end. Raises UserError."""
    if not is_basic(master.hydra.sweeper):
        return
    count: dict[str, int] = {}
    for override in _parsed(arguments_of(master)):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: an interval needs a sweeper that samples, such as hydra/sweeper=optuna")
        if _length(override) > MOST_JOBS:
            raise UserError(f"{override.input_line} has more than {MOST_JOBS} values, the most jobs of a sweep")
        values = len(list(override.sweep_string_iterator())) if override.is_sweep_override() else 1
        if not values:
            raise UserError(f"{override.input_line}: nothing matches")
        count[override.get_key_element()] = values
    if (jobs := math.prod(count.values())) > MOST_JOBS:
        raise UserError(f"this sweep has {jobs} jobs, at most {MOST_JOBS} are allowed: start several")


def is_basic(plugin: DictConfig) -> bool:
    """Is it the launcher, or the sweeper, that comes with Hydra?"""
    return str(plugin._target_).startswith("hydra._internal.")


def job_of(cfg: DictConfig, sweep: bool) -> Job:
    """What was composed as checked values. Raises UserError."""
    words = list(cfg.hydra.overrides.task)
    sampled = OmegaConf.select(cfg, "dataset") is not None
    place = _subdir(cfg, sampled) if sweep else None
    folder = Path(place or "") if sampled else None  # not where: another job's ${now} is another moment
    own = {str(key) for key in OmegaConf.select(cfg, "hydra.sweeper.params") or ()}
    if left := own - {word.lstrip("+").partition("=")[0] for word in words}:
        how = "give it alone" if sweep else "it needs -m"
        raise UserError(f"experiment={_choice(cfg, 'experiment')} is a sweep, over {', '.join(sorted(left))}: {how}")
    run = frozen(cfg)
    if run.dataset is not None:
        _refuse_own_sample(words, run.dataset.name)
    for kind in registry.KINDS:
        if kind != "dataset" or run.dataset is not None:
            try:
                registry.build(kind, getattr(run, kind))
            except Exception as error:  # of a sweep, a strategy that fails when it is made costs its own job, which says so
                if isinstance(error, UserError) or not sweep:
                    raise
    return Job(run, Path(cfg.hydra.run.dir), folder, names.label(words), place)


def frozen(cfg: DictConfig) -> RunConfig:
    """The checked values of what was composed, but for Hydra's own part. Raises UserError."""
    for key in map(str, cfg):
        if key not in (*config.KEYS, "hydra"):
            raise UserError(f'there is no key "{key}"; there is {", ".join(config.NAMES)}.{did_you_mean(key, config.NAMES)}')
    for key in config.KEYS:
        if key not in cfg or OmegaConf.is_missing(cfg, key):
            raise UserError(f"{key} has no value: give {key}=…")
    for key, example in (("dataset", "synthetic"), ("tracker", "wandb")):
        if cfg[key] is not None and not (isinstance(cfg[key], DictConfig) and isinstance(cfg[key].get("name"), str)):
            raise UserError(f"{key}={line(str(cfg[key]))}: expected null, or one by name, as in {key}={example}")
    for side in ("target", "draft"):
        if OmegaConf.is_missing(cfg[side], "path"):
            raise UserError(f"{side}.path has no value: give {side}.path=FOLDER, a folder as save_pretrained writes it")
    kinds = [kind for kind in registry.KINDS if kind != "dataset" or cfg.dataset is not None]
    chosen = {kind: registry.settings(kind, cfg[kind]) for kind in kinds}
    if cfg.tracker is not None:
        chosen["tracker"] = OmegaConf.to_object(OmegaConf.merge(config.schema(config.WandbConfig), cfg.tracker))
    values: dict[str, Any] = {
        key: OmegaConf.to_object(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key] for key in config.KEYS
    }
    run = RunConfig(**values | chosen)
    config.validate(run)
    return run


def _refuse_own_sample(words: Sequence[str], dataset: str) -> None:
    """Keys of one run say nothing about a data set's samples. Only words tell: in a configuration they have defaults."""
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if key in OWN_SAMPLE:
            how = f"leave {key} out, or ask what you like by dataset=folder dataset.root=FOLDER"
            raise UserError(f"{word} does not go with dataset={dataset}, which brings its own videos and questions: {how}")


def _refuse_shared(found: Sequence[Job]) -> None:
    """Raises UserError for two jobs of a sweep that would write into one folder; shards of a job share theirs."""
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
    """None where a number is in it."""
    try:
        return str(cfg.hydra.sweep.subdir)
    except OmegaConfBaseException as err:
        if not sampled:
            return None
        raise UserError("hydra.sweep.subdir: a job over samples has no number: call it after what it is") from err


def _choice(cfg: DictConfig, group: str) -> str:
    return str(cfg.hydra.runtime.choices.get(group))


def _length(override: Override) -> float:
    """How many values a sweep over one key has, without making them."""
    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        start, stop, step = (float(number or 0) for number in (sweep.start, sweep.stop, sweep.step))
        return (stop - start) / step if step else math.inf
    return len(sweep.list) if isinstance(sweep, ChoiceSweep) else 1


def _unknown_key(full_key: str, owner: Any) -> str:
    parent, _, key = full_key.rpartition(".")
    if not parent:
        deeper = [f"{kind}.{key}" for kind, infos in registry.collect().items() for i in infos.values() if _has(i.config, key)]
        hint = did_you_mean(key, config.NAMES) or (f' Did you mean "{deeper[0]}"?' if deeper else "")
        return f'there is no key "{key}"; there is {", ".join(config.NAMES)}.{hint}'
    names = [f.name for f in fields(owner)] if is_dataclass(owner) else []
    whose = f'{parent} "{owner.name}"' if parent in registry.KINDS and "name" in names else parent
    there = [name for name in names if name != "name" or parent not in registry.KINDS]
    hint = did_you_mean(full_key, [f"{parent}.{name}" for name in there])
    return f'there is no key "{full_key}"; {whose} has {", ".join(there) or "no keys"}.{hint}'


def _has(owner: Any, key: str) -> bool:
    return any(f.name == key for f in fields(owner))


def _wrong_type(cause: ValidationError) -> str:
    seen = f"{cause.full_key}={'null' if cause.value is None else cause.value}"
    reason = str(cause).splitlines()[0]
    owner: Any = cause.object_type
    hint = get_type_hints(owner).get(str(cause.key)) if is_dataclass(owner) else None
    if hint is None:
        return f"{seen}: {reason}"
    choice, *null = [*get_args(hint), hint][:2] if get_args(hint) else [hint]
    if isinstance(choice, type) and issubclass(choice, Enum):
        names = list(choice.__members__)
        return f"{seen}: expected one of {', '.join([*('null' for _ in null), *names])}.{did_you_mean(str(cause.value), names)}"
    return f"{seen}: expected {hint.__name__ if isinstance(hint, type) else str(hint)} ({reason})"


def _quoted(word: str, sweep: bool) -> str:
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if name in AT_HOME and value.startswith("~"):
        value = os.path.expanduser(value)
        word = f"{key}={value}"
    if name in FOLDERS and equals and not value:
        raise UserError(f"{word} names no folder: is a variable of your shell empty?")
    if not equals or not value:
        return word
    if name in TEXT_KEYS:  # nothing in it is filled in, however it is quoted
        return f"{key}={value.replace('${', chr(92) + '${') if HYDRAS_OWN.fullmatch(value) else _text(value)}"
    if HYDRAS_OWN.fullmatch(value):
        return word
    if name in FOLDERS or (name == "drafter.shape" and value.startswith("[")):  # a text that looks like a list
        return f"{key}={_text(value, filled=True)}"
    if name not in PATH_KEYS:
        return word
    there = os.path.exists(os.path.expanduser(value))
    if there or not sweep:
        return f"{key}={_text(value, filled=not there)}"
    return f"{key}={','.join(part if UNQUOTED.fullmatch(part) else _path(part) for part in value.split(','))}"


def _path(part: str) -> str:
    """One of several in a sweep."""
    own = not part or HYDRAS_OWN.fullmatch(part) or "${" in part
    return part if own else _text(part)


def _text(value: str, filled: bool = False) -> str:
    """A text in quotes, as Hydra reads it. filled: a `${…}` in it is OmegaConf's."""
    value = value if filled else escaped(value)
    inner = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{inner}'"
