"""Greedy speculative decoding with chains, for a target and a draft whose layers may be recurrent.

A round: the draft guesses a chain, the target reads it in one pass, and the longest prefix that equals the target's own
choices is accepted. A recurrent layer keeps one state, which after the pass holds the rejected guesses too. So states are
copied before the chain, and restored if a guess is rejected. Then the accepted tokens must be read again. That is done

- "now": in a pass of its own, of as many rows;
- "later": by the next round's pass, in front of its chain, which saves the pass and costs the rows. Tokens that wait pile
  up while rounds reject; more than WAITING of them are read at once.

The draft reads token by token, so it copies its states before each and restores those of the accepted length: no pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from experiments.recurrent.state import Saved, restore, save

WAITING = 16


@dataclass
class Count:
    """What a decode took. rows: read by the target, after the prompt; again: those of them that it had read before."""

    rounds: int = 0
    accepted: int = 0
    passes: int = 0
    rows: int = 0
    again: int = 0
    copies: int = 0
    tokens: list[int] = field(default_factory=list)


class Reader:
    """A model and its cache. `length` tokens are in the cache."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.cache, self.length = hf, DynamicCache(config=hf.config), 0
        # Models without any attention name it otherwise, and take no positions.
        self.name = next(name for name in ("past_key_values", "cache_params") if name in signature(hf.forward).parameters)

    def read(self, tokens: list[int]) -> Tensor:
        """Append tokens. Returns the (Q, V) logits behind each."""
        more: dict[str, Any] = {self.name: self.cache, "use_cache": True}
        if self.name == "past_key_values":
            more["position_ids"] = torch.arange(self.length, self.length + len(tokens))[None]
        out = self.hf(input_ids=torch.tensor([tokens]), **more)
        self.length += len(tokens)
        return out.logits[0]

    def save(self) -> Saved:
        return save(self.cache, self.length)

    def restore(self, saved: Saved) -> None:
        restore(self.cache, saved)
        self.length = saved.length


def guessed(draft: Reader, behind: list[int], count: int) -> tuple[list[int], list[Saved]]:
    """Guess a chain behind tokens that the draft has not read. Returns it, and the states before each guess is read."""
    token = int(draft.read(behind)[-1].argmax())
    guesses, points = [token], [draft.save()]
    for _ in range(count - 1):
        guesses.append(int(draft.read(guesses[-1:])[-1].argmax()))
        points.append(draft.save())
    return guesses, points


@torch.inference_mode()
def decode(target: Any, draft: Any, prompt: list[int], limit: int, count: int = 4, replay: str = "later") -> Count:
    """Decode greedily.

    Args:
        target: Hugging Face model that gives the answer.
        draft: Hugging Face model that guesses.
        prompt: Token ids.
        limit: Number of new tokens.
        count: Guesses of a chain.
        replay: When accepted tokens are read again after a rejection: "now" or "later".
    """
    ours, its, done = Reader(target), Reader(draft), Count()
    waiting = [int(ours.read(prompt)[-1].argmax())]  # chosen, and not yet in the target's cache
    its.read(prompt)
    done.tokens, unread, point = waiting[:], waiting[:], ours.save()
    while len(done.tokens) < limit:
        guesses, points = guessed(its, unread, count)
        chosen = ours.read([*waiting, *guesses])[len(waiting) - 1 :].argmax(-1).tolist()
        right = next((n for n in range(count) if guesses[n] != chosen[n]), count)
        fresh = [*guesses[:right], chosen[right]]
        done.rounds, done.accepted, done.passes = done.rounds + 1, done.accepted + right, done.passes + 1
        done.rows, done.tokens = done.rows + len(waiting) + count, [*done.tokens, *fresh]
        if right == count:
            waiting, unread, point = fresh[-1:], fresh[-2:], ours.save()  # the draft has not read its last guess
            done.copies += 1
            continue
        its.restore(points[right])
        unread = fresh[-1:]
        ours.restore(point)
        known = [*waiting, *fresh[:-1]]
        done.again += len(known)
        if replay == "now" or len(known) > WAITING:
            ours.read(known)
            waiting, point = fresh[-1:], ours.save()
            done.passes, done.rows, done.copies = done.passes + 1, done.rows + len(known), done.copies + 1
        else:
            waiting = [*known, fresh[-1]]
    done.tokens = done.tokens[:limit]
    return done
