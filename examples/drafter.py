"""Draft a chain of the draft model's best tokens, with one forward pass per token."""

from dataclasses import dataclass
from functools import partial

import torch

from specvlm import Drafter, DraftSession, DraftTree, hookimpl
from specvlm.models.passes import Pass, Routine


@dataclass(frozen=True)
class BestChainDrafter(Drafter):
    """Guess the draft's best token, then the best token after it, and so on.

    length: tokens per round. Cost: length + 1 passes of the draft model per round.
    """

    name = "best_chain"
    model = "draft"
    length: int = 4

    @property
    def max_nodes(self):
        return 1 + self.length

    def start(self, ctx):
        return BestChainSession(ctx, self.length)


class BestChainSession(DraftSession):
    """State of one request: the draft model's cache with the pruned prompt and all accepted tokens."""

    def __init__(self, ctx, length):
        model, prompt, keep = ctx.draft, ctx.prompt, ctx.keep
        embeds, positions = model.pruned(prompt, model.features(prompt, keep), keep, ctx.positions)
        self.cache = ctx.caches.take("draft", model, len(embeds) + ctx.max_new_tokens + 2 * length + 2)
        model.prefill(embeds, positions, self.cache)
        self.parents, self.bonus = tuple(range(-1, length)), ctx.bonus
        self.slot = self.cache.length  # slot of the last accepted token
        unused = self.cache.capacity - length - 1  # slots that the warm-up run may write to
        self.round = Routine(
            work=partial(guess, length, ctx.vocabulary),
            key=("best_chain", length, ctx.vocabulary),
            model=model,
            cache=self.cache,
            widest=1,
            state=(unused, 0, 0),
        )

    def propose(self, last):
        token = self.bonus if last is None else last.bonus
        self.slot += 0 if last is None else len(last.path)
        (tokens,) = yield self.round((self.slot, token, self.cache.offset))
        return DraftTree(tokens, self.parents)


def guess(length, vocabulary, model, cache, state):
    """Draft one round on the device. state: slot of the last accepted token, that token, position minus slot."""
    slot, token, offset = state.split(1)
    tokens = [token]
    for row in range(length + 1):  # feed the last guess too: the cache needs its row if all guesses are accepted
        rows = yield Pass(model, cache, tokens[-1], (0,), None, slot + row, offset)
        tokens.append(rows.best(rows.logits()[:, :vocabulary], 1)[0])
    return (torch.cat(tokens[: length + 1]),)


@hookimpl
def specvlm_strategies():
    return [BestChainDrafter]


if __name__ == "__main__":
    from decode import decode

    decode(drafter=BestChainDrafter())
