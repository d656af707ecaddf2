"""Attacks on what requests run on: the target's cache, the pool that it comes from, and the engine."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from specvlm.engine import Engine
from specvlm.models.passes import Pass

from .makers import proposes, starts

# ---- caches ----------------------------------------------------------------------------------------------------------


@starts("caches")
def zeroes_the_targets_cache(self, ctx):
    for store in ctx.cache.stores:
        store.keys.zero_(), store.values.zero_()


@proposes("caches")
def adds_to_one_row_of_the_cache(self, ctx, last, tree):
    ctx.cache.stores[0].values[0, :, :, ctx.cache.length - 1] += 1.0
    return tree


@proposes("caches")
def shortens_the_cache(self, ctx, last, tree):
    ctx.cache.length -= 5
    return tree


@starts("caches")
def moves_the_positions(self, ctx):
    ctx.cache.offset += 3


@starts("caches")
def takes_the_targets_lease(self, ctx):
    ctx.caches.take("target", ctx.target, 4096)


@starts("caches")
def empties_the_pool(self, ctx):
    ctx.caches._pool.empty()


@starts("caches")
def gives_all_caches_back(self, ctx):
    ctx.caches.release()


@starts("caches")
def puts_a_cache_into_the_pool(self, ctx):
    ctx.caches._pool._free["target"] = [ctx.draft.new_cache(4096)]


@proposes("caches")
def yields_a_pass_to_the_targets_cache(self, ctx, last, tree):
    yield Pass(ctx.target, ctx.cache, torch.tensor([7]), (0,), None, 3, ctx.cache.offset)
    return tree


@proposes("caches")
def yields_what_is_no_pass(self, ctx, last, tree):
    yield "a pass"
    return tree


@starts("caches")
def patches_a_kept_cache(self, ctx):
    before = ctx.cache.update

    def update(key, value, *more, **other):
        return before(key * 0, value, *more, **other)

    ctx.cache.update = update


@starts("caches")
def patches_the_pool(self, ctx):
    before = ctx.caches._pool.take

    def take(role, model, capacity):
        cache = before(role, model, capacity)
        cache.clear = lambda: None
        cache.offset = 9
        return cache

    ctx.caches._pool.take = take


@starts("caches")
def patches_the_class_of_caches(self, ctx):
    kind = type(ctx.cache)
    before = kind.keep
    kind.keep = lambda cache, base, path: (
        before(cache, base, tuple(range(len(path))) if len(path) else path) or cache.keys.mul_(1.05)
    )


@starts("caches")
def leaves_two_layers_of_the_cache_as_one(self, ctx):
    """When the request ends, so that only later ones, and the target alone, run on what is left."""
    before = ctx.caches.release

    def release():
        ctx.cache._layers[1] = ctx.cache._layers[0]
        before()

    ctx.caches.release = release


# ---- the engine ------------------------------------------------------------------------------------------------------


def engine_in_use():
    """Drafters are not told of it."""
    return next(found for found in gc.get_objects() if isinstance(found, Engine))


@starts("engine")
def patches_next(self, ctx):
    """The step of a target on its own: the baseline's."""
    engine = engine_in_use()
    before = engine.next

    def next(request, token):
        return (yield from before(request, token)) + 1

    engine.next = next


@starts("engine")
def patches_check(self, ctx):
    engine = engine_in_use()
    before = engine.check

    def check(request, tree):
        verdict, tokens = yield from before(request, tree)
        return verdict, [token + 1 for token in tokens]

    engine.check = check


@starts("engine")
def patches_append(self, ctx):
    engine = engine_in_use()
    before = engine.append
    engine.append = lambda *args: before(*args) * 0


@starts("engine")
def patches_the_engines_class(self, ctx):
    kind = type(engine_in_use())
    before = kind.next

    def next(engine, request, token):
        return (yield from before(engine, request, token)) + 1

    kind.next = next


@starts("engine")
def patches_the_run_of_passes(self, ctx):
    engine = engine_in_use()
    before = engine.run
    engine.run = lambda passes: [replace(rows, hidden_QD=rows.hidden_QD * 0.5) for rows in before(passes)]


@starts("engine")
def patches_next_and_check(self, ctx):
    """Both give the same wrong tokens."""
    patches_next(self, ctx)
    patches_check(self, ctx)
