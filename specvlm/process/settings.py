"""The process's settings that requests share, such as torch's default dtype: read, compared and put back."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import eq
from typing import Any

import torch

GLOBAL_HOOKS = tuple(
    name for name, value in vars(torch.nn.modules.module).items() if name[:8] == "_global_" and isinstance(value, dict)
)


@dataclass(frozen=True)
class Setting:
    """One of the process's: how it is read, how it is set again, and whether two values of it are the same."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    same: Callable[[Any, Any], bool] = eq
    blamed: bool = True  # else it is put back without a word: a video may be read meanwhile, which uses it too


def _tables(name: str, found: Callable[[], list[Any]]) -> Setting:
    """Tables whose content is put back, whoever holds them."""

    def write(before: list[dict[Any, Any]]) -> None:
        for table, content in zip(found(), before, strict=False):
            table.clear()
            table.update(content)

    return Setting(name, lambda: list(map(dict, found())), write)


def _set_device(device: torch.device) -> None:
    """The CPU is what there is without a default, which is a mode that stays."""
    torch.set_default_device(None if device.type == "cpu" else device)


def modes_entered() -> tuple[int, int]:
    """How many modes torch is in, of functions and of dispatch."""
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def leave_modes(before: tuple[int, int]) -> str:
    """Leave the modes entered since there were so many; returns what they are called."""
    functions, dispatch = before
    found = []
    while torch._C._len_torch_function_stack() > functions:
        torch._C._pop_torch_function_stack()
        found.append("a function mode")
    while torch._C._len_torch_dispatch_stack() > dispatch:
        torch._C._pop_torch_dispatch_stack(None)
        found.append("a dispatch mode")
    return " and ".join(dict.fromkeys(found))


def _kept(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Has every name its value? New ones may come: modules are imported late, libraries leave notes in the environment."""
    return all(now.get(name) == value for name, value in before.items())


def _modules() -> dict[str, Any]:
    """Those of specvlm that are imported: without their entries pickle, pydantic and late imports find others."""
    found = [name for name in list(sys.modules) if name.startswith("specvlm")]  # the quickest: there are thousands
    return {name: sys.modules[name] for name in found if name.partition(".")[0] == "specvlm"}


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


SETTINGS = (
    _tables("attention functions", _interfaces),
    Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device", torch.get_default_device, _set_device),
    Setting("torch's modes", modes_entered, leave_modes),  # behind the default device, which is one
    Setting("torch's grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("torch's threads", torch.get_num_threads, torch.set_num_threads),
    Setting("torch's float32 precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    Setting(
        "torch's deterministic algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    _tables("torch's hooks of every module", lambda: [vars(torch.nn.modules.module)[name] for name in GLOBAL_HOOKS]),
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
