"""Registry of strategies by kind and name: check their classes, offer them as Hydra options, build them from configs.

A strategy is registered under the `name` of its class; no other list of names exists.
"""

import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specvlm import config
from specvlm.errors import UserError, did_you_mean
from specvlm.models import plugins
from specvlm.models.plugins import PluginError
from specvlm.parsing.bounds import check
from specvlm.parsing.files import literal
from specvlm.process.settings import settled
from specvlm.strategies import Dataset, Drafter, Metric, Pruner, Strategy, Tracker, Verifier
from specvlm.strategies.fence import inside

KINDS: dict[str, type[Strategy]] = {
    "pruner": Pruner,
    "drafter": Drafter,
    "verifier": Verifier,
    "dataset": Dataset,
    "metric": Metric,
    "tracker": Tracker,
}
OPTIONAL = ("dataset", "metric", "tracker")  # kinds that a run may do without: their key may be null
# Fields may not have these names: they would shadow a key of the run or an attribute of the class.
RESERVED = frozenset({*config.KEYS, *config.GROUPS, "budget", "name", "kind", "needs"})


@dataclass(frozen=True)
class StrategyInfo:
    """A registered strategy class.

    Attributes:
        cls: The class.
        plugin: Label of the package that provides it; "specvlm" for the built-ins.
        summary: First line of its docstring; of its module's docstring if it has none.
        config: The dataclass that Hydra sees: `name` and the fields of the class.
        source: Its fidelity and paper, such as "adapted: FastV (arXiv 2403.06764)"; empty without a paper.
    """

    cls: type[Strategy]
    plugin: str
    summary: str
    config: type
    source: str = ""

    @property
    def fields(self) -> tuple[dataclasses.Field[Any], ...]:
        """The fields of the class that its constructor takes."""
        return _fields(self.cls)


@cache
def collect() -> dict[str, dict[str, StrategyInfo]]:
    """Collect all usable strategies. Cached, so that plugins load once per process.

    A class that `describe` refuses is left out, with a warning. If classes of one kind share a name, a warning says so:
    a built-in one is used, and if none is built-in, all are left out.

    Returns:
        `{kind: {name: info}}`, in order of registration.

    Raises:
        PluginError: Something calls for a warning, and SPECVLM_STRICT_PLUGINS=1 turns warnings into errors.
    """
    found: dict[tuple[str, str], list[StrategyInfo]] = defaultdict(list)
    for plugin in plugins.load():
        for cls in plugin.strategies:
            try:
                info = describe(cls, plugin.label)
            except PluginError as err:
                plugins.report(plugin.label, f"has a class that cannot be used: {err}", err)
                continue
            found[cls.kind, cls.name].append(info)
    table: dict[str, dict[str, StrategyInfo]] = {kind: {} for kind in KINDS}
    for (kind, name), infos in found.items():
        winner = _only(kind, name, infos)
        if winner:
            table[kind][name] = winner
    return table


def describe(cls: Any, plugin: str) -> StrategyInfo:
    """Check a class and create its Hydra config.

    Args:
        cls: The class to check.
        plugin: Label of the package that provides it.

    Returns:
        The class with its label, summary, config and source.

    Raises:
        PluginError: The class is not a frozen dataclass derived from a base class of strategies, is abstract, has no
            valid name, or has a field that a config cannot hold or whose name is taken. The message names the class.
    """
    if not isinstance(cls, type) or not issubclass(cls, Strategy):
        raise PluginError(f"{cls!r} is not a class derived from Pruner, Drafter, Verifier, Dataset, Metric or Tracker")
    _check_class(cls)
    for field in _fields(cls):
        if field.name in RESERVED or field.name.startswith("_"):
            hint = f"write `{field.name} = …` without a type" if field.name in ("name", "kind", "needs") else "rename it"
            raise PluginError(f'{_full(cls)}: a field may not be called "{field.name}", that name is taken: {hint}')
    return StrategyInfo(cls, plugin, _summary(cls), _config_class(cls), _source(cls))


def store() -> None:
    """Register every strategy with Hydra, and the schema of the run. May be called repeatedly."""
    options = ConfigStore.instance()
    options.store(name="schema", node=config.schema(config.RunConfig), provider="specvlm")
    for kind, infos in collect().items():
        for name, info in infos.items():
            options.store(group=kind, name=name, node=config.schema(info.config), provider=info.plugin)


def find(kind: str, name: str) -> StrategyInfo:
    """Look up a strategy.

    Args:
        kind: "pruner", "drafter", "verifier", "dataset", "metric" or "tracker".
        name: The registered name.

    Raises:
        UserError: There is no such kind or name. The message lists the known ones.
    """
    table = collect()
    if kind not in table:
        raise UserError(f'there is no kind of strategy "{kind}"; choose from {", ".join(table)}.{did_you_mean(kind, table)}')
    if name not in table[kind]:
        raise UserError(unknown(kind, name, list(table[kind])))
    return table[kind][name]


def unknown(kind: str, name: str, names: list[str]) -> str:
    """Return the message for an unknown name, with the known `names` and the closest of them."""
    there = ", ".join(sorted(names)) or "none"
    return f'{kind}={name}: there is no {kind} "{name}"; choose from {there}.{did_you_mean(name, names)}'


def settings(kind: str, node: Mapping[str, Any] | DictConfig) -> Any:
    """Convert a strategy's config to an instance of its typed dataclass, `StrategyInfo.config`.

    Args:
        kind: "pruner", "drafter", "verifier", "dataset", "metric" or "tracker".
        node: The strategy's `name` and any of its fields. Other fields take their defaults.

    Raises:
        UserError: The name is missing or unknown, a field is unknown, a value has the wrong type, or a required value
            is missing.
    """
    if not isinstance(node, Mapping) or "name" not in node:
        raise UserError(f"{kind}: expected one by name, as in {kind}={next(iter(collect()[kind]), 'NAME')}, got {node}")
    info = find(kind, str(node["name"]))
    plain: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    there = ["name", *(field.name for field in info.fields)]
    for key in plain:
        if key not in there:
            has = ", ".join(there[1:]) or "no keys"
            raise UserError(f'{kind}={info.cls.name} has no key "{key}"; it has {has}.{did_you_mean(str(key), there[1:])}')
        if plain[key] == MISSING:  # merging would replace it with the default
            raise UserError(f"{kind}.{key} has no value: give {kind}.{key}=…")
    hints = get_type_hints(info.cls)
    plain = {key: _number(value) if _number_or_word(hints.get(key)) else value for key, value in plain.items()}
    try:
        return OmegaConf.to_object(OmegaConf.merge(config.schema(info.config), literal(plain)))
    except MissingMandatoryValue as err:
        raise UserError(f"{kind}.{err.full_key} has no value: give {kind}.{err.full_key}=…") from err
    except OmegaConfBaseException as err:
        raise UserError(f"{kind}={info.cls.name}: {str(err).splitlines()[0]}") from err


def build(kind: str, chosen: Any) -> Any:
    """Build a strategy.

    Args:
        kind: "pruner", "drafter", "verifier", "dataset", "metric" or "tracker".
        chosen: A registered name, a mapping of `name` and fields, or the result of `settings`.

    Returns:
        An instance of the strategy's class.

    Raises:
        UserError: The config is invalid (see `settings`), a number is out of bounds, or the constructor raises a
            ValueError or ArithmeticError.
        StrategyError: The constructor raises an error that callers would misread, such as an OSError, which would look
            like a full disk (see `fence.inside`).
        TypeError: The constructor returns an instance of another class.
    """
    if not dataclasses.is_dataclass(chosen):
        chosen = settings(kind, {"name": chosen} if isinstance(chosen, str) else chosen)
    info, values = find(kind, chosen.name), vars(chosen)
    hints = get_type_hints(info.cls)
    try:
        check(info.cls, values)
        with settled(), inside(info.cls):
            made = info.cls(**{f.name: _as_tuple(values[f.name], hints[f.name]) for f in info.fields})
            if type(made) is not info.cls:
                raise TypeError(f"{info.cls.__name__}() returned a {type(made).__name__}")
            return made
    except (ValueError, ArithmeticError) as err:
        raise UserError(f"{kind}={info.cls.name}: {err}") from err


def _check_class(cls: type[Strategy]) -> None:
    """Raise PluginError unless the class is a complete frozen dataclass with a valid kind and name."""
    kind = getattr(cls, "kind", None)
    if kind not in KINDS or not issubclass(cls, KINDS[kind]):
        how = "derive from Pruner, Drafter, Verifier, Dataset, Metric or Tracker"
        raise PluginError(f"{_full(cls)}: kind {kind!r} is none of {', '.join(KINDS)}: {how}")
    params = vars(cls).get("__dataclass_params__")
    if params is None or not params.frozen:
        raise PluginError(f"{_full(cls)} must be a frozen dataclass: write @dataclass(frozen=True) above it")
    missing: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    if missing:
        raise PluginError(f"{_full(cls)} does not implement {', '.join(sorted(missing))}")
    if any(field.name == "name" for field in _fields(cls)):
        return  # the check of field names has a better message
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise PluginError(f'{_full(cls)}: name must be an identifier like "two_stage", got {name!r}')


def _only(kind: str, name: str, infos: list[StrategyInfo]) -> StrategyInfo | None:
    """Return the only class of a kind and name. If there are several, warn, and return the built-in one, or None."""
    if len(infos) == 1:
        return infos[0]
    builtin = [info for info in infos if info.plugin == "specvlm"]
    owners = " and ".join(f"{_full(info.cls)} ({info.plugin})" for info in infos)
    outcome = "the built-in one is used" if builtin else "neither is used"
    culprit = next((info.plugin for info in infos if info.plugin != "specvlm"), "specvlm")
    plugins.report(culprit, f'clashes: {owners} are both registered as {kind} "{name}"; {outcome}')
    return builtin[0] if builtin else None


def _config_class(cls: type[Strategy]) -> type:
    """Create the dataclass that Hydra sees: the name of the strategy, then the fields of its class.

    Raises PluginError for a field whose type Hydra cannot handle.
    """
    try:
        hints = get_type_hints(cls)
    except NameError as err:
        raise PluginError(f"{_full(cls)}: {err}: field types must be importable at run time") from err
    except (TypeError, ValueError) as err:
        raise PluginError(f"{_full(cls)}: its field types cannot be read: {err}") from err
    columns: list[tuple[str, Any, Any]] = [("name", str, dataclasses.field(default=cls.name))]
    for field in _fields(cls):
        hint = hints[field.name] | int if _number_or_word(hints[field.name]) else hints[field.name]
        column = (field.name, hint, _default(field))
        try:
            OmegaConf.structured(dataclasses.make_dataclass("Probe", [column]))
        except Exception as err:  # a default_factory is the plugin's own code and may raise anything
            raise PluginError(
                f'{_full(cls)}: field "{field.name}" of type {field.type} cannot be configured ({str(err).splitlines()[0]}); '
                "use int, float, bool, str, an Enum, or lists, tuples, dicts and dataclasses of these"
            ) from err
        columns.append(column)
    return dataclasses.make_dataclass(f"{cls.__name__}Config", columns, frozen=True)


def _number_or_word(hint: Any) -> bool:
    """Return True for a type such as `float | str`, without int: Hydra would refuse the integer 1 for it."""
    return {float, str} <= {*get_args(hint)} and int not in get_args(hint)


def _number(value: Any) -> Any:
    """Convert an int, or a text such as "0.5", to float, as Hydra does for a float field; return others unchanged."""
    plain = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{0,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?", value)
    if type(value) is not int and not plain:
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def described(strategy: object) -> str:
    """Return a strategy's repr, which is its log line. If the repr raises, return its name and the error."""
    try:
        with inside(strategy):
            return repr(strategy)
    except Exception as error:
        return f"{getattr(strategy, 'name', type(strategy).__name__)}(its repr raises {type(error).__name__})"


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return a dataclass field with the same default; with OmegaConf's MISSING as default if there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=MISSING if field.default is dataclasses.MISSING else field.default)


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(field for field in dataclasses.fields(cls) if field.init)


def _as_tuple(value: Any, hint: Any) -> Any:
    """Convert a list back to a tuple if the field's type is a tuple, also within it: OmegaConf turns tuples into lists.

    Lists within optional types and dicts stay.
    """
    if get_origin(hint) is not tuple or not isinstance(value, list):
        return value
    inner = [arg for arg in get_args(hint) if arg is not Ellipsis]
    return tuple(_as_tuple(item, inner[min(i, len(inner) - 1)]) for i, item in enumerate(value))


def _summary(cls: type) -> str:
    """Return `StrategyInfo.summary`."""
    text = cls.__doc__ or ""
    if text.startswith(f"{cls.__name__}("):  # @dataclass writes this if the class has no docstring
        text = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
    return text.strip().split("\n")[0]


def _source(cls: type) -> str:
    """Return `StrategyInfo.source`; empty unless `fidelity` and `paper` are both non-empty texts."""
    paper, fidelity = getattr(cls, "paper", ""), getattr(cls, "fidelity", "")
    return f"{fidelity}: {paper}" if isinstance(paper, str) and isinstance(fidelity, str) and paper and fidelity else ""


def _full(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
