"""Attacks by what is proposed: malformed draft trees, of any type, of another request, changed once they are handed over."""

from __future__ import annotations

import threading
import time

import torch

from specvlm.types import DraftTree

from .makers import proposes, strategy

KEPT: dict[str, DraftTree] = {}


def with_parents(*parents):
    """The honest root, and guesses on such parents."""

    def answer(self, ctx, last, tree):
        tokens = tree.tokens[:1].repeat(max(1, len(parents)))
        return DraftTree(tokens, parents)

    return answer


PARENTS = {
    "cycle_of_two": (-1, 2, 1),
    "root_twice": (0, 0, 1),
    "own_parent": (-1, 1),
    "forward_parent": (-1, 2, 0),
    "two_roots": (-1, -1, 0),
    "far_parent": (-1, 0, 99),
    "below_the_root": (-7, 0, 1),
    "negative_parent": (-1, 0, -2),
    "no_nodes": (),
    "float_parents": (-1, 0.0, 1.0),
    "parents_of_text": ("-1", "0", "1"),
    "truth_for_parents": (-1, False, True),
}
for name, parents in PARENTS.items():
    strategy("drafter", name, "trees", answer=with_parents(*parents))


@proposes("trees")
def wrong_root(self, ctx, last, tree):
    return DraftTree(tree.tokens + 1, tree.parents)


@proposes("trees")
def more_than_max_nodes(self, ctx, last, tree):
    return DraftTree(tree.tokens[:1].repeat(3000), tuple(range(-1, 2999)))


@proposes("trees")
def one_more_than_max_nodes(self, ctx, last, tree):
    return DraftTree(tree.tokens[:1].repeat(4), (-1, 0, 1, 2))


@proposes("trees", max_nodes=10**12)
def max_nodes_beyond_memory(self, ctx, last, tree):
    return tree


@proposes("trees", max_nodes=-300)
def negative_max_nodes(self, ctx, last, tree):
    return tree


@proposes("trees", max_nodes="many")
def max_nodes_of_text(self, ctx, last, tree):
    return tree


def fewer_each_time(self):
    KEPT["reads"] = KEPT.get("reads", 400) - 50
    return KEPT["reads"]


@proposes("trees", max_nodes=property(fewer_each_time))
def max_nodes_that_shrink(self, ctx, last, tree):
    return DraftTree(tree.tokens[:1].repeat(400), tuple(range(-1, 399)))


@proposes("trees")
def tokens_as_floats(self, ctx, last, tree):
    return DraftTree(tree.tokens.float() + 0.5, tree.parents)


@proposes("trees")
def tokens_as_bytes(self, ctx, last, tree):
    return DraftTree(tree.tokens.to(torch.uint8), tree.parents)


@proposes("trees")
def tokens_as_list(self, ctx, last, tree):
    return DraftTree(tree.tokens.tolist(), tree.parents)


@proposes("trees")
def tokens_on_meta(self, ctx, last, tree):
    return DraftTree(tree.tokens.to("meta"), tree.parents)


@proposes("trees")
def tokens_in_a_square(self, ctx, last, tree):
    return DraftTree(tree.tokens[:, None].expand(-1, 3), tree.parents)


@proposes("trees")
def more_tokens_than_parents(self, ctx, last, tree):
    return DraftTree(tree.tokens.repeat(2), tree.parents)


@proposes("trees")
def fewer_tokens_than_parents(self, ctx, last, tree):
    return DraftTree(tree.tokens[:2], tree.parents)


@proposes("trees")
def tokens_beyond_the_vocabulary(self, ctx, last, tree):
    return DraftTree(torch.cat([tree.tokens[:1], tree.tokens[1:] + 10**6]), tree.parents)


@proposes("trees")
def negative_tokens(self, ctx, last, tree):
    return DraftTree(torch.cat([tree.tokens[:1], -1 - tree.tokens[1:]]), tree.parents)


@proposes("trees")
def parents_as_list(self, ctx, last, tree):
    return DraftTree(tree.tokens, list(tree.parents))


@proposes("trees")
def parents_as_tensor(self, ctx, last, tree):
    return DraftTree(tree.tokens, torch.tensor(tree.parents))


@proposes("trees")
def q_of_another_shape(self, ctx, last, tree):
    return DraftTree(tree.tokens, tree.parents, torch.rand(1, 3))


@proposes("trees")
def q_of_nan(self, ctx, last, tree):
    return DraftTree(tree.tokens, tree.parents, torch.full((len(tree), ctx.vocabulary), float("nan")))


@proposes("trees")
def q_of_text(self, ctx, last, tree):
    return DraftTree(tree.tokens, tree.parents, "q")


@proposes("trees")
def ranks_of_another_length(self, ctx, last, tree):
    return DraftTree(tree.tokens, tree.parents, ranks=(0,))


@proposes("trees")
def varies_as_it_likes(self, ctx, last, tree):
    class Sometimes:
        def __bool__(self):
            raise RuntimeError("whether it varies is not told")

    return DraftTree(tree.tokens, tree.parents, varies=Sometimes())


@proposes("trees")
def no_tree(self, ctx, last, tree):
    return None


@proposes("trees")
def looks_like_a_tree(self, ctx, last, tree):
    class Tree:
        tokens, parents, q, varies, ranks, depths = tree.tokens, tree.parents, None, False, None, (0, 0, 0)
        mask = torch.ones(3, 3, dtype=torch.bool)

        def to(self, device):
            return self

        def __len__(self):
            return 3

        def refused(self, path):
            return ()

        def ranks_on(self, path):
            return (), ()

        def kept(self, made):
            return made

        def way_to(self, node):
            return tuple(range(node + 1))

    return Tree()


class LyingTree(DraftTree):
    """Every node sees every other, at one depth."""

    depths = (0, 5, 9)
    mask = torch.ones(3, 3, dtype=torch.bool)

    def to(self, device):
        return self

    def refused(self, path):
        return ()


@proposes("trees")
def tree_that_lies_about_itself(self, ctx, last, tree):
    return LyingTree(tree.tokens, tree.parents)


class LongTree(DraftTree):
    def __len__(self):
        return 1


@proposes("trees")
def tree_that_lies_about_its_length(self, ctx, last, tree):
    return LongTree(tree.tokens, tree.parents)


class OddTokens(torch.Tensor):
    """Says other tokens than it has, when asked for a list."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return [token + 1 for token in found] if isinstance(found, list) else found


@proposes("trees")
def tokens_that_lie(self, ctx, last, tree):
    return DraftTree(tree.tokens.as_subclass(OddTokens), tree.parents)


class OddParents(tuple):
    """Another parent for every second question."""

    __slots__ = ()

    def __getitem__(self, at):
        KEPT["asked"] = KEPT.get("asked", 0) + 1
        found = super().__getitem__(at)
        return 0 if KEPT["asked"] % 2 and isinstance(found, int) and found > 0 else found


@proposes("trees")
def parents_that_change(self, ctx, last, tree):
    return DraftTree(tree.tokens, OddParents(tree.parents))


@proposes("trees")
def tree_of_another_request(self, ctx, last, tree):
    return KEPT.setdefault("first", tree)


@proposes("trees")
def the_same_tree_again(self, ctx, last, tree):
    """One tensor for all rounds, written to by whoever reads it last."""
    tokens = KEPT.setdefault("tokens", tree.tokens.clone())
    tokens.copy_(tree.tokens)
    tokens[1:] = KEPT.setdefault("guess", tree.tokens[1:].clone())
    return DraftTree(tokens, tree.parents)


@proposes("trees")
def tree_that_changes_behind(self, ctx, last, tree):
    """By a thread, while it is checked."""
    tokens = tree.tokens.clone()

    def change():
        for _ in range(200):
            tokens.add_(1).remainder_(50)
            time.sleep(0.001)

    threading.Thread(target=change, daemon=True).start()
    return DraftTree(tokens, tree.parents)


@proposes("trees")
def session_keeps_and_edits(self, ctx, last, tree):
    """What the last round's tree holds, behind the verdict."""
    if "edited" in KEPT:
        KEPT["edited"].tokens.fill_(1)
        object.__setattr__(KEPT["edited"], "parents", (-1, 1, 1))
    KEPT["edited"] = tree
    return tree
