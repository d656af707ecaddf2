"""Draft on rank 0 and broadcast the trees, for a tensor-parallel target whose draft model is on rank 0 only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from specvlm.models.passes import Work, driven
from specvlm.strategies import DraftContext, Drafter, DraftSession
from specvlm.types import DraftTree, Verdict


class BroadcastSession(DraftSession):
    """Session that proposes rank 0's trees on every rank. Rank 0 has the drafter's session, the others have none."""

    def __init__(self, drafter: Drafter, session: DraftSession | None, ctx: DraftContext) -> None:
        self.session, self.ranks, self.device = session, ctx.target.ranks, ctx.target.device
        self.shape = drafter.fixed
        # On rank 0 the drafter may have drawn from the generator when it started: give all ranks the same state.
        ctx.generator.set_state(self.ranks.share(ctx.generator.get_state))
        self._wide = torch.promote_types(ctx.target.dtype, torch.float32)
        self._vocabulary = ctx.vocabulary
        self._drawn: bool | None = None  # whether trees have draft distributions `q`; None before the first tree

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        """Propose a tree on rank 0, and return it on every rank."""
        tree = None
        if self.session is not None:
            proposed: Work[DraftTree] | DraftTree = self.session.propose(last)
            tree = (yield from driven(proposed)).to(self.device)
        return self._share_any_shape(tree) if self.shape is None else self._share_fixed_shape(tree)

    def guess_on(self, done: Callable[[], bool]) -> Work[None] | None:
        """Let the session on rank 0 draft during the check. Other ranks have no draft."""
        return None if self.session is None else self.session.guess_on(done)

    @property
    def drafted_ahead(self) -> int | None:  # type: ignore[override]
        """The `drafted_ahead` of the drafter's session; None on other ranks."""
        return None if self.session is None else self.session.drafted_ahead

    def _share_any_shape(self, tree: DraftTree | None) -> DraftTree:
        """Broadcast a tree of any shape through the host."""

        def on_cpu() -> DraftTree:
            assert tree is not None
            return tree.to(torch.device("cpu"))

        return self.ranks.share(on_cpu).to(self.device)

    def _share_fixed_shape(self, tree: DraftTree | None) -> DraftTree:
        """Broadcast tokens and draft distributions `q` from device to device, for a tree whose shape every rank knows.

        Raises ValueError on rank 0 if the tree has another shape.
        """
        shape = self.shape
        assert shape is not None
        if tree is not None and tree.parents != shape.parents:
            raise ValueError(f"a tree of {len(tree)} nodes does not have the drafter's `fixed` shape")
        if self._drawn is None:
            self._drawn = self.ranks.share(lambda: tree is not None and tree.q is not None)
        if tree is None:
            tokens = torch.zeros(len(shape), dtype=torch.int64, device=self.device)
            q = torch.zeros(len(shape), self._vocabulary, dtype=self._wide, device=self.device) if self._drawn else None
            tree = DraftTree(tokens, shape.parents, q, ranks=shape.ranks)
        elif tree.q is not None:  # the other ranks do not know the draft's dtype, so they expect this one
            tree = replace(tree, q=tree.q.to(self._wide))
        for tensor in (tree.tokens, tree.q):
            if tensor is not None:
                self.ranks.first(tensor)
        return tree
