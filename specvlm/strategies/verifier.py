"""What accepts guesses, and the distribution that it is exact for."""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specvlm.strategies.base import Strategy
from specvlm.types import DraftTree, Verdict


@dataclass(frozen=True)
class Sampling:
    """How the target's next token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) logits to probabilities, in float32 or better: temperature, top-k, top-p, in Hugging Face's order."""
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} gives no distribution to sample from (0 is greedy)")
        scores = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[..., -1:], float("-inf"))
        if self.top_p < 1.0:
            ascending, order = scores.sort(dim=-1)
            # A token goes when it and everything below it weigh at most 1 - top_p; the best one always stays.
            drop = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            drop[..., -1:].fill_(False)
            scores = scores.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
        return scores.softmax(-1)


@dataclass(frozen=True, eq=False)
class VerifyContext:
    """logits_MV: the target's, one row a tree node, sliced to the shared vocabulary never (it is the target's own).

    dice: uniform numbers drawn ahead, on the device, for a captured step; None: they are drawn when asked for. tables: what
    `Verifier.tables` gave for this tree, on the device, in a step captured for every tree of its size; None: in others.
    hidden_MD, video_ND: the target's last hidden states of the nodes, and of the video tokens, these to unit length, for a
    rule that `reads_hidden`; None: for others, and where there is no video or nothing was guessed.
    """

    tree: DraftTree
    logits_MV: Tensor
    generator: torch.Generator
    dice: Tensor | None = None
    tables: tuple[Tensor, ...] | None = None
    hidden_MD: Tensor | None = None
    video_ND: Tensor | None = None

    def numbers(self, count: int) -> Tensor:
        """(count,) uniform in [0, 1), float64, on the device of the logits."""
        if self.dice is not None:
            if len(self.dice) != count:
                raise ValueError(f"the verifier asks for {count} random numbers, and its `dice` announced {len(self.dice)}")
            return self.dice
        return uniform(count, self.generator).to(self.logits_MV.device)


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """(count,) random numbers in [0, 1), float64, drawn where the generator lives."""
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)


class Verifier(Strategy, ABC):
    """The rule that accepts guesses: a pure function of its context.

    Write `decide`, on the device alone, and the rule runs inside a captured step; or `verify`, free to read on the host.

    Of a rule that is not `lossless` the loop cuts the path where it would end the answer, or lengthen it, by a guess: a stop id
    stands where the target's argmax is one (where the rule samples: where a draw from `sampling` is), and nowhere else. Its
    checks are not captured.
    """

    kind = "verifier"
    lossless: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False  # of rules that write `verify`; (N, D) more are kept for a request

    @property
    def sampling(self) -> Sampling:
        """The distribution that this rule is exact for; drafters that sample draw from theirs warped alike."""
        return Sampling()

    @property
    def on_device(self) -> bool:
        return type(self).verify is Verifier.verify

    def dice(self, nodes: int) -> int:
        """How many uniform numbers `decide` asks of `ctx.numbers` for a tree of so many nodes."""
        return 0

    def tables(self, parents: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """All that `decide` reads of a tree's shape, as tensors on the host whose sizes and types go by the number of nodes
        alone.

        Given these in `ctx.tables`, `decide` must not look at `ctx.tree.parents`: one captured step then checks every tree of a
        size, as drafters need whose trees vary. None: it goes by `parents`, and trees that vary are checked uncaptured.
        """
        return None

    def decide(self, ctx: VerifyContext) -> Tensor:
        """(2,) integers on the device: the last accepted node, and the target's own next token (-1: there is none).

        What it does may depend on the shape of the tree, never on the value of a tensor. Tensors made from that shape must be
        kept (functools.cache), unless `tree.varies`: a captured step knows their addresses alone.
        """
        raise NotImplementedError(f"verifier {self.name} has neither `decide` nor `verify`")

    def verify(self, ctx: VerifyContext) -> Verdict:
        last, bonus = self.decide(ctx).tolist()
        return self.verdict(last, bonus, ctx.tree)

    def verdict(self, last: int, bonus: int, tree: DraftTree) -> Verdict:
        """What `decide` gave, on the host. Raises ValueError where the logits gave no next token."""
        if bonus < 0:
            raise ValueError("the target's logits hold NaN or +inf: there is no distribution to draw from")
        return Verdict(tree.way_to(last), bonus)

    def first(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """The next token where nothing was guessed: after the prefill, and in `autoregressive`. A tree of the root alone."""
        root = DraftTree(torch.zeros(1, dtype=torch.int64, device=logits_V.device), (-1,))
        return self.verify(VerifyContext(root, logits_V[None], generator)).bonus
