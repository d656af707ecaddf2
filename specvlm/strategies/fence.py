"""Guarded calls into strategies: attribute their errors to them, and check what they return before the loop uses it.

Shape suffixes: Q rows of a pass, T slots that rows may attend to, V vocabulary.
"""

import signal
import sys
import threading

# `signal.getsignal` converts its result to an Enum, which takes longer than the rest of `inside`.
from _signal import getsignal  # type: ignore[import-not-found]
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import inf
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from specvlm.errors import MissingVideo, StrategyError, UserError, line, message, one_line
from specvlm.models.kv_cache import CacheLease
from specvlm.models.passes import Call, Pass
from specvlm.process.interrupts import INTERRUPTS
from specvlm.process.settings import leave_modes, modes_entered
from specvlm.strategies import Drafter, Pruner, Sampling, Verifier
from specvlm.types import DraftTree, Verdict


def label_of(strategy: object) -> str:
    """Return the label of a strategy or its class, such as "drafter=tree". Strings are returned unchanged."""
    if type(strategy) is str:
        return strategy
    return _label(strategy if isinstance(strategy, type) else type(strategy))


@lru_cache(maxsize=256)
def _label(cls: type) -> str:
    kind, name = getattr(cls, "kind", None), getattr(cls, "name", None)
    return line(f"{kind if isinstance(kind, str) else 'strategy'}={name if isinstance(name, str) else cls.__name__}")


PACKAGE = Path(__file__).parents[1]
# Names of specvlm's own modules, taken from its files: a plugin could call its module "specvlm.something".
OURS = frozenset(
    ".".join(("specvlm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


class ThirdPartyCalls:
    """Counts this process's calls into strategies that are not specvlm's own."""

    def __init__(self) -> None:
        self.calls = 0

    def met(self, strategy: object) -> None:
        """Count a call, unless the strategy is specvlm's own or only its label is given."""
        self.calls += not (
            isinstance(strategy, str) or defined_here(strategy if isinstance(strategy, type) else type(strategy))
        )


THIRD_PARTY_CALLS = ThirdPartyCalls()


class inside:
    """Context manager for a call into a strategy: name the strategy in errors, restore Ctrl-C and torch's modes.

    Ordinary errors get a note that names the strategy. Errors that callers would misread become a StrategyError: an
    OSError (which would look like a full results disk), StopIteration, a KeyboardInterrupt without the user's Ctrl-C,
    SystemExit and the like, and specvlm's own errors and their subclasses. Only StrategyError, UserError and
    MissingVideo are raised unchanged. In the main thread, the SIGINT handler is restored. An instance may be entered
    several times, but not nested.

    It is a class because a round enters it a dozen times, and `contextmanager` takes three times as long.

    Raises:
        KeyboardInterrupt: The user pressed Ctrl-C, even if the strategy caught it and went on.
        StrategyError: The strategy raised one of the errors above, or returned with a torch mode still active.
    """

    __slots__ = ("handler", "heard", "label", "modes", "names")

    def __init__(self, strategy: object) -> None:
        if type(strategy) is str:  # a label, as in every pass of a round
            self.label = strategy
            return
        self.label = label_of(strategy)
        THIRD_PARTY_CALLS.met(strategy)

    def __enter__(self) -> None:
        self.heard, self.names = INTERRUPTS.heard, INTERRUPTS.names
        self.names.append(self.label)
        self.modes, self.handler = modes_entered(), getsignal(signal.SIGINT)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Restore the SIGINT handler and torch's modes, then raise an error if the class docstring calls for one."""
        self.names.pop()
        if getsignal(signal.SIGINT) is not self.handler and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.handler)  # restore it at once: the next call may hang
        # Leave the modes at once, too: the loop may cache tensors that it creates under them.
        left = leave_modes(self.modes) if modes_entered() != self.modes else ""
        if error is not None:
            self._replace_or_pass(error)
        elif left:
            raise StrategyError(f"{self.label} left torch in {left} of its own")
        elif INTERRUPTS.heard > self.heard:
            raise _interrupted(self.label)

    def _replace_or_pass(self, error: BaseException) -> None:
        """Raise the error that replaces this one. Return if this one may propagate, after adding a note if needed."""
        label, heard = self.label, self.heard
        if INTERRUPTS.heard > heard and not isinstance(error, KeyboardInterrupt):
            raise _interrupted(label) from error  # the strategy turned the user's Ctrl-C into another error
        if isinstance(error, StrategyError) or type(error) in (UserError, MissingVideo):
            return
        ends_jobs = type(error).__module__.partition(".")[0] == "specvlm"  # our own errors would end the whole sweep
        plain = isinstance(error, Exception) and not isinstance(error, OSError | UserError | StopIteration) and not ends_jobs
        if plain or (isinstance(error, KeyboardInterrupt) and INTERRUPTS.pressed(heard)):
            if f"in {label}" not in getattr(error, "__notes__", ()):
                BaseException.add_note(error, f"in {label}")
            return
        raise StrategyError(f"{label} raised {type(error).__name__}: {message(error)}") from error


def _interrupted(label: str) -> KeyboardInterrupt:
    error = KeyboardInterrupt()
    error.add_note(f"in {label}")
    return error


@contextmanager
def contained() -> Iterator[None]:
    """Context manager for code that may call strategies: turn SystemExit and the like into a StrategyError.

    Other exceptions pass: those derived from Exception, GeneratorExit and KeyboardInterrupt.
    """
    try:
        yield
    except (Exception, GeneratorExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise StrategyError(f"a strategy raised {one_line(error)}") from error


def claims_of(verifier: Verifier) -> tuple[bool, Sampling]:
    """Read and check a verifier's `lossless` and `sampling`. Raises TypeError or ValueError for an invalid one."""
    with inside(verifier):
        lossless, sampling = bool(verifier.lossless), verifier.sampling
        if type(sampling) is not Sampling:
            raise TypeError(f"sampling must be a Sampling, got {type(sampling).__name__}")
        for name in ("temperature", "top_k", "top_p"):
            value = getattr(sampling, name)
            if type(value) not in (int, float) or not 0 <= value < inf:
                raise ValueError(f"sampling.{name} must be a number from 0 on, got {value!r:.50}")
        if type(sampling.coupled) is not bool or (sampling.coupled and not sampling.temperature):
            raise ValueError(f"sampling.coupled must be True or False, and needs a temperature, got {sampling.coupled!r:.50}")
        return lossless, sampling


def needs_of(strategy: Pruner | Drafter) -> frozenset[str]:
    """Read and check a strategy's `needs`. Raises TypeError unless it is a frozenset of names."""
    with inside(strategy):
        found = strategy.needs
        if type(found) is not frozenset or not all(type(name) is str for name in found):
            raise TypeError(f"needs must be a frozenset of names, got {found!r:.50}")
        return found


def sizes_of(drafter: Drafter) -> tuple[int, int]:
    """Read and check `max_nodes` and `max_rows`, which size the caches. Raises ValueError unless both are ints >= 1."""
    with inside(drafter):
        found = drafter.max_nodes, drafter.max_rows
        for name, value in zip(("max_nodes", "max_rows"), found, strict=True):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int from 1 on, got {value!r:.50}")
        return found


def checked_item(drafter: Drafter, lease: CacheLease, item: object) -> Pass | Call:
    """Check and return what a drafter yields. The slots of a pass are copied to the host.

    Raises:
        StrategyError: It is not a valid pass or call of a routine, or does not write to a cache that the session took.
        TypeError: The key of a routine is not hashable.
    """
    label = label_of(drafter)
    if type(item) is not Pass and type(item) is not Call:  # a subclass may answer otherwise once it has been checked
        raise StrategyError(f"{label}: propose yielded a {type(item).__name__}, expected a Pass or a call of a Routine")
    cache = item.cache if isinstance(item, Pass) else item.routine.cache
    if not lease.has(cache):
        raise StrategyError(f"{label}: a pass writes to a cache that the session did not take: use ctx.caches.take")
    if not cache.fits(item.model if isinstance(item, Pass) else item.routine.model, 0):
        raise StrategyError(f"{label}: a pass runs another model than its cache was taken for")
    if isinstance(item, Call):
        _check_call(label, item)
        return item
    check_pass(label, item)
    try:
        return item.placed()
    except IndexError as error:
        raise StrategyError(f"{label}: {error}") from None


def check_pass(label: str, one: Pass) -> None:
    """Check a pass without reading tensors. Raises StrategyError if shapes disagree or rows exceed the cache."""
    tokens, seen = one.tokens_Q, one.seen_QT
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.dtype != torch.int64 or not (rows := tokens.numel()):
        raise StrategyError(f"{label}: tokens of a pass must be (Q,) int64, got {_described(tokens)}")
    wanted = (rows, one.at + rows)
    if seen is not None and (not isinstance(seen, Tensor) or seen.shape != wanted):
        raise StrategyError(f"{label}: `seen` of a pass of {rows} rows at {one.at} must be {wanted}, got {_described(seen)}")
    if len(one.depths_Q) != rows:
        raise StrategyError(f"{label}: a pass of {rows} rows needs {rows} depths, got {len(one.depths_Q)}")
    if not 0 <= one.at <= one.cache.capacity - rows:
        raise StrategyError(f"{label}: a pass of {rows} rows at base + {one.at} exceeds its {one.cache.capacity} slots")


def _check_call(label: str, call: Call) -> None:
    """Check that a call fits its routine and can be captured. Raises StrategyError, or TypeError for an unhashable key.

    Done on every engine, so that authors see errors on a CPU, too.
    """
    routine, made = call.routine, call.routine.function
    if not isinstance(made, FunctionType) or "<locals>" in made.__qualname__:
        raise StrategyError(f"{label}: a routine's work must be a module-level function or a partial of one, got {made!r:.100}")
    hash(routine.key)  # raises TypeError for a key that cannot be looked up
    if len(call.state) != len(routine.state) or any(type(number) is not int for number in call.state):
        raise StrategyError(f"{label}: a routine with a state of {len(routine.state)} ints was called with {call.state}")
    pairs = zip(routine.inputs, call.inputs, strict=False)
    unlike = any(new is not None and (new.shape, new.dtype) != (old.shape, old.dtype) for old, new in pairs)
    if unlike or len(call.inputs) != len(routine.inputs):
        made_with, given = ([*map(_described, tensors)] for tensors in (routine.inputs, call.inputs))
        raise StrategyError(f"{label}: a routine with inputs {made_with} was called with {given}")


def checked_tree(drafter: Drafter, tree: DraftTree, root: int, most: int, vocabulary: int, ours: bool = False) -> DraftTree:
    """Check a proposal and copy it to a plain DraftTree with the last accepted token at node 0.

    On a CPU, token ids outside the vocabulary are refused. On a GPU they are clamped, since reading them would wait for
    the device; the verifier then judges the changed guess like any other.

    Args:
        drafter: Named in errors.
        tree: The proposal.
        root: The last accepted token.
        most: The drafter's `max_nodes` when the request began, which sized the caches.
        vocabulary: Size of the target's vocabulary.
        ours: True for a session of specvlm's own. On a GPU its tokens are not touched, since each change costs a
            launch.

    Raises:
        StrategyError: The proposal is not a valid tree.
    """
    label = label_of(drafter)
    if not isinstance(tree, DraftTree):
        raise StrategyError(f"{label}: propose returned a {type(tree).__name__}, expected a DraftTree")
    try:
        parents, ranks = _shape(tree.parents, tree.ranks)
    except (TypeError, ValueError) as error:
        raise StrategyError(f"{label}: {one_line(error)}") from None
    count, tokens, q = len(parents), tree.tokens, tree.q
    if count > most:
        raise StrategyError(f"{label}: a tree of {count} nodes exceeds its max_nodes of {most}")
    if not isinstance(tokens, Tensor) or tokens.shape != (count,) or tokens.dtype != torch.int64:
        raise StrategyError(f"{label}: tokens must be ({count},) int64, got {_described(tokens)}")
    if q is not None and (not isinstance(q, Tensor) or q.ndim != 2 or len(q) != count or not q.is_floating_point()):
        raise StrategyError(f"{label}: q must be ({count}, V) of floating point, got {_described(q)}")
    if tokens.device.type == "cpu":
        guesses = tokens.as_subclass(Tensor).tolist()[1:]  # faster than two tensor reductions
        low, high = min(guesses, default=0), max(guesses, default=0)
        if low < 0 or high >= vocabulary:
            raise StrategyError(f"{label}: guessed token {low if low < 0 else high}, the target has 0..{vocabulary - 1}")
        tokens = torch.tensor([root, *guesses])
    elif not ours:
        tokens = tokens.as_subclass(Tensor).clamp(0, vocabulary - 1)
        tokens[:1].fill_(root)  # an assignment would copy the number from the host, and wait for the device
    return DraftTree(tokens, parents, q, bool(tree.varies), ranks)


@lru_cache(maxsize=256)
def _shape(parents: tuple[int, ...], ranks: tuple[int, ...] | None) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the parents and ranks of a tree. Raises TypeError or ValueError for invalid ones. Cached: shapes recur."""
    for name, values in (("parents", parents), ("ranks", ranks)):
        if values is not None and not (type(values) is tuple and all(type(value) is int for value in values)):
            raise TypeError(f"{name} must be a tuple of int, got {values!r:.200}")
    if not parents or parents[0] != -1 or any(not 0 <= parent < node for node, parent in enumerate(parents) if node):
        raise ValueError(f"parents must be -1 for the root and parents[i] < i for the others, got {parents!r:.200}")
    if ranks is not None and (len(ranks) != len(parents) or min(ranks) < 0):
        raise ValueError(f"ranks must be one per node, none negative, got {ranks!r:.200}")
    return parents, ranks


def is_ours(value: object) -> bool:
    """Return True for an instance of one of specvlm's own classes, unless one of its methods may have been replaced.

    Methods count as replaced if `propose` is set on the instance or, for a dataclass, any attribute besides its fields.
    """
    own = vars(value) if hasattr(value, "__dict__") else {}
    fields = getattr(type(value), "__dataclass_fields__", None)  # the only attributes that a strategy sets
    changed = "propose" in own or (fields is not None and not own.keys() <= fields.keys())
    return not changed and defined_here(type(value))


def defined_here(cls: Any) -> bool:
    """Return True for a class or function of specvlm's own that has not been replaced in its module."""
    home = cls.__module__
    return type(home) is str and home in OURS and getattr(sys.modules.get(home), cls.__name__, None) is cls


def checked_verdict(verifier: Verifier, verdict: Verdict, tree: DraftTree, vocabulary: int) -> Verdict:
    """Check a verdict and copy it.

    Raises:
        StrategyError: Its path does not lead from the root to a node of the tree, or its bonus is not a token.
    """
    path, bonus = getattr(verdict, "path", None), getattr(verdict, "bonus", None)
    whole = type(path) is tuple and len(path) > 0 and all(type(node) is int for node in path) and 0 <= path[-1] < len(tree)
    if not whole or path != tree.way_to(path[-1]):  # type: ignore[index]
        raise StrategyError(f"{label_of(verifier)}: {path!r:.200} is not a path from the root of a tree of {len(tree)} nodes")
    if type(bonus) is not int or not 0 <= bonus < vocabulary:
        raise StrategyError(f"{label_of(verifier)}: the next token must lie within 0..{vocabulary - 1}, got {bonus!r:.200}")
    return Verdict(path, bonus)


def _described(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
