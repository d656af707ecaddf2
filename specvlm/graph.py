"""The decoding loop, and the plain loop it must agree with. Both in one file, in the order things happen.

embed → prefill the target → select → start the drafter → (propose → score → verify → keep)*
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specvlm.cache import CachePool, KVCache
from specvlm.clock import Clock
from specvlm.engine import Engine, Request, agreed
from specvlm.errors import UserError
from specvlm.models.attention import Guidance
from specvlm.models.video_lm import VideoLM
from specvlm.penalty import RepetitionPenalty
from specvlm.signals import gathered, guidance_for, state_layer
from specvlm.strategy import DraftContext, Drafter, PruneContext, Pruner, Verifier
from specvlm.types import KeepSet, Step, VideoPrompt

RECORDED = frozenset({"verifier_attention"})


class Output:
    """The answer so far: cut exactly at the first stop id (which is kept) and at the token limit."""

    def __init__(self, limit: int, stop_ids: frozenset[int]) -> None:
        if limit < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {limit}")
        self.room, self.stop_ids = limit, stop_ids

    @property
    def done(self) -> bool:
        return self.room == 0

    def take(self, tokens: list[int]) -> tuple[int, ...]:
        tokens = tokens[: self.room]
        stop = next((i for i, token in enumerate(tokens, start=1) if token in self.stop_ids), None)
        self.room = 0 if stop else self.room - len(tokens)
        return tuple(tokens[:stop])


def generator_for(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Turn:
    """A request's claim on the target's cache in a pool, which a newer request takes over."""

    def __init__(self, caches: CachePool, target: VideoLM, slots: int) -> None:
        self.caches = caches
        self.cache = caches.take("target", target, slots)
        self.lease = caches.lease("target")

    def check(self) -> None:
        """To be called whenever the consumer asks for the next step."""
        if self.caches.lease("target") != self.lease:
            raise RuntimeError("this request was overtaken by a newer one on the same caches; read one to its end first")


def prefill(
    target: VideoLM, prompt: VideoPrompt, cache: KVCache, clock: Clock, guidance: Guidance | None = None
) -> tuple[Tensor, Tensor]:
    """Fill the target's cache; returns the video features (N, D) and the logits (1, V) of the next token."""
    features_ND = target.features(prompt, sight=guidance.sight) if guidance and guidance.sight else target.features(prompt)
    embeds_SD = target.embed(prompt, features_ND)
    if guidance is not None:
        guidance.weigh_rows(embeds_SD[prompt.cut :], features_ND, target.ranks)
    clock.mark("embed")
    hidden_D = target.prefill(embeds_SD, target.positions(prompt), cache, prompt.cut, guidance)
    return features_ND, target.head(hidden_D[None])


@torch.inference_mode()
def autoregressive(
    target: VideoLM,
    prompt: VideoPrompt,
    max_new_tokens: int,
    verifier: Verifier,
    seed: int = 0,
    caches: CachePool | None = None,
    engine: Engine | None = None,
) -> Iterator[Step]:
    """The target on its own, a token a step: the truth, and the baseline. Same prefill, cache and stop rules as `decode`."""
    clock, output, generator = Clock(target.device), Output(max_new_tokens, target.stop_ids), generator_for(seed)
    turn, penalty = Turn(caches or CachePool(), target, len(prompt) + max_new_tokens), RepetitionPenalty.of(target, prompt)
    engine, request = engine or Engine(), Request(target, turn.cache, verifier, penalty, generator, clock.mark)
    _, logits_MV = prefill(target, prompt, turn.cache, clock)
    token = agreed(target, verifier, verifier.first(penalty(logits_MV)[0], generator))
    clock.mark("prefill")
    while True:
        yield Step(output.take([token]), times_s=clock.lap())
        if output.done:
            return
        turn.check()
        clock.resume()
        penalty.add(torch.tensor([token]))
        token = engine.next(request, token)
        clock.mark("verify")


@dataclass
class DecodingGraph:
    """A target, a draft and three strategies. `decode` yields a request's steps as they happen.

    ratio: share of video tokens dropped from the drafter's view, 0..1; 1 leaves it the text alone. positions: the
    drafter's rotary positions, `original` (of the full prompt) or `reindexed` (contiguous, as the paper's code does).
    engine: how a step runs, see `specvlm.engine`. draft: a skeleton on ranks where it does not lie. vocabulary: token ids
    known to both models. record: hand out the target's attention to the video too. Caches are kept between requests; one
    request at a time.
    """

    target: VideoLM
    draft: VideoLM | None
    pruner: Pruner
    drafter: Drafter
    verifier: Verifier
    ratio: float = 0.9
    positions: str = "original"
    seed: int = 0
    vocabulary: int = 0
    caches: CachePool = field(default_factory=CachePool)
    engine: Engine = field(default_factory=Engine)
    record: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise UserError(f"ratio={self.ratio} is not between 0 and 1: it is the share of video tokens dropped")
        if self.positions not in ("original", "reindexed"):
            raise UserError(f"positions={self.positions!r} is none of original, reindexed")
        if self.drafter.model == "draft" and self.draft is None:
            raise UserError(f"drafter={self.drafter.name} needs a draft model")
        lone = self.drafter.model == "draft" and self.draft is not None and self.draft.ranks.size < self.target.ranks.size
        if lone and not self.drafter.tells:
            raise UserError(f"drafter={self.drafter.name} cannot tell other ranks its trees: use draft.parallel=tensor")
        state_layer(self.pruner, self.target)
        self.vocabulary = self.vocabulary or min(m.vocabulary for m in (self.target, self.draft) if m is not None)

    @torch.inference_mode()
    def decode(self, prompt: VideoPrompt, max_new_tokens: int) -> Iterator[Step]:
        target, drafter, verifier = self.target, self.drafter, self.verifier
        clock, output, generator = Clock(target.device), Output(max_new_tokens, target.stop_ids), generator_for(self.seed)
        turn = Turn(self.caches, target, len(prompt) + max_new_tokens + drafter.max_nodes)
        cache, penalty, guidance = turn.cache, RepetitionPenalty.of(target, prompt), self._guidance(prompt)
        features_ND, logits_MV = prefill(target, prompt, cache, clock, guidance)
        token = agreed(target, verifier, verifier.first(penalty(logits_MV)[0], generator))
        clock.mark("prefill")
        yield Step(output.take([token]), times_s=clock.lap())
        if output.done:
            return

        turn.check()
        recorded = gathered(RECORDED, prompt, guidance, features_ND) if self.record else {}
        attention = recorded.get("verifier_attention")
        clock.resume()
        penalty.add(torch.tensor([token]))
        keep = self._agreed(prompt, guidance, features_ND, generator)
        clock.mark("prune")

        def started(part: str) -> None:
            if self.draft is not None and drafter.model == "draft":
                clock.wait(self.draft.device)
            clock.mark(part)

        context = DraftContext(
            prompt=prompt,
            keep=keep,
            bonus=token,
            target=target,
            draft=self.draft,
            features_ND=features_ND,
            positions=self.positions,
            max_new_tokens=max_new_tokens,
            vocabulary=self.vocabulary,
            sampling=verifier.sampling,
            generator=generator,
            caches=self.caches,
            engine=self.engine,
            signals=gathered(drafter.needs, prompt, guidance, features_ND),
            cache=cache,
            mark=started,
        )
        session = drafter.start(context)
        started("draft_prefill")

        video_ND = guidance.video_hidden() if guidance is not None and guidance.hidden else None
        request = Request(target, cache, verifier, penalty, generator, clock.mark, video_ND)
        verdict, shown = None, keep if drafter.model and drafter.sees(prompt) is None else None
        while True:
            tree = session.propose(verdict).to(target.device)
            clock.mark("draft")
            verdict, new = self.engine.check(request, tree)
            clock.mark("verify")
            tokens = output.take(new)
            full, depth = len(tokens) == len(new), max(tree.depths)
            # What a lossy rule accepts says nothing about the target's own choice.
            ranks, widths = tree.ranks_on(verdict.path) if verifier.lossless else ((), ())
            times = clock.lap()
            refused = tree.refused(verdict.path) if full else ()  # read behind the lap: no time of the request's
            seen = tree.on_host()
            yield Step(
                tokens, len(tree) - 1, depth, verdict.accepted, full, times, shown, ranks, widths, refused, attention, seen
            )
            if output.done:
                return
            turn.check()
            clock.resume()
            penalty.add(torch.tensor(new))
            shown = attention = None

    def budget(self, prompt: VideoPrompt) -> int:
        """Video tokens the drafter may see."""
        total, own = len(prompt.video_index), self.drafter.sees(prompt)
        if own is not None:
            return own
        return total if self.pruner.keeps_all else KeepSet.budget(total, self.ratio)

    def _prunes(self, prompt: VideoPrompt) -> bool:
        """Is there anything to choose? Not when all or nothing is kept, nor for a drafter that sees no video."""
        chosen = self.drafter.model is not None and self.drafter.sees(prompt) is None
        return chosen and 0 < self.budget(prompt) < len(prompt.video_index)

    def _guidance(self, prompt: VideoPrompt) -> Guidance | None:
        """The collector for what the strategies read of the target on the way; None when they read nothing."""
        if not len(prompt.video_index):
            return None
        pruner = self.pruner if self._prunes(prompt) else None
        more = self.drafter.needs | (RECORDED if self.record else frozenset())
        return guidance_for(pruner, self.target, prompt, more, self.verifier.reads_hidden)

    def _agreed(
        self, prompt: VideoPrompt, guidance: Guidance | None, features_ND: Tensor, generator: torch.Generator
    ) -> KeepSet:
        """`select`, and where several ranks run this loop the first one's word for all: it may be the only one with a draft."""
        ranks, here = self.target.ranks, self.draft is None or self.draft.device.type != "meta"
        keep = self.select(prompt, guidance, features_ND, generator) if here else None
        if ranks.size > 1:
            keep, state = ranks.share(lambda: (keep and keep.cpu(), generator.get_state()))
            generator.set_state(state)
        assert keep is not None
        return keep

    def select(
        self, prompt: VideoPrompt, guidance: Guidance | None, features_ND: Tensor, generator: torch.Generator
    ) -> KeepSet:
        """The pruner's choice, held to its budget. Raises ValueError naming the pruner when it keeps too much."""
        total, budget = len(prompt.video_index), self.budget(prompt)
        if not self._prunes(prompt):
            return KeepSet.everything(total) if budget else KeepSet(torch.empty(0, dtype=torch.int64), total)
        signals = gathered(self.pruner.needs, prompt, guidance, features_ND)
        if "draft_attention_last_row" in self.pruner.needs:
            signals["draft_attention_last_row"] = self._draft_attention(prompt, features_ND)
        context = PruneContext(prompt.grids, budget, signals, generator, self.target.device)
        keep = self.pruner.select(context)
        if keep.total != total or len(keep) > budget:
            raise ValueError(
                f"pruner {self.pruner.name} kept {len(keep)} of {keep.total} tokens, its budget was {budget} of {total}"
            )
        return keep

    def _draft_attention(self, prompt: VideoPrompt, features_ND: Tensor) -> Tensor:
        """(L, N) of the drafter's first layers over the whole video: its own prefill, stopped at the layer asked for."""
        model = self.target if self.drafter.model == "target" else self.draft
        assert model is not None
        features = features_ND if model is self.target else model.features(prompt)
        guidance = Guidance(prompt.video_index.to(model.device), rows=False, last_row=True, depth=self.pruner.draft_layers)
        cache = self.caches.take("draft", model, len(prompt))
        model.prefill(model.embed(prompt, features), model.positions(prompt), cache, guidance=guidance)
        return guidance.last_rows()
