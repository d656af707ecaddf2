"""Load strategies: the built-ins, and every installed package with an entry point in the group `specvlm`.

Both use the same hook. Plugins load one by one; a broken plugin is skipped, with a warning.

SPECVLM_PLUGINS=a,b          load only these installed plugins (empty: none), and always the built-ins
SPECVLM_STRICT_PLUGINS=1     treat a broken plugin as an error
SPECVLM_PLUGIN_TRACEBACK=1   show the full traceback of a broken plugin
"""

import importlib
import inspect
import logging
import os
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from specvlm.errors import UserError, did_you_mean, one_line
from specvlm.models.integrity import Code
from specvlm.process.interrupts import INTERRUPTS

GROUP = "specvlm"
HOOK = "specvlm_strategies"
BUILTINS = (
    "specvlm.strategies.pruners",
    "specvlm.strategies.drafters",
    "specvlm.strategies.verifiers",
    "specvlm.strategies.datasets",
)

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
log = logging.getLogger(__name__)


class Hooks:
    """Hooks that a plugin implements, by functions marked with `@hookimpl` in the module that its entry point names."""

    @hookspec
    def specvlm_strategies(self) -> list[type]:  # type: ignore[empty-body]
        """Return the strategy classes of this plugin."""


class PluginError(UserError):
    """A plugin or one of its classes cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Plugin:
    """A package that provides strategies.

    Attributes:
        name: Name of the distribution; "specvlm" for the built-ins, the entry point's name if there is no distribution.
        version: Version of the distribution; empty if there is none.
        strategies: Its classes, unchecked.
    """

    name: str
    version: str
    strategies: tuple[Any, ...]

    @property
    def label(self) -> str:
        """Name and version, as users see them."""
        return f"{self.name} {self.version}".strip()


def load() -> list[Plugin]:
    """Load the built-ins, then the installed plugins in the order of their entry points' names.

    Skips plugins that SPECVLM_PLUGINS excludes, and, with a warning, broken ones.

    Raises:
        PluginError: A plugin is broken and SPECVLM_STRICT_PLUGINS=1 is set.
    """
    plugins = [Plugin("specvlm", "", strategies_of(importlib.import_module(module))) for module in BUILTINS]
    code, heard = Code(), INTERRUPTS.heard
    code.look()
    for point in _chosen(_unambiguous(entry_points(group=GROUP))):
        name, version = _distribution(point)
        try:
            strategies = strategies_of(point.load())
            if changed := code.undo():
                raise PluginError(f"importing it changes {', '.join(changed[:3])}, which computes the target's own output")
            plugins.append(Plugin(name, version, strategies))
        except BaseException as err:
            if isinstance(err, KeyboardInterrupt) and INTERRUPTS.pressed(heard):
                raise
            code.undo()
            report(f"{name} {version}".strip(), f"is left out: {one_line(err)}", err)
    return plugins


def installed() -> list[str]:
    """List "name version" of every installed plugin, whether it is loaded or not."""
    return list(_installed(entry_points, tuple(sys.path)))


@lru_cache(maxsize=8)  # it is called for every sample, and reads a file of each installed package
def _installed(points: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...]) -> tuple[str, ...]:
    """List the plugins that `points`, called with our group, finds. `path` is there only as a cache key."""
    return tuple(sorted({" ".join(_distribution(point)).strip() for point in points(group=GROUP)}))


def strategies_of(plugin: object) -> tuple[Any, ...]:
    """Call a plugin's hook, in a plugin manager of its own so that it cannot break other plugins.

    Args:
        plugin: The plugin's module, or any object with a method marked as hook.

    Returns:
        The classes that the hook returns, unchecked.

    Raises:
        PluginError: The plugin implements no hook or an unknown one, or its hook does not return a list.
    """
    _check_hook_names(plugin)
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    manager.register(plugin)
    (classes,) = manager.hook.specvlm_strategies()
    if not isinstance(classes, list | tuple):
        raise PluginError(f"{HOOK}() must return a list of classes, got {classes!r}")
    return tuple(classes)


def report(label: str, reason: str, cause: BaseException | None = None) -> None:
    """Log a broken plugin. Raise PluginError instead if SPECVLM_STRICT_PLUGINS=1 is set.

    The log is one line, followed by the traceback if SPECVLM_PLUGIN_TRACEBACK=1 is set.
    """
    line = f"specvlm: plugin {label} {reason}"
    if os.environ.get("SPECVLM_STRICT_PLUGINS") == "1":
        raise PluginError(line.removeprefix("specvlm: ")) from cause
    if cause is None:
        log.warning(line)
    elif os.environ.get("SPECVLM_PLUGIN_TRACEBACK") == "1":
        log.warning("%s\n%s", line, "".join(traceback.format_exception(cause)).rstrip())
    else:
        log.warning("%s (SPECVLM_PLUGIN_TRACEBACK=1 shows where)", line)


def _check_hook_names(plugin: object) -> None:
    """Raise PluginError unless the plugin implements the hook, and no other."""
    routines = {name: value for name in dir(plugin) if inspect.isroutine(value := getattr(plugin, name, None))}
    marked = [name for name, value in routines.items() if isinstance(getattr(value, "specvlm_impl", None), dict)]
    for name in marked:
        if name != HOOK:
            raise PluginError(f'it implements the hook "{name}", but the only hook is "{HOOK}".{did_you_mean(name, [HOOK])}')
    if not marked:
        near = [name for name in routines if did_you_mean(name, [HOOK])]
        found = f'; it has a function "{near[0]}"' if near else ""
        raise PluginError(
            f'it implements no hook: define "{HOOK}" and mark it with @specvlm.strategies.plugins.hookimpl{found}'
        )


def _unambiguous(points: Any) -> list[EntryPoint]:
    """Report entry points that share a name and leave all of them out. Sort the others by name."""
    by_name: dict[str, list[EntryPoint]] = defaultdict(list)
    for point in points:
        by_name[point.name].append(point)
    for name, same in by_name.items():
        if len(same) > 1:
            owners = " and ".join(sorted(" ".join(_distribution(point)).strip() for point in same))
            report(owners, f'are left out: they share the entry-point name "{name}"; uninstall one')
    return [same[0] for _, same in sorted(by_name.items()) if len(same) == 1]


def _chosen(points: list[EntryPoint]) -> list[EntryPoint]:
    """Keep those entry points whose name, or distribution, SPECVLM_PLUGINS lists; all of them if it is not set."""
    wish = os.environ.get("SPECVLM_PLUGINS")
    if wish is None:
        return points
    names = {_normal(name) for name in wish.split(",") if name.strip()}
    answers = {point: {_normal(point.name), _normal(_distribution(point)[0])} for point in points}
    known = sorted(set().union(*answers.values()))
    for name in sorted(names.difference(known)):
        report(name, f"of SPECVLM_PLUGINS is not installed; there is {', '.join(known) or 'none'}.{did_you_mean(name, known)}")
    return [point for point in points if answers[point] & names]


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """Return name and version of an entry point's package; if unknown, the entry point's name and an empty version."""
    return (point.dist.name, point.dist.version) if point.dist else (point.name, "")


def _normal(name: str) -> str:
    """Normalize a package name as package indexes do (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
