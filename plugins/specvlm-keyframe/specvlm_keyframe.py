"""Keep key frames in full, and nothing of the others."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from specvlm.errors import check_choice
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import adjacent_cosine, cuts, spans
from specvlm.types import KeepSet

PICKS = ("first", "medoid")


@dataclass(frozen=True)
class KeyframePruner(Pruner):
    """Keep one frame of every scene in full, and leave the rest to the text. Inspired by CMVC (arXiv 2408.08093).

    The video is cut into ceil(B / P) scenes, for a budget B and P tokens per frame, at the least similar neighbouring
    frames (cosine of mean features; ties go to the earlier cut), as METok (arXiv 2506.02850) cuts its events. If the
    budget does not hold all key frames whole, the one of the shortest scene (of equally short ones the last) is thinned
    out evenly.

    Deviations: CMVC codes a video as key frames and text, and a trained model generates the frames between. Only the
    idea is used that key frames and text are enough. CMVC, too, finds key frames by cosine, of CLIP features and to the
    last key frame; here their number is given, so all scenes are cut at once.

    Signals: features. Cost: one pass over N D, and a loop over scenes. Limits: the drafter does not see what happens
    between key frames.

    Attributes:
        pick: The key frame of a scene: `first`, as in codecs, or `medoid`, whose mean feature has the highest cosine to
            the scene's mean (ties go to the earlier frame).

    Raises:
        UserError: `pick` is neither.
    """

    name = "keyframe"
    paper = "CMVC (arXiv 2408.08093)"
    fidelity = "inspired by"
    needs = frozenset({"features"})
    pick: str = "first"

    def __post_init__(self) -> None:
        check_choice("keyframe: pick", self.pick, PICKS)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,), per_frame = ctx.by_frame(ctx.features), ctx.grid.per_frame
        frame_FD = x_FPD.float().mean(1)
        wanted = -(-ctx.budget // per_frame)
        scenes = spans(cuts(adjacent_cosine(frame_FD), least=wanted))
        if self.pick == "medoid":
            middles = [a + int(cosine_similarity(frame_FD[a:b], frame_FD[a:b].mean(0), dim=-1).argmax()) for a, b in scenes]
        else:
            middles = [start for start, _ in scenes]
        by_length = sorted(range(wanted), key=lambda s: scenes[s][0] - scenes[s][1])
        frame_K = torch.tensor([middles[s] for s in by_length], device=ctx.device)
        index = (frame_K[:, None] * per_frame + torch.arange(per_frame, device=ctx.device)).flatten()
        whole = (wanted - 1) * per_frame
        rest = KeepSet.uniform(per_frame, ctx.budget - whole, ctx.device).index
        return KeepSet(torch.cat([index[:whole], index[whole:][rest]]).sort().values, ctx.total)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [KeyframePruner]
