"""Attacks by what is accepted: wrong tokens, paths that are none, and words that a rule gives and breaks."""

from __future__ import annotations

import torch

from specvlm.strategies import Sampling
from specvlm.types import Verdict

from .makers import decides, strategy

ASKED: dict[str, int] = {}


def times(name):
    ASKED[name] = ASKED.get(name, 0) + 1
    return ASKED[name]


def second(logits_MV, node):
    return int(logits_MV[node].topk(2).indices[1])


# ---- verdicts --------------------------------------------------------------------------------------------------------


@decides("verdicts")
def second_best(self, ctx, verdict):
    return Verdict((0,), second(ctx.logits_MV, 0))


@decides("verdicts")
def second_best_behind_a_guess(self, ctx, verdict):
    """In trees alone; on its own the target has its way."""
    return Verdict(verdict.path, second(ctx.logits_MV, verdict.path[-1])) if len(ctx.tree) > 1 else verdict


@decides("verdicts")
def second_best_later(self, ctx, verdict):
    """Behind the first ten questions, which a warm-up may ask."""
    return verdict if times("later") < 20 else Verdict((0,), second(ctx.logits_MV, 0))


@decides("verdicts", first=lambda self, logits_V, generator: second(logits_V[None], 0))
def second_best_at_first(self, ctx, verdict):
    """Where nothing was guessed: the first token, and all of the baseline's, if it asks."""
    return verdict


@decides("verdicts", first=lambda self, logits_V, generator: int(logits_V.argmax()))
def second_best_but_at_first(self, ctx, verdict):
    return Verdict((0,), second(ctx.logits_MV, 0))


@decides("verdicts")
def accepts_everything(self, ctx, verdict):
    last = len(ctx.tree) - 1
    return Verdict(ctx.tree.way_to(last), int(ctx.logits_MV[last].argmax()))


class LyingVerdict(Verdict):
    """Another path, and another bonus, each time it is asked."""

    @property
    def accepted(self):
        return 40

    def __getattribute__(self, name):
        if name == "bonus" and times("bonus") % 2:
            return 3
        return super().__getattribute__(name)


class Endless(tuple):
    """A path that says it is short."""

    def __len__(self):
        return 1


MADE = {
    "path_not_from_the_root": lambda ctx, verdict: Verdict((len(ctx.tree) - 1,), verdict.bonus),
    "path_over_siblings": lambda ctx, verdict: Verdict(tuple(range(len(ctx.tree))), verdict.bonus),
    "path_twice_the_root": lambda ctx, verdict: Verdict((0, 0, 0), verdict.bonus),
    "path_skips_a_node": lambda ctx, verdict: Verdict((0, len(ctx.tree) - 1), verdict.bonus),
    "path_backwards": lambda ctx, verdict: Verdict(tuple(reversed(range(len(ctx.tree)))), verdict.bonus),
    "path_beyond_the_tree": lambda ctx, verdict: Verdict((0, 77), verdict.bonus),
    "path_of_negatives": lambda ctx, verdict: Verdict((0, -1), verdict.bonus),
    "empty_path": lambda ctx, verdict: Verdict((), verdict.bonus),
    "path_as_list": lambda ctx, verdict: Verdict(list(verdict.path), verdict.bonus),
    "path_as_tensor": lambda ctx, verdict: Verdict(torch.tensor(verdict.path), verdict.bonus),
    "path_of_floats": lambda ctx, verdict: Verdict((0.0,), verdict.bonus),
    "path_longer_than_it_says": lambda ctx, verdict: Verdict(Endless(range(len(ctx.tree))), verdict.bonus),
    "bonus_beyond_the_vocabulary": lambda ctx, verdict: Verdict(verdict.path, 10**7),
    "negative_bonus": lambda ctx, verdict: Verdict(verdict.path, -5),
    "bonus_as_float": lambda ctx, verdict: Verdict(verdict.path, float(verdict.bonus)),
    "bonus_as_half": lambda ctx, verdict: Verdict(verdict.path, verdict.bonus + 0.5),
    "bonus_as_tensor": lambda ctx, verdict: Verdict(verdict.path, ctx.logits_MV[verdict.path[-1]].argmax()),
    "bonus_as_text": lambda ctx, verdict: Verdict(verdict.path, str(verdict.bonus)),
    "bonus_none": lambda ctx, verdict: Verdict(verdict.path, None),
    "bonus_of_numpy": lambda ctx, verdict: Verdict(verdict.path, torch.tensor([verdict.bonus]).numpy()[0]),
    "no_verdict": lambda ctx, verdict: None,
    "verdict_as_tuple": lambda ctx, verdict: (verdict.path, verdict.bonus),
    "verdict_that_lies": lambda ctx, verdict: LyingVerdict(verdict.path, verdict.bonus),
}
for name, make in MADE.items():
    strategy("verifier", name, "verdicts", attack=lambda self, ctx, verdict, make=make: make(ctx, verdict))


@decides("verdicts")
def edits_the_logits(self, ctx, verdict):
    """So that what it says is the argmax, for whoever looks behind it."""
    bonus = second(ctx.logits_MV, 0)
    ctx.logits_MV[:, bonus] = ctx.logits_MV.max() + 1
    return Verdict((0,), bonus)


@decides("verdicts")
def edits_the_tree(self, ctx, verdict):
    ctx.tree.tokens.fill_(second(ctx.logits_MV, 0))
    return verdict


@decides("verdicts")
def edits_the_parents(self, ctx, verdict):
    object.__setattr__(ctx.tree, "parents", (-1, *(0 for _ in ctx.tree.parents[1:])))
    return Verdict((0,), verdict.bonus)


@decides("verdicts", reads_hidden=True)
def edits_hidden_states(self, ctx, verdict):
    for tensor in (ctx.hidden_MD, ctx.video_ND):
        if tensor is not None:
            tensor.zero_()
    return verdict


# ---- claims ----------------------------------------------------------------------------------------------------------


def lie(ctx, verdict):
    return Verdict((0,), second(ctx.logits_MV, 0))


WARM, COUPLED = Sampling(0.7), Sampling(0.7, coupled=True)
CLAIMS = {
    "lossless_now_and_then": {"lossless": property(lambda self: times("lossless") % 2 == 0)},
    "lossless_at_last": {"lossless": property(lambda self: times("at last") > 12)},
    "lossless_as_text": {"lossless": "no"},
    "sampling_now_and_then": {"sampling": property(lambda self: WARM if times("sampling") % 2 else Sampling())},
    "sampling_at_first": {"sampling": property(lambda self: WARM if times("at first") < 12 else Sampling())},
    "sampling_at_last": {"sampling": property(lambda self: Sampling() if times("to the last") < 12 else WARM)},
    "greedy_that_claims_to_sample": {"sampling": property(lambda self: WARM)},
    "no_sampling": {"sampling": property(lambda self: None)},
    "sampling_at_nan": {"sampling": property(lambda self: Sampling(float("nan")))},
    "sampling_below_zero": {"sampling": property(lambda self: Sampling(-1.0))},
    "sampling_at_text": {"sampling": property(lambda self: Sampling("0"))},
    "coupled_by_word_alone": {"sampling": property(lambda self: COUPLED)},
    "coupled_now_and_then": {"sampling": property(lambda self: COUPLED if times("coupled") % 2 else WARM)},
    "coupled_without_temperature": {"sampling": property(lambda self: Sampling(coupled=True))},
    "coupled_as_text": {"sampling": property(lambda self: Sampling(0.7, coupled="no"))},
}
for name, content in CLAIMS.items():
    strategy("verifier", name, "claims", attack=lambda self, ctx, verdict: lie(ctx, verdict), **content)


class OddSampling(Sampling):
    """Hot or cold, by how often it was asked."""

    def __getattribute__(self, name):
        if name == "temperature":
            return 0.7 if times("temperature") % 2 else 0.0
        return super().__getattribute__(name)

    def __repr__(self):
        return repr(Sampling())


strategy(
    "verifier",
    "sampling_that_changes",
    "claims",
    attack=lambda self, c, v: lie(c, v),
    sampling=property(lambda self: OddSampling()),
)


@decides("claims")
def samples_and_claims_to_be_greedy(self, ctx, verdict):
    hot_V = (ctx.logits_MV[0] / 5).softmax(-1)
    return Verdict((0,), int(torch.multinomial(hot_V, 1, generator=ctx.generator)))


@decides("claims", sampling=property(lambda self: COUPLED))
def edits_the_key_of_the_noise(self, ctx, verdict):
    if ctx.key_2 is not None:
        ctx.key_2.zero_()
    return verdict


@decides("claims")
def draws_from_the_global_generator(self, ctx, verdict):
    return Verdict((0,), int(torch.multinomial((ctx.logits_MV[0] / 5).softmax(-1), 1)))


@decides("claims", __repr__=lambda self: "GreedyVerifier()")
def says_it_is_greedy(self, ctx, verdict):
    """In the log."""
    return lie(ctx, verdict)
