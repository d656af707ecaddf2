"""Loading plugins, the rules for strategy classes, and building a strategy from its config."""

import dataclasses
import enum
import logging
from dataclasses import MISSING, dataclass, field
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace
from typing import Literal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from specvlm import config
from specvlm.errors import UserError
from specvlm.strategies import Pruner, Strategy, plugins, registry
from specvlm.strategies.plugins import PluginError, hookimpl


class Colour(enum.Enum):
    RED = 1


class Select:
    def select(self, ctx):
        raise NotImplementedError


@dataclass(frozen=True)
class Good(Select, Pruner):
    """Keep the good ones."""

    name = "good"
    share: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    colour: Colour = Colour.RED
    limit: int | None = None


@dataclass(frozen=True)
class OtherGood(Select, Pruner):
    name = "good"


@dataclass(frozen=True)
class Uniform(Select, Pruner):
    name = "uniform"


def module(name="some_plugin", **content):
    it = ModuleType(name)
    vars(it).update(content)
    return it


def bringing(*classes):
    def specvlm_strategies():
        return list(classes)

    return module(specvlm_strategies=hookimpl(specvlm_strategies))


class Point:
    """Entry point whose module need not be installed."""

    def __init__(self, name, target, dist=None, version="1.0"):
        self.name, self.target = name, target
        self.dist = SimpleNamespace(name=dist or name, version=version)

    def load(self):
        if isinstance(self.target, BaseException):
            raise self.target
        return self.target


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these entry points, and no others, are installed."""
    monkeypatch.delenv("SPECVLM_PLUGINS", raising=False)

    def install(*points):
        monkeypatch.setattr(plugins, "entry_points", lambda group: points)
        registry.collect.cache_clear()

    yield install
    registry.collect.cache_clear()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="specvlm")
    return lambda: [record.getMessage() for record in caplog.records]


def test_built_ins_come_through_the_hook():
    table = registry.collect()
    assert list(table) == ["pruner", "drafter", "verifier", "dataset", "metric", "tracker"]
    assert set(table["pruner"]) == {"none", "uniform", "random", "window", "verifier_attention", "two_stage", "fastv"}
    grown = {"dynamic_tree", "entropy_tree", "overlap"}
    assert set(table["drafter"]) == {"tree", "self", "sparse", "prompt_lookup"} | grown
    assert set(table["verifier"]) == {"greedy", "sampling", "coupled", "loose"}
    assert set(table["metric"]) == {"accuracy", "exact_match", "rouge_l"}
    assert set(table["tracker"]) == {"wandb"}
    assert all(info.plugin == "specvlm" and info.summary for kind in table.values() for info in kind.values())


def test_every_built_in_is_built_from_its_own_defaults():
    for kind, infos in registry.collect().items():
        for name, info in infos.items():
            needed = {f.name: "FOLDER" for f in info.fields if f.default is f.default_factory is MISSING}  # a data set's root
            assert registry.build(kind, {"name": name} | needed) == info.cls(**needed), name


def test_plugin_is_registered_with_its_distribution_and_summary(installed):
    installed(Point("specvlm-good", bringing(Good), version="0.3"))
    info = registry.collect()["pruner"]["good"]
    assert (info.cls, info.plugin, info.summary) == (Good, "specvlm-good 0.3", "Keep the good ones.")
    assert [f.name for f in info.fields] == ["share", "sizes", "colour", "limit"]


def test_broken_plugin_is_named_and_the_rest_load(installed, warnings, monkeypatch):
    installed(Point("specvlm-bad", ImportError("no module named x"), version="0.2"), Point("specvlm-good", bringing(Good)))
    assert "good" in registry.collect()["pruner"]
    (line,) = warnings()
    assert line.startswith("specvlm: plugin specvlm-bad 0.2 is left out: ImportError: no module named x")
    assert "SPECVLM_PLUGIN_TRACEBACK=1" in line and "\n" not in line


def test_traceback_of_a_broken_plugin_on_request(installed, warnings, monkeypatch):
    monkeypatch.setenv("SPECVLM_PLUGIN_TRACEBACK", "1")
    installed(Point("specvlm-bad", SystemExit(3)))
    plugins.load()
    assert "Traceback (most recent call last)" in warnings()[0]


def test_strict_plugins_raise(installed, monkeypatch):
    monkeypatch.setenv("SPECVLM_STRICT_PLUGINS", "1")
    installed(Point("specvlm-bad", ImportError("no module named x")))
    with pytest.raises(PluginError, match="specvlm-bad 1.0 is left out: ImportError"):
        registry.collect()


def test_a_hook_that_raises_is_survived(installed, warnings):
    def specvlm_strategies():
        raise RuntimeError("boom")

    installed(Point("specvlm-bad", module(specvlm_strategies=hookimpl(specvlm_strategies))))
    assert "two_stage" in registry.collect()["pruner"]
    assert "RuntimeError: boom" in warnings()[0]


@pytest.mark.parametrize(
    ("wish", "loaded"),
    [("", []), ("specvlm-good", ["specvlm-good"]), ("specvlm_Good , other-dist", ["other-dist", "specvlm-good"])],
)
def test_allow_list_limits_plugins_by_either_name(installed, monkeypatch, wish, loaded):
    installed(Point("specvlm-good", bringing()), Point("other", bringing(), dist="other-dist"), Point("third", bringing()))
    monkeypatch.setenv("SPECVLM_PLUGINS", wish)
    assert sorted({p.name for p in plugins.load()} - {"specvlm"}) == loaded


def test_allow_list_names_what_is_not_installed(installed, monkeypatch, warnings):
    installed(Point("specvlm-good", bringing()))
    monkeypatch.setenv("SPECVLM_PLUGINS", "specvlm-god")
    plugins.load()
    assert warnings()[0].endswith('is not installed. There is specvlm-good. Did you mean "specvlm-good"?')


def test_two_distributions_with_one_entry_point_name_are_both_named(installed, warnings):
    installed(Point("good", bringing(Good), dist="dist-a"), Point("good", bringing(OtherGood), dist="dist-b"))
    assert "good" not in registry.collect()["pruner"]
    assert "dist-a 1.0 and dist-b 1.0" in warnings()[0] and '"good"' in warnings()[0]


def test_two_classes_with_one_name_are_both_named_and_neither_used(installed, warnings):
    installed(Point("a", bringing(Good)), Point("b", bringing(OtherGood)))
    assert "good" not in registry.collect()["pruner"]
    (line,) = warnings()
    assert "Good (a 1.0)" in line and "OtherGood (b 1.0)" in line and "neither is used" in line


def test_a_plugin_cannot_replace_a_built_in(installed, warnings):
    installed(Point("a", bringing(Uniform, Good)))
    assert registry.collect()["pruner"]["uniform"].plugin == "specvlm"
    assert registry.collect()["pruner"]["good"].plugin == "a 1.0"
    assert "the built-in one is used" in warnings()[0]


def test_misspelt_hook_is_named():
    def marked():
        return []

    def unmarked():
        return []

    with pytest.raises(
        PluginError, match='"specvlm_strategy", but the only hooks are "specvlm_strategies" and .*. Did you mean'
    ):
        plugins.strategies_of(module(specvlm_strategy=hookimpl(marked)))
    with pytest.raises(PluginError, match='implements no hook: .* it has a function "specvlm_strategy"'):
        plugins.strategies_of(module(specvlm_strategy=unmarked))
    with pytest.raises(PluginError, match="implements no hook"):
        plugins.strategies_of(module())


def test_hook_must_return_a_list():
    def specvlm_strategies():
        return Good

    with pytest.raises(PluginError, match="must return a list of classes"):
        plugins.strategies_of(module(specvlm_strategies=hookimpl(specvlm_strategies)))


def a_pruner(frozen=True, **content):
    annotations = {name: kind for name, (kind, _) in content.items() if kind}
    values = {name: value for name, (_, value) in content.items() if value is not ...}
    body = {"name": "odd", "select": Select.select, "__annotations__": annotations} | values
    return dataclass(frozen=frozen)(type("Odd", (Pruner,), body))


class NotFrozen(Select, Pruner):
    name = "not_frozen"


class Kindless(Strategy):
    name = "kindless"


NO_DATACLASS = [NotFrozen, a_pruner(frozen=False), type("Sub", (Good,), {})]
BAD = [
    *[(cls, "must be a frozen dataclass") for cls in NO_DATACLASS],
    (object, "not a class derived from"),
    (Good(), "not a class derived from"),
    (dataclass(frozen=True)(Kindless), "kind None is none of pruner, drafter, verifier"),
    (dataclass(frozen=True)(type("Abstract", (Pruner,), {"name": "abstract"})), "does not implement select"),
    (a_pruner(name=(None, "two-stage")), "name must be an identifier"),
    (a_pruner(name=(None, 3)), "name must be an identifier"),
    (a_pruner(name=(str, "odd")), "write `name = …` without a type"),
    (a_pruner(ratio=(float, 0.5)), 'may not be called "ratio"'),
    (a_pruner(seed=(int, 0)), 'may not be called "seed"'),
    (a_pruner(budget=(int, 0)), 'may not be called "budget"'),
    (a_pruner(_target_=(str, "x")), 'may not be called "_target_"'),
    (a_pruner(spread=(Literal["a", "b"], "a")), 'field "spread" of type .*Literal.* cannot be configured'),
    (a_pruner(thing=(object, field(default_factory=object))), 'field "thing" .* cannot be configured'),
    (a_pruner(thing=("Missing", 1)), "name 'Missing' is not defined"),
]


@pytest.mark.parametrize(("cls", "why"), BAD, ids=[why[:30] for _, why in BAD])
def test_class_that_breaks_a_rule_is_refused_with_the_rule(cls, why):
    with pytest.raises(PluginError, match=why) as caught:
        registry.describe(cls, "a 1.0")
    assert "\n" not in str(caught.value)


def test_every_top_level_key_is_reserved():
    assert {"ratio", "seed", "positions", "frames", "target", "pair"} <= registry.RESERVED


def test_build_keeps_types_and_gives_tuples_back(installed):
    installed(Point("a", bringing(Good)))
    node = OmegaConf.create({"name": "good", "sizes": [3], "colour": "RED", "share": "0.25"})
    built = registry.build("pruner", node)
    assert built == Good(share=0.25, sizes=(3,)) and hash(built)


@pytest.mark.parametrize(("value", "built"), [(1, 1.0), (0.5, 0.5), ("0.25", 0.25), ("auto", "auto"), ("", ""), (None, None)])
def test_a_field_may_take_a_number_or_a_word(installed, value, built):
    either = a_pruner(share=(float | str | None, "auto"), select=(None, Select.select))
    installed(Point("a", bringing(either)))
    found = registry.build("pruner", {"name": "odd", "share": value}).share
    assert found == built and type(found) is type(built)
    with pytest.raises(UserError, match="pruner=odd: .*bool"):
        registry.build("pruner", {"name": "odd", "share": True})


def test_a_default_is_shown_as_the_command_line_takes_it(installed):
    installed(Point("a", bringing(Good)))
    other = Good(share=0.25, sizes=(3, 4), colour=Colour.RED, limit=None)
    words = [f"{f.name}={config.word(getattr(other, f.name))}" for f in dataclasses.fields(other)]
    assert words == ["share=0.25", "sizes=[3,4]", "colour=RED", "limit=null"] and config.word(True) == "true"
    overrides = OverridesParser.create().parse_overrides(words)
    node = {override.key_or_group: override.value() for override in overrides}
    assert registry.build("pruner", OmegaConf.create({"name": "good"} | node)) == other


def test_build_explains_a_bad_node(installed):
    @dataclass(frozen=True)
    class Fussy(Select, Pruner):
        name = "fussy"
        needed: int
        part: float = 0.5

        def __post_init__(self):
            if self.part > 1:
                raise ValueError(f"part {self.part} is more than 1")

    installed(Point("a", bringing(Fussy)))
    for node, why in [
        ({"name": "fusy"}, 'no pruner "fusy"; choose from .*Did you mean "fussy"'),
        ({}, "expected one by name"),
        ({"name": "fussy"}, "pruner.needed has no value"),
        ({"name": "fussy", "needed": "x"}, "could not be converted to Integer"),
        ({"name": "fussy", "needed": 1, "prt": 2}, 'has no key "prt"; it has needed, part. Did you mean "part"'),
        ({"name": "fussy", "needed": 1, "part": 2}, "pruner=fussy: part 2.0 is more than 1"),
    ]:
        with pytest.raises(UserError, match=why):
            registry.build("pruner", OmegaConf.create(node))
    with pytest.raises(UserError, match='no kind of strategy "prunner".*Did you mean "pruner"'):
        registry.build("prunner", "fussy")


def test_entry_points_are_read_from_the_group_specvlm(monkeypatch):
    asked = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: asked.append(group) or ())
    plugins.load()
    assert asked == ["specvlm"]
    assert plugins._distribution(EntryPoint("x", "y", "specvlm")) == ("x", "")
