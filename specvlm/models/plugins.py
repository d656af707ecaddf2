"""Load the built-in strategies and families, and those of installed packages with an entry point in group `specvlm`.

Both use the same hooks. Plugins load one by one; a broken plugin is skipped, with a warning.

SPECVLM_PLUGINS=a,b          load only these installed plugins (empty: none), and always the built-ins
SPECVLM_STRICT_PLUGINS=1     treat a broken plugin as an error
SPECVLM_PLUGIN_TRACEBACK=1   show the full traceback of a broken plugin, and of an error in a family's code
"""

import importlib
import inspect
import logging
import os
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from specvlm.errors import UserError, did_you_mean, one_line
from specvlm.models.integrity import Code
from specvlm.process.interrupts import INTERRUPTS

GROUP = "specvlm"
HOOKS = ("specvlm_strategies", "specvlm_families")
BUILTINS = (
    "specvlm.models.families",
    "specvlm.strategies.pruners",
    "specvlm.strategies.drafters",
    "specvlm.strategies.verifiers",
    "specvlm.strategies.datasets",
    "specvlm.strategies.metrics",
    "specvlm.strategies.trackers",
)

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
log = logging.getLogger(__name__)


class Hooks:
    """Hooks that a plugin implements, by functions marked with `@hookimpl` in the module that its entry point names."""

    @hookspec
    def specvlm_strategies(self) -> list[type]:  # type: ignore[empty-body]
        """Return the strategy classes of this plugin."""

    @hookspec
    def specvlm_families(self) -> dict[str, str]:  # type: ignore[empty-body]
        """Return the model families of this plugin, as a dict from `model_type` to "module:Class"."""


class PluginError(UserError):
    """A plugin or one of its classes cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Plugin:
    """A package that provides strategies or model families.

    Attributes:
        name: Name of the distribution; "specvlm" for the built-ins, the entry point's name if there is no distribution.
        version: Version of the distribution; empty if there is none.
        strategies: Its classes, unchecked.
        families: "module:Class" of its model families by `model_type`.
    """

    name: str
    version: str
    strategies: tuple[Any, ...]
    families: Mapping[str, str] = field(default_factory=dict)

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
    plugins = [_plugin("specvlm", "", importlib.import_module(module)) for module in BUILTINS]
    code, heard = Code(), INTERRUPTS.heard
    code.look()
    for point in _chosen(_unambiguous(entry_points(group=GROUP))):
        name, version = _distribution(point)
        try:
            plugin = _plugin(name, version, point.load())
            if changed := code.undo():
                raise PluginError(f"importing it changes {', '.join(changed[:3])}, which computes the target's own output")
            plugins.append(plugin)
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


def _plugin(name: str, version: str, module: object) -> Plugin:
    """Call the hooks of a plugin's module. Raises PluginError as `strategies_of` and `families_of`."""
    return Plugin(name, version, strategies_of(module), families_of(module))


def strategies_of(plugin: object) -> tuple[Any, ...]:
    """Call a plugin's hook for strategies.

    Args:
        plugin: The plugin's module, or any object with a method marked as hook.

    Returns:
        The classes that the hook returns, unchecked; none if the plugin provides only model families.

    Raises:
        PluginError: The plugin implements no hook or an unknown one, or its hook does not return a list.
    """
    classes = _answer(plugin, "specvlm_strategies", [])
    if not isinstance(classes, list | tuple):
        raise PluginError(f"specvlm_strategies() must return a list of classes, got {classes!r}")
    return tuple(classes)


def families_of(plugin: object) -> dict[str, str]:
    """Call a plugin's hook for model families. Raises PluginError as `strategies_of`, or for an invalid result."""
    found = _answer(plugin, "specvlm_families", {})
    if not isinstance(found, dict) or not all(isinstance(part, str) for item in found.items() for part in item):
        raise PluginError(f'specvlm_families() must return a dict {{model_type: "module:Class"}}, got {found!r}')
    return found


def _answer(plugin: object, hook: str, default: Any) -> Any:
    """Call one hook in its own plugin manager, so that a plugin cannot break others. default: result without a hook."""
    _check_hook_names(plugin)
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    manager.register(plugin)
    answers = getattr(manager.hook, hook)()
    return answers[0] if answers else default


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


def traced(said: str, cause: BaseException) -> PluginError:
    """Make a PluginError for an error in a plugin's code. Logs its traceback if SPECVLM_PLUGIN_TRACEBACK=1 is set."""
    if os.environ.get("SPECVLM_PLUGIN_TRACEBACK") != "1":
        return PluginError(f"{said} (SPECVLM_PLUGIN_TRACEBACK=1 shows where)")
    log.warning("".join(traceback.format_exception(cause)).rstrip())
    return PluginError(said)


def _check_hook_names(plugin: object) -> None:
    """Raise PluginError unless the plugin implements a hook, and no unknown one."""
    routines = {name: value for name in dir(plugin) if inspect.isroutine(value := getattr(plugin, name, None))}
    marked = [name for name, value in routines.items() if isinstance(getattr(value, "specvlm_impl", None), dict)]
    for name in marked:
        if name not in HOOKS:
            there = " and ".join(f'"{hook}"' for hook in HOOKS)
            raise PluginError(f'it implements the hook "{name}", but the only hooks are {there}.{did_you_mean(name, HOOKS)}')
    if not marked:
        near = [name for name in routines if did_you_mean(name, HOOKS)]
        found = f'; it has a function "{near[0]}"' if near else ""
        raise PluginError(
            f'it implements no hook: define "{HOOKS[0]}" and mark it with @specvlm.strategies.plugins.hookimpl{found}'
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
        report(name, f"of SPECVLM_PLUGINS is not installed. There is {', '.join(known) or 'none'}.{did_you_mean(name, known)}")
    return [point for point in points if answers[point] & names]


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """Return name and version of an entry point's package; if unknown, the entry point's name and an empty version."""
    return (point.dist.name, point.dist.version) if point.dist else (point.name, "")


def _normal(name: str) -> str:
    """Normalize a package name as package indexes do (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
