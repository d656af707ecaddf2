"""Rewrite errors of Hydra, OmegaConf and YAML as one plain line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from specvlm import config
from specvlm.errors import UserError, did_you_mean
from specvlm.strategies import registry


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and YAML into a UserError.

    Also covers ValueError, which Hydra raises too, and RecursionError.
    """
    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as err:
        raise UserError(explain(err)) from err
    except RecursionError:
        raise UserError("a value is nested too deeply to be read") from None


def explain(err: Exception) -> str:
    """Describe an error without Hydra's own terms: what is wrong, what exists, and "did you mean".

    An error of an unknown kind keeps its own text, on one line.
    """
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


def _unknown_key(full_key: str, owner: Any) -> str:
    """Message for a key that does not exist, listing those that do. owner: the dataclass that lacks the key."""
    parent, _, key = full_key.rpartition(".")
    if not parent:
        infos = ((kind, info) for kind, by_name in registry.collect().items() for info in by_name.values())
        deeper = [f"{kind}.{key}" for kind, info in infos if key == "name" or key in {f.name for f in info.fields}]
        hint = did_you_mean(key, config.NAMES) or (f' Did you mean "{deeper[0]}"?' if deeper else "")
        return f'there is no key "{key}"; choose from {", ".join(config.NAMES)}.{hint}'
    names = [f.name for f in fields(owner)] if is_dataclass(owner) else []
    whose = f'{parent} "{owner.name}"' if parent in registry.KINDS and "name" in names else parent
    there = [name for name in names if name != "name" or parent not in registry.KINDS]
    hint = did_you_mean(full_key, [f"{parent}.{name}" for name in there])
    return f'there is no key "{full_key}"; {whose} has {", ".join(there) or "no keys"}.{hint}'


def _wrong_type(cause: ValidationError) -> str:
    """Message for a value of the wrong type. If the key's type is known, says which type or choices the key takes."""
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
