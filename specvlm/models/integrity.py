"""Detect and undo changes that a strategy made to shared state: weights, modules, settings and specvlm's code.

A strategy is third-party code in this process, with access to the models. Anything it changes, by mistake or not, would
affect the baseline, the verdict and later requests. So the shared state is compared after every request. Code and
settings are restored; models and caches that changed are dropped. This finds changes of the compared state, but not
those made by code that reaches into C or by a thread that acts later. `check=hf` is a further check, which shares no
code with the decoding loop.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from specvlm.models.checksum import checksum
from specvlm.models.kv_cache import CachePool, KVCache
from specvlm.process.memo import restored
from specvlm.process.settings import set_again, settings

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

FOREIGN = (builtins, hashlib, json, math, os, time, torch, torch.nn.functional)  # modules to compare besides our own
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
SPECIAL = [f"__{word}__" for word in ("call", "init", "getattr", "getattribute", "setattr", "eq", "len", "iter", "next")]
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def weights_of(model: VideoLM) -> int:
    """Compute the checksum of a model's parameters and buffers."""
    return checksum(tensor for _, tensor in sorted((*model.hf.named_parameters(), *model.hf.named_buffers())))


def structure(model: VideoLM) -> dict[str, Any]:
    """Describe a model for comparison: its attributes, configurations, and modules with their hooks and attributes."""
    found: dict[str, Any] = {f"the model's {key}": _plain(value) for key, value in vars(model).items()}
    fused = model.forms.forwards  # set while another session's thread runs a pass of a model that both use
    for name, module in model.hf.named_modules():
        found[f"its module {name or 'root'}"] = _module(module, fused.get(module))
    for name, config in (("configuration", model.hf.config), ("generation settings", model.hf.generation_config)):
        found[f"its {name}"] = _config(config)
    return found


def _config(config: object) -> object:
    """Return a configuration's attributes as text, including those of configurations nested in it."""
    inner = {key: _config(value) if hasattr(value, "to_dict") else value for key, value in vars(config).items()}
    return repr(inner)


def _module(module: nn.Module, fused: object) -> tuple[Any, ...]:
    """Describe a module for comparison: type, tensors, children, hooks, and attributes except for its fused form."""
    attributes = dict(vars(module))  # a copy: another thread's pass may put fused forms in place meanwhile
    tables = ("_parameters", "_buffers", "_modules")
    held = tuple((name, id(value)) for table in tables for name, value in attributes[table].items())
    hooks = tuple(tuple(map(id, attributes.get(name, {}).values())) for name in HOOKS)
    kept = ((key, value) for key, value in attributes.items() if key[0] != "_" and (fused is None or value is not fused))
    own_ones = ((key, _plain(value)) for key, value in kept)
    return (type(module), held, hooks, *own_ones)


def _plain(value: object) -> object:
    """Return a comparable form: simple values, tuples and frozensets themselves; type and identity of other objects."""
    return value if isinstance(value, PLAIN) or type(value) in (tuple, frozenset) else (type(value), id(value))


class Code:
    """Records the names in specvlm's modules and classes, in FOREIGN modules, and in classes of torch and models.

    `undo` restores them. It also deletes callables added later to classes, where they would override inherited ones,
    and to specvlm's modules, where they would shadow built-ins.
    """

    def __init__(self) -> None:
        self.watched = False
        self.owners: set[Any] = set()
        self.names: dict[Any, set[str]] = {}  # names that each owner has; no callable may be added to them
        self.entries: list[tuple[Any, str, Any, tuple[Any, ...]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager in which `look` keeps the definitions recorded at its start, before plugins are imported.

        A whole command runs in it. Outside, `look` records all definitions again, so that each request restores those
        that it began with.
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
        """Record all definitions, including those in `classes`. While watching, record only new modules and classes."""
        modules = [module for name, module in list(sys.modules.items()) if module and _ours(name)]
        inside = ((value, module.__name__) for module in modules for value in vars(module).values())
        inner = (value for value, name in inside if isinstance(value, type) and value.__module__ == name)
        old = self.entries if self.watched else []
        known = [] if self.watched else [(owner, name) for owner, name, _, _ in self.entries if name in vars(owner)]
        fresh = set[Any]()
        for owner in (*modules, *FOREIGN, torch.Tensor, nn.Module, *classes, *inner):
            if owner not in self.owners:
                self.owners.add(owner)
                fresh.add(owner)
                known += [(owner, name) for name in list(vars(owner)) if _compared(name)]
        self.entries = old + [(owner, name, value := vars(owner)[name], _inside(name, value)) for owner, name in known]
        looked_at = fresh if self.watched else self.owners
        closed = (owner for owner in looked_at if isinstance(owner, type) or _ours(owner.__name__))
        self.names = (self.names if self.watched else {}) | {owner: set(vars(owner)) for owner in closed}

    def undo(self) -> list[str]:
        """Restore definitions that differ and delete callables that were added; returns the names of both."""
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
            for name, value in list(vars(owner).items()):
                if name not in names and _called(value) and not _theirs(owner, value):
                    changed.append(f"{owner.__name__}.{name}")
                    delattr(owner, name)
        return changed


def _ours(name: str) -> bool:
    """Whether a module of this name belongs to specvlm."""
    return name == "specvlm" or name.startswith("specvlm.")


def _theirs(owner: Any, now: Any) -> bool:
    """Whether torch or transformers made a change: both replace functions of torch, for example to compile.

    owner: The module or class that was changed. now: its new value.
    """
    if _ours(getattr(owner, "__module__", None) or owner.__name__) or type(now) is not FunctionType:
        return False
    homes = (vars(sys.modules[name])["__file__"] for name in ("torch", "transformers") if name in sys.modules)
    return any(now.__code__.co_filename.startswith(os.path.dirname(home) + os.sep) for home in homes)


def _called(value: object) -> bool:
    """Whether a value is callable or a descriptor, and not a module."""
    return not isinstance(value, ModuleType) and (callable(value) or hasattr(type(value), "__get__"))


def _compared(name: str) -> bool:
    """Whether a name is recorded: any name, except special ones that SPECIAL does not list."""
    return not (name.startswith("__") and name.endswith("__")) or name in SPECIAL


def _inside(name: str, value: Any) -> tuple[Any, ...]:
    """Return what to compare inside a value: a function's code and defaults, or the content of a constant dict.

    name: The name of the value; constants have upper case names.
    """
    if type(value) is FunctionType:
        return value.__code__, value.__defaults__
    return (*value.keys(), *value.values()) if name.isupper() and type(value) is dict else ()


def classes_of(model: VideoLM) -> set[type]:
    """Return the classes of a model and of its modules, with their base classes except object and nn.Module."""
    found = {base for module in model.hf.modules() for base in type(module).__mro__}
    return {cls for cls in (*found, *type(model).__mro__) if cls not in (object, nn.Module)}


CODE = Code()  # of this process


class Snapshot:
    """The shared state before strategies run, to compare it with the state afterwards.

    Args:
        code: Records definitions in modules and classes.
        models: Target and draft, or the target alone.
        weights: The checksum of each model when it was loaded.
        caches: The pool of KV caches.
        engine: The engine.
    """

    def __init__(
        self, code: Code, models: Sequence[VideoLM], weights: Sequence[int], caches: CachePool, engine: object
    ) -> None:
        self.models, self.weights, self.caches, self.engine = models, weights, caches, engine
        # Recorded here and not by `ModelCache`: with several ranks, modules change after loading.
        self.structures, self.running = [structure(model) for model in models], self._running()
        code.look({cls for model in models for cls in classes_of(model)})
        self.settings = settings()
        # Keep references, so that a later patch of this module does not affect this snapshot.
        self._parts = (code.undo, set_again, structure, weights_of)

    def _running(self) -> list[Any]:
        """Return ids of callables set on the pool, a cache or the engine, and of caches that are not intact."""
        held = self.caches.held
        own_ones = [value for owner in (self.caches, self.engine, *held) for value in vars(owner).values() if callable(value)]
        odd = [cache for cache in held if type(cache) is not KVCache or not cache.whole]
        return [id(value) for value in (*own_ones, *odd)]

    def undo(self) -> tuple[list[str], list[str]]:
        """Undo changes of code, settings and cached tensors, and find changes of models, caches and engine.

        Returns:
            Names of what was restored, and names of the parts of models, caches and engine that changed, which cannot
            be restored.
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
