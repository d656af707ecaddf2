"""Read, compare and restore process-wide settings that requests share, such as torch's default dtype."""

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
from torch import is_inference_mode_enabled
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch._C import _len_torch_function_stack as _function_modes

# Names of torch's tables of hooks that run for every module.
GLOBAL_HOOKS = tuple(
    name for name, value in vars(torch.nn.modules.module).items() if name[:8] == "_global_" and isinstance(value, dict)
)


@dataclass(frozen=True)
class Setting:
    """A process-wide setting: how to read it, set it, and compare two values. `name` is for messages."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    same: Callable[[Any, Any], bool] = eq
    blamed: bool = True  # report a change; if False, only restore it, since reading a video may change the setting, too


def _tables(name: str, found: Callable[[], list[Any]]) -> Setting:
    """Make a setting of several dicts, whose content is restored in place."""

    def write(before: list[dict[Any, Any]]) -> None:
        for table, content in zip(found(), before, strict=False):
            table.clear()
            table.update(content)

    return Setting(name, lambda: list(map(dict, found())), write)


def _set_device(device: torch.device) -> None:
    """Set torch's default device. Unset it for the CPU, since a default device stays active as a torch mode."""
    torch.set_default_device(None if device.type == "cpu" else device)


_UNDONE: list[torch.inference_mode] = []  # kept alive: torch restores the previous mode when one of them is collected


def modes_entered() -> tuple[int, int, bool]:
    """Return the depths of torch's stacks of function modes and dispatch modes, and whether inference mode is on."""
    return _function_modes(), _dispatch_modes(), is_inference_mode_enabled()


def leave_modes(before: tuple[int, int, bool]) -> str:
    """Leave the modes entered since `before`, and turn inference mode on or off as before.

    Returns a text that names the kinds of modes that differed.
    """
    functions, dispatch, inferring = before
    found = []
    if torch.is_inference_mode_enabled() is not inferring:
        _UNDONE.append(torch.inference_mode(inferring))
        _UNDONE[-1].__enter__()
        found.append("an inference mode")
    while torch._C._len_torch_function_stack() > functions:
        torch._C._pop_torch_function_stack()
        found.append("a function mode")
    while torch._C._len_torch_dispatch_stack() > dispatch:
        torch._C._pop_torch_dispatch_stack(None)
        found.append("a dispatch mode")
    return " and ".join(dict.fromkeys(found))


def _kept(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether all entries of `before` are unchanged. New ones are allowed: late imports and libraries add some."""
    return all(now.get(name) == value for name, value in before.items())


def _modules() -> dict[str, Any]:
    """Return specvlm's imported modules by name. If one is replaced, pickle and later imports use the replacement."""
    found = [name for name in list(sys.modules) if name.startswith("specvlm")]  # a quick filter, since there are thousands
    return {name: sys.modules[name] for name in found if name.partition(".")[0] == "specvlm"}


def _signal(number: int) -> Setting:
    """Make the setting of a signal's handler. It is restored only in the main thread, since others cannot set it."""

    def write(handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)

    return Setting(f"the handler of {signal.Signals(number).name}", lambda: signal.getsignal(number), write, blamed=False)


def _stream(name: str) -> Setting:
    """Make the setting of a standard stream of `sys`."""
    return Setting(f"sys.{name}", lambda: getattr(sys, name), lambda stream: setattr(sys, name, stream), blamed=False)


def _interfaces() -> list[Any]:
    """Return Hugging Face's registries of attention and mask functions, as far as they are imported."""
    places = (("transformers.modeling_utils", "AttentionInterface"), ("transformers.masking_utils", "AttentionMaskInterface"))
    return [vars(sys.modules[module])[name]._global_mapping for module, name in places if module in sys.modules]


SETTINGS = (
    _tables("attention functions", _interfaces),
    Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device", torch.get_default_device, _set_device),
    Setting("torch's modes", modes_entered, leave_modes),  # after the default device, which is a mode too
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
    """Read the current values of SETTINGS."""
    return [_read(setting) for setting in SETTINGS]


def _read(setting: Setting) -> Any:
    """Read a setting; None if reading raises OSError or RuntimeError."""
    try:
        return setting.read()
    except (OSError, RuntimeError):  # the working directory is gone, or torch's old and new settings were mixed
        return None


def set_again(before: Sequence[Any]) -> list[str]:
    """Restore the settings that differ from `before`, which `settings` returned. Those that it could not read are left.

    Returns the names of those that differed and are to be reported (`Setting.blamed`).
    """
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
    """Context manager that restores the SETTINGS after its block: for calls into strategies outside a request."""
    before = settings()
    try:
        yield
    finally:
        set_again(before)
