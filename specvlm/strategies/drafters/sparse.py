"""The target drafts for itself over the most attended part of its own keys and values (Sparse-to-Dense).

Shape suffixes: L layers, J KV heads (of this process), N video tokens, K kept ones, T other tokens of the prompt, M nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from specvlm.models.passes import Pass, Work
from specvlm.strategies import DraftContext, Drafter, DraftSession
from specvlm.strategies.drafters.tree import draw
from specvlm.types import DEEPEST, DraftTree, Verdict, VideoPrompt, Within


@dataclass(frozen=True)
class SparseDrafter(Drafter):
    """A chain of the target's own guesses, each KV head of which sees its own K video tokens and all text.

    A video token's score, by layer and KV head, is the attention that the prompt's text behind the video pays it in the
    target's prefill, averaged over that text and the query heads of the KV head (StD adds these up, which orders tokens
    alike). The K highest stay (equal ones go to the earlier token), K = entries - all other tokens of the prompt, chosen once.
    Their keys and values are copied in their old order beside those of the rest: rotated already, they keep their positions,
    and there is no second prefill. The output's own rows come from the dense checks. With K = N a round is the target's own,
    and is accepted in full.

    Sparse-to-Dense (arXiv 2505.19155): scores, one choice a request, entries 1024 = K + text and length 9. Deviations: none.
    Cases that it does not have: tokens of images count as text and all stay; a prompt whose text alone takes `entries` leaves
    K = 0; where the verifier samples, guesses are drawn from the draft's distribution. The pruner has no say.

    Signal: `verifier_attention_per_kv_head`, (L, J, N) floats while the request starts. Cost: a copy of entries rows of the
    cache per request, `length` passes of the target a round, which read all its weights and `entries` of its keys. Limits: so
    it pays only where reading keys is what takes the time, for batches or very long prompts, and at batch 1 over short ones it
    is slower than the target alone. Passes are not captured. ValueError for entries or length below 1.
    """

    name = "sparse"
    paper = "Sparse-to-Dense (arXiv 2505.19155)"
    fidelity = "exact"
    model = "target"
    needs = frozenset({"verifier_attention_per_kv_head"})

    entries: Annotated[int, Within(1, 2**20)] = 1024
    length: Annotated[int, Within(1, DEEPEST)] = 9

    def __post_init__(self) -> None:
        if self.entries < 1 or self.length < 1:
            raise ValueError(f"entries and length must be at least 1, got {self.entries} and {self.length}")

    @property
    def max_nodes(self) -> int:
        return 1 + self.length

    def own_budget(self, prompt: VideoPrompt) -> int:
        total = len(prompt.video_index)
        return min(total, max(0, self.entries - (len(prompt) - total)))

    def start(self, ctx: DraftContext) -> SparseSession:
        return SparseSession(self, ctx)


class SparseSession(DraftSession):
    """A compact cache beside the target's own, which it follows as that grows."""

    def __init__(self, drafter: SparseDrafter, ctx: DraftContext) -> None:
        assert ctx.cache is not None
        self.ctx, self.dense = ctx, ctx.cache
        self.parents = tuple(range(-1, drafter.length))
        slots_LJC = self._slots(drafter.own_budget(ctx.prompt))
        room = slots_LJC.shape[2] + ctx.max_new_tokens + drafter.max_nodes
        self.cache = ctx.caches.take("draft", ctx.target, room)
        self.cache.gather(self.dense, slots_LJC)
        self.base, self.known = self.cache.length, self.dense.length
        self.sample = ctx.sampling.temperature > 0
        device = ctx.target.head_device
        seed = int(torch.randint(2**62, (), generator=ctx.generator)) if self.sample else 0
        self.generator = torch.Generator(device).manual_seed(seed)

    def _slots(self, count: int) -> Tensor:
        """(L, J, K + T) the prompt's slots that stay, ascending."""
        target, prompt = self.ctx.target, self.ctx.prompt
        text = prompt.kept_slots(torch.empty(0, dtype=torch.int64)).to(target.device)
        slots_LJT = text.expand(target.layers, target.kv_heads, -1)
        if not count:
            return slots_LJT
        scores_LJN = self.ctx.signal("verifier_attention_per_kv_head")
        best_LJK = scores_LJN.sort(descending=True, stable=True).indices[..., :count]
        video_LJK = prompt.video_index.to(best_LJK.device)[best_LJK]
        return torch.cat([video_LJK, slots_LJT.to(best_LJK.device)], -1).sort().values

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        self.cache.length = self.base
        self.cache.follow(self.dense, self.known)
        self.base, self.known = self.cache.length, self.dense.length
        target, cache = self.ctx.target, self.cache
        token_1 = torch.tensor([self.ctx.bonus if last is None else last.bonus], device=target.head_device)
        tokens, q = [token_1], []
        for row in range(len(self.parents) - 1):
            rows = yield Pass(target, cache, token_1, (0,), None, self.base + row, cache.offset)
            logits_1V = rows.logits()[:, : self.ctx.vocabulary]
            if self.sample:
                q_1V = self.ctx.sampling.probabilities(logits_1V)
                race = torch.empty(q_1V.shape, dtype=torch.float64, device=q_1V.device)
                token_1 = draw(q_1V, race.exponential_(generator=self.generator), 1)[0]
                q.append(q_1V)
            else:
                token_1 = logits_1V.argmax(-1)
            tokens.append(token_1)
        q_MV = torch.cat([*q, torch.zeros_like(q[0])]) if q else None
        return DraftTree(torch.cat(tokens), self.parents, q_MV)
