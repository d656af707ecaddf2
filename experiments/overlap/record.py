"""Record the outcomes of checks on the embedded pairs: guesses accepted, and the rank of the target's correction.

Output is greedy and lossless, so a scene's answer is decoded once by the target, and each setting drafts against it,
with all passes ahead. One row per scene and setting in outcomes.jsonl, rounds as [accepted, rank] pairs: the number of
the target's token among the draft's likeliest corrections after the last accepted guess, from 0, or -1.

    python -m experiments.overlap.record --family qwen2_5_vl --scenes 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.embedded_pair.evaluate import answered, longest_match, scene_request
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, generator_for
from specvlm.engine import Engine
from specvlm.models.attention import AttentionCollector
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import DraftContext, Pruner, Sampling
from specvlm.strategies.drafters.overlap import OverlapDrafter, OverlapSession
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, Verdict

OUT = Path(__file__).with_name("outcomes.jsonl")
PRUNERS: dict[str, Pruner] = {"two_stage mass=0.2": TwoStagePruner(mass=0.2), "uniform": UniformPruner()}
# Corrections per node. A chain follows all of them; of a tree's outcomes only the likeliest fit into a pass.
SHAPES = {"chain:5": 4, "chain:9": 4, "paper": 2}
RATIO, LIMIT = 0.9, 120
ENGINE = Engine()


def outcomes(session: OverlapSession, answer: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the outcome of each round of a known answer that is not cut by its end."""
    at, verdict = 0, None
    while True:
        tree = ENGINE.finish(session.propose(verdict))
        work = session.guess_on(lambda: False)
        assert work is not None
        ENGINE.finish(work)
        path = longest_match(tree, list(answer[at + 1 :]))
        at += len(path)
        if at >= len(answer):
            return
        verdict = Verdict(tuple(path), answer[at])
        number = session.outcome(verdict)
        yield verdict.accepted, -1 if number is None else session.plan.outcomes[number][1]


def rows(target: VideoLM, draft: VideoLM, family: str, scene: int, shapes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one scene."""
    prompt, _ = scene_request(target, family, "caption", scene)
    collector = AttentionCollector(prompt.video_index, rows=True, last_row=True)
    features = target.features(prompt)
    answer, _ = answered(target, prompt, features, collector, LIMIT)
    for name, pruner in PRUNERS.items():
        for shape in shapes:
            drafter, generator = OverlapDrafter(shape, corrections=SHAPES[shape], ahead=129), generator_for(scene)
            graph = DecodingGraph(target, draft, pruner, drafter, GreedyVerifier(), GenerationOptions(ratio=RATIO))
            keep = graph.select(prompt, collector, features, generator)
            context = DraftContext(
                prompt, keep, answer[0], target, draft, None, "original", LIMIT, graph.vocabulary, Sampling(), generator
            )
            session = drafter.start(context)
            yield {
                "family": family,
                "scene": scene,
                "pruner": name,
                "shape": shape,
                "tokens": len(answer),
                "rounds": list(outcomes(session, answer)),
            }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target, draft = (load(model_folder(f"embedded:{options.family}/{name}"), "float32") for name in ("target", "plain"))
    for scene in range(options.first, options.first + options.scenes):
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(target, draft, options.family, scene, options.shapes))


if __name__ == "__main__":
    main()
