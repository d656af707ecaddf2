"""Options of a call, by keyword.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor

from specvlm.errors import UserError, check_choice, check_range, did_you_mean, line
from specvlm.strategies import Strategy, registry
from specvlm.types import GenerationOptions
from specvlm.video.readers import NAMES

MOST_BIAS = 100.0
MOST_SEED = 2**63 - 1
LISTS = (list, tuple, set, frozenset)
NUMBERS: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("max_new_tokens", "seed", "n", "logprobs", "max_pixels", "frames"), int),
    **dict.fromkeys(("ratio", "repetition_penalty", "presence_penalty", "frequency_penalty", "fps"), float),
}
# Option names of other libraries, and what to use here instead.
ELSEWHERE = {
    **dict.fromkeys(
        ("temperature", "top_p", "top_k", "do_sample"),
        'sample with verifier={"name": "sampling", "temperature": …, "top_p": …, "top_k": …}, or with "coupled"',
    ),
    **dict.fromkeys(("max_tokens", "max_length", "max_completion_tokens"), "limit the answer with max_new_tokens"),
    **dict.fromkeys(("num_beams", "best_of"), "beams are not supported: n=… draws several answers"),
    "num_return_sequences": "ask for several answers with n",
    "stop_strings": "end the answer with stop",
    "stream": "call stream(…) instead of generate(…)",
    "num_frames": "set the number of frames with frames",
}


@dataclass(frozen=True)
class Options:
    """Options of `generate` and `stream`. `load_pair` sets defaults for a session; a call can replace each of them.

    Attributes:
        pruner: Chooses the video tokens that the drafter sees: a name, a mapping of `name` and fields, or an instance.
        drafter: Makes the guesses; given like `pruner`. By default "tree"; without a draft model "prompt_lookup".
        verifier: Accepts guesses; given like `pruner`. "greedy", "sampling" and "coupled" are exact.
        ratio: Share of the video tokens hidden from the drafter.
        positions: Rotary positions of the drafter's tokens: "original" or "reindexed".
        max_new_tokens: Maximum number of tokens of the answer.
        seed: Seed of everything random. Answer number i of `n` has the seed `seed + i`.
        n: Number of answers to draw after one prefill. None gives one result, a number a list of results.
        stop: A text, or several, that end the answer. They are not part of its text.
        stop_ids: A token id, or several, that end the answer, instead of the checkpoint's.
        logprobs: Return log-probabilities: of each token of the answer, and of this many most likely tokens at its
            place.
        repetition_penalty: Divides positive logits of tokens in prompt and answer. None takes the checkpoint's.
        presence_penalty: Subtracted from the logits of tokens in the answer.
        frequency_penalty: Subtracted from the logits of a token once for each time that it is in the answer.
        logit_bias: Added to the logits of these token ids, within -100 and 100.
        frames: Number of frames to sample from a video file. None, here and for `fps`: the model family's rule.
        fps: Frames per second to sample from a video file.
        max_pixels: Most pixels of a frame. None: the checkpoint's limit.
        reader: Reader of video files: "auto", "pyav" or "decord".
        check: Also decode with the target alone and compare: see `GenerationResult.verdict`.
        speculate: Whether to draft. False decodes with the target alone, without logprobs; the answer is the same.

    Raises:
        UserError: A value is not allowed.
    """

    pruner: Any = "two_stage"
    drafter: Any = "tree"
    verifier: Any = "greedy"
    ratio: float = 0.9
    positions: str = "original"
    max_new_tokens: int = 256
    seed: int = 0
    n: int | None = None
    stop: str | Iterable[str] | None = ()
    stop_ids: int | Iterable[int] | None = None
    logprobs: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    frames: int | None = None
    fps: float | None = None
    max_pixels: int | None = None
    reader: str = "auto"
    check: bool = False
    speculate: bool = True

    def __post_init__(self) -> None:
        for name, kind in NUMBERS.items():
            _number(name, getattr(self, name), kind, getattr(type(self), name) is None)
        for name in ("n", "frames", "max_pixels"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        if self.fps is not None and self.fps <= 0:
            raise UserError(f"fps={self.fps}: expected frames per second, a number above 0")
        check_range("seed", self.seed, 0, MOST_SEED - (self.n or 1))
        for name in ("check", "speculate"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r}: expected True or False")
        if self.logprobs is not None and not self.speculate:
            raise UserError("logprobs and speculate=False cannot be combined yet: leave one of them out")
        check_choice("reader", self.reader, NAMES)
        self.generation()

    def asked(self, given: Mapping[str, Any]) -> Self:
        """Return a copy in which the options given in a call are replaced. Raises UserError for an unknown option."""
        known = [option.name for option in fields(self)]
        for name in given:
            if name not in known:
                hint = ELSEWHERE.get(name)
                hint = f": {hint}" if hint else f"; choose from {', '.join(known)}.{did_you_mean(name, known)}"
                raise UserError(f'there is no option "{name}"{hint}')
        return replace(self, **given)

    def strategies(self) -> tuple[Any, Any, Any]:
        """Build pruner, drafter and verifier."""
        pruner, drafter, verifier = (_built(kind, getattr(self, kind)) for kind in ("pruner", "drafter", "verifier"))
        return pruner, drafter, verifier

    def generation(self) -> GenerationOptions:
        """Make the options of the first answer."""
        penalties = Penalties(float(self.presence_penalty), float(self.frequency_penalty), _biases(self.logit_bias))
        return GenerationOptions(
            int(self.max_new_tokens),
            float(self.ratio),
            self.positions,
            int(self.seed),
            None if self.repetition_penalty is None else float(self.repetition_penalty),
            _ids(self.stop_ids),
            stop=_texts(self.stop),
            adjust=penalties if penalties.active else None,
            logprobs=None if self.logprobs is None else int(self.logprobs),
        )


@dataclass(frozen=True)
class Penalties:
    """Rule of a request that lowers the logits of tokens in the answer, and adds a bias to those of chosen tokens.

    Computes logit - presence * [count > 0] - frequency * count + bias. Tokens of the prompt do not count.

    Raises:
        UserError: A number is outside of -100..100.
    """

    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    _made: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("presence", "frequency"):
            if not abs(value := getattr(self, name)) <= MOST_BIAS:
                raise UserError(f"{name}_penalty={value}: expected a number within -100 and 100")

    def check(self, vocabulary: int) -> None:
        """Raise UserError if a token with a bias is not below `vocabulary`, the target's number of ids."""
        if self.bias and (largest := max(self.bias)) >= vocabulary:
            raise UserError(f"logit_bias has token {largest}, but the target has {vocabulary} ids")

    @property
    def active(self) -> bool:
        """Whether any number is set."""
        return bool(self.presence or self.frequency or self.bias)

    def __call__(self, answer: Sequence[int], logits_V: Tensor) -> Tensor:
        # In float32 as `generate` does: 16 bits would round a small penalty away.
        added_V = torch.zeros_like(logits_V, dtype=torch.promote_types(logits_V.dtype, torch.float32))
        if answer:
            ids, counts = torch.tensor(answer, device=logits_V.device).unique(return_counts=True)
            added_V[ids] -= self.presence + self.frequency * counts.to(added_V.dtype)
        if self.bias:
            tokens, biases = self._bias_like(added_V)
            added_V[tokens] += biases
        return logits_V + added_V

    def _bias_like(self, added_V: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens with a bias and their biases, on the device and in the dtype of a tensor. Cached."""
        place = added_V.device, added_V.dtype
        if place not in self._made:
            tokens = torch.tensor(list(self.bias), device=added_V.device)
            self._made[place] = tokens, torch.tensor(list(self.bias.values()), device=added_V.device, dtype=added_V.dtype)
        return self._made[place]


def _built(kind: str, chosen: Any) -> Any:
    """Build a strategy, unless it is an instance already. Raises UserError if it is neither."""
    if isinstance(chosen, Strategy):
        if chosen.kind != kind:
            raise UserError(f"{kind}={chosen!r} is a {chosen.kind}")
        return chosen
    if not isinstance(chosen, str | Mapping):
        raise UserError(f"{kind}={chosen!r}: expected a name, a mapping of name and fields, or an instance")
    return registry.build(kind, chosen)


def _number(name: str, value: Any, kind: type[int] | type[float], optional: bool) -> None:
    """Raise UserError unless a value is a number of a kind. A bool is not a number."""
    if value is None and optional:
        return
    fits = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not fits or (kind is float and not _finite(value)):
        wanted = "a whole number" if kind is int else "a finite number"
        raise UserError(f"{name}={line(repr(value))}: expected {wanted}" + (" or None" if optional else ""))


def _finite(value: Any) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _texts(given: Any) -> tuple[str, ...]:
    """Return the stop texts. Raises UserError for anything else, and for an empty one."""
    texts = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(texts, LISTS) or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"stop={given!r}: expected texts, none of them empty")
    return tuple(texts)


def _ids(given: Any) -> frozenset[int] | None:
    """Return the stop ids. Raises UserError for anything but token ids."""
    if given is None:
        return None
    ids = (given,) if isinstance(given, Integral) else given
    if not isinstance(ids, LISTS) or not all(map(_is_id, ids)):
        raise UserError(f"stop_ids={given!r}: expected token ids, whole numbers from 0")
    return frozenset(map(int, ids))


def _biases(given: Any) -> dict[int, float]:
    """Return the biases by token id. Raises UserError for anything else."""
    if not isinstance(given, Mapping | None):
        raise UserError(f"logit_bias={given!r}: expected a mapping of token ids to numbers")
    for token, value in (given or {}).items():
        if not _is_id(token):
            raise UserError(f"logit_bias has the key {token!r}: expected token ids, whole numbers from 0")
        if not isinstance(value, Real) or isinstance(value, bool) or not abs(float(value)) <= MOST_BIAS:
            raise UserError(f"logit_bias of token {token} is {value!r}: expected a number within -100 and 100")
    return {int(token): float(value) for token, value in (given or {}).items()}


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
