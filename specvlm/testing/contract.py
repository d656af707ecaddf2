"""Helpers shared by the contract suites of `specvlm.testing`."""

import dataclasses
import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from specvlm.strategies import Strategy

# Types that the fields of a strategy may have.
PLAIN = (int, float, str, bool, type(None), enum.Enum, tuple, list)
S = TypeVar("S", bound=Strategy)


def made(strategy: type[S] | S, base: type[S], fields: dict[str, Any]) -> S:
    """Check the class of a strategy (see `check_class`), and return the instance to test.

    Args:
        strategy: A class, which is called with `fields`; or an instance, of which these fields are replaced in a copy.
        base: Base class that it must have, such as `Pruner`.
        fields: Values by name of a field.
    """
    cls: type[S] = strategy if isinstance(strategy, type) else type(strategy)
    check_class(cls, base)
    if isinstance(strategy, type):
        return strategy(**fields)
    return dataclasses.replace(strategy, **fields) if fields else strategy  # type: ignore[type-var]  # the classes are dataclasses


def check_class(cls: type[Any], base: type[Strategy]) -> None:
    """Check that a class is a named, frozen dataclass derived from `base`, whose fields have plain defaults."""
    what = cls.__name__
    assert issubclass(cls, base), f"{what} is not a subclass of specvlm.strategies.{base.__name__}"
    name = getattr(cls, "name", None)
    assert str(name).isidentifier(), f"{what}.name must be an identifier like two_stage, got {name!r}"
    frozen = "__dataclass_fields__" in vars(cls) and cls.__dict__["__dataclass_params__"].frozen
    assert frozen, f"{what} must be a @dataclass(frozen=True): its fields are its config"
    try:
        default: Any = cls()
    except TypeError as error:
        raise AssertionError(f"{what}() must work, since {base.kind}={name} calls it: {error}") from None
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        assert isinstance(value, PLAIN), f"{what}.{field.name} must be a plain value that a config can hold, got {value!r}"


def seeded(seed: int = 0) -> torch.Generator:
    """Return a CPU generator with a seed."""
    return torch.Generator().manual_seed(seed)


def devices() -> list[torch.device]:
    """Return the CPU and, if available, the CUDA device."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


@contextmanager
def other_global_state(what: str) -> Iterator[None]:
    """Run a block with another state of torch's global CPU generator, and check that the block leaves it unchanged."""
    before, state = torch.get_rng_state(), seeded(1).get_state()
    try:
        torch.set_rng_state(state)
        yield
        assert torch.equal(state, torch.get_rng_state()), f"{what} draws from torch's global generator, not ctx.generator"
    finally:
        torch.set_rng_state(before)
