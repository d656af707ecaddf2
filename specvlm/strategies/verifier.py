"""Base class and context of verifiers, which accept or reject guesses, and the sampling settings they are exact for.

Shape suffixes: M tree nodes, N video tokens, V vocabulary of the target, D width of the target.
"""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specvlm.strategies.base import Strategy
from specvlm.types import DraftTree, Verdict


@dataclass(frozen=True)
class Sampling:
    """Settings by which the target's next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep this many of the most likely tokens, and those that tie with the last of them; 0 is off.
        top_p: Keep the fewest most likely tokens whose probabilities sum to at least this, in (0, 1]; 1 is off.
        coupled: True if each token is the one with the highest `scores`, whose noise follows from the request's seed,
            not from a random generator.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    coupled: bool = False

    def probabilities(self, logits: Tensor) -> Tensor:
        """Warp logits by temperature, top-k and top-p, in Hugging Face's order.

        Args:
            logits: (..., V)

        Returns:
            (..., V) Probabilities in float32, or in float64 for float64 logits.

        Raises:
            ValueError: The temperature is not above 0.
        """
        return self.warped(logits).softmax(-1)

    def scores(self, logits_NV: Tensor, noise_NV: Tensor) -> Tensor:
        """Add Gumbel noise to warped logits, so that the id of the largest is a draw from `probabilities`.

        A drafter that ranks its guesses by the scores of its own logits is likely to guess the token that a target
        with similar logits draws.

        Args:
            logits_NV: (N, V) logits. N is any number of rows here.
            noise_NV: Noise from `gumbel`, (N, V) or (1, V), on the device of the logits.

        Returns:
            (N, V) float64; -inf for tokens that top-k or top-p removes.

        Raises:
            ValueError: The temperature is not above 0.
        """
        return self.warped(logits_NV).double() + noise_NV

    def warped(self, logits: Tensor) -> Tensor:
        """Apply temperature, top-k and top-p to (..., V) logits. Logits of removed tokens become -inf.

        Raises:
            ValueError: The temperature is not above 0.
        """
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} gives no distribution to sample from (0 is greedy)")
        scores = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[..., -1:], float("-inf"))
        if self.top_p < 1.0:
            ascending, order = scores.sort(dim=-1, stable=self.coupled)
            # Drop a token if its probability and all lower ones sum to at most 1 - top_p. The best token always stays.
            if self.coupled:  # sums of integers do not depend on their order: a row alone keeps the same tokens
                weights = ((ascending - ascending[..., -1:]).exp() * 2.0**40).round().to(torch.int64)
                drop = weights.cumsum(-1).double() <= (1.0 - self.top_p) * weights.sum(-1, keepdim=True).double()
            else:
                drop = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            drop[..., -1:].fill_(False)
            scores = scores.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
        return scores


@dataclass(frozen=True, eq=False)
class VerifyContext:
    """Input of a verifier: one tree and the target's logits for it.

    Attributes:
        tree: The draft tree of M nodes.
        logits_MV: (M, V) The target's logits, one row per node, over the target's full vocabulary.
        generator: Random generator, seeded per request.
        dice: Uniform random numbers on the device, drawn ahead of a captured step. Read them with `numbers`, which
            draws them if this is None.
        tables: Result of `Verifier.tables` for this tree, on the device, if a captured step serves all trees of this
            size; None otherwise.
        hidden_MD: (M, D) The target's last hidden states of the nodes. None if the verifier does not set
            `reads_hidden`, and in `Verifier.first`.
        video_ND: (N, D) The target's last hidden states of the video tokens, scaled to unit length. None in the same
            cases, and for a prompt without a video.
        key_2: (2,) int64: seed of the request, and index in the answer of the token after the root; input of `gumbel`.
            On the device of the logits. Used only if the verifier's `sampling` is coupled; may be None otherwise.
    """

    tree: DraftTree
    logits_MV: Tensor
    generator: torch.Generator
    dice: Tensor | None = None
    tables: tuple[Tensor, ...] | None = None
    hidden_MD: Tensor | None = None
    video_ND: Tensor | None = None
    key_2: Tensor | None = None

    def numbers(self, count: int) -> Tensor:
        """Return uniform random numbers.

        Args:
            count: Number of random numbers. If they were drawn ahead, this must be what `Verifier.dice` returned.

        Returns:
            (count,) float64 in [0, 1), on the device of the logits.

        Raises:
            ValueError: A different number of them was drawn ahead.
        """
        if self.dice is not None:
            if len(self.dice) != count:
                raise ValueError(f"the verifier asks for {count} random numbers, and its `dice` announced {len(self.dice)}")
            return self.dice
        return uniform(count, self.generator).to(self.logits_MV.device)


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """Draw (count,) float64 random numbers in [0, 1) on the generator's device."""
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)


class Verifier(Strategy, ABC):
    """Base class of verifiers: decide which guesses are accepted, as a pure function of the context.

    Implement one of two methods: `decide`, which works on the device only, so that its step can be captured in a CUDA
    graph, or `verify`, which may read tensors on the host.

    A lossy verifier cannot change where the answer ends. The loop compares each token that it accepts or adds with the
    target's own choice (its argmax, or a draw from `sampling`). Where they differ and either is a stop id, the path is
    cut, and the target's choice is taken. Verification with a lossy verifier is not captured.

    Attributes:
        lossless: True if the output is exactly the target's own (greedy, coupled) or has exactly its distribution
            (sampling).
        reads_hidden: True if `verify` reads `hidden_MD` and `video_ND`. Costs an (N, D) tensor per request.
    """

    kind = "verifier"
    lossless: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False

    @property
    def sampling(self) -> Sampling:
        """Settings that this verifier is exact for. Drafters that sample warp their distribution the same way."""
        return Sampling()

    @property
    def on_device(self) -> bool:
        """True if the verifier implements `decide`, so that a step can be captured."""
        return type(self).verify is Verifier.verify

    @property
    def follows(self) -> bool:
        """True if the verifier implements `follow`."""
        return type(self).follow is not Verifier.follow

    def dice(self, nodes: int) -> int:
        """Return how many random numbers `decide` reads from `ctx.numbers` for a tree of `nodes` nodes."""
        return 0

    def tables(self, parents: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """Encode the shape of a tree as tensors, so that one captured step can verify all trees of one size.

        With `ctx.tables` set, `decide` must read the shape from there and not from `ctx.tree.parents`.

        Args:
            parents: Parent of each node; -1 for the root.

        Returns:
            Host tensors whose shapes and dtypes depend only on the number of nodes. None if `decide` needs `parents`;
            trees whose shape varies are then verified without a capture.
        """
        return None

    def decide(self, ctx: VerifyContext) -> Tensor:
        """Verify a tree on the device, without reading a tensor on the host.

        Control flow may depend on the shape of the tree, never on the value of a tensor. A captured step refers to
        tensors by address, so do not free those that are built from the shape: cache them (functools.cache), unless
        `tree.varies`.

        Args:
            ctx: The tree and the target's logits.

        Returns:
            (2,) integers on the device: the last accepted node, and the target's next token after it. The token is -1
            if the logits give no distribution.
        """
        raise NotImplementedError(f"verifier {self.name} has neither `decide` nor `verify`")

    def follow(self, parents: Sequence[int], tokens: Sequence[int], best: Sequence[int]) -> tuple[int, int]:
        """Verify a tree on the host, as `decide` does, from the target's argmax after each node.

        Implement this only if `decide` reads nothing of the logits but the argmax. It is called when several requests
        share a pass, and only for built-in verifiers; those of plugins are called through `decide`.

        Args:
            parents: Parent of each node; -1 for the root.
            tokens: Token of each node.
            best: Argmax of the logits after each node.

        Returns:
            The two integers of `decide`.
        """
        raise NotImplementedError(f"verifier {self.name} has no `follow`")

    def verify(self, ctx: VerifyContext) -> Verdict:
        """Verify a tree. The default calls `decide` and reads its result.

        Args:
            ctx: The tree and the target's logits.

        Returns:
            The accepted path and the target's next token after it.

        Raises:
            ValueError: `decide` reports that the logits give no distribution (NaN, +inf), or returns anything but (2,)
                integers.
        """
        last, bonus = decision_of(self, ctx).tolist()
        return self.verdict(last, bonus, ctx.tree)

    def verdict(self, last: int, bonus: int, tree: DraftTree) -> Verdict:
        """Convert the two integers of `decide` to a verdict.

        Args:
            last: The last accepted node.
            bonus: The target's next token after it; -1 if the logits give no distribution.
            tree: The tree that was verified.

        Returns:
            The path to `last`, and `bonus`.

        Raises:
            ValueError: `bonus` is -1.
        """
        if bonus < 0:
            raise ValueError("the target's logits hold NaN or +inf: there is no distribution to draw from")
        return Verdict(tree.way_to(last), bonus)

    def first(self, logits_V: Tensor, generator: torch.Generator, key_2: Tensor | None = None) -> int:
        """Choose the next token without guesses: after the prefill, and in `autoregressive`.

        Args:
            logits_V: (V,) The target's logits.
            generator: Random generator of the request.
            key_2: (2,) seed of the request, and index of the next token in the answer. Not given unless `sampling` is
                coupled.

        Returns:
            The next token: by default, that of `verify` for a tree of only the root.
        """
        root = DraftTree(torch.zeros(1, dtype=torch.int64, device=logits_V.device), (-1,))
        return self.verify(VerifyContext(root, logits_V[None], generator, key_2=key_2)).bonus


def decision_of(verifier: Verifier, context: VerifyContext) -> Tensor:
    """Call `decide`. Raises ValueError if its result is not (2,) integers, which later code could not detect."""
    found = verifier.decide(context)
    if found.shape != (2,) or found.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`decide` returns (2,) integers, got {tuple(found.shape)} {found.dtype}")
    return found
