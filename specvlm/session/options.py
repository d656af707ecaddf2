"""Options of a call, by keyword.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any, Self

import torch
from torch import Tensor

from specvlm.errors import UserError, did_you_mean
from specvlm.strategies import Strategy, registry
from specvlm.types import GenerationOptions

MOST_BIAS = 100.0
# What other libraries call things, and how to ask for them here.
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
    """Options of `generate` and `stream`. `load_pair` sets defaults for a session; a call replaces single ones.

    Attributes:
        pruner: Chooses the video tokens that the drafter sees: a name, a mapping of `name` and fields, or an instance.
        drafter: Makes the guesses, given in the same ways. By default "tree"; without a draft model "prompt_lookup".
        verifier: Accepts guesses, given in the same ways. "greedy", "sampling" and "coupled" are exact.
        ratio: Share of the video tokens hidden from the drafter.
        positions: Rotary positions of the drafter's tokens: "original" or "reindexed".
        max_new_tokens: Maximum number of tokens of the answer.
        seed: Seed of everything random. Answer number i of `n` has the seed `seed + i`.
        n: Number of answers to draw after one prefill. None gives one result, a number a list of results.
        stop: A text, or several, that end the answer. They are not part of its text.
        stop_ids: Token ids that end the answer, instead of the checkpoint's.
        logprobs: Return the log-probabilities of the answer's tokens, and of this many of the best tokens in place of each.
        repetition_penalty: Divides positive logits of tokens in prompt and answer. None takes the checkpoint's.
        presence_penalty: Subtracted from the logits of tokens in the answer.
        frequency_penalty: The same, once for each time a token is in the answer.
        logit_bias: Added to the logits of these token ids, within -100 and 100.
        frames: Number of frames to sample from a video file. None, also for fps: the family's own rule.
        fps: Frames per second to sample from a video file.
        max_pixels: Most pixels of a frame. None: the checkpoint's limit.
        reader: Reader of video files: "auto", "pyav" or "decord".
        check: Also decode with the target alone and compare: see `GenerationResult.verdict`.

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
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] | frozenset[int] | None = None
    logprobs: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    frames: int | None = None
    fps: float | None = None
    max_pixels: int | None = None
    reader: str = "auto"
    check: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seed", "n", "logprobs", "max_pixels"):
            _expect(name, getattr(self, name), int, "a whole number", optional=name not in ("max_new_tokens", "seed"))
        for name in ("ratio", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            _expect(name, getattr(self, name), (int, float), "a number", optional=name == "repetition_penalty")
        if self.n is not None and self.n < 1:
            raise UserError(f"n={self.n}: wanted a number of answers, 1 or more")
        _expect("check", self.check, bool, "True or False")
        Penalties(self.presence_penalty, self.frequency_penalty, dict(self.logit_bias))

    def asked(self, given: Mapping[str, Any]) -> Self:
        """Replace options by those of a call. Raises UserError for one that does not exist."""
        known = [option.name for option in fields(self)]
        for name in given:
            if name not in known:
                hint = ELSEWHERE.get(name)
                hint = f": {hint}" if hint else f"; there is {', '.join(known)}.{did_you_mean(name, known)}"
                raise UserError(f'there is no option "{name}"{hint}')
        return replace(self, **given)

    def strategies(self) -> tuple[Any, Any, Any]:
        """Build pruner, drafter and verifier."""
        pruner, drafter, verifier = (_built(kind, getattr(self, kind)) for kind in ("pruner", "drafter", "verifier"))
        return pruner, drafter, verifier

    def generation(self) -> GenerationOptions:
        """Make the options of the first answer."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        penalties = Penalties(self.presence_penalty, self.frequency_penalty, dict(self.logit_bias))
        return GenerationOptions(
            self.max_new_tokens,
            self.ratio,
            self.positions,
            self.seed,
            self.repetition_penalty,
            None if self.stop_ids is None else frozenset(self.stop_ids),
            stop=stop,
            adjust=penalties if penalties.active else None,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True)
class Penalties:
    """Rule of a request that lowers the logits of tokens in the answer, and adds to those of given tokens.

    The prompt does not count. Together: logit - presence * [count > 0] - frequency * count + bias.

    Raises:
        UserError: A number is not finite, or a bias is outside of -100..100 or not of a token id.
    """

    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("presence", "frequency"):
            if not isfinite(value := getattr(self, name)):
                raise UserError(f"{name}_penalty={value}: wanted a finite number")
        for token, value in self.bias.items():
            if type(token) is not int or token < 0:
                raise UserError(f"logit_bias has the key {token!r}: wanted token ids, whole numbers from 0")
            if not isinstance(value, int | float) or not -MOST_BIAS <= value <= MOST_BIAS:
                raise UserError(f"logit_bias of token {token} is {value!r}: wanted a number within -100 and 100")

    @property
    def active(self) -> bool:
        """Whether any number is set."""
        return bool(self.presence or self.frequency or self.bias)

    def __call__(self, answer: Sequence[int], logits_V: Tensor) -> Tensor:
        added_V = torch.zeros_like(logits_V)
        if answer:
            ids, counts = torch.tensor(answer, device=logits_V.device).unique(return_counts=True)
            added_V[ids] -= self.presence + self.frequency * counts.to(logits_V.dtype)
        if self.bias:
            if (largest := max(self.bias)) >= len(logits_V):
                raise UserError(f"logit_bias has token {largest}, but the target has {len(logits_V)} ids")
            tokens = torch.tensor(list(self.bias), device=logits_V.device)
            added_V[tokens] += torch.tensor(list(self.bias.values()), device=logits_V.device, dtype=logits_V.dtype)
        return logits_V + added_V


def _built(kind: str, chosen: Any) -> Any:
    """Build a strategy, unless it is an instance already. Raises UserError if it is neither."""
    if isinstance(chosen, Strategy):
        if chosen.kind != kind:
            raise UserError(f"{kind}={chosen!r} is a {chosen.kind}")
        return chosen
    if not isinstance(chosen, str | Mapping):
        raise UserError(f"{kind}={chosen!r}: wanted a name, a mapping of name and fields, or an instance")
    return registry.build(kind, chosen)


def _expect(name: str, value: Any, kind: Any, wanted: str, optional: bool = False) -> None:
    """Raise UserError unless a value is of a type. A truth value is no number."""
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not (fits or (optional and value is None)):
        raise UserError(f"{name}={value!r}: wanted {wanted}" + (" or None" if optional else ""))
