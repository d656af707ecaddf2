"""Where ranks share the target and the draft lies on the first alone: that one drafts, and tells the others its trees."""

from __future__ import annotations

from dataclasses import replace

import torch

from specvlm.models.passes import Work, driven
from specvlm.strategies import DraftContext, Drafter, DraftSession
from specvlm.types import DraftTree, Verdict


class BroadcastSession(DraftSession):
    """Any drafter's session as all ranks know it: its own on the first rank, None on the others."""

    def __init__(self, drafter: Drafter, session: DraftSession | None, ctx: DraftContext) -> None:
        self.session, self.ranks, self.device = session, ctx.target.ranks, ctx.target.device
        self.shape = drafter.fixed
        ctx.generator.set_state(self.ranks.share(ctx.generator.get_state))  # what the session drew of it, all have drawn
        self._wide = torch.promote_types(ctx.target.dtype, torch.float32)
        self._vocabulary = ctx.vocabulary
        self._drawn: bool | None = None  # are guesses drawn? The first tree tells

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        tree = None
        if self.session is not None:
            proposed: Work[DraftTree] | DraftTree = self.session.propose(last)
            tree = (yield from driven(proposed)).to(self.device)
        return self._told(tree) if self.shape is None else self._filled(tree)

    def _told(self, tree: DraftTree | None) -> DraftTree:
        """A tree of any shape, by way of the host."""

        def told() -> DraftTree:
            assert tree is not None
            return tree.to(torch.device("cpu"))

        return self.ranks.share(told).to(self.device)

    def _filled(self, tree: DraftTree | None) -> DraftTree:
        """One of the shape that all know: its tokens go from device to device, and so does what they were drawn from."""
        shape = self.shape
        assert shape is not None
        if tree is not None and tree.parents != shape.parents:
            raise ValueError(f"a tree of {len(tree)} nodes is not of the shape that the drafter calls fixed")
        if self._drawn is None:
            self._drawn = self.ranks.share(lambda: tree is not None and tree.q is not None)
        if tree is None:
            tokens = torch.zeros(len(shape), dtype=torch.int64, device=self.device)
            q = torch.zeros(len(shape), self._vocabulary, dtype=self._wide, device=self.device) if self._drawn else None
            tree = DraftTree(tokens, shape.parents, q, ranks=shape.ranks)
        elif tree.q is not None:  # the others do not know the draft's dtype
            tree = replace(tree, q=tree.q.to(self._wide))
        for tensor in (tree.tokens, tree.q):
            if tensor is not None:
                self.ranks.first(tensor)
        return tree
