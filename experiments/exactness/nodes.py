"""Compare the nodes of random trees with sequential steps, bit by bit, at published shapes.

Weights are random (see `experiments.gpu_pair.shapes`), and so are the cached keys and values before the trees. Each
node's logits, and its keys and values in all layers, are compared with those of a pass of one row after the same path.
There are three arithmetics:

- `ours`: path attention, as in the captured engine.
- `mask`: masked flash decoding, whose key splits depend on the number of rows, as drafters use it.
- `sdpa`: Hugging Face's modules with SDPA attention.

The models' own head has a far larger gap between its two best logits than a language model's, so rounding never changes
the argmax. Argmaxes are therefore also counted with a random head of 32,768 tokens, whose gaps are far smaller than a
language model's. The true rate lies between the two.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from specvlm.engine.base import placed
from specvlm.engine.cuda_graphs import kernels_for
from specvlm.engine.lean import LeanText, Sight
from specvlm.exact_probe.__main__ import attention_of
from specvlm.models.kv_cache import KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.types import DraftTree
from specvlm.types.tree import children_of

Rows = Callable[[DraftTree, KVCache, int], tuple[Tensor, Tensor]]  # (M, V) logits and (M, D) hidden states
WAYS = ("ours", "mask", "sdpa")


def measure(model: VideoLM, way: str, slots: int, least: int, first: int = 0) -> dict[str, Any]:
    """Count nodes equal to passes of one row, over random trees of 1 to 64 nodes, alignments and cache capacities.

    Args:
        model: Target model.
        way: Its arithmetic, one of WAYS.
        slots: Cached tokens before a tree, at most; up to 600 fewer.
        least: Minimum number of nodes.
        first: Number of the first tree. Other numbers give other trees.

    Returns:
        Counts, and a digest of the first 64 nodes' logits: another process must get the same.
    """
    rows, counts, start, seed = passes(model, way), Counter[str](), time.perf_counter(), first
    generator = torch.Generator(model.device).manual_seed(0)
    other_head = torch.randn(model.text.config.hidden_size, 32_768, generator=generator, device=model.device).to(model.dtype)
    many, one = (model.new_cache(slots + 700 + extra) for extra in (0, 300))
    for cache in (many, one):
        fill(cache)
    digest = hashlib.sha256()
    while counts["nodes"] < least:
        seed += 1
        chance = random.Random(seed)
        tree = random_tree(chance, model)
        base = slots - chance.randrange(600)
        before = [tensor[:, :, :, base : base + len(tree)].clone() for tensor in tensors_of(many)]
        logits_MV, hidden_MD = rows(tree, many, base)
        kept = [tensor[:, 0, :, base : base + len(tree)].clone() for tensor in tensors_of(many)]
        for depth, node in steps(tree):
            row = DraftTree(tree.tokens[node : node + 1], (-1,))
            logits_1V, hidden_1D = rows(row, one, base + depth)
            mine = (tensor[:, 0, :, base + depth] for tensor in tensors_of(one))
            same_kv = all(torch.equal(a, b[:, :, node]) for a, b in zip(mine, kept, strict=True))
            counts["nodes"] += 1
            counts["bits"] += torch.equal(logits_1V[0], logits_MV[node]) and same_kv
            counts["argmax"] += bool(logits_1V[0].argmax() == logits_MV[node].argmax())
            best = [(hidden @ other_head).argmax() for hidden in (hidden_1D[0], hidden_MD[node])]
            counts["argmax, random head"] += bool(best[0] == best[1])
            if counts["nodes"] <= 64:
                digest.update(logits_1V[0].float().cpu().numpy().tobytes())
        for cache in (many, one):  # later trees may begin further on
            for tensor, piece in zip(tensors_of(cache), before, strict=True):
                tensor[:, :, :, base : base + len(tree)] = piece
    seconds = round(time.perf_counter() - start, 1)
    return {"way": way, **counts, "trees": seed - first, "digest": digest.hexdigest()[:16], "seconds": seconds}


def tensors_of(cache: KVCache) -> list[Tensor]:
    """List keys and values of all pipeline stages, (L, 1, H, C, D) each."""
    return [tensor for store in cache.stores for tensor in store]


def fill(cache: KVCache) -> None:
    """Fill a cache with random numbers: the same in each slot, whatever the capacity."""
    generator = torch.Generator(cache.stores[0].keys.device)
    for number, layer in enumerate(layer for tensor in tensors_of(cache) for layer in tensor):
        generator.manual_seed(number)
        _, heads, _, width = layer.shape
        for piece in layer.split(1024, 2):
            numbers = torch.empty(1, heads, 1024, width, dtype=layer.dtype, device=layer.device).normal_(generator=generator)
            piece.copy_(numbers[:, :, : piece.shape[2]])


def random_tree(chance: random.Random, model: VideoLM) -> DraftTree:
    """Make a random tree of 1 to 64 nodes."""
    parents = random_parents(chance, chance.randint(1, 64))
    tokens = torch.tensor([chance.randrange(model.vocabulary) for _ in parents], device=model.device)
    return DraftTree(tokens, parents)


def random_parents(chance: random.Random, count: int) -> tuple[int, ...]:
    """Choose the parents of `count` nodes, deep or wide."""
    reach = chance.choice((1, 3, 64))
    return (-1, *(chance.randrange(max(0, node - reach), node) for node in range(1, count)))


def steps(tree: DraftTree) -> Iterator[tuple[int, int]]:
    """Yield (depth, node) in preorder, so that a node's ancestors are in the cache when its turn comes."""
    below, left = children_of(tree.parents), [0]
    while left:
        node = left.pop()
        yield tree.depths[node], node
        left += reversed(below[node])


def passes(model: VideoLM, way: str) -> Rows:
    """Return a function that runs a tree at a slot in one of the arithmetics."""
    if way in ("ours", "mask"):
        lean = LeanText(model)
        lean.ops = kernels_for(model, lean)
        return lambda tree, cache, base: _lean(lean, tree, cache, base, way == "ours")
    return lambda tree, cache, base: _hugging_face(model, way, tree, cache, base)


def _lean(lean: LeanText, tree: DraftTree, cache: KVCache, base: int, by_path: bool) -> tuple[Tensor, Tensor]:
    """Run a tree through the lean pass, by paths or by mask."""
    (depths, seen_MM), device = placed(tree), tree.tokens.device
    depths_M = depths.to(device)
    ways = [tree.way_to(node) for node in range(len(tree))]
    longest = max(map(len, ways))
    ways_MP = torch.tensor([[*way, *[0] * (longest - len(way))] for way in ways], device=device)
    sight = Sight(None, ways_MP, depths_M) if by_path else Sight(seen_MM.to(device, torch.int8))
    at, offset = torch.tensor([[base], [0]], device=device)
    hidden_MD = lean(tree.tokens, depths_M, 0, sight, at, offset, cache)
    return lean.logits(hidden_MD), hidden_MD


def _hugging_face(model: VideoLM, way: str, tree: DraftTree, cache: KVCache, base: int) -> tuple[Tensor, Tensor]:
    """Run a tree through Hugging Face's modules. way: Name of its attention function."""
    depths_M, seen_MM = placed(tree)
    cache.length, cache.offset = base, 0
    seen_MK = torch.cat([torch.ones(len(tree), base, dtype=torch.bool), seen_MM], 1)
    positions_AM = (depths_M + base).expand(model.axes, -1)
    with attention_of(model, way):
        hidden_MD = model.forward(model.embed_tokens(tree.tokens), positions_AM, cache, seen_MK)
    return model.head(hidden_MD), hidden_MD
