"""Check external values against types with bounds: keys of a run, fields of strategies, content of files.

A bound is part of the type: `frames: Annotated[int | None, Within(1, 16_384)]`. For keys and fields, Hydra checks types
and `check` bounds; numbers without a bound of their own get INTEGER or REAL. For content of files, `parse` checks both.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from specvlm.errors import SURROGATE, UserError, line, message

SHOWN = 100  # maximum number of characters of an unexpected value to show


@dataclass(frozen=True)
class Within:
    """Bounds of a number.

    Attributes:
        low: Lower bound, itself allowed unless `above`.
        high: Upper bound, itself allowed.
        what: Description for messages, such as "a share"; replaces the wording of the lower bound.
        above: The value must be larger than `low`.

    Raises:
        ValueError: The bounds are not two numbers, the lower one first.
    """

    low: float
    high: float
    what: str = ""
    above: bool = False

    def __post_init__(self) -> None:
        numbers = all(isinstance(bound, int | float) for bound in (self.low, self.high))
        if not numbers or not self.low <= self.high:
            raise ValueError(f"Within({self.low!r}, {self.high!r}): expected two numbers, the lower one first")

    def __contains__(self, value: float) -> bool:
        """Whether the value is within the bounds; False for NaN."""
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        return f"{self.least}, {self.most}"

    @property
    def least(self) -> str:
        """Wording of the lower bound, such as "at least 1"; `what` if it is set."""
        return self.what or f"{'more than' if self.above else 'at least'} {self.low}"

    @property
    def most(self) -> str:
        """Wording of the upper bound, such as "at most 5"; if `what` is set, of both bounds, such as "from 0 to 1"."""
        return f"from {self.low} to {self.high}" if self.what else f"at most {self.high}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Tell pydantic to check the bounds after the type."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: float | None) -> float | None:
        """Return the value unchanged. Raises ValueError if it is out of bounds; None passes."""
        if value is not None and value not in self:
            raise ValueError(f"expected {self}")
        return value


Count = Annotated[int, Within(0, 2**53)]
Seconds = Annotated[float, Within(0, 1e9)]


KEY, FIELD = "{name}={value}: expected {least}, {most}", "{name} must be {least}, got {value} ({most})"  # messages of `check`
INTEGER, REAL = Within(-(2**31), 2**31 - 1), Within(-1e30, 1e30)  # bounds that `check` applies to types without any


def check(owner: type, values: Mapping[str, Any], wording: str = FIELD) -> None:
    """Check values against the bounds in a dataclass's type hints.

    Args:
        owner: The dataclass.
        values: Value of each field; their types are correct already.
        wording: KEY for keys of a run, FIELD for fields of a strategy.

    Raises:
        UserError: A value is out of bounds. The message names the key, the value and the bounds.
    """
    for name, hint in get_type_hints(owner, include_extras=True).items():
        if hint is Any:  # for example a strategy among the keys of a run, which is checked separately
            continue
        for number, bounds in _numbers(values.get(name), hint):
            own = bounds or (INTEGER if isinstance(number, int) else REAL,)
            for allowed in (within for within in own if number not in within):
                null = ", or null" if type(None) in _parts(hint) else ""
                value = line(repr(values[name]))
                raise UserError(wording.format(name=name, value=value, least=allowed.least + null, most=allowed.most))


def parse(kind: Any, value: Any, where: object) -> Any:
    """Check a value read from a file against a type, and convert it to that type.

    Types are strict: "3" and true are not numbers, 3.0 is not an integer. Values that JSON lacks, such as dates in
    YAML, are read as text. Lone surrogates in a text become U+FFFD.

    Args:
        kind: Type with bounds, such as a dataclass or a TypedDict.
        value: Plain data, as read from JSON or YAML.
        where: Name of the file, to begin the message.

    Raises:
        UserError: The value does not fit the type (the message names the first invalid part), or cannot be written as
            JSON.
    """
    from pydantic import ValidationError

    try:
        text = SURROGATE.sub("\ufffd", json.dumps(value, default=str, ensure_ascii=False))
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(f"{where} {_described(error.errors(include_url=False)[0])}") from None
    except (TypeError, ValueError, RecursionError) as error:  # data that YAML allows but JSON does not
        raise UserError(f"{where} is not plain data ({message(error)})") from None


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _described(error: Mapping[str, Any]) -> str:
    """Convert an error of pydantic to a message; shows at most SHOWN characters of the value."""
    place = ".".join(map(str, error["loc"])) or "content"
    if error["type"] in ("missing", "missing_argument"):
        return f"has no {place!r}"
    if error["type"] == "unexpected_keyword_argument":
        return f"has {place!r}, which is not one of its keys"
    ours = error["type"] == "value_error"
    expected = str(error["ctx"]["error"]) if ours else error["msg"].replace("Input should be", "expected")
    return f"has {place}={line(repr(error['input']))[:SHOWN]}: {expected}"


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or of a union inside Annotated."""
    return get_args(getattr(hint, "__origin__", hint)) or get_args(hint)


def _numbers(value: Any, hint: Any, around: tuple[Within, ...] = ()) -> Iterator[tuple[float, tuple[Within, ...]]]:
    """Yield each number in a value, with the bounds in its type and in the types around it.

    Nested dataclasses are passed to `check`; nothing is yielded for them.
    """
    if metadata := getattr(hint, "__metadata__", ()):
        around = (*around, *(part for part in metadata if isinstance(part, Within)))
        hint = hint.__origin__
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        for part in inner:
            yield from _numbers(value, part, around)
    elif is_dataclass(value) and not isinstance(value, type):
        check(type(value), vars(value))
    elif isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part, inner[-1] if inner else Any, around)
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            own = [each for each in inner if each is not Ellipsis]
            yield from _numbers(part, own[min(place, len(own) - 1)] if own else Any, around)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value, around
