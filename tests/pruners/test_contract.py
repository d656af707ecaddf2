"""Every built-in pruner keeps the contract that plugins are held to, and the contract suite catches what breaks it."""

import dataclasses
import enum
from dataclasses import dataclass, field
from itertools import count

import pytest
import torch

from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.pruners import (
    FastVPruner,
    NonePruner,
    RandomPruner,
    TwoStagePruner,
    UniformPruner,
    VerifierAttentionPruner,
    WindowPruner,
    specvlm_strategies,
)
from specvlm.testing import check_pruner
from specvlm.types import KeepSet, TokenGrid

INSTANCES = [
    NonePruner(),
    UniformPruner(),
    RandomPruner(),
    WindowPruner("front"),
    WindowPruner("middle"),
    WindowPruner("back"),
    VerifierAttentionPruner(),
    TwoStagePruner(),
    TwoStagePruner(mass=1.0),
    TwoStagePruner("auto"),
    TwoStagePruner(spread="frame"),
    TwoStagePruner(mass=1e-3, spread="frame"),
    FastVPruner(),
    FastVPruner(layer=7, source="target"),
    FastVPruner(layer=3, source="draft"),
]


@pytest.mark.parametrize("pruner", INSTANCES, ids=repr)
def test_built_in_keeps_the_contract(pruner):
    check_pruner(pruner)


def test_every_built_in_is_offered_under_the_name_of_its_file():
    offered = specvlm_strategies()
    assert {type(pruner) for pruner in INSTANCES} == set(offered)
    for cls in offered:
        assert cls.__module__ == f"specvlm.strategies.pruners.{cls.name}"


def random_grids(generator):
    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    return tuple(TokenGrid(number(1, 9), number(1, 7), number(1, 7), number(0, 1)) for _ in range(number(1, 3)))


@pytest.mark.parametrize("pruner", [p for p in INSTANCES if not p.keeps_all], ids=repr)
def test_built_in_spends_the_whole_budget_on_random_grids(pruner):
    generator = torch.Generator().manual_seed(7)
    for _ in range(40):
        grids = random_grids(generator)
        total = sum(map(len, grids))
        if total < 2:
            continue
        budget = int(torch.randint(1, total, (), generator=generator))
        signals = {name: torch.rand(8, total, generator=generator) for name in pruner.needs}
        if "verifier_attention" in signals:
            signals["verifier_attention"] = signals["verifier_attention"][0]
        keep = pruner.select(PruneContext(grids, budget, signals, generator))
        assert len(keep) == budget
        assert keep.index.unique().tolist() == keep.index.tolist()


def test_check_takes_a_class_with_fields():
    check_pruner(WindowPruner, where="back")
    check_pruner(FastVPruner(), source="draft")


@dataclass(frozen=True)
class FirstFrame(Pruner):
    """A pruner in order, for one video a prompt."""

    name = "first_frame"
    needs = frozenset({"features"})

    def select(self, ctx):
        order = torch.arange(len(ctx.grid), 0, -1) + 0 * ctx.features.sum(1)
        return KeepSet.top(order, min(ctx.budget, ctx.grid.per_frame))


class Order(enum.Enum):
    FIRST = 1


@dataclass(frozen=True)
class Optioned(FirstFrame):
    """All types that an option may have."""

    name = "optioned"
    order: Order = Order.FIRST
    most: int | None = None
    names: tuple[str, ...] = ("a", "b")
    sure: bool = True


@dataclass(frozen=True)
class PairMean(FirstFrame):
    """A merger in order: each kept token is the mean of all tokens up to the next kept one."""

    name = "pair_mean"

    def select(self, ctx):
        index = KeepSet.uniform(ctx.total, ctx.budget).index
        ctx.signal("features")
        group = torch.searchsorted(index, torch.arange(ctx.total), right=True) - 1
        pool = torch.nn.functional.one_hot(group, len(index)).T.float()
        return KeepSet(index, ctx.total, (pool / pool.sum(1, keepdim=True)).to_sparse())


@pytest.mark.parametrize("cls", [FirstFrame, Optioned, PairMean])
def test_check_passes_a_refusal_of_several_videos_and_a_merger(cls):
    check_pruner(cls)


def breaking(**members):
    """A pruner that is FirstFrame but for `members`."""
    return dataclass(frozen=True)(type("Broken", (FirstFrame,), {"name": "broken", **members}))


def select_with(change):
    def select(self, ctx):
        return change(ctx, FirstFrame.select(self, ctx))

    return select


def sort_input(ctx, keep):
    ctx.features.copy_(ctx.features.sort(0).values)
    return keep


def global_random(ctx, keep):
    return KeepSet.top(torch.rand(ctx.total), ctx.budget)


def whole_numbers(ctx, keep):
    return KeepSet(keep.index, ctx.total, torch.eye(ctx.total, dtype=torch.int64)[keep.index])


TURNS = count()


def changing_pool(ctx, keep):
    return KeepSet(keep.index, ctx.total, torch.eye(ctx.total).roll(next(TURNS), 0)[keep.index])


def unequal_pool(ctx, keep):
    return KeepSet(keep.index, ctx.total, torch.ones(len(keep), ctx.total))


@pytest.mark.parametrize(
    ("cls", "complaint"),
    [
        (breaking(select=select_with(lambda ctx, keep: KeepSet.everything(ctx.total))), "tokens kept"),
        (breaking(select=select_with(lambda ctx, keep: keep.index)), "not a KeepSet"),
        (breaking(select=select_with(lambda ctx, keep: KeepSet(keep.index, ctx.total + 1))), "keep set over"),
        (breaking(select=select_with(sort_input)), "changed its input features"),
        (breaking(select=select_with(global_random)), "global generator"),
        (breaking(select=select_with(unequal_pool)), "rows of pool must sum to 1"),
        (breaking(select=select_with(whole_numbers)), "pool must be floats"),
        (breaking(select=select_with(changing_pool)), "other tokens for the same seed"),
        (
            breaking(select=select_with(lambda ctx, keep: KeepSet.top(ctx.verifier_attention, 1))),
            '"verifier_attention" is not available',
        ),
        (breaking(select=select_with(lambda ctx, keep: 1 / 0)), "ZeroDivisionError"),
        (breaking(select=lambda self, ctx: KeepSet.uniform(ctx.total, ctx.budget)), "works without it"),
        (breaking(select=lambda self, ctx: KeepSet.top(ctx.signals["features"].sum(1), ctx.budget)), "read it with ctx.signal"),
        (breaking(keeps_all=True), "keeps_all is set, but"),
        (breaking(needs=frozenset({"featuers"})), "the only signals are"),
        (breaking(needs=["features"]), "must be a frozenset"),
        (breaking(needs=frozenset({"draft_attention_last_row"})), "draft_layers"),
        (breaking(needs=frozenset({"hidden"})), "it must be 1 to"),
        (breaking(needs=frozenset({"hidden"}), state_layer=lambda self, layers: 2), "it must be 1 to 1"),
        (
            breaking(needs=frozenset({"verifier_attention_weighted"}), row_weights=lambda self, text, video: 0 * text[:, 0]),
            "not all zero",
        ),
        (breaking(name="frame-diff"), "must be an identifier"),
        (breaking(ratio=0.5, __annotations__={"ratio": float}), "hides the run's own"),
        (breaking(frames=3, __annotations__={"frames": int}), "rename the field"),
        (breaking(__annotations__={"mass": float}), "must work"),
        (breaking(table=field(default_factory=dict), __annotations__={"table": dict}), "plain value"),
        (type("Undecorated", (FirstFrame,), {"name": "undecorated"}), "frozen=True"),
        (dict, "not a subclass"),
    ],
)
def test_check_names_the_broken_contract(cls, complaint):
    with pytest.raises(AssertionError, match=complaint) as refusal:
        check_pruner(cls)
    assert "\n" not in str(refusal.value).split("\nassert ")[0]


def test_frozen_pruners_show_their_fields_in_their_log_line():
    assert repr(TwoStagePruner(mass=0.5)) == "TwoStagePruner(mass=0.5, spread='linspace')"
    with pytest.raises(dataclasses.FrozenInstanceError):
        TwoStagePruner().mass = 0.5
