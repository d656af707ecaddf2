"""Compare rows of random trees with sequential steps, bit by bit, at published shapes on one GPU.

Run `python -m experiments.exactness`. Weights are random (see `experiments.gpu_pair.shapes`), and so are the cached
keys and values before the trees. Each tree node's logits, and its keys and values in all layers, are compared with
those of a pass of one row after the same path. There are three arithmetics:

- `ours`: path attention, as in the captured engine.
- `mask`: masked flash decoding, whose key splits depend on the number of rows, as drafters use it.
- `sdpa`: Hugging Face's modules with SDPA attention.

The models' own head has a far larger gap between its two best logits than a language model's, so rounding never changes
the argmax. Argmaxes are therefore also counted with a random head of 32,768 tokens, whose gaps are far smaller than a
language model's. The true rate lies between the two.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_pair.models import WRAPS
from experiments.gpu_pair.shapes import build, pair_of
from specvlm.engine.base import placed
from specvlm.engine.cuda_graphs import kernels_for
from specvlm.engine.lean import LeanText, Sight
from specvlm.models.kv_cache import KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.types import DraftTree
from specvlm.types.tree import children_of

Rows = Callable[[DraftTree, KVCache, int], tuple[Tensor, Tensor]]  # (M, V) logits and (M, D) hidden states
WAYS = ("ours", "mask", "sdpa")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.exactness", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--shape",
        default="qwen2_5_vl_7b_3b",
        help="pair of experiments.gpu_pair, whose target is measured (default: %(default)s)",
    )
    parser.add_argument("--slots", type=int, default=16_384, help="cached tokens before the trees (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1000, help="minimum tree nodes per arithmetic (default: %(default)s)")
    parser.add_argument("--ways", default=",".join(WAYS), help="arithmetics, with commas (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--out", type=Path, help="file to append a line of JSON per arithmetic to")
    options = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, options.dtype)
    shape = pair_of(options.shape).target
    model = build(shape, WRAPS[shape.family], device, dtype)
    for way in options.ways.split(","):
        found = measure(model, way, options.slots, options.nodes)
        found |= {
            "shape": options.shape,
            "slots": options.slots,
            "dtype": options.dtype,
            "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        }
        print(told(found), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
    return 0


def measure(model: VideoLM, way: str, slots: int, least: int) -> dict[str, Any]:
    """Count equal rows over random trees of 1 to 64 nodes, with varying alignments and cache capacities."""
    rows, counts, start, seed = passes(model, way), Counter[str](), time.perf_counter(), 0
    generator = torch.Generator(model.device).manual_seed(0)
    other_head = torch.randn(model.text.config.hidden_size, 32_768, generator=generator, device=model.device).to(model.dtype)
    caches = [model.new_cache(slots + 700 + extra) for extra in (0, 300)]
    for cache in caches:
        for store in cache.stores:
            for tensor in store:
                tensor.normal_(generator=generator.manual_seed(1))
    while counts["nodes"] < least:
        seed += 1
        chance = random.Random(seed)
        tree = random_tree(chance, model)
        base = slots - chance.randrange(600)
        logits_MV, hidden_MD = rows(tree, caches[0], base)
        kept = [[part[0, :, base : base + len(tree)].clone() for part in caches[0].layer(n)] for n in range(model.layers)]
        for depth, node in steps(tree):
            one = DraftTree(tree.tokens[node : node + 1], (-1,))
            logits_1V, hidden_1D = rows(one, caches[1], base + depth)
            pairs = (pair for n in range(model.layers) for pair in zip(caches[1].layer(n), kept[n], strict=True))
            same_kv = all(torch.equal(mine[0, :, base + depth], its[:, node]) for mine, its in pairs)
            counts["nodes"] += 1
            counts["bits"] += torch.equal(logits_1V[0], logits_MV[node]) and same_kv
            counts["argmax"] += bool(logits_1V[0].argmax() == logits_MV[node].argmax())
            best = [(hidden @ other_head).argmax() for hidden in (hidden_1D[0], hidden_MD[node])]
            counts["argmax, random head"] += bool(best[0] == best[1])
    return {"way": way, **counts, "trees": seed, "seconds": round(time.perf_counter() - start, 1)}


def random_tree(chance: random.Random, model: VideoLM) -> DraftTree:
    """Make a random tree of 1 to 64 nodes, deep or wide."""
    count, reach = chance.randint(1, 64), chance.choice((1, 3, 64))
    parents = (-1, *(chance.randrange(max(0, node - reach), node) for node in range(1, count)))
    tokens = torch.tensor([chance.randrange(model.vocabulary) for _ in parents], device=model.device)
    return DraftTree(tokens, parents)


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
    model.hf.set_attn_implementation({"text_config": way})
    return lambda tree, cache, base: _hugging_face(model, tree, cache, base)


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


def _hugging_face(model: VideoLM, tree: DraftTree, cache: KVCache, base: int) -> tuple[Tensor, Tensor]:
    """Run a tree through Hugging Face's modules."""
    depths_M, seen_MM = placed(tree)
    cache.length, cache.offset = base, 0
    seen_MK = torch.cat([torch.ones(len(tree), base, dtype=torch.bool), seen_MM], 1)
    positions_AM = (depths_M + base).expand(model.axes, -1)
    hidden_MD = model.forward(model.embed_tokens(tree.tokens), positions_AM, cache, seen_MK)
    return model.head(hidden_MD), hidden_MD


def told(found: dict[str, Any]) -> str:
    """Format the counts as a line."""
    nodes = found["nodes"]
    shares = ", ".join(f"{name} {found.get(name, 0)}" for name in ("bits", "argmax", "argmax, random head"))
    return f"{found['shape']} {found['way']:>5}: of {nodes} rows equal to a pass of one: {shares} ({found['seconds']} s)"


if __name__ == "__main__":
    sys.exit(main())
