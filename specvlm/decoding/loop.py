"""The speculative decoding loop, and the plain autoregressive loop whose output it must reproduce.

embed → prefill the target → select → start the drafter → (propose → score → verify → keep)*
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specvlm.decoding.broadcast import BroadcastSession
from specvlm.decoding.budget import sharing
from specvlm.decoding.collect import attention_layers, gathered, state_layer
from specvlm.decoding.early_start import early_start
from specvlm.decoding.logprobs import with_logprobs
from specvlm.decoding.output import Output
from specvlm.decoding.prefill import Prefill
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.proposals import Proposals
from specvlm.decoding.scheduler import alone
from specvlm.decoding.selection import RECORDED, Selection
from specvlm.decoding.timing import Clock
from specvlm.engine import Engine
from specvlm.engine.adjusted import penalty_for
from specvlm.engine.base import Request, first_token
from specvlm.errors import UserError
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import CachePool
from specvlm.models.passes import Job
from specvlm.models.pauses import Pause
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import DraftContext, Drafter, DraftSession, Pruner, Verifier
from specvlm.strategies.fence import checked_tree, claims_of, inside, sizes_of
from specvlm.types import Features, GenerationOptions, KeepSet, Step, VideoPrompt


def generator_for(seed: int) -> torch.Generator:
    """Make a generator on the CPU with this seed."""
    return torch.Generator().manual_seed(seed)


def verifier_generator(seed: int) -> torch.Generator:
    """Make the verifier's generator, separate from the drafter's: no guess may depend on the draws that judge it."""
    return generator_for((seed ^ 0x9E3779B97F4A7C15) % 2**63)


def autoregressive(
    target: VideoLM,
    prompt: VideoPrompt,
    options: GenerationOptions | int,
    verifier: Verifier,
    caches: CachePool | None = None,
    engine: Engine | None = None,
    prefixes: PrefixStore | None = None,
) -> Iterator[Step]:
    """Decode with the target alone, one token per step: the reference output and the speed baseline.

    Uses the same prefill, cache and stop rules as `DecodingGraph.decode`. Yields the steps as they happen.

    Args:
        options: An int sets `max_new_tokens` and leaves the rest at the defaults. `logprobs` is ignored.
        verifier: Chooses each token (`Verifier.first`).
        caches: Caches to reuse; new ones by default.
        engine: Engine that runs the passes; the eager one by default.
        prefixes: Kept rows of earlier prompts; by default nothing is reused.
    """
    engine = engine or Engine()
    return alone(engine, autoregressive_work(target, prompt, options, verifier, caches or CachePool(), engine, prefixes))


def autoregressive_work(
    target: VideoLM,
    prompt: VideoPrompt,
    options: GenerationOptions | int,
    verifier: Verifier,
    caches: CachePool,
    engine: Engine,
    prefixes: PrefixStore | None = None,
) -> Generator[Job | Pause | Step, Any, None]:
    """Decode as `autoregressive` does, as a generator of passes and steps for a `Scheduler` to run.

    prefixes: Kept rows of earlier prompts; by default nothing is reused.
    """
    asked = GenerationOptions().asked(options)
    clock, stop_ids = Clock(target.device), asked.stop_ids_or(target.stop_ids)
    output, generator = Output.of(target, asked), verifier_generator(asked.seed)
    penalty = penalty_for(target, prompt, asked)
    with caches.lease() as lease, sharing(engine, target) as share:
        cache = lease.take("target", target, len(prompt) + asked.max_new_tokens)
        rule = (verifier, claims_of(verifier)[1], penalty, generator, stop_ids)
        request = Request(target, cache, *rule, clock.mark, seed=asked.seed, start=len(prompt))
        filled = yield from Prefill(target, prompt, cache, clock, engine, None, prefixes).run()
        token, reused, share.decodes = first_token(request, filled.logits_1V), filled.reused, True
        clock.mark("prefill")
        times_s = filled.timed(clock.lap())
        while True:
            yield Step(output.take([token]), times_s=times_s, reused=reused)
            if output.done:
                return filled.keep_answer(output.tokens, cache)
            reused = None
            clock.resume()
            penalty.add([token])
            token = yield from engine.next(request, token)
            clock.mark("verify")
            times_s = clock.lap()


@dataclass
class DecodingGraph:
    """A target, a draft and three strategies that decode requests. Safe to share between requests and threads.

    Raises UserError if the drafter needs a draft model and there is none, or the pruner reads a layer that the target
    does not have.

    Attributes:
        draft: The draft model, on the meta device on ranks that do not hold it. None if the drafter needs none.
        options: Defaults for requests that pass no options.
        vocabulary: Both models know the token ids below this number. 0 takes the smaller vocabulary of the two.
        caches: KV caches, kept between requests.
        engine: Engine that runs the passes (see `specvlm.engine`).
        prefixes: Kept rows of earlier prompts. None: nothing is reused.
    """

    target: VideoLM
    draft: VideoLM | None
    pruner: Pruner
    drafter: Drafter
    verifier: Verifier
    options: GenerationOptions = field(default_factory=GenerationOptions)
    vocabulary: int = 0
    caches: CachePool = field(default_factory=CachePool)
    engine: Engine = field(default_factory=Engine)
    prefixes: PrefixStore | None = None

    def __post_init__(self) -> None:
        if self.drafter.model == "draft" and self.draft is None:
            raise UserError(f"drafter={self.drafter.name} needs a draft model")
        state_layer(self.pruner, self.target)
        attention_layers(self.pruner, self.target)
        # Read only once: they decide how the output is checked.
        self.lossless, self.sampling = claims_of(self.verifier)
        self.joins = self.lossless and (self.sampling.coupled or not self.sampling.temperature)
        self.vocabulary = self.vocabulary or min(m.vocabulary for m in (self.target, self.draft) if m is not None)

    def decode(self, prompt: VideoPrompt, options: GenerationOptions | int | None = None) -> Iterator[Step]:
        """Run one request and yield its steps as they happen.

        Args:
            prompt: From `target.prompt`.
            options: Replace the graph's `options` as a whole. An int replaces only `max_new_tokens` of them.
        """
        return alone(self.engine, self.work(prompt, options))

    def work(
        self, prompt: VideoPrompt, options: GenerationOptions | int | None = None, prefixes: PrefixStore | None = None
    ) -> Generator[Job | Pause | Step, Any, None]:
        """Decode as `decode` does, as a generator of passes and steps for a `Scheduler` to run.

        prefixes: Use this store instead of the graph's.
        """
        target, drafter, verifier = self.target, self.drafter, self.verifier
        asked, clock = self.options.asked(options), Clock(target.device)
        stop_ids, generator = asked.stop_ids_or(target.stop_ids), generator_for(asked.seed)
        output = Output.of(target, asked)
        (most, rows), selection = sizes_of(drafter), self._selection
        view = selection.view(prompt, asked.ratio)
        with (
            self.caches.lease() as lease,
            self.caches.lease(drafter=True) as drafts,
            sharing(self.engine, target, self._drafts, drafter, self.joins) as share,
            early_start(selection, prompt, view, asked, generator, rows + 2, self.joins) or nullcontext() as early,
        ):
            cache = lease.take("target", target, len(prompt) + asked.max_new_tokens + most)
            penalty = penalty_for(target, prompt, asked)
            collector = selection.collector(prompt, view, asked.record, self.verifier.reads_hidden)
            dice = verifier_generator(asked.seed)
            rule = (verifier, self.sampling, penalty, dice, stop_ids)
            request = Request(target, cache, *rule, clock.mark, None, self.lossless, asked.seed, len(prompt))
            filling = Prefill(target, prompt, cache, clock, self.engine, collector, prefixes or self.prefixes, early)
            filled = yield from filling.run()
            features_ND, logits_MV, reused, _ = filled
            copy = filled.copy(prompt)  # for strategies; copied while the GPU is still busy with the prefill
            token, share.decodes = first_token(request, logits_MV), True
            clock.mark("prefill")
            times = filled.timed(clock.lap())
            first = Step(output.take([token]), times_s=times, lossless=self.lossless, reused=reused)
            yield (yield from with_logprobs(first, output, request, logits_MV, asked.logprobs))
            if output.done:
                return
            recorded = gathered(RECORDED, prompt, collector, features_ND) if asked.record else {}
            attention = recorded.get("verifier_attention")
            clock.resume()
            penalty.add([token])
            keep = early.chosen() if early is not None else None
            if keep is None:
                keep = selection.on_rank0(copy, view, collector, features_ND, generator)
            clock.mark("prune")
            context = DraftContext(
                prompt=copy,
                keep=keep,
                bonus=token,
                target=target,
                draft=self.draft,
                features_ND=features_ND,
                positions=asked.positions,
                max_new_tokens=asked.max_new_tokens,
                vocabulary=self.vocabulary,
                sampling=replace(self.sampling),
                generator=generator,
                caches=drafts,
                signals=gathered(drafter.needs, copy, collector, features_ND),
                cache=cache,
                captured=self.engine.captures,
                seed=request.key(0)[0] if self.sampling.coupled else None,
                next_shape=share.next_shape if share.budget else None,
                prefill=early if early is not None and early.begun else filled.drafting(self.engine, self.pruner, self.joins),
            )
            session = self._session(context)
            if self.draft is not None and drafter.model == "draft":
                clock.wait(self.draft.device)
            clock.mark("draft_prefill")

            drafting = Proposals(drafter, session, drafts, self.engine, clock, self.joins)
            shown = keep if drafter.model and not view.own else None
            if collector is not None and collector.hidden:
                request = replace(request, video_ND=collector.video_hidden())
            verdict = None
            while True:
                tree = yield from drafting.tree(verdict)
                tree = checked_tree(drafter, tree, token, most, target.vocabulary, drafting.ours).to(target.device)
                clock.mark("draft")
                verdict, new = yield from drafting.check(request, tree)
                clock.mark("verify")
                tokens, times = output.take(new), clock.lap()
                share.saw(tree, verdict, times)
                seen = (shown, attention, self.lossless, None, drafting.drafted_ahead)
                step = Step(tokens, tree.on_host(), verdict, times, *seen)
                yield (yield from with_logprobs(step, output, request, logits_MV, asked.logprobs))
                if output.done:
                    return None if asked.logprobs is not None else filled.keep_answer(output.tokens, cache)
                clock.resume()
                penalty.add(new)
                token, shown, attention = verdict.bonus, None, None

    @property
    def _drafts(self) -> VideoLM | None:
        """The model that drafts: the target or the draft. For a drafter without a model, the draft, if there is one."""
        return self.target if self.drafter.model == "target" else self.draft

    def _session(self, context: DraftContext) -> DraftSession:
        """Start the drafter. If only rank 0 holds the draft model, wrap its session so that trees are broadcast."""
        ranks = self.target.ranks
        on_rank0_only = self.drafter.model == "draft" and self.draft is not None and self.draft.ranks.size < ranks.size
        with inside(self.drafter):
            if not on_rank0_only:
                return self.drafter.start(context)
            return BroadcastSession(self.drafter, self.drafter.start(context) if ranks.rank == 0 else None, context)

    def budget(self, prompt: VideoPrompt, ratio: float | None = None) -> int:
        """Return the number of video tokens that the drafter may see. ratio: By default that of the graph's options."""
        return self._selection.view(prompt, self.options.ratio if ratio is None else ratio).budget

    @property
    def _selection(self) -> Selection:
        """Chooses the video tokens that the drafter sees."""
        return Selection(self.pruner, self.drafter, self.target, self._drafts, self.caches)

    def select(
        self,
        prompt: VideoPrompt,
        collector: AttentionCollector | None,
        features_ND: Tensor | Features,
        generator: torch.Generator,
    ) -> KeepSet:
        """Ask the pruner which video tokens to keep at the graph's ratio; see `Selection.select`."""
        view = self._selection.view(prompt, self.options.ratio)
        return self._selection.select(prompt, view, collector, features_ND, generator)
