"""The target drafts for itself, attending only to the most attended part of its own KV cache (Sparse-to-Dense).

Shape suffixes: L layers, J KV heads of this process, N video tokens, K kept video tokens, T other tokens of the prompt,
M nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from specvlm.models.passes import Pass, Work
from specvlm.strategies import DraftContext, Drafter, DraftSession, gumbel
from specvlm.strategies.drafters.pruned import draw
from specvlm.types import DEEPEST, DraftTree, Verdict, VideoPrompt, Within


@dataclass(frozen=True)
class SparseDrafter(Drafter):
    """A chain of the target's own guesses, for which each KV head sees its own K video tokens and all text.

    The score of a video token, per layer and KV head, is the attention it receives in the target's prefill from the
    text after the video, averaged over that text and the query heads of the KV head (the paper sums, which gives the
    same order). The K tokens with the highest scores stay, chosen once per request; ties go to the earlier token. K is
    `entries` minus all other tokens of the prompt, between 0 and N. Keys and values are copied in the prompt's order:
    already rotated, they keep their positions, so there is no second prefill. Rows of accepted tokens are copied from
    the target's cache. With K = N the draft equals the target, and every guess is accepted, rounding aside.

    Sparse-to-Dense (arXiv 2505.19155): scores, one choice per request, entries 1024 = K + text, and length 9.
    Deviations: none. In cases that the paper does not cover, image tokens count as text and all stay; K is 0 if the
    text alone fills `entries`; and under `sampling` guesses are drawn from the draft's distribution, under `coupled`
    they are the best by scores with the shared noise. The pruner is not used.

    Cost: a copy of `entries` rows of the cache per request, (L, J, N) floats for the signal
    `verifier_attention_per_kv_head`, and `length` target passes per round, each of which reads all weights, and the
    keys and values of `entries` tokens and the answer.
    Limits: it pays only if reading keys takes most of the time, as for batches or very long prompts; at batch 1 with
    short prompts it is slower than the target alone. Passes are not captured.

    Attributes:
        entries: Number of prompt tokens that the draft attends to, text included; more if the text alone is longer.
        length: Guesses per round.

    Raises:
        ValueError: `entries` or `length` is below 1.
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
    """Keeps a compact copy of the target's cache, and appends the target's new rows to it in every round."""

    def __init__(self, drafter: SparseDrafter, ctx: DraftContext) -> None:
        assert ctx.cache is not None
        self.ctx, self.dense = ctx, ctx.cache
        self.parents = tuple(range(-1, drafter.length))
        slots_LJC = self._slots(drafter.own_budget(ctx.prompt))
        room = slots_LJC.shape[2] + ctx.max_new_tokens + drafter.max_nodes
        self.cache = ctx.caches.take("draft", ctx.target, room)
        self.cache.gather(self.dense, slots_LJC)
        self.base, self.known = self.cache.length, self.dense.length
        self.sample = ctx.sampling.temperature > 0 and not ctx.sampling.coupled
        device = ctx.target.head_device
        seed = int(torch.randint(2**62, (), generator=ctx.generator)) if self.sample else 0
        self.generator = torch.Generator(device).manual_seed(seed)

    def _slots(self, count: int) -> Tensor:
        """Return the slots of the prompt to copy, (L, J, K + T) and ascending. count: K."""
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
        """Copy the rows of accepted tokens from the target's cache, then draft a chain, one pass per guess."""
        self.cache.length = self.base
        self.cache.follow(self.dense, self.known)
        self.base, self.known = self.cache.length, self.dense.length
        target, cache, rule = self.ctx.target, self.cache, self.ctx.sampling
        token_1 = torch.tensor([self.ctx.bonus if last is None else last.bonus], device=target.head_device)
        index = self.known - len(self.ctx.prompt) + 1  # in the answer, of the first guess
        tokens, q = [token_1], []
        for row in range(len(self.parents) - 1):
            rows = yield Pass(target, cache, token_1, (0,), None, self.base + row, cache.offset)
            logits_1V = rows.logits()[:, : self.ctx.vocabulary]
            if self.sample:
                q_1V = rule.probabilities(logits_1V)
                race = torch.empty(q_1V.shape, dtype=torch.float64, device=q_1V.device)
                token_1 = draw(q_1V, race.exponential_(generator=self.generator), 1)[0]
                q.append(q_1V)
            elif rule.coupled:
                key_2 = torch.tensor([self.ctx.seed or 0, index + row], device=logits_1V.device)
                token_1 = rule.scores(logits_1V, gumbel(key_2, self.ctx.vocabulary)).argmax(-1)
            else:
                token_1 = logits_1V.argmax(-1)
            tokens.append(token_1)
        q_MV = torch.cat([*q, torch.zeros_like(q[0])]) if q else None
        return DraftTree(torch.cat(tokens), self.parents, q_MV)
