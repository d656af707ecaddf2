"""Attacks on what requests run on: the target's cache, the pool that it comes from, and the engine."""

from __future__ import annotations

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
    ctx.caches.empty()


@starts("caches")
def replaces_the_pools_entry(self, ctx):
    ctx.caches._caches["target"] = ctx.draft.new_cache(4096)


@starts("caches")
def patches_a_kept_cache(self, ctx):
    before = ctx.cache.update

    def update(key, value, *more, **other):
        return before(key * 0, value, *more, **other)

    ctx.cache.update = update


@starts("caches")
def patches_the_pool(self, ctx):
    before = ctx.caches.take

    def take(role, model, capacity):
        cache = before(role, model, capacity)
        cache.clear = lambda: None
        cache.offset = 9
        return cache

    ctx.caches.take = take


@starts("caches")
def patches_the_class_of_caches(self, ctx):
    kind = type(ctx.cache)
    before = kind.keep
    kind.keep = lambda cache, base, path: (
        before(cache, base, tuple(range(len(path))) if len(path) else path) or cache.keys.mul_(1.05)
    )


# ---- the engine ------------------------------------------------------------------------------------------------------


@starts("engine")
def patches_next(self, ctx):
    """The step of a target on its own: the baseline's."""
    before = ctx.engine.next
    ctx.engine.next = lambda request, token: before(request, token) + 1


@starts("engine")
def patches_check(self, ctx):
    before = ctx.engine.check

    def check(request, tree):
        verdict, tokens = before(request, tree)
        return verdict, [token + 1 for token in tokens]

    ctx.engine.check = check


@starts("engine")
def patches_append(self, ctx):
    before = ctx.engine.append
    ctx.engine.append = lambda *args: before(*args) * 0


@starts("engine")
def patches_the_engines_class(self, ctx):
    kind = type(ctx.engine)
    before = kind.next
    kind.next = lambda engine, request, token: before(engine, request, token) + 1


@starts("engine")
def patches_next_and_check(self, ctx):
    """Both give the same wrong tokens."""
    patches_next(self, ctx)
    patches_check(self, ctx)
