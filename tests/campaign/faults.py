"""Faults of the speculative path, planted into a running specvlm: each as a true bug there would act, and there alone.

`FAULTS` names them. A fault is a function that gives a patch, to be entered. Passes of one row without a mask, and so
the target's own answer, are never touched.

Shape suffixes: M tree nodes, K keys, A rotary axes, Q rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from specvlm.decoding.output import Output
from specvlm.engine import Engine
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models import attention
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass
from specvlm.models.video_lm import VideoLM
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree

Planted = Callable[[], Any]
FAULTS: dict[str, Planted] = {}


def fault(make: Planted) -> Planted:
    FAULTS[make.__name__] = make
    return make


@contextmanager
def planted(name: str) -> Iterator[None]:
    with FAULTS[name]():
        yield


# ---- the pass over a tree: what its rows see, and where they stand ---------------------------------------------------------


def scoring(changed: Callable[[DraftTree, list[int], Tensor], None], before: int = 1) -> Any:
    """The pass of a check with other depths, or another mask over the tree's rows and `before` slots in front of them."""

    def tree_pass(target: VideoLM, tree: DraftTree, cache: KVCache) -> Pass:
        depths = list(tree.depths)
        seen_MT = torch.cat([torch.ones(len(tree), before, dtype=torch.bool), tree.mask], 1)
        if len(tree) > 1:
            changed(tree, depths, seen_MT)
        depths, base = [depth + before for depth in depths], cache.length - before
        return Pass(target, cache, tree.tokens, depths, seen_MT, base, cache.offset, before)

    return patch("specvlm.engine.base.tree_pass", tree_pass)


@fault
def the_slot_before_is_hidden() -> Any:
    def changed(tree, depths, seen_MT):
        seen_MT[:, 0] = False

    return scoring(changed)


@fault
def rows_below_the_root_stand_early() -> Any:
    def changed(tree, depths, seen_MT):
        depths[1:] = [depth - 1 for depth in depths[1:]]

    return scoring(changed)


@fault
def deep_rows_stand_early() -> Any:
    def changed(tree, depths, seen_MT):
        depths[:] = [depth - (depth > 2) for depth in depths]

    return scoring(changed)


@fault
def the_whole_tree_stands_late() -> Any:
    def changed(tree, depths, seen_MT):
        depths[:] = [depth + 1 for depth in depths]

    return scoring(changed)


@fault
def a_row_sees_its_sibling() -> Any:
    def changed(tree, depths, seen_MT):
        for node in range(2, len(tree)):
            if tree.parents[node] == tree.parents[node - 1]:
                seen_MT[node, node] = True  # column 1 + (node - 1)

    return scoring(changed)


@fault
def deep_rows_miss_the_root() -> Any:
    def changed(tree, depths, seen_MT):
        for node, depth in enumerate(depths):
            seen_MT[node, 1] &= depth < 2

    return scoring(changed)


@fault
def rows_miss_their_parent() -> Any:
    def changed(tree, depths, seen_MT):
        for node, parent in enumerate(tree.parents):
            if parent > 0:
                seen_MT[node, 1 + parent] = False

    return scoring(changed)


@fault
def the_root_sees_a_guess() -> Any:
    def changed(tree, depths, seen_MT):
        seen_MT[0, 2] = True

    return scoring(changed)


@fault
def every_row_sees_a_rejected_one() -> Any:
    """The slot behind what was accepted still counts as seen."""

    def changed(tree, depths, seen_MT):
        seen_MT[:, -1] = True

    return scoring(changed)


@fault
def rows_of_a_tree_are_causal() -> Any:
    def changed(tree, depths, seen_MT):
        seen_MT[:, 1:] = torch.ones_like(seen_MT[:, 1:]).tril()

    return scoring(changed)


@fault
def a_far_slot_is_hidden() -> Any:
    def changed(tree, depths, seen_MT):
        seen_MT[:, 0] = False  # 12 slots in front of the root

    return scoring(changed, before=12)


# ---- the same in a pass that judge and judged share ------------------------------------------------------------------------


def passing(changed: Callable[[VideoLM, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """`forward` of several rows under a mask, with other positions (A, Q) or another mask (Q, K)."""
    real = VideoLM.forward

    @wraps(real)
    def forward(self: VideoLM, embeds_QD, positions_AQ, cache, mask_QK, *rest: Any) -> Tensor:
        if mask_QK is not None and len(embeds_QD) > 1:
            positions_AQ, mask_QK = changed(self, positions_AQ.clone(), mask_QK.clone())
        return real(self, embeds_QD, positions_AQ, cache, mask_QK, *rest)

    return patch.object(VideoLM, "forward", forward)


@fault
def the_slot_before_is_hidden_in_every_masked_pass() -> Any:
    def changed(self, positions_AQ, mask_QK):
        mask_QK[:, mask_QK.shape[1] - mask_QK.shape[0] - 1] = False
        return positions_AQ, mask_QK

    return passing(changed)


@fault
def rows_stand_early_in_every_masked_pass() -> Any:
    def changed(self, positions_AQ, mask_QK):
        positions_AQ[:, 1:] -= 1
        return positions_AQ, mask_QK

    return passing(changed)


@fault
def one_axis_is_off_in_every_masked_pass() -> Any:
    def changed(self, positions_AQ, mask_QK):
        positions_AQ[-1] += 1
        return positions_AQ, mask_QK

    return passing(changed)


@fault
def positions_are_rounded_to_bfloat16() -> Any:
    def changed(self, positions_AQ, mask_QK):
        return positions_AQ.bfloat16().long(), mask_QK

    return passing(changed)


@fault
def the_first_slot_is_hidden_in_every_masked_pass() -> Any:
    def changed(self, positions_AQ, mask_QK):
        mask_QK[:, 0] = False
        return positions_AQ, mask_QK

    return passing(changed)


@fault
def masked_attention_is_scaled_by_a_fiftieth_more() -> Any:
    real = attention.scaled_dot_product_attention

    def scaled(query, key, value, attn_mask=None, is_causal=False, scale=None, **rest: Any) -> Tensor:
        if attn_mask is not None and query.shape[2] > 1 and attn_mask.dim() == 4:
            scale = 1.02 * (scale or query.shape[-1] ** -0.5)
        return real(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, **rest)

    return patch.object(attention, "scaled_dot_product_attention", scaled)


# ---- the rule --------------------------------------------------------------------------------------------------------------


def within(margin: float) -> Any:
    """The greedy rule, to which a guess that is so near the best is the best."""
    real = GreedyVerifier.decide

    def decide(self: GreedyVerifier, ctx: Any) -> Tensor:
        logits_MV = ctx.logits_MV.clone()
        for node, parent in enumerate(ctx.tree.parents):
            token = int(ctx.tree.tokens[node])
            if parent >= 0 and float(logits_MV[parent].max() - logits_MV[parent, token]) <= margin:
                logits_MV[parent, token] = float(logits_MV[parent].max()) + 1  # the last of several counts
        return real(self, replace(ctx, logits_MV=logits_MV))

    return patch.object(GreedyVerifier, "decide", decide)


@fault
def accepts_within_half_a_logit() -> Any:
    return within(0.5)


@fault
def accepts_within_a_quarter_of_a_logit() -> Any:
    return within(0.25)


def judging(changed: Callable[[Any], Any]) -> Any:
    """The greedy rule on another context, where anything was guessed."""
    real = GreedyVerifier.decide

    def decide(self: GreedyVerifier, ctx: Any) -> Tensor:
        return real(self, changed(ctx) if len(ctx.tree) > 1 else ctx)

    return patch.object(GreedyVerifier, "decide", decide)


@fault
def two_rows_are_exchanged() -> Any:
    def changed(ctx):
        order = list(range(len(ctx.tree)))
        order[1], order[2] = 2, 1
        return replace(ctx, logits_MV=ctx.logits_MV[order])

    return judging(changed)


@fault
def logits_are_rounded_to_an_eighth() -> Any:
    return judging(lambda ctx: replace(ctx, logits_MV=(ctx.logits_MV * 8).round() / 8))


@fault
def logits_are_of_float8() -> Any:
    return judging(lambda ctx: replace(ctx, logits_MV=ctx.logits_MV.to(torch.float8_e4m3fn).to(ctx.logits_MV.dtype)))


@fault
def the_bonus_is_of_the_row_above() -> Any:
    real = GreedyVerifier.decide

    def decide(self: GreedyVerifier, ctx: Any) -> Tensor:
        last, bonus = real(self, ctx).tolist()
        above = max(0, ctx.tree.parents[last])
        return torch.tensor([last, int(ctx.logits_MV[above].argmax()) if last else bonus])

    return patch.object(GreedyVerifier, "decide", decide)


@fault
def the_last_of_equals_wins() -> Any:
    """Exact ties go to the highest id in a tree, and to the lowest alone."""
    real = GreedyVerifier.decide

    def decide(self: GreedyVerifier, ctx: Any) -> Tensor:
        if len(ctx.tree) == 1:
            return real(self, ctx)
        logits_MV = ctx.logits_MV.clone()
        best = logits_MV.shape[1] - 1 - logits_MV.flip(1).argmax(1)
        logits_MV[range(len(best)), best] += 1
        return real(self, replace(ctx, logits_MV=logits_MV))

    return patch.object(GreedyVerifier, "decide", decide)


@fault
def tree_nodes_are_not_penalised() -> Any:
    real = RepetitionPenalty.__call__

    def penalised(self: RepetitionPenalty, logits_MV, tree=None, above_MM=None) -> Tensor:
        return real(self, logits_MV, None)

    return patch.object(RepetitionPenalty, "__call__", penalised)


@fault
def a_penalty_forgets_the_answer() -> Any:
    """In a tree it knows the prompt and the nodes above alone."""
    real, add = RepetitionPenalty.__call__, RepetitionPenalty.add

    def adding(self: RepetitionPenalty, tokens: Tensor) -> None:
        if not hasattr(self, "of_prompt"):
            add(self, tokens)
            self.of_prompt = self.seen_V.clone()
        add(self, tokens)

    def penalised(self: RepetitionPenalty, logits_MV, tree=None, above_MM=None) -> Tensor:
        if tree is None or len(tree) == 1:
            return real(self, logits_MV, tree, above_MM)
        return real(RepetitionPenalty(self.factor, self.of_prompt), logits_MV, tree, above_MM)

    both = patch.multiple(RepetitionPenalty, add=adding, __call__=penalised)
    return both


# ---- the cache behind a verdict --------------------------------------------------------------------------------------------


def keeping(changed: Callable[[KVCache, int, list[int]], None], real: Callable[..., None] | None = None) -> Any:
    """`keep`, and then something else; or in its place."""
    kept = real or KVCache.keep

    def keep(self: KVCache, base: int, path: Any) -> None:
        kept(self, base, path)
        if len(path) > 1:
            changed(self, base, list(path))

    return patch.object(KVCache, "keep", keep)


def _cut(self: KVCache, base: int, path: Any) -> None:
    self.length = base + len(path)


@fault
def accepted_rows_are_not_moved() -> Any:
    return keeping(lambda *_: None, _cut)


@fault
def only_keys_are_moved() -> Any:
    def moved(self: KVCache, base: int, path: Any) -> None:
        for store in self.stores:
            store.keys[:, :, :, base : base + len(path)] = store.keys[:, :, :, [base + node for node in path]]
        self.length = base + len(path)

    return keeping(lambda *_: None, moved)


@fault
def the_last_layer_is_not_moved() -> Any:
    def moved(self: KVCache, base: int, path: Any) -> None:
        for store in self.stores:
            for tensor in store:
                tensor[:-1, :, :, base : base + len(path)] = tensor[:-1, :, :, [base + node for node in path]]
        self.length = base + len(path)

    return keeping(lambda *_: None, moved)


@fault
def a_rejected_row_is_kept() -> Any:
    real = KVCache.keep

    def keep(self: KVCache, base: int, path: Any) -> None:
        real(self, base, [*path[:-1], path[-1] + 1] if len(path) > 1 else path)  # the neighbour of the last

    return patch.object(KVCache, "keep", keep)


@fault
def a_row_is_kept_twice() -> Any:
    real = KVCache.keep

    def keep(self: KVCache, base: int, path: Any) -> None:
        real(self, base, [*path[:-1], path[-2]] if len(path) > 1 else path)

    return patch.object(KVCache, "keep", keep)


@fault
def the_cache_is_one_short() -> Any:
    def changed(self: KVCache, base: int, path: list[int]) -> None:
        self.length -= 1

    return keeping(changed)


@fault
def the_cache_is_one_long() -> Any:
    def changed(self: KVCache, base: int, path: list[int]) -> None:
        self.length += 1

    return keeping(changed)


@fault
def the_cache_is_one_long_and_positions_are_right() -> Any:
    def changed(self: KVCache, base: int, path: list[int]) -> None:
        self.length, self.offset = self.length + 1, self.offset - 1

    return keeping(changed)


@fault
def the_offset_is_one_off() -> Any:
    def changed(self: KVCache, base: int, path: list[int]) -> None:
        if not hasattr(self, "slipped") or self.slipped != self.offset:
            self.offset += 1
            self.slipped = self.offset

    return keeping(changed)


@fault
def a_key_row_is_off_by_a_hundredth() -> Any:
    def changed(self: KVCache, base: int, path: list[int]) -> None:
        for store in self.stores:
            store.keys[:, :, :, self.length - 1] *= 1.01

    return keeping(changed)


@fault
def a_value_row_is_off_by_a_hundredth() -> Any:
    def changed(self: KVCache, base: int, path: list[int]) -> None:
        for store in self.stores:
            store.values[:, :, :, self.length - 1] *= 1.01

    return keeping(changed)


@fault
def values_are_of_another_layer() -> Any:
    def changed(self: KVCache, base: int, path: list[int]) -> None:
        for store in self.stores:
            store.values[1, :, :, self.length - 1] = store.values[0, :, :, self.length - 1]

    return keeping(changed)


# ---- what comes out --------------------------------------------------------------------------------------------------------


def checking(changed: Callable[[DraftTree, Any, list[int]], list[int]]) -> Any:
    """`check`, which hands on other tokens than it found."""
    real = Engine.check

    def check(self: Engine, request: Any, tree: DraftTree) -> Any:
        verdict, new = yield from real(self, request, tree)
        return verdict, changed(tree, verdict, new)

    return patch.object(Engine, "check", check)


@fault
def the_last_accepted_token_is_dropped() -> Any:
    return checking(lambda tree, verdict, new: [*new[:-2], new[-1]] if len(new) > 2 else new)


@fault
def the_last_accepted_token_comes_twice() -> Any:
    return checking(lambda tree, verdict, new: [*new[:-1], new[-2], new[-1]] if len(new) > 3 else new)


@fault
def two_guesses_change_places_after_they_were_scored() -> Any:
    real = Engine.check

    def check(self: Engine, request: Any, tree: DraftTree) -> Any:
        penalty, scored = request.penalty, []

        def swapping(logits_MV: Tensor, seen: DraftTree | None = None, above_MM: Tensor | None = None) -> Tensor:
            found = penalty(logits_MV, seen, above_MM)
            if seen is not None and len(seen) > 2 and not scored:
                scored.append(1)
                seen.tokens[[1, 2]] = seen.tokens[[2, 1]]
            return found

        return real(self, replace(request, penalty=swapping), tree)

    return patch.object(Engine, "check", check)


@fault
def a_stop_id_is_overlooked_once() -> Any:
    real = Output.take

    def take(self: Output, tokens: list[int]) -> tuple[int, ...]:
        if len(tokens) > 1 and set(tokens) & self.stop_ids and not hasattr(self, "slipped"):
            self.slipped, stops, self.stop_ids = True, self.stop_ids, frozenset()
            try:
                return real(self, tokens)
            finally:
                self.stop_ids = stops
        return real(self, tokens)

    return patch.object(Output, "take", take)
