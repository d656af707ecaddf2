"""Held-out acceptance of the embedded pairs: every pruner, every ratio, both drafts, captions and questions.

Output is greedy and lossless, so a scene's answer is decoded once by the target; each setting then drafts against that
known answer, which accepts exactly what the target would (tests/test_evaluate.py shows it). Rows: one per scene, draft
and setting, in results/<family>_<kind>.jsonl; `report` turns them into the tables of RESULTS.md.

    python -m experiments.embedded_pair.evaluate run --family qwen2_5_vl --kind caption --scenes 128 --workers 2
    python -m experiments.embedded_pair.evaluate report
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, generator_for
from specvlm.engine import Engine
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import KVCache
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import DraftContext, DraftSession, Pruner, Sampling
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.fastv import FastVPruner
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.random import RandomPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.pruners.verifier_attention import VerifierAttentionPruner
from specvlm.strategies.pruners.window import WindowPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, GenerationOptions, Verdict, VideoPrompt
from specvlm.video import synthetic
from specvlm.video.video import Clip

RESULTS = Path(__file__).parent / "results"
ENGINE = Engine()
FAMILIES = ("qwen2_5_vl", "llava_onevision")  # with evidence of every strategy too
DRAFTS = {**dict.fromkeys(FAMILIES, ("plain", "aware")), "qwen3_vl": ("plain",)}
RATIOS = (0.5, 0.75, 0.9, 0.95)
AWARE_SCENES = 32  # `aware` is near 5 whatever is pruned: fewer scenes tell that well enough
FIRST_SCENE = 77_000_000  # held out: the seeds of training, 1e6 (1 + seed) + step, ended far below
PRUNERS: dict[str, Pruner] = {
    "uniform": UniformPruner(),
    "random": RandomPruner(),
    "window front": WindowPruner("front"),
    "window middle": WindowPruner("middle"),
    "window back": WindowPruner("back"),
    "verifier_attention": VerifierAttentionPruner(),
    "two_stage": TwoStagePruner(),
    "two_stage mass=0.2": TwoStagePruner(mass=0.2),
    "two_stage spread=frame": TwoStagePruner(spread="frame"),
    "fastv": FastVPruner(),
    "fastv source=draft": FastVPruner(layer=1, source="draft"),
}


def settings() -> Iterator[tuple[str, Pruner, float, str]]:
    """name, pruner, ratio, positions of the drafter."""
    yield "full context", NonePruner(), 0.0, "original"
    yield "text only", UniformPruner(), 1.0, "original"
    for ratio in RATIOS:
        for name, pruner in PRUNERS.items():
            yield name, pruner, ratio, "original"
    yield "two_stage positions=reindexed", TwoStagePruner(), 0.9, "reindexed"


def scene_request(lm: VideoLM, family: str, kind: str, number: int, file: Path | None = None) -> tuple[VideoPrompt, str]:
    """A held-out scene as a prompt, and its gold answer. Captions: at least two objects, as in the prototype's figures.

    file: a video file of the scene, which the prompt then names as its origin, for signals of the stream; the frames are
    those of the scene itself.
    """
    seed = FIRST_SCENE + number
    scene = synthetic.sample_scene(seed, min_objects=2)
    if kind == "caption":
        question, gold = random.Random(seed).choice(synthetic.CAPTION_QUESTIONS), synthetic.caption(scene)
    else:
        question, gold = random.Random(seed).choice(synthetic.questions(scene, seed))
    frames = torch.from_numpy(synthetic.render(scene, seed)).permute(0, 3, 1, 2)
    step = 2 if family == "llava_onevision" else 1  # it takes one frame a second
    index = tuple(range(0, len(frames), step))
    times = tuple(place / synthetic.FPS for place in index)
    index, source = index if file else (), str(file or f"scene {seed}")
    clip = Clip(frames[::step].contiguous(), times, synthetic.FPS / step, source, len(frames), synthetic.FPS, index)
    return lm.prompt(question, [clip]), gold


def answered(
    target: VideoLM, prompt: VideoPrompt, features_ND: Tensor, collector: AttentionCollector | None, limit: int
) -> tuple[list[int], KVCache]:
    """The target's own greedy answer, stop id included, and its cache with all of that but the last token."""
    cache, embeds_SD = target.new_cache(len(prompt) + limit), target.embed(prompt, features_ND)
    if collector is not None:
        collector.weigh_rows(embeds_SD[prompt.cut :], features_ND, target.ranks)
    hidden_D = target.prefill(embeds_SD, target.positions(prompt), cache, prompt.cut, collector)
    answer = [int(target.head(hidden_D).argmax())]
    while answer[-1] not in target.stop_ids and len(answer) < limit:
        answer.append(int(ENGINE.append(target, torch.tensor(answer[-1:]), cache)[0].argmax()))
    return answer, cache


def exactly(target: VideoLM, answer: list[int], gold: str) -> bool:
    """Is it the gold answer, word by word?"""
    text = target.tokenizer.decode(answer, skip_special_tokens=True)
    return text.split() == target.tokenizer.decode(target.tokenizer(gold)["input_ids"], skip_special_tokens=True).split()


def replay(session: DraftSession, answer: list[int], cache: KVCache | None = None, start: int = 0) -> list[tuple[int, bool]]:
    """Rounds of a drafter against a known greedy answer (its first token came from the prefill): (accepted, full).

    cache, start: the target's, with the prompt's `start` slots and the answer, of which each round sees what it had then; for
    a session that reads it.
    """
    at, verdict, rounds = 0, None, []
    while at + 1 < len(answer):
        if cache is not None:
            cache.length = start + at
        tree = ENGINE.finish(session.propose(verdict))
        path = longest_match(tree, answer[at + 1 :])
        end = at + len(path)  # the bonus token's place
        full = end < len(answer)
        rounds.append((len(path) - 1, full))
        if not full:
            break
        verdict, at = Verdict(tuple(path), answer[end]), end
    return rounds


def longest_match(tree: DraftTree, following: list[int]) -> list[int]:
    """Nodes, root first, whose tokens are the beginning of `following`."""
    tokens, path = tree.tokens.tolist(), [0]
    for wanted in following:
        child = next((n for n in range(1, len(tree)) if tree.parents[n] == path[-1] and tokens[n] == wanted), None)
        if child is None:
            break
        path.append(child)
    return path


class Family:
    """The target and the drafts of one family, in float32, one thread."""

    def __init__(self, family: str, shape: str) -> None:
        self.family = family
        self.target = load(model_folder(f"embedded:{family}/target"), "float32")
        self.drafts = {name: load(model_folder(f"embedded:{family}/{name}"), "float32") for name in DRAFTS[family]}
        self.drafter = TreeDrafter(shape)

    @torch.inference_mode()
    def scene(self, kind: str, number: int, limit: int = 200) -> list[dict[str, Any]]:
        target = self.target
        prompt, gold = scene_request(target, self.family, kind, number)
        collector = AttentionCollector(prompt.video_index, rows=True, last_row=True)
        features = target.features(prompt)
        answer, _ = answered(target, prompt, features, collector, limit)
        rows = [{"scene": number, "exact": exactly(target, answer, gold), "tokens": len(answer)}]
        for draft_name, draft in self.drafts.items():
            if draft_name == "aware" and number >= AWARE_SCENES:
                continue
            draft_features = draft.features(prompt)
            draft.features = lambda *_, known=draft_features: known  # the tower is not what is measured here
            for name, pruner, ratio, positions in settings():
                graph = DecodingGraph(
                    target, draft, pruner, self.drafter, GreedyVerifier(), GenerationOptions(ratio=ratio, positions=positions)
                )
                generator = generator_for(number)
                keep = graph.select(prompt, collector, features, generator)
                session = self.drafter.start(
                    DraftContext(
                        prompt, keep, answer[0], target, draft, None, positions, limit, graph.vocabulary, Sampling(), generator
                    )
                )
                rounds = replay(session, answer)
                full = [accepted for accepted, whole in rounds if whole]
                row = {"scene": number, "draft": draft_name, "setting": name, "ratio": ratio, "kept": len(keep)}
                rows.append(row | {"rounds": len(rounds), "accepted": full})
            del draft.features
        return rows


_family: Family | None = None


def _start(family: str, shape: str) -> None:
    global _family
    torch.set_num_threads(1)
    _family = Family(family, shape)


def _scene(job: tuple[str, int]) -> list[dict[str, Any]]:
    assert _family is not None
    return _family.scene(*job)


def run(family: str, kind: str, scenes: int, workers: int, shape: str, out: Path) -> None:
    """Rows appended as scenes finish; scenes already in the file are not done again."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{family}_{kind}.jsonl"
    done = {json.loads(line)["scene"] for line in path.read_text().splitlines()} if path.is_file() else set()
    jobs = [(kind, number) for number in range(scenes) if number not in done]
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (family, shape)) as pool, path.open("a") as file:
        for count, rows in enumerate(pool.map(_scene, jobs), start=1):
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            if count % 8 == 0:
                print(f"{family} {kind}: {count} of {len(jobs)} scenes", flush=True)


# ---- report ----------------------------------------------------------------------------------------------------------


def per_scene(rows: list[dict[str, Any]]) -> dict[tuple[str, str, float], dict[int, float]]:
    """(draft, setting, ratio) → scene → accepted per round, of scenes with a round that was not cut short."""
    table: dict[tuple[str, str, float], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.get("accepted"):
            table[row["draft"], row["setting"], row["ratio"]][row["scene"]] = sum(row["accepted"]) / len(row["accepted"])
    return table


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over scenes with its 95 % bootstrap interval."""
    from specvlm.report.statistics import mean_of  # needs SciPy, which decoding does not

    found = mean_of(values)
    assert found and found.low is not None and found.high is not None, f"{len(values)} scenes have no interval"
    return found.value, found.low, found.high


def tables(family: str, kind: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    scenes = [row for row in rows if "exact" in row]
    exact = sum(row["exact"] for row in scenes)
    length = sum(row["tokens"] for row in scenes) / len(scenes)
    yield f"## {family}, {kind}s\n"
    yield f"Target: {exact} of {len(scenes)} exact ({exact / len(scenes):.1%}), {length:.0f} tokens on average.\n"
    table = per_scene(rows)
    for draft in DRAFTS[family]:
        names = list(dict.fromkeys(setting for d, setting, _ in table if d == draft))
        ratios = sorted({ratio for d, _, ratio in table if d == draft})
        yield f"### draft `{draft}`\n"
        yield "| setting | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |"
        yield "|---|" + "---|" * len(ratios)
        for name in names:
            cells = []
            for ratio in ratios:
                values = table.get((draft, name, ratio))
                mean, low, high = interval(list(values.values())) if values else (0.0, 0.0, 0.0)
                cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]" if values else "")
            yield f"| {name} | " + " | ".join(cells) + " |"
        yield ""
        yield from paired(table, draft)


def paired(table: dict[tuple[str, str, float], dict[int, float]], draft: str, ratio: float = 0.9) -> Iterator[str]:
    """Scene by scene against uniform: the differences' mean and interval, which the cells' own intervals overstate."""
    base = table[draft, "uniform", ratio]
    parts = []
    for name in PRUNERS:
        mine = table[draft, name, ratio]
        mean, low, high = interval([mine[scene] - base[scene] for scene in mine.keys() & base.keys()])
        if name != "uniform":
            parts.append(f"{name} {mean:+.2f} [{low:+.2f}, {high:+.2f}]")
    yield f"Against uniform at {ratio:g}, paired by scene: {'; '.join(parts)}.\n"


def report(out: Path) -> None:
    lines = ["# Accepted per round, held-out scenes\n", HEADER]
    for family in DRAFTS:
        for kind in ("caption", "question"):
            path = out / f"{family}_{kind}.jsonl"
            if path.is_file():
                lines += tables(family, kind, [json.loads(line) for line in path.read_text().splitlines()])
    (out / "RESULTS.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


HEADER = """Synthetic scenes, greedy, the paper's 25-node tree, float32. A cell is the mean over scenes of a scene's accepted
guesses per round (bonus token not counted, rounds cut short by the end of the answer left out; at most 5), with its
95 % bootstrap interval over scenes. Columns are the share of video tokens dropped. `plain` never saw pruned input in
training, `aware` did, and is measured on the first 32 scenes only. Captions and questions are of the same scenes.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--family", choices=DRAFTS, default="qwen2_5_vl")
    parser.add_argument("--kind", choices=("caption", "question"), default="caption")
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shape", default="paper")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.action == "report":
        report(args.out)
    else:
        run(args.family, args.kind, args.scenes, args.workers, args.shape, args.out)


if __name__ == "__main__":
    main()
