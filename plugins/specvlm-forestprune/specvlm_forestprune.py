"""ForestPrune: grow token trees over time, and keep their roots first.

Shape suffixes: F frames, P tokens of one frame, C of these that enter the forest, M = F C tokens of the forest, E of
them in earlier frames, G frames at a time, R roots, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.errors import check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import at_once, written
from specvlm.types import KeepSet, TokenGrid

NEIGHBOUR, TEMPERATURE, STEPS = 0.5, 0.03, 5  # of the graph within a frame
NO_EDGE = -5000.0  # logit of a missing edge
LISTED = 32  # similar earlier roots remembered per root


@dataclass(frozen=True)
class ForestPrunePruner(Pruner):
    """Keep the roots of token trees that grow over time, the most alike merged, then the nodes closest to the roots.

    ForestPrune (arXiv 2603.22911), after the authors' released code, llava/model/llava_arch_forest.py of
    github.com/luminousllsa/ForestPrune. Only the abstract of the paper was available to us, so no equation is cited.

    1. Within a frame: A = softmax over a row of cos(x_i, x_j) / 0.03 where that cosine is at least 0.5, and 0
       elsewhere. The best `intra` of the tokens by (|x| A^5)_j / (neighbours of j) enter the forest.
    2. Frame by frame, a token joins a tree that has a token in an earlier frame with a cosine of at least `similarity`,
       at most 1 - `spatial` away in either direction, with the frame 1 high and 1 wide. It takes the tree of the most
       similar such token; ties go to the nearest one, then to the oldest tree. It becomes a child of the tree's newest
       token, so its depth is the number of earlier frames in which the tree has tokens. Other tokens become roots of
       new trees.
    3. If there are more roots than the budget, the root most similar to an earlier root is merged into that one,
       repeatedly, until the budget is met. Otherwise tokens are kept by depth, then by frame.

    The defaults are those of the scripts for MLVU and MVBench; the script for Video-MME has similarity=0.8 spatial=0.5.

    Deviations: it acts on the drafter's context. If the budget exceeds `intra` of the tokens, more tokens of each frame
    enter the forest, so that it is met; the code then keeps fewer. At least one token of each frame enters. The
    grid may be any rectangle (a square in the code). The code sorts by depth + frame / 1000, which mixes the two in
    long videos. Ties, which are arbitrary in the code, go to the earlier token. Computed in float32 or wider; the code
    uses the model's dtype.

    Signals: features. Cost: F P^2 D within frames, M^2 D / 2 for the trees, and R^2 D if roots are merged, in slices,
    with a loop over the roots on the host; M D numbers are copied. Limits: newline tokens come last; each video of a
    prompt is treated on its own; P^2 numbers of one frame are held at once.

    Attributes:
        similarity: Least cosine for joining a tree, -1 to 1.
        spatial: 1 minus the largest distance for joining a tree, 0 to 1.
        intra: Share of a frame's tokens that enter the forest, 0 to 1.

    Raises:
        UserError: A field is out of range.
    """

    name = "forestprune"
    paper = "ForestPrune (arXiv 2603.22911)"
    fidelity = "adapted"
    needs = frozenset({"features"})
    similarity: float = 0.9
    spatial: float = 0.8
    intra: float = 0.5

    def __post_init__(self) -> None:
        check_range("forestprune: similarity", self.similarity, -1, 1)
        check_range("forestprune: spatial", self.spatial, 0, 1)
        check_range("forestprune: intra", self.intra, 0, 1)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,), grid = ctx.by_frame(ctx.features), ctx.grid
        count = max(1, round(written(self.intra) * grid.per_frame), math.ceil(ctx.budget / grid.frames))
        cell_FC = centrality(x_FPD).sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        x_FCD = x_FPD.gather(1, cell_FC[..., None].expand(-1, -1, x_FPD.shape[-1]))
        unit_FCD = normalize(x_FCD.to(torch.promote_types(x_FPD.dtype, torch.float32)), dim=-1)
        depth_M = self.depths(unit_FCD, cell_FC, grid).flatten()
        root_R = (depth_M == 0).nonzero().flatten()
        if len(root_R) > ctx.budget:
            kept = root_R[apart(unit_FCD.flatten(0, 1)[root_R], ctx.budget)]
        else:
            kept = depth_M.sort(stable=True).indices[: ctx.budget]
        token_FC = cell_FC + grid.per_frame * torch.arange(grid.frames, device=cell_FC.device)[:, None]
        return KeepSet(token_FC.flatten()[kept].sort().values, ctx.total)

    def depths(self, unit_FCD: Tensor, cell_FC: Tensor, grid: TokenGrid) -> Tensor:
        """(F, C) depth of every token in its tree.

        A tree has the number of its root, so that older trees have lower numbers.
        """
        frames, count = cell_FC.shape
        tree_FC = torch.arange(frames * count, device=cell_FC.device).view(frames, count)
        depth_FC, newest_M = torch.zeros_like(tree_FC), torch.zeros_like(tree_FC).flatten()
        for frame in range(1, frames):
            past = unit_FCD[:frame].flatten(0, 1), cell_FC[:frame].flatten(), tree_FC[:frame].flatten()
            step = max(1, at_once(cell_FC.device) // (frame * count))
            parts = zip(unit_FCD[frame].split(step), cell_FC[frame].split(step), strict=True)
            oldest_C = torch.cat([self.tree(*past, unit, cell, grid) for unit, cell in parts])
            joins_C = oldest_C >= 0
            tree_FC[frame] = torch.where(joins_C, oldest_C, tree_FC[frame])
            depth_FC[frame] = torch.where(joins_C, newest_M[tree_FC[frame]] + 1, 0)
            newest_M[tree_FC[frame]] = depth_FC[frame]
        return depth_FC

    def tree(self, unit_ED: Tensor, cell_E: Tensor, tree_E: Tensor, unit_CD: Tensor, cell_C: Tensor, grid: TokenGrid) -> Tensor:
        """(C,) tree that each token joins; -1 if it fits none."""
        cosine_EC, distance_EC = unit_ED @ unit_CD.T, distance(cell_E, cell_C, grid)
        # 1e-9: a distance of exactly 1 - spatial counts, however it was rounded.
        fits_EC = (cosine_EC >= self.similarity) & (distance_EC <= 1 - self.spatial + 1e-9)
        fits_EC &= cosine_EC == cosine_EC.masked_fill(~fits_EC, float("-inf")).amax(0)
        fits_EC &= distance_EC == distance_EC.masked_fill(~fits_EC, float("inf")).amin(0)
        none = torch.iinfo(tree_E.dtype).max
        oldest_C = tree_E[:, None].where(fits_EC, none).amin(0)
        return oldest_C.masked_fill(oldest_C == none, -1)


def centrality(x_FPD: Tensor) -> Tensor:
    """(F, P) norm that a token collects in STEPS steps along the frame's graph, divided by its number of neighbours."""
    wide = torch.promote_types(x_FPD.dtype, torch.float32)
    scores = []
    for part in x_FPD.split(max(1, at_once(x_FPD.device) // max(x_FPD.shape[1] ** 2, x_FPD[0].numel(), 1))):
        x = part.to(wide)
        unit = normalize(x, dim=-1)
        cosine_GPP = unit @ unit.mT
        graph_GPP = (cosine_GPP / TEMPERATURE).masked_fill(cosine_GPP < NEIGHBOUR, NO_EDGE).softmax(-1)
        collected_G1P = x.norm(dim=-1)[:, None]
        for _ in range(STEPS):
            collected_G1P = collected_G1P @ graph_GPP
        scores.append(collected_G1P[:, 0] / (graph_GPP > 0).sum(-1))
    return torch.cat(scores)


def distance(cell_E: Tensor, cell_C: Tensor, grid: TokenGrid) -> Tensor:
    """(E, C) distance of two cells: the larger one of both directions, in heights and widths of the frame.

    Computed from differences of integers, so that equal distances compare equal.
    """
    down_EC = (cell_E[:, None] // grid.width - cell_C // grid.width).abs().double() / max(grid.height - 1, 1)
    across_EC = (cell_E[:, None] % grid.width - cell_C % grid.width).abs().double() / max(grid.width - 1, 1)
    return torch.maximum(down_EC, across_EC)


def apart(unit_RD: Tensor, keep: int) -> Tensor:
    """Remove the root most similar to an earlier remaining one until `keep` are left. Returns those, ascending.

    Ties remove the earlier root. The result is exact, although only `LISTED` similarities per root are held: a list
    that runs out is rebuilt from the remaining roots.
    """
    left = [True] * len(unit_RD)
    nearest = earlier(unit_RD)  # per root, the most similar one last
    heap = [(-near[-1][0], root) for root, near in enumerate(nearest) if near]
    heapify(heap)
    gone = 0
    while gone < len(unit_RD) - keep:
        _, root = heappop(heap)
        near = nearest[root]
        if left[near[-1][1]]:
            left[root] = False
            gone += 1
            continue
        while near and not left[near[-1][1]]:
            near.pop()
        if not near and any(left[:root]):
            others = torch.tensor([other for other in range(root) if left[other]], device=unit_RD.device)
            best = (unit_RD[others] @ unit_RD[root]).topk(min(LISTED, len(others)))
            near.extend(zip(best.values.tolist()[::-1], others[best.indices].tolist()[::-1], strict=True))
        if near:
            heappush(heap, (-near[-1][0], root))
    return torch.tensor([root for root, there in enumerate(left) if there], device=unit_RD.device)


def earlier(unit_RD: Tensor) -> list[list[tuple[float, int]]]:
    """List the most similar earlier roots of each root, at most `LISTED`, as (cosine, root), the best last."""
    found: list[list[tuple[float, int]]] = []
    place_R = torch.arange(len(unit_RD), device=unit_RD.device)
    for rows in place_R.split(max(1, at_once(unit_RD.device) // max(len(unit_RD), 1))):
        cosine = (unit_RD[rows] @ unit_RD.T).masked_fill(place_R >= rows[:, None], float("-inf"))
        best = cosine.topk(min(LISTED, len(unit_RD)), dim=1)
        for row, values, others in zip(rows.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            near = [(value, other) for value, other in zip(values, others, strict=True) if other < row]
            found.append(near[::-1])
    return found


@hookimpl
def specvlm_strategies() -> list[type]:
    return [ForestPrunePruner]
