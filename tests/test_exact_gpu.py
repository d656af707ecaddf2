"""Passes of many rows and of one row are bit-identical in bfloat16 and float16: kernels and passes.

Answers: test_exact_answers.py.
"""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from test_engine_gpu import HEADS, error, kernels
from torch import nn

from specvlm.engine import engine_for, ops
from specvlm.engine.lean import LeanText, Sight
from specvlm.engine.ops import Weight
from specvlm.models.quantize import quantize
from specvlm.testing.tiny import built
from specvlm.types import DraftTree

pytestmark = pytest.mark.gpu
WIDTHS = [*HEADS, (4, 2, 48), (8, 1, 64)]
LENGTHS = [0, 1, 63, 64, 500, 511, 512, 1000, 4097]
BORDERS = [32_767 - 5, 32_767, 32_768, 65_530, 70_000]  # where chunks double
EARLY = [16_384 - 5, 16_383, 16_384, 16_700]  # where they double first, with 8 KV heads


def random_parents(count: int, seed: int) -> tuple[int, ...]:
    """Alternate between deep and wide trees."""
    chance = random.Random(seed)
    return (-1, *(chance.randrange(max(0, node - (3 if seed % 2 else node)), node) for node in range(1, count)))


def tables_of(parents: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    tree = DraftTree(torch.zeros(len(parents)), parents)
    ways = [tree.way_to(node) for node in range(len(parents))]
    longest = max(map(len, ways))
    table = [[*way, *[0] * (longest - len(way))] for way in ways]
    return torch.tensor(tree.depths, device="cuda"), torch.tensor(table, device="cuda")


def rows(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def alone(node, q, keys, values, base, ways, capacity, **options):
    """Run a row in a pass of its own, with its path laid out after the shared slots, in a cache of another capacity."""
    own = ways[node].tolist()
    moved = []
    for store in (keys, values):
        other = torch.zeros(len(store), capacity, store.shape[-1], dtype=store.dtype, device="cuda")
        other[:, :base] = store[:, :base]
        other[:, base : base + len(own)] = store[:, [base + row for row in own]]
        moved.append(other)
    zero = torch.zeros(1, dtype=torch.int64, device="cuda")
    last = torch.tensor([base + len(own) - 1], device="cuda")
    return kernels.path_attention(q[node : node + 1], *moved, last, zero, zero[:, None], 0.1, **options)


def differing(heads, count, base, dtype=torch.bfloat16, capacity=None, seed=0, **options) -> tuple[int, float]:
    """Count rows of a random tree that differ from a pass of one; also return the largest error against plain torch."""
    many, kv, width = heads
    depths, ways = tables_of(random_parents(count, seed))
    keys, values = (rows(kv, base + count + 30, width, dtype=dtype, seed=seed + n) for n in (1, 2))
    q, at = rows(count, many, width, dtype=dtype, seed=seed + 3), torch.tensor([base], device="cuda")
    found = kernels.path_attention(q, keys, values, at, depths, ways, 0.1, **options)
    right = ops.path_attention(q, keys, values, at, depths, ways, 0.1)
    most = capacity or base + 2 * count + 700
    cut = [way[: int(depth) + 1] for way, depth in zip(ways, depths, strict=True)]
    same = [torch.equal(found[n], alone(n, q, keys, values, base, cut, most, **options)[0]) for n in range(count)]
    return same.count(False), error(found, right)


@pytest.mark.parametrize("heads", WIDTHS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 6, 26, 33, 64])
@torch.inference_mode()
def test_a_rows_attention_depends_on_its_path_alone(heads, count):
    for seed, base in enumerate(LENGTHS):
        wrong, far = differing(heads, count, base, seed=seed)
        assert not wrong and far < 6e-3, base


@pytest.mark.parametrize("base", BORDERS)
@torch.inference_mode()
def test_so_it_is_where_chunks_double(base):
    for seed, count in enumerate((1, 6, 26)):
        wrong, far = differing((8, 2, 128), count, base, seed=seed)
        assert not wrong and far < 1e-2


@pytest.mark.parametrize("base", [*EARLY, *BORDERS[3:]])
@pytest.mark.parametrize("heads", [(40, 8, 128), (64, 8, 128)], ids=str)
@torch.inference_mode()
def test_so_it_is_where_chunks_of_many_heads_double(heads, base):
    """Up to 64 query rows of a KV head, and more, of which the programs start in another order."""
    for seed, count in enumerate((1, 6, 26)):
        wrong, far = differing(heads, count, base, seed=seed)
        assert not wrong and far < 1e-2


@torch.inference_mode()
def test_so_it_is_in_float16_and_over_131_072_keys():
    for dtype, base in ((torch.float16, 1000), (torch.float16, 511), (torch.bfloat16, 131_072 - 3)):
        wrong, far = differing((10, 2, 128), 8, base, dtype)
        assert not wrong and far < 1e-2


@pytest.mark.parametrize("base", [100, 511, 1020])
@torch.inference_mode()
def test_so_it_is_along_a_path_of_two_hundred_rows(base):
    """Rows come in slices, as for trees of more nodes than a pass can take."""
    parents = (-1, *range(199))
    depths, ways = tables_of(parents)
    keys, values = (rows(2, base + 230, 128, dtype=torch.bfloat16, seed=n) for n in (1, 2))
    q, at = rows(200, 8, 128, dtype=torch.bfloat16, seed=3), torch.tensor([base], device="cuda")
    for start in (0, 64, 128, 192):
        here = slice(start, start + 64)
        found = kernels.path_attention(q[here], keys, values, at, depths[here], ways[here], 0.1)
        cut = [way[: int(depth) + 1] for way, depth in zip(ways[here], depths[here], strict=True)]
        assert all(torch.equal(found[n], alone(n, q[here], keys, values, base, cut, base + 900)[0]) for n in range(len(found)))


# ---- planted faults: each changes bits -------------------------------------------------------------------------------


@torch.inference_mode()
def test_another_chunk_is_seen():
    """Sanity check: another chunk length changes the bits."""
    found = []
    for chunk in (512, 1024):
        keys, values = (rows(2, 3000, 128, dtype=torch.bfloat16, seed=n) for n in (1, 2))
        q, at = rows(1, 8, 128, dtype=torch.bfloat16, seed=3), torch.tensor([2900], device="cuda")
        zero = torch.zeros(1, dtype=torch.int64, device="cuda")
        found.append(kernels.path_attention(q, keys, values, at, zero, zero[:, None], 0.1, chunk=chunk))
    assert not torch.equal(*found) and error(*found) < 6e-3


@pytest.mark.parametrize("name", ["row tile of 16", "border by base", "one more part"])
@torch.inference_mode()
def test_a_planted_fault_is_seen(name, monkeypatch):
    from specvlm.engine.kernels import flash_decoding, path_decoding

    q, (keys, values) = (
        rows(26, 40, 128, dtype=torch.bfloat16, seed=1),
        (rows(8, 3000, 128, dtype=torch.bfloat16, seed=n) for n in (2, 3)),
    )
    depths, ways = tables_of(random_parents(26, 1))
    at = torch.tensor([2900], device="cuda")
    right = kernels.path_attention(q, keys, values, at, depths, ways, 0.1)[:1]
    if name == "row tile of 16":
        monkeypatch.setattr(path_decoding, "ROWS", 16)
        wrong = kernels.path_attention(q[:1], keys, values, at, depths[:1], ways[:1], 0.1)
    elif name == "border by base":  # what is seen starts one slot later
        wrong = kernels.path_attention(
            q[:1], keys[:, 1:].contiguous(), values[:, 1:].contiguous(), at - 1, depths[:1], ways[:1], 0.1
        )
    else:  # key parts that go by the number of rows, as those of the drafters' kernel do
        seen = torch.eye(26, device="cuda", dtype=torch.int8)
        many, one = (flash_decoding.attention(q[:n], keys, values, at, seen[:n, :n].contiguous(), 0.1) for n in (26, 1))
        right, wrong = many[:1], one
    assert not torch.equal(right, wrong)


# ---- the other steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "fp8", "int8", "int4"])
@torch.inference_mode()
def test_a_row_of_a_linear_layer_is_that_of_a_pass_of_one(kind):
    layers = [nn.Linear(1024, n, bias=False, device="cuda", dtype=torch.bfloat16) for n in (512, 128, 200, 21_000)]
    layers = layers if kind == "full" else [quantize(layer, kind) for layer in layers]
    weights, ones = tuple(map(Weight.of, layers)), torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    x = rows(128, 1024, dtype=torch.bfloat16, seed=1)

    def steps(count, first):
        total, y = kernels.add_norm(x[first : first + count].contiguous(), None, ones, 1e-6, kind)
        found = [kernels.linear(y, weights[:3]), kernels.linear(y, weights[3:], whole=torch.bfloat16)]
        return [total[None], *found, kernels.gated(y, weights[3], weights[3], torch.bfloat16)[None]]

    for count in (2, 6, 16, 17, 26, 32, 33, 64, 65, 104, 128):
        for first in (0, 128 - count):
            for place in {0, count - 1}:
                pairs = zip(steps(count, first), steps(1, first + place), strict=True)
                assert all(torch.equal(many[:, place], one[:, 0]) for many, one in pairs), (count, first, place)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_trees_rows_are_those_of_sequential_steps(family, dtype):
    """Logits, and keys and values of all layers, for random trees after prompts of several lengths."""
    lm = small(family, dtype)
    lean = LeanText(lm, kernels)
    for seed, (count, base) in enumerate(((26, 40), (64, 511), (7, 500), (33, 1023), (2, 0), (64, 1500))):
        many, one = (lm.new_cache(base + 200 + 64 * extra) for extra in (0, 1))
        for cache in (many, one):
            for store in cache.stores:
                for tensor in store:
                    start = rows(*tensor.shape[:3], base, tensor.shape[-1], dtype=dtype, seed=seed)
                    tensor[:, :, :, :base] = start
        parents = random_parents(count, seed)
        tokens = torch.randint(0, lm.vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).cuda()
        depths, ways = tables_of(parents)
        offset = torch.zeros(1, dtype=torch.int64, device="cuda")
        at = torch.tensor([base], device="cuda")
        logits = lean.logits(lean(tokens, depths, 0, Sight(None, ways, depths), at, offset, many))
        tree, zero = DraftTree(tokens, parents), torch.zeros(1, dtype=torch.int64, device="cuda")
        for leaf in [node for node in range(count) if node not in parents]:
            for depth, node in enumerate(tree.way_to(leaf)):
                step = lean(tokens[node : node + 1], zero, 0, Sight(None, zero[:, None], zero), at + depth, offset, one)
                assert torch.equal(lean.logits(step)[0], logits[node])
                for layer in range(lm.layers):
                    pairs = zip(many.layer(layer), one.layer(layer), strict=True)
                    assert all(torch.equal(a[0, :, base + node], b[0, :, base + depth]) for a, b in pairs)


@pytest.mark.parametrize("count", [65, 129, 300])
@torch.inference_mode()
def test_a_tree_of_more_nodes_than_a_pass_has_goes_in_slices(count):
    """Through the engine, head included: a pass of 300 rows would not fit a processor's shared memory."""
    lm, engine = small("qwen2_5_vl", torch.bfloat16), engine_for("graphs", "cuda")
    many, one = (lm.new_cache(900 + extra) for extra in (0, 100))
    for cache in (many, one):
        for store in cache.stores:
            for tensor in store:
                tensor[:, :, :, :500] = rows(*tensor.shape[:3], 500, tensor.shape[-1], dtype=torch.bfloat16, seed=1)
        cache.length = 500
    tokens = torch.randint(0, lm.vocabulary, (count,), generator=torch.Generator().manual_seed(1)).cuda()
    tree = DraftTree(tokens, random_parents(count, 1))
    found = engine.finish(engine.tree_rows(lm, tree, many)).logits()
    many.length = 500
    assert torch.equal(engine.rescore(lm, tree, many), found)
    path = tree.way_to(count - 1)
    for depth, node in enumerate(path):
        one.length = 500 + depth
        single = DraftTree(tokens[node : node + 1], (-1,))
        assert torch.equal(engine.finish(engine.tree_rows(lm, single, one)).logits()[0], found[node])


@pytest.mark.parametrize("count", [3, 64, 150])
@torch.inference_mode()
def test_rows_of_a_question_are_those_of_passes_of_one(count):
    """Logits, keys and values behind the video: of the whole question, token by token, and behind a kept video."""
    from specvlm.config import model_folder
    from specvlm.models.load import load
    from specvlm.video.clips import find_clip
    from specvlm.video.video import probe, read_video

    lm, engine = load(model_folder("embedded:qwen2_5_vl/target"), "bfloat16", "cuda"), engine_for("graphs", "cuda")
    clip = find_clip("synthetic_1")
    video = lm.prompt("describe the video.", [read_video(clip, **lm.sampling(probe(clip)))])
    words = video.tokens[video.text :].repeat(count)[:count]

    def asked(question: torch.Tensor):
        """Ask something else about the same video."""
        before = video.tokens[: int(video.video_index[0]) + 1]
        return lm.expand([*before.tolist(), *question.tolist()], video.grids, video.videos)

    def filled(prompt, cache):
        return engine.prefill(lm, prompt, (lm.embed(prompt, lm.features(prompt)), lm.positions(prompt)), cache)

    prompt, other = asked(words), asked(words.flip(0)[: count // 2 + 1])
    many, one, kept = (lm.new_cache(len(prompt) + extra) for extra in (0, 100, 30))
    logits = filled(prompt, many)
    filled(other, kept)
    filled(prompt, one)
    one.length = prompt.text
    for token in prompt.tokens[prompt.text :].split(1):
        last = engine.append(lm, token, one)
    kept.length = prompt.text
    behind = engine.append(lm, prompt.tokens[prompt.text :], kept)[-1:]
    assert torch.equal(last, logits) and torch.equal(behind, logits)
    for layer in range(lm.layers):
        for stores in zip(*(cache.layer(layer) for cache in (many, one, kept)), strict=True):
            first, *rest = (store[0, :, : len(prompt)] for store in stores)
            assert all(torch.equal(first, store) for store in rest)


def small(family: str, dtype: torch.dtype):
    """Make a tiny model, as wide as the kernels need."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    return tiny.wrap(built(family, 97, **sizes).to(dtype).cuda())
