"""Decode whole answers at published shapes with planted guesses, and compare them with plain decoding, token by token.

At each level of a tree, one guess is the target's own next token with probability 0.7, on a branch chosen at random;
all other guesses are random. So paths of all lengths are accepted, along any branch. Trees are, in turn, the paper's, a
chain, a bushy one and a random one of 64 nodes.

The head is random too. Its two best logits are far closer to each other than a language model's, so that a difference
in the last bit soon changes a token: `control` decodes the same prompts with Hugging Face's modules, where bits depend
on the number of rows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from experiments.exactness.nodes import random_parents
from experiments.gpu_pair.shapes import Shape, prompt_of
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.models.fused import HUGGING_FACE
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import local_shard
from specvlm.results.metrics import tokens_of
from specvlm.strategies import DraftContext, Drafter, DraftSession
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, GenerationOptions, TreeShape, Verdict, VideoPrompt
from specvlm.types.tree import children_of

RIGHT = 0.7  # probability that a level has a right guess below the last one
TREES = tuple(TreeShape.parse(text).parents for text in ("paper", "chain:5", "3x2x2x1"))


@dataclass(frozen=True)
class PlantedDrafter(Drafter):
    """Plant the target's own next tokens in trees of random guesses.

    Attributes:
        known: The target's answer to the same prompt, from plain decoding.
        seed: Of the random guesses and branches.
    """

    name = "planted"
    model = None
    known: tuple[int, ...] = ()
    seed: int = 0

    @property
    def max_nodes(self) -> int:
        return 64

    def start(self, ctx: DraftContext) -> DraftSession:
        return PlantedSession(self, ctx)


class PlantedSession(DraftSession):
    """Session that follows its place in the known answer. Once the output has left the answer, no guess is planted."""

    def __init__(self, drafter: PlantedDrafter, ctx: DraftContext) -> None:
        self.known, self.chance, self.vocabulary = drafter.known, random.Random(drafter.seed), ctx.vocabulary
        self.trees = (*TREES, random_parents(random.Random(drafter.seed % 4), 64))
        self.bonus, self.position, self.rounds = ctx.bonus, 0, 0

    def propose(self, last: Verdict | None) -> DraftTree:
        if last is not None:
            self.bonus = last.bonus
            self.position += len(last.path)
            if self.known[self.position : self.position + 1] != (last.bonus,):
                self.position = len(self.known)
        parents = self.trees[self.rounds % len(self.trees)]
        self.rounds += 1
        tokens = [self.bonus, *(self.chance.randrange(self.vocabulary) for _ in parents[1:])]
        below, node = children_of(parents), 0
        for token in self.known[self.position + 1 :]:
            if not below[node] or self.chance.random() >= RIGHT:
                break
            node = self.chance.choice(below[node])
            tokens[node] = token
        return DraftTree(torch.tensor(tokens), parents)


def use_random_head(model: VideoLM) -> None:
    """Replace the numbers of the model's head by random ones."""
    weight = local_shard(model.hf.lm_head.weight)
    generator = torch.Generator(weight.device).manual_seed(1 + model.ranks.rank)
    weight.normal_(0, model.text.config.hidden_size**-0.5, generator=generator)


def prompts_of(model: VideoLM, shape: Shape, most: int, numbers: Iterable[int]) -> Iterator[tuple[int, VideoPrompt]]:
    """Yield numbered prompts with random pixels and words, of an eighth of `most` to `most` video tokens."""
    for number in numbers:
        share = random.Random(number).uniform(0.125, 1) if number else 1.0  # the longest first: caches are kept
        yield number, prompt_of(model, shape, round(share * most), True, seed=number)


def measure(
    model: VideoLM, shape: Shape, engine: Engine, video_tokens: int, numbers: Iterable[int], limit: int, control: int
) -> Iterator[dict[str, Any]]:
    """Decode prompts plainly and with planted guesses. Yields a row for each, and for each decode of the control."""
    caches, forms = CachePool(), model.forms
    for number, prompt in prompts_of(model, shape, video_tokens, numbers):
        for name, by in (("control", Engine()), ("ours", engine)):
            model.forms = forms if name == "ours" else HUGGING_FACE
            if name == "ours" or number < control:
                found = compare(model, prompt, by, caches, limit, number)
                yield {"by": name, "engine": by.runs(model), "prompt": number, "video_tokens": len(prompt.video_index)} | found


def compare(model: VideoLM, prompt: VideoPrompt, engine: Engine, caches: CachePool, limit: int, seed: int) -> dict[str, Any]:
    """Decode a prompt both ways. `first`: place of the first other token, None if there is none."""
    start, options = time.perf_counter(), GenerationOptions(max_new_tokens=limit, stop_ids=frozenset())
    caches.reserve("target", model, len(prompt) + limit + 64)
    plain = tokens_of(list(autoregressive(model, prompt, options, GreedyVerifier(), caches, engine)))
    drafter = PlantedDrafter(tuple(plain), seed)
    graph = DecodingGraph(model, None, UniformPruner(), drafter, GreedyVerifier(), options, caches=caches, engine=engine)
    taken = list(graph.decode(prompt))
    pairs = enumerate(zip_longest(plain, tokens_of(taken)))
    return {
        "tokens": len(plain),
        "first": next((place for place, (one, other) in pairs if one != other), None),
        "rounds": len(taken) - 1,
        "accepted": sum(step.accepted for step in taken[1:]),
        "seconds": round(time.perf_counter() - start, 1),
    }
