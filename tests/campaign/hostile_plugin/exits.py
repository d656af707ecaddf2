"""Attacks by ending the process, or the sweep, from wherever a strategy is asked: what is raised costs its own row."""

from __future__ import annotations

import asyncio
import sys

import torch

from specvlm.errors import JobFailed, MissingVideo, OutOfMemory
from specvlm.results.rows import CannotWrite, Taken

from .makers import BASES, strategy


class Odd(BaseException):
    """No Exception, and without a text."""

    def __str__(self):
        raise KeyboardInterrupt("by its text")


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit(0)

    __repr__ = __str__


class Bare(BaseException):
    pass


RAISED = {
    "exit_0": lambda: sys.exit(0),
    "exit_1": lambda: sys.exit(1),
    "exit_none": lambda: sys.exit(),
    "exit_text": lambda: sys.exit("goodbye"),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "generator_exit": lambda: _raise(GeneratorExit()),
    "bare": lambda: _raise(Bare("bare")),
    "odd": lambda: _raise(Odd()),
    "unprintable": lambda: _raise(Unprintable()),
    "stop_iteration": lambda: _raise(StopIteration()),
    "cancelled": lambda: _raise(asyncio.CancelledError()),
    "memory": lambda: _raise(MemoryError()),
    "cuda_memory": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory")),
    "job_failed": lambda: _raise(JobFailed(0)),
    "cannot_write": lambda: _raise(CannotWrite("the disk is full")),
    "taken": lambda: _raise(Taken("by another")),
    "broken_pipe": lambda: _raise(BrokenPipeError()),
    "missing_video": lambda: _raise(MissingVideo("no such file")),
    "out_of_memory": lambda: _raise(OutOfMemory("by its own word")),
    "recursion": lambda: _recursion(),
}
PLACES = {  # by kind: what calls it, for which the honest member stands
    "pruner": ("__post_init__", "needs", "row_weights", "select", "state_layer", "__repr__"),
    "drafter": ("__post_init__", "needs", "max_nodes", "max_rows", "own_budget", "start", "answer", "__repr__"),
    "verifier": ("__post_init__", "sampling", "lossless", "verify", "first", "__repr__"),
    "dataset": ("__post_init__", "samples", "split"),
}
PROPERTIES = {"needs", "max_nodes", "max_rows", "sampling", "lossless", "split"}


def _raise(error):
    raise error


def _recursion():
    return _recursion()


def raising(kind, place, word):
    """Register a strategy that raises in that place."""

    def member(self, *args, **other):
        RAISED[word]()

    content = {place: property(member) if place in PROPERTIES else member}
    if kind == "pruner" and place == "row_weights":
        content["needs"] = frozenset({"verifier_attention_weighted"})
    if kind == "pruner" and place == "state_layer":
        content["needs"] = frozenset({"hidden"})
    strategy(kind, f"{word}_in_{kind}_{place.strip('_')}", "exits", **content)


def pairs():
    """Every place once, with the words in turn; and where requests run, those words that mean most."""
    words = list(RAISED)
    for number, (kind, place) in enumerate([(kind, place) for kind, places in PLACES.items() for place in places]):
        yield kind, place, words[number % len(words)]
    for kind, place in (("pruner", "select"), ("drafter", "answer"), ("verifier", "verify")):
        for word in ("exit_0", "interrupt", "generator_exit", "odd", "cannot_write", "job_failed", "missing_video"):
            yield kind, place, word


for kind, place, word in sorted(set(pairs())):
    raising(kind, place, word)
assert set(PLACES) == set(BASES)
