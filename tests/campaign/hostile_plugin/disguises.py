"""Attacks by what passes for specvlm's own: its names, its classes with something else in them, tables that it keeps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

import specvlm.decoding.output
import specvlm.strategies.drafters.tree
import specvlm.strategies.verifiers.greedy
from specvlm.strategies.drafters.tree import TreeDrafter, TreeSession
from specvlm.types import TreeShape

from .makers import proposes, starts, strategy
from .world import AddsOne, Rolls

TREE = "specvlm.strategies.drafters.tree"


def rolls_every_linear():
    def hook(module, args, found):
        return found.roll(1, -1) if isinstance(module, torch.nn.Linear) else None

    torch.nn.modules.module.register_module_forward_hook(hook)


# ---- names -----------------------------------------------------------------------------------------------------------


class Anything(str):
    """A text that is equal to every other, and has the hash of the one that is asked for."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return True

    def partition(self, sep):
        return "specvlm", sep, "strategies"


for name, home in {"own": TREE, "any": Anything(TREE), "new": "specvlm.more"}.items():
    hooks = {"__post_init__": lambda self: rolls_every_linear(), "__module__": home}
    strategy("drafter", f"of_{name}_module_hooks_in_post_init", "disguises", **hooks)
    patches = {"__module__": home, "attack": lambda self, ctx: AddsOne().__enter__()}
    strategy("drafter", f"of_{name}_module_enters_a_mode", "disguises", **patches)


# ---- classes ---------------------------------------------------------------------------------------------------------


class Levels(tuple):
    """Of a draft tree; who goes through them runs this."""

    def __iter__(self):
        Rolls().__enter__()
        return super().__iter__()


def with_other_routines(session):
    for name in ("feed_both", "feed_root"):
        routine = getattr(session, name)
        tables, *other = routine.work.args
        work = partial(routine.work.func, tables._replace(levels=Levels(tables.levels)), *other)
        setattr(session, name, replace(routine, work=work, key=(name, "other")))
    return session


def started_otherwise(self, ctx):
    return with_other_routines(TreeDrafter.start(TreeDrafter("chain:2"), ctx))


strategy("drafter", "starts_a_session_of_specvlms_with_other_routines", "disguises", start=started_otherwise)


def makes_a_drafter_of_specvlms(cls, *args, **other):
    drafter = TreeDrafter("chain:2")
    object.__setattr__(drafter, "start", lambda ctx: started_otherwise(drafter, ctx))
    return drafter


strategy("drafter", "makes_a_drafter_of_specvlms", "disguises", __new__=makes_a_drafter_of_specvlms)


class Session(TreeSession):
    """Its class is swapped for its parent's once it is made."""

    def __init__(self, *args):
        super().__init__(*args)
        self.propose = self.other
        self.__class__ = TreeSession

    def other(self, last):
        AddsOne().__enter__()
        return (yield from TreeSession.propose(self, last))


def started_as_another(self, ctx):
    return Session(ctx, ctx.draft, TreeShape.parse("chain:2"), False)


strategy("drafter", "starts_a_session_of_a_class_that_changes", "disguises", start=started_as_another)


# ---- what is kept, or called later -------------------------------------------------------------------------------------


@starts("disguises")
def enters_a_mode_when_tokens_are_taken(self, ctx):
    before = specvlm.decoding.output.Output.take

    def take(self, tokens):
        found = before(self, tokens)
        if self.done:
            AddsOne().__enter__()
        return found

    specvlm.decoding.output.Output.take = take


@starts("disguises")
def edits_tables_of_trees(self, ctx):
    shape = TreeShape.parse("chain:5")
    for fed in (1, 2):
        tables = specvlm.strategies.drafters.tree.tables_of(shape, False, torch.device("cpu"), fed)
        tables.ways_MD.zero_()
        for level in tables.levels:
            level.depths_Q.add_(7)


@proposes("disguises")
def edits_tables_of_the_rule(self, ctx, last, tree):
    for table in specvlm.strategies.verifiers.greedy._layout(tree.parents, torch.device("cpu")):
        table.zero_()
    return tree


@proposes("disguises")
def leaves_inference_mode_between_two_passes(self, ctx, last, tree):
    torch.inference_mode(False).__enter__()
    return tree


@proposes("disguises")
def calls_a_drafter_of_specvlms_with_other_routines(self, ctx, last, tree):
    """In the middle of a round, with a cache of its own."""
    session = with_other_routines(TreeDrafter.start(TreeDrafter("chain:2"), replace(ctx, caches=Renamed(ctx.caches, last))))
    return (yield from session.propose(None))


class Renamed:
    """A lease that takes caches by other roles."""

    def __init__(self, lease, last):
        self.lease, self.number = lease, 0 if last is None else id(last)

    def take(self, role, *args):
        return self.lease.take(f"{role} {self.number}", *args)
