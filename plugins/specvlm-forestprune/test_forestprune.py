"""ForestPrune equals the method in plain loops: the graph within a frame, trees, merged roots, an exact budget."""

import math

import pytest
import specvlm_forestprune
import torch
from rounding import assert_same_sums
from specvlm_forestprune import ForestPrunePruner, apart, centrality, distance
from torch.nn.functional import normalize, one_hot

from specvlm.errors import UserError
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"similarity": 0.3, "spatial": 0.0}, {"intra": 0.0}, {"intra": 1.0}], ids=str)
def test_contract(fields):
    check_pruner(ForestPrunePruner, **fields)


def select(x_FPD, grid, budget, **fields):
    return ForestPrunePruner(**fields).select(PruneContext((grid,), budget, {"features": x_FPD.flatten(0, 1)})).index.tolist()


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def unit(a):
    return [x / max(math.hypot(*a), 1e-12) for x in a]


def naive_centrality(frame):
    """The fifth power of the graph's matrix, number by number."""
    size, units = range(len(frame)), [unit(token) for token in frame]
    graph = []
    for i in size:
        cosines = [dot(units[i], units[j]) for j in size]
        weights = [math.exp((c - 1) / 0.03) if c >= 0.5 else 0.0 for c in cosines]
        graph.append([w / math.fsum(weights) for w in weights])
    power = graph
    for _ in range(4):
        power = [[math.fsum(power[i][k] * graph[k][j] for k in size) for j in size] for i in size]
    lengths = [math.hypot(*token) for token in frame]
    return [math.fsum(lengths[i] * power[i][j] for i in size) / sum(w > 0 for w in graph[j]) for j in size]


def naive(video, grid, budget, central, similarity=0.9, spatial=0.8, intra=0.5):
    """Trees as lists of nodes with parents, the newest node of each as its tail."""
    count = max(1, round(grid.per_frame * intra), math.ceil(budget / grid.frames))
    units = [[unit(token) for token in tokens] for tokens in video]
    nodes, parent, trees = [], [], []  # a node: (frame, cell)
    for frame, tokens in enumerate(video):
        chosen = sorted(sorted(range(len(tokens)), key=lambda cell: (-central[frame][cell], cell))[:count])
        grown = []
        for cell in chosen:
            best = None
            for number, tree in enumerate(trees):
                for node in tree:
                    _, other = nodes[node]
                    cosine = dot(units[frame][cell], units[nodes[node][0]][other])
                    down = abs(cell // grid.width - other // grid.width) / max(grid.height - 1, 1)
                    across = abs(cell % grid.width - other % grid.width) / max(grid.width - 1, 1)
                    if cosine >= similarity and max(down, across) <= 1 - spatial + 1e-9:
                        best = min(best or (9,), (-cosine, max(down, across), number))
            grown.append((cell, None if best is None else best[2]))
        tails = [tree[-1] for tree in trees]
        for cell, number in grown:
            nodes.append((frame, cell))
            parent.append(None if number is None else tails[number])
            if number is None:
                trees.append([len(nodes) - 1])
            else:
                trees[number].append(len(nodes) - 1)
    roots = [node for node, above in enumerate(parent) if above is None]
    cosines = {(a, b): dot(*(units[nodes[node][0]][nodes[node][1]] for node in (a, b))) for a in roots for b in roots if a < b}
    while len(roots) > budget:
        _, child, above = min((-cosines[a, b], b, a) for b in roots for a in roots if a < b)
        parent[child] = above
        roots.remove(child)
    depth = []
    for above in parent:
        depth.append(0 if above is None else depth[above] + 1)
    order = sorted(range(len(nodes)), key=lambda node: (depth[node], nodes[node][0], node))
    return sorted(nodes[node][0] * grid.per_frame + nodes[node][1] for node in order[:budget])


def videos():
    """Videos in float64: random, static, alternating scenes, slow change, and equal tokens with exact sums."""
    generator = torch.Generator().manual_seed(0)
    for number in range(50):
        grid = TokenGrid(1 + number % 6, 1 + number % 2, 2 + number % 3)
        shape = (grid.frames, grid.per_frame)
        x = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
        kind = ("random", "static", "alternating", "slow", "equal")[number // 10]
        if kind == "static":
            x = x[:1].expand_as(x)
        elif kind == "alternating":
            x = x[[t % 2 if grid.frames > 1 else 0 for t in range(grid.frames)]]
        elif kind == "slow":
            x = x[:1] + 0.3 * x
        elif kind == "equal":
            at_most_two = torch.arange(grid.per_frame) // 2
            x = one_hot((at_most_two + torch.randint(0, 3, (grid.frames, 1), generator=generator)) % 5, 5).double()
        yield pytest.param(x.contiguous(), grid, id=f"{kind}{number}")


@pytest.mark.parametrize(("x_FPD", "grid"), list(videos()))
def test_it_equals_the_method_in_plain_loops(x_FPD, grid):
    video = x_FPD.tolist()
    central = [naive_centrality(frame) for frame in video]
    for budget in {1, 2, *range(3, grid.cells, 7), grid.cells - 1}:
        for fields in ({}, {"similarity": 0.5, "spatial": 0.4, "intra": 0.8}):
            assert select(x_FPD, grid, budget, **fields) == naive(video, grid, budget, central, **fields), (budget, fields)


def test_the_graph_of_a_frame_is_that_of_the_formula():
    """Frames of similar tokens, so that every step along the graph has an effect."""
    generator = torch.Generator().manual_seed(4)
    x_FPD = 1 + 0.3 * torch.randn(5, 7, 5, generator=generator, dtype=torch.float64)
    found = torch.tensor([naive_centrality(frame) for frame in x_FPD.tolist()], dtype=torch.float64)
    # The error of a cosine (inner product and two norms of width 5) counts 1 / 0.03 times in a weight, once per step.
    assert_same_sums(centrality(x_FPD), found, 5 * (2 * 7 + round(3 * 5 / 0.03)), float(x_FPD.norm(dim=-1).sum(1).max()))
    assert not torch.equal(centrality(x_FPD).argsort(1), x_FPD.norm(dim=-1).argsort(1))


def test_of_equally_similar_trees_the_nearest_is_joined_and_of_these_the_oldest():
    x_FCD = torch.eye(3)[torch.tensor([[0, 1, 0, 1, 0], [0, 2, 2, 2, 1]])]
    grid = TokenGrid(2, 1, 5)
    args = x_FCD[0], torch.arange(5), torch.tensor([10, 11, 12, 13, 14]), x_FCD[1], torch.tensor([4, 0, 1, 2, 2])
    assert ForestPrunePruner(spatial=0.0).tree(*args, grid).tolist() == [14, -1, -1, -1, 11]


def test_depth_grows_with_the_tree_and_not_with_the_nearest_node():
    """A, A far away, then A at the first place: a grandchild, since the tree's newest token is its parent."""
    x_FCD = torch.eye(4)[torch.tensor([[0, 1], [2, 0], [0, 3]])]
    depth = ForestPrunePruner(spatial=0.0).depths(x_FCD, torch.arange(2).expand(3, 2), TokenGrid(3, 1, 2))
    assert depth.tolist() == [[0, 0], [0, 1], [2, 0]]


@pytest.mark.parametrize("listed", [1, 2, 32])
def test_slices_change_nothing(listed, monkeypatch):
    x_FPD = torch.randn(6, 6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fields, budgets = {"similarity": 0.5, "spatial": 0.0, "intra": 1.0}, range(1, 36, 5)
    whole = [select(x_FPD, TokenGrid(6, 2, 3), budget, **fields) for budget in budgets]
    monkeypatch.setattr(specvlm_forestprune, "LISTED", listed)
    monkeypatch.setattr(specvlm_forestprune, "at_once", lambda device: 20)
    assert [select(x_FPD, TokenGrid(6, 2, 3), budget, **fields) for budget in budgets] == whole


@pytest.mark.parametrize("listed", [1, 2, 32])
def test_roots_are_merged_as_by_a_search_of_all_pairs_however_few_are_remembered(monkeypatch, listed):
    monkeypatch.setattr(specvlm_forestprune, "LISTED", listed)
    monkeypatch.setattr(specvlm_forestprune, "at_once", lambda device: 100)
    units = normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    rows, left = units.tolist(), list(range(30))
    for keep in range(29, 0, -1):
        left.remove(min((-dot(rows[a], rows[b]), b) for b in left for a in left if a < b)[1])
        assert apart(units, keep).tolist() == left


def test_a_static_video_is_its_first_frame_then_the_second():
    """The roots are the first frame's tokens, and every later frame is one level deeper."""
    x_FPD = torch.eye(4)[None].expand(5, 4, 4)
    assert select(x_FPD, TokenGrid(5, 2, 2), 4, intra=1.0) == [0, 1, 2, 3]
    assert select(x_FPD, TokenGrid(5, 2, 2), 6, intra=1.0) == [0, 1, 2, 3, 4, 5]


def test_a_token_that_moved_too_far_is_a_new_root():
    """An object moves from the left edge to the right; with four cells, the next one is 1/3 of the width away."""
    x_FPD = torch.eye(8)[torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])]
    grid, cell_FC = TokenGrid(2, 1, 4), torch.arange(4).expand(2, 4)
    near, far = (ForestPrunePruner(spatial=spatial).depths(x_FPD, cell_FC, grid) for spatial in (0.0, 0.5))
    assert near.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]] and far.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_distance_of_just_the_limit_counts_and_the_larger_direction_decides():
    grid = TokenGrid(2, 6, 3)
    assert distance(torch.tensor([0]), torch.tensor([3, 1, 4]), grid).tolist() == [[0.2, 0.5, 0.5]]
    for row in range(5):
        unit_FCD = torch.ones(2, 1, 1)
        cells = torch.tensor([[3 * row], [3 * row + 3]])
        assert ForestPrunePruner(spatial=0.8).depths(unit_FCD, cells, grid).tolist() == [[0], [1]]


def test_the_depth_counts_the_frames_in_which_the_tree_has_tokens():
    """A, B, A, A and A: two tokens of one frame are siblings, and the gap adds no depth."""
    x_FCD = torch.eye(5)[torch.tensor([[0, 1], [2, 3], [0, 0], [0, 4]])]
    depth = ForestPrunePruner(spatial=0.0).depths(x_FCD, torch.arange(2).expand(4, 2), TokenGrid(4, 1, 2))
    assert depth.tolist() == [[0, 0], [0, 0], [1, 1], [2, 0]]


@pytest.mark.parametrize("intra", [0.0, 0.5, 1.0])
def test_the_budget_is_met_exactly(intra):
    x_FPD = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(2))
    for budget in range(1, 30):
        assert len(select(x_FPD, TokenGrid(5, 2, 3), budget, intra=intra)) == budget


@pytest.mark.parametrize("field", ["similarity", "spatial", "intra"])
def test_fields_out_of_range_are_refused(field):
    with pytest.raises(UserError, match=field):
        ForestPrunePruner(**{field: 1.1})


def test_a_token_of_just_the_similarity_joins():
    unit_FCD = torch.tensor([[[1.0, 1, 1, 1]], [[1, 1, 1, -1]]]) / 2  # of cosine 0.5, exact in float32
    cells, grid = torch.zeros(2, 1, dtype=torch.int64), TokenGrid(2, 1, 1)
    depths = [ForestPrunePruner(similarity=least).depths(unit_FCD, cells, grid).tolist() for least in (0.5, 0.51)]
    assert depths == [[[0], [1]], [[0], [0]]]


def test_by_default_a_token_may_move_by_a_fifth_of_the_frame():
    unit_FCD, cells = torch.ones(2, 1, 1), torch.tensor([[0], [1]])
    assert [ForestPrunePruner().depths(unit_FCD, cells, TokenGrid(2, 1, width))[1].item() for width in (6, 5)] == [1, 0]


def test_the_share_of_a_frame_is_that_of_the_number_as_written():
    """0.575 of 100 are 57.5, and round to 58; in floats they are less."""
    x_FPD = torch.eye(100)[None].expand(2, 100, 100)
    assert max(select(x_FPD, TokenGrid(2, 10, 10), 58, intra=0.575)) < 100
