"""What requests share — weights, modules, settings, specvlm's own code — is the same after a strategy has run as before.

A strategy is code of somebody else's in this process, with the models in its hands. What it changes, by mistake or not, would
reach the baseline, the verdict and the requests that follow. So it is looked for behind every request and put right. A mistake
cannot hide from it, nor can a patch of what it looks at; code that reaches into C, or a thread that acts later, can. A check
that shares no code with the loop is `check=hf`.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import eq, is_
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specvlm.cache import CachePool, KVCache
from specvlm.kept import restored
from specvlm.ranks import own

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

WORDS = 65_537  # of 8 bytes: words so far apart are summed before they are weighted; prime, as no width of a matrix is
FOREIGN = (builtins, hashlib, json, math, os, time, torch, torch.nn.functional)  # beside specvlm's own modules
SMALL = 2**16  # bytes
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
GLOBAL_HOOKS = tuple(
    name for name, value in vars(torch.nn.modules.module).items() if name[:8] == "_global_" and isinstance(value, dict)
)
SPECIAL = (
    "__call__",
    "__init__",
    "__getattr__",
    "__getattribute__",
    "__setattr__",
    "__eq__",
    "__len__",
    "__iter__",
    "__next__",
)
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def checksum(tensors: Iterable[Tensor]) -> int:
    """Of every byte and its place, on any device.

    Words of 8 bytes, weighted by their place modulo 65,537, summed modulo 2**64. It takes one pass over the memory, which is
    what a token of plain decoding takes. It is no defence against somebody who computes a change that leaves it as it is.
    """
    small: dict[torch.device, list[Tensor]] = {}  # one after the other: a pass over each would take longer than reading it
    parts: dict[torch.device, list[tuple[int, Tensor]]] = {}
    weights = cache(_weights)  # for this call alone: between calls they could be written to
    for number, tensor in enumerate(tensors):
        if tensor.device.type == "meta":
            continue
        flat = own(tensor).detach().contiguous().flatten().view(torch.uint8)
        if len(flat) < SMALL:
            small.setdefault(tensor.device, []).append(flat)
        else:
            parts.setdefault(tensor.device, []).extend((number + 1, part) for part in _sums(flat, weights))
    for device, flats in small.items():
        parts.setdefault(device, []).extend((0, part) for part in _sums(torch.cat(flats), weights))
    total = 0
    for found in parts.values():
        values = torch.stack([part for _, part in found]).tolist()
        total += sum((2 * number + 1) * value for (number, _), value in zip(found, values, strict=True))
    return total % 2**64


def _sums(flat: Tensor, weights: Callable[[int, torch.device], Tensor]) -> Iterator[Tensor]:
    """() int64 each, of bytes: of whole rows of words, of the words behind them, of the bytes behind those."""
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # else it is no row of words
    count = len(flat) // 8
    words, rest = flat[: count * 8].view(torch.int64), flat[count * 8 :]
    rows = count // WORDS
    if rows:
        yield (words[: rows * WORDS].view(rows, WORDS).sum(0) * weights(WORDS, flat.device)).sum()
    if count % WORDS:
        yield (words[rows * WORDS :] * weights(count % WORDS, flat.device)).sum()
    if len(rest):
        yield (rest * weights(len(rest), flat.device)).sum()


def _weights(count: int, device: torch.device) -> Tensor:
    """(count,) odd numbers, all different; their products wrap around."""
    return torch.arange(count, device=device) * 0x1E3779B97F4A7C16 + 0x5851F42D4C957F2D


def weights_of(model: VideoLM) -> int:
    """The checksum of a model's parameters and buffers."""
    return checksum(tensor for _, tensor in sorted((*model.hf.named_parameters(), *model.hf.named_buffers())))


# ---- what a model is beside its weights ------------------------------------------------------------------------------


def structure(model: VideoLM) -> dict[str, Any]:
    """Its modules, what is hooked into them or set on them, its configuration and its own attributes, to be compared."""
    found: dict[str, Any] = {f"the model's {key}": _plain(value) for key, value in vars(model).items()}
    for name, module in model.hf.named_modules():
        found[f"its module {name or 'root'}"] = _module(module)
    for name, config in (("configuration", model.hf.config), ("generation settings", model.hf.generation_config)):
        found[f"its {name}"] = _config(config)
    return found


def _config(config: object) -> object:
    """Its attributes, and those of the configurations in it."""
    inner = {key: _config(value) if hasattr(value, "to_dict") else value for key, value in vars(config).items()}
    return repr(inner)


def _module(module: nn.Module) -> tuple[Any, ...]:
    attributes = vars(module)
    tables = ("_parameters", "_buffers", "_modules")
    held = tuple((name, id(value)) for table in tables for name, value in attributes[table].items())
    hooks = tuple(tuple(map(id, attributes.get(name, {}).values())) for name in HOOKS)
    own_ones = ((key, _plain(value)) for key, value in attributes.items() if key[0] != "_")
    return (type(module), held, hooks, *own_ones)


def _plain(value: object) -> object:
    return value if isinstance(value, PLAIN) or type(value) in (tuple, frozenset) else (type(value), id(value))


# ---- code and settings -----------------------------------------------------------------------------------------------


class Code:
    """What specvlm's modules and classes define, those of torch's that decoding stands on, and the models' classes.

    As it was when last looked at. Of names that come later, what is called goes from classes, where it would stand before what
    they inherit, and from specvlm's modules, where it would stand before a built-in.
    """

    def __init__(self) -> None:
        self.watched = False
        self.owners: set[Any] = set()
        self.names: dict[Any, set[str]] = {}  # of those that should get no more
        self.entries: list[tuple[Any, str, Any, tuple[Any, ...]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For a command: what is there now, before plugins are imported, is what has to stay. Else it is what was there when
        the request began.
        """
        self.owners.clear()
        self.entries = []
        self.look()
        self.watched = True
        try:
            yield
        finally:
            self.watched = False

    def look(self, classes: Iterable[type] = ()) -> None:
        modules = [module for name, module in list(sys.modules.items()) if module and _ours(name)]
        inner = (value for module in modules for value in vars(module).values() if _defined(value, module))
        old = self.entries if self.watched else []
        known = [] if self.watched else [(owner, name) for owner, name, _, _ in self.entries if name in vars(owner)]
        fresh = set[Any]()
        for owner in (*modules, *FOREIGN, torch.Tensor, nn.Module, *classes, *inner):
            if owner not in self.owners:
                self.owners.add(owner)
                fresh.add(owner)
                known += [(owner, name) for name in list(vars(owner)) if _told(name)]
        self.entries = old + [(owner, name, value := vars(owner)[name], _inside(name, value)) for owner, name in known]
        closed = (
            owner for owner in (fresh if self.watched else self.owners) if isinstance(owner, type) or _ours(owner.__name__)
        )
        self.names = (self.names if self.watched else {}) | {owner: set(vars(owner)) for owner in closed}

    def undo(self) -> list[str]:
        """Put back what differs; returns its names."""
        changed = []
        for owner, name, value, inside in self.entries:
            now = vars(owner).get(name)
            if now is value and (not inside or all(map(is_, inside, _inside(name, value)))):
                continue
            if _theirs(owner, now):
                continue
            changed.append(f"{getattr(owner, '__name__', owner)}.{name}")
            if isinstance(value, FunctionType):
                value.__code__, value.__defaults__ = inside
            elif inside:
                value.clear()
                value.update(zip(inside[: len(inside) // 2], inside[len(inside) // 2 :], strict=True))
            setattr(owner, name, value)
        for owner, names in self.names.items():
            for name in [
                name
                for name, value in list(vars(owner).items())
                if name not in names and _called(value) and not _theirs(owner, value)
            ]:
                changed.append(f"{owner.__name__}.{name}")
                delattr(owner, name)
        return changed


def _ours(name: str) -> bool:
    return name == "specvlm" or name.startswith("specvlm.")


def _defined(value: object, module: ModuleType) -> bool:
    """Is it a class, and defined in this module?"""
    return isinstance(value, type) and value.__module__ == module.__name__


def _theirs(owner: Any, now: Any) -> bool:
    """torch replaces some of its functions itself, such as where it first compiles one, and transformers adds to torch's."""
    if _ours(getattr(owner, "__module__", None) or owner.__name__) or type(now) is not FunctionType:
        return False
    homes = (vars(sys.modules[name])["__file__"] for name in ("torch", "transformers") if name in sys.modules)
    return any(now.__code__.co_filename.startswith(os.path.dirname(home) + os.sep) for home in homes)


def _called(value: object) -> bool:
    return not isinstance(value, ModuleType) and (callable(value) or hasattr(type(value), "__get__"))


def _told(name: str) -> bool:
    return not (name.startswith("__") and name.endswith("__")) or name in SPECIAL


def _inside(name: str, value: Any) -> tuple[Any, ...]:
    """What can be changed of it in place: a function's code and defaults, the content of a table."""
    if type(value) is FunctionType:
        return value.__code__, value.__defaults__
    return (*value.keys(), *value.values()) if name.isupper() and type(value) is dict else ()


def classes_of(model: VideoLM) -> set[type]:
    """Of its modules, with what they inherit from."""
    found = {base for module in model.hf.modules() for base in type(module).__mro__}
    return {cls for cls in (*found, *type(model).__mro__) if cls not in (object, nn.Module)}


@dataclass(frozen=True)
class Setting:
    """One of the process's: how it is read, how it is set again, and whether two values of it are the same."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    same: Callable[[Any, Any], bool] = eq
    blamed: bool = True  # else it is put back without a word: a video may be read meanwhile, which uses it too


def _module_hooks() -> list[dict[int, Any]]:
    return [dict(vars(torch.nn.modules.module)[name]) for name in GLOBAL_HOOKS]


def _set_module_hooks(before: list[dict[int, Any]]) -> None:
    for name, hooks in zip(GLOBAL_HOOKS, before, strict=True):
        table = vars(torch.nn.modules.module)[name]
        table.clear()
        table.update(hooks)


def _set_device(device: torch.device) -> None:
    """The CPU is what there is without a default, which is a mode that stays."""
    torch.set_default_device(None if device.type == "cpu" else device)


def _kept(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Has every name its value? New ones may come: modules are imported late, libraries leave notes in the environment."""
    return all(now.get(name) == value for name, value in before.items())


def _modules() -> dict[str, Any]:
    """Those of specvlm that are imported: without their entries pickle, pydantic and late imports find others."""
    return {name: module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "specvlm"}


def _signal(number: int) -> Setting:
    def write(handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)

    return Setting(f"the handler of {signal.Signals(number).name}", lambda: signal.getsignal(number), write, blamed=False)


def _stream(name: str) -> Setting:
    return Setting(f"sys.{name}", lambda: getattr(sys, name), lambda stream: setattr(sys, name, stream), blamed=False)


def _interfaces() -> list[Any]:
    """Hugging Face's tables of attention functions, where they have been imported."""
    places = (("transformers.modeling_utils", "AttentionInterface"), ("transformers.masking_utils", "AttentionMaskInterface"))
    return [vars(sys.modules[module])[name]._global_mapping for module, name in places if module in sys.modules]


def _attention(functions: list[dict[str, Any]]) -> None:
    for table, named in zip(_interfaces(), functions, strict=False):
        table.clear()
        table.update(named)


SETTINGS = (
    Setting("attention functions", lambda: list(map(dict, _interfaces())), _attention),
    Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device", torch.get_default_device, _set_device),
    Setting("torch's grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("torch's threads", torch.get_num_threads, torch.set_num_threads),
    Setting("torch's float32 precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    Setting(
        "torch's deterministic algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    Setting("torch's hooks of every module", _module_hooks, _set_module_hooks),
    Setting("specvlm's modules", _modules, sys.modules.update, _kept),
    Setting("the working directory", os.getcwd, os.chdir, blamed=False),
    Setting("environment variables", lambda: dict(os.environ), os.environ.update, _kept, blamed=False),
    *map(_stream, ("stdin", "stdout", "stderr")),
    *map(_signal, (signal.SIGINT, signal.SIGTERM)),
)


def settings() -> list[Any]:
    return [_read(setting) for setting in SETTINGS]


def _read(setting: Setting) -> Any:
    try:
        return setting.read()
    except (OSError, RuntimeError):  # the working directory was removed; torch's older and newer settings are mixed
        return None


def set_again(before: Sequence[Any]) -> list[str]:
    """Undo what differs; returns its names."""
    changed = []
    for setting, was in zip(SETTINGS, before, strict=True):
        if (now := _read(setting)) is was or setting.same(was, now):
            continue
        changed += [setting.name] * setting.blamed
        if was is not None:
            setting.write(was)
    return changed


@contextmanager
def settled() -> Iterator[None]:
    """Around calls into strategies outside of a request: the settings are the same behind them."""
    before = settings()
    try:
        yield
    finally:
        set_again(before)


CODE = Code()  # of this process


class Snapshot:
    """Of all that is looked at, before strategies run. weights: the checksum of each of `models`, as it was loaded."""

    def __init__(
        self, code: Code, models: Sequence[VideoLM], weights: Sequence[int], caches: CachePool, engine: object
    ) -> None:
        self.models, self.weights, self.caches, self.engine = models, weights, caches, engine
        # Not those of `Held`: with ranks, modules differ from what was loaded.
        self.structures, self.running = [structure(model) for model in models], self._running()
        code.look({cls for model in models for cls in classes_of(model)})
        self.settings = settings()
        # Held here, so that a patch of this module changes nothing of a snapshot that was taken before it.
        self._parts = (code.undo, set_again, structure, weights_of)

    def _running(self) -> list[Any]:
        """Methods that were set on the pool, a cache or the engine itself, and caches of other kinds."""
        held = self.caches.held
        own_ones = [value for owner in (self.caches, self.engine, *held) for value in vars(owner).values() if callable(value)]
        return [id(value) for value in (*own_ones, *(cache for cache in held if type(cache) is not KVCache))]

    def undo(self) -> tuple[list[str], list[str]]:
        """Undo what was changed of code and settings. Returns their names; and what was changed of models and caches, which
        must not be used again.
        """
        undo_code, set_again, structure, weights_of = self._parts
        undone = [*undo_code(), *set_again(self.settings), *["tensors that specvlm keeps"] * restored()]
        spoilt = ["caches or engine"] if self._running() != self.running else []
        for model, before, weights in zip(self.models, self.structures, self.weights, strict=True):
            after = structure(model)
            spoilt += [name for name in {**before, **after} if before.get(name) != after.get(name)]
            if weights_of(model) != weights:
                spoilt.append(f"weights of {model}")
        return undone, spoilt
