"""Contract checks for plugins: one line in a plugin's tests, such as `check_pruner(FrameDiffPruner)`.

They need no video and no test framework. Drafters run on tiny random models; only `check_family` needs checkpoints,
which may be tiny and random. A violation raises an AssertionError that names the rule and the failing case.

Shape suffixes: N video tokens, K kept video tokens, T text tokens after the video, D feature size.
"""

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specvlm.strategies import SIGNALS, STATE_SIGNALS, PruneContext, Pruner
from specvlm.strategies.registry import RESERVED
from specvlm.strategies.signals import LAYERED, axes_of
from specvlm.testing.contract import devices, made, other_global_state, seeded
from specvlm.types import KeepSet, TokenGrid

if TYPE_CHECKING:
    from specvlm.testing.drafter import check_drafter as check_drafter
    from specvlm.testing.family import check_family as check_family
    from specvlm.testing.metric import check_metric as check_metric
    from specvlm.testing.tracker import check_tracker as check_tracker
    from specvlm.testing.verifier import check_verifier as check_verifier

__all__ = ["check_drafter", "check_family", "check_metric", "check_pruner", "check_tracker", "check_verifier"]

PLAIN = TokenGrid(4, 2, 2)
GRIDS: tuple[tuple[TokenGrid, ...], ...] = (
    (TokenGrid(1, 1, 1),),
    (TokenGrid(1, 2, 3),),
    (TokenGrid(5, 1, 1),),
    (PLAIN,),
    (TokenGrid(3, 3, 5),),
    (TokenGrid(4, 2, 2, newline=1),),
    (TokenGrid(1, 1, 1, newline=1),),
    (TokenGrid(2, 2, 2), TokenGrid(3, 1, 4)),
    (TokenGrid(2, 3, 2, newline=1), TokenGrid(1, 2, 2, newline=1)),
)
LAYERS, WIDTH = 32, 8  # of the imaginary target that the signals come from


def __getattr__(name: str) -> Any:
    """Import the other checks on first use, so that `check_pruner` need not wait for the import of transformers."""
    if name in ("check_drafter", "check_family", "check_metric", "check_tracker", "check_verifier"):
        return getattr(import_module(f"specvlm.testing.{name.removeprefix('check_')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_pruner(pruner: type[Pruner] | Pruner, **fields: Any) -> None:
    """Check that a pruner keeps the contract of `Pruner.select`. Takes a second or two.

    Cases: small grids (one frame, one token per frame, a single token, newline tokens, two videos); all budgets from 1
    to N for random float32 signals, a few for equal, zero and bfloat16 signals; on the CPU and, if available, on CUDA.

    Checks: no more tokens are kept than the budget, or all if `keeps_all` is set; the result is on the right device;
    rows of `pool` sum to 1; the same seed gives the same tokens, whatever the state of torch's global generator; inputs
    are not changed; the names of fields and signals are allowed; `draft_layers`, `state_layer`, `attention_layers` and
    `row_weights` fit `needs`; a missing signal raises a ValueError that names it. A pruner may refuse several videos,
    but only with a ValueError whose message is a sentence.

    Args:
        pruner: A class or an instance. The class must work without arguments.
        **fields: Values of the pruner's fields.

    Raises:
        AssertionError: The pruner breaks the contract.
    """
    pruner = made(pruner, Pruner, fields)  # type: ignore[type-abstract]
    _check_fields(type(pruner))
    _check_needs(pruner)
    for ctx, where in _contexts(pruner):
        before = {name: signal.clone() for name, signal in ctx.signals.items()}
        keep = _select(pruner, ctx, where)
        if keep is not None:
            _check_keep(pruner, ctx, keep, where)
            _check_repeatable(pruner, dataclasses.replace(ctx, generator=seeded()), keep, where)
        for name, signal in ctx.signals.items():
            assert torch.equal(signal, before[name]), f"{pruner!r} changed its input {name} on {where}"
    _check_missing(pruner)


def _check_fields(cls: type[Pruner]) -> None:
    """Check that no field has a reserved name."""
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert field.name not in ("ratio", "budget"), f"{cls.__name__}.{field.name} hides the run's own: read ctx.budget"
        assert field.name not in RESERVED, f"{cls.__name__}.{field.name}: the name is reserved, rename the field"


def _check_needs(pruner: Pruner) -> None:
    """Check `needs`, and the members that certain signals require: `draft_layers`, `state_layer` and the like."""
    needs = pruner.needs
    assert isinstance(needs, frozenset), f"{pruner!r}: needs must be a frozenset of names, got {needs!r}"
    unknown = sorted(needs - SIGNALS.keys())
    assert not unknown, f"{pruner!r} needs {unknown}, but the only signals are {sorted(SIGNALS)}"
    asks_drafter = any(name.startswith("draft_") for name in needs)
    assert (pruner.draft_layers > 0) == asks_drafter, (
        f"{pruner!r}: draft_layers is {pruner.draft_layers}; it must be positive for signals of the drafter and 0 without"
    )
    for layers in (1, 4, LAYERS) if needs & STATE_SIGNALS else ():
        layer = pruner.state_layer(layers)
        assert isinstance(layer, int) and 1 <= layer <= layers, (
            f"{pruner!r}: state_layer({layers}) is {layer!r}; it must be 1 to {layers} for {sorted(needs & STATE_SIGNALS)}"
        )
    for layers in (1, 4, LAYERS) if needs & LAYERED else ():
        read = pruner.attention_layers(layers)
        assert type(read) is int and 1 <= read <= layers, (
            f"{pruner!r}: attention_layers({layers}) is {read!r}; it must be 1 to {layers} for {sorted(needs & LAYERED)}"
        )
    if "verifier_attention_weighted" in needs:
        _check_row_weights(pruner)


def _check_row_weights(pruner: Pruner) -> None:
    """Check that `row_weights` gives valid weights for one and several text tokens, and for embeddings of all 0."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, scale in ((1, 1.0), (6, 1.0), (6, 0.0)):
            text_TD = scale * torch.randn(rows, WIDTH, generator=seeded()).to(dtype)
            weights_T = pruner.row_weights(text_TD, scale * torch.randn(9, WIDTH, generator=seeded(1)).to(dtype))
            good = weights_T.shape == (rows,) and bool((weights_T >= 0).all()) and 0 < float(weights_T.sum()) < float("inf")
            assert good, f"{pruner!r}: row_weights must be {rows} weights, none negative, not all zero; got {weights_T}"


def _contexts(pruner: Pruner) -> Iterator[tuple[PruneContext, str]]:
    """Yield every case as a context, with a description for messages."""
    for device in devices():
        for grids in GRIDS:
            total = sum(map(len, grids))
            for kind in ("random", "equal", "zero"):
                for dtype in (torch.float32, torch.bfloat16):
                    signals = {name: _signal(name, total, kind, dtype, pruner).to(device) for name in sorted(pruner.needs)}
                    # For rounded or constant signals, a few budgets are enough.
                    step = 1 if kind == "random" and dtype == torch.float32 else max(1, total // 4)
                    for budget in sorted({*range(1, total + 1, step), total - 1, total} - {0}):
                        where = f"{grids}, budget {budget} of {total}, {kind} signals of {dtype} on {device}"
                        yield PruneContext(grids, budget, signals, seeded(), device), where


def _signal(name: str, total: int, kind: str, dtype: torch.dtype, pruner: Pruner) -> Tensor:
    """Make a signal of the shape that SIGNALS lists."""
    layers = pruner.draft_layers if name.startswith("draft_") else pruner.attention_layers(LAYERS)
    sizes = {"N": total, "L": layers, "D": WIDTH, "T": 6, "J": 4}
    shape = [int(axis) if axis.isdigit() else sizes[axis] for axis in axes_of(name)]
    if kind == "random":
        return torch.rand(shape, generator=seeded(total)).to(dtype)
    return torch.full(shape, 1.0 / total if kind == "equal" else 0.0, dtype=dtype)


def _select(pruner: Pruner, ctx: PruneContext, where: str) -> KeepSet | None:
    """Call `select`. Returns None if the pruner properly refuses several videos."""
    try:
        return pruner.select(ctx)
    except Exception as error:
        if isinstance(error, ValueError) and len(ctx.grids) > 1 and _is_sentence(error):
            return None
        raise AssertionError(f"{pruner!r} failed on {where}: {type(error).__name__}: {error}") from error


def _is_sentence(error: Exception) -> bool:
    """Return True if the message is one line of at least three words, so that it can explain something."""
    return len(str(error).split()) > 2 and "\n" not in str(error)


def _check_keep(pruner: Pruner, ctx: PruneContext, keep: KeepSet, where: str) -> None:
    """Check that a result is valid for its context."""
    what = f"{pruner!r} on {where}"
    assert isinstance(keep, KeepSet), f"{what}: select returned {type(keep).__name__}, not a KeepSet"
    assert keep.total == ctx.total, f"{what}: keep set over {keep.total} tokens"
    if pruner.keeps_all:
        assert len(keep) == ctx.total, f"{what}: keeps_all is set, but {len(keep)} tokens were kept"
    else:
        assert len(keep) <= ctx.budget, f"{what}: {len(keep)} tokens kept"
    assert keep.index.device.type == ctx.device.type, f"{what}: keep set on {keep.index.device}"
    assert "\n" not in keep.note, f"{what}: note must be one line, got {keep.note!r}"
    # KeepSet checks this in its constructor, but a subclass may not.
    ordered = bool((keep.index[1:] > keep.index[:-1]).all())
    assert ordered, f"{what}: index is not sorted and unique"
    if keep.pool is not None:
        fits = keep.pool.is_floating_point() and keep.pool.device == keep.index.device
        assert fits, f"{what}: pool must be floats on the index's device, got {keep.pool.dtype} on {keep.pool.device}"
        sums_K = keep.pool.to_dense().float().sum(1)
        assert torch.allclose(sums_K, torch.ones_like(sums_K), atol=1e-2), f"{what}: rows of pool must sum to 1, got {sums_K}"


def _check_repeatable(pruner: Pruner, ctx: PruneContext, keep: KeepSet, where: str) -> None:
    """Check that the same seed and signals give the same tokens with another state of torch's global generator."""
    with other_global_state(repr(pruner)):
        again = pruner.select(ctx)
    same = torch.equal(keep.index, again.index) and (keep.pool is None) == (again.pool is None)
    if same and keep.pool is not None and again.pool is not None:
        same = torch.equal(keep.pool.to_dense(), again.pool.to_dense())
    assert same, f"{pruner!r} kept other tokens for the same seed and signals on {where}"


def _check_missing(pruner: Pruner) -> None:
    """Check that `select` reads each signal in `needs`, and raises a readable ValueError if one is missing."""
    grids = (PLAIN,)
    total = sum(map(len, grids))
    signals = {name: _signal(name, total, "random", torch.float32, pruner) for name in pruner.needs}
    for missing in pruner.needs:
        rest = {name: signal for name, signal in signals.items() if name != missing}
        try:
            pruner.select(PruneContext(grids, total // 2, rest, seeded()))
        except Exception as error:
            if isinstance(error, ValueError) and missing in str(error) and _is_sentence(error):
                continue
            what = f"{pruner!r} without {missing} fails with {type(error).__name__}: {error}"
            raise AssertionError(f"{what}; read it with ctx.signal") from error
        raise AssertionError(f"{pruner!r} declares that it needs {missing}, but works without it")
