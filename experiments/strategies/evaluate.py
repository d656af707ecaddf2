"""Held-out acceptance of the embedded pairs: every registered pruner and every drafter, captions, the draft `plain`.

Output is greedy and lossless, so a scene's answer is decoded once by the target, in float32, and each setting drafts against
it, which accepts what a real decode accepts (tests/test_evaluate.py). Pruners see the frames as they were drawn; the codec's
signals come from an H.264 encoding of the same frames, made for the scene and thrown away.

    python -m experiments.strategies.evaluate --family qwen2_5_vl --workers 2
    python -m experiments.strategies.evaluate --family qwen2_5_vl --pruner codec --out elsewhere      # some rows alone

One row a scene and setting, in <out>/<family>_caption.jsonl; rows that are there are not made again, so files of several
machines can be put one behind the other, and the rest be made where it can.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from experiments.embedded_pair.evaluate import FAMILIES, FIRST_SCENE, answered, exactly, replay, scene_request
from experiments.strategies.settings import RESULTS, Setting, Timed, drafter_for, groups, left_out, pruners, settings
from specvlm.config import model_folder
from specvlm.decoding.collect import collector_for, gathered
from specvlm.decoding.loop import DecodingGraph, generator_for
from specvlm.models.attention import AttentionCollector
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import CODEC_SIGNALS, DraftContext, Sampling
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, KeepSet, VideoPrompt
from specvlm.video import synthetic

FIRST, SCENES, LIMIT = 128, 64, 200  # scenes 0..127 are embedded_pair's own evaluation
Row = dict[str, Any]


class Pair:
    """Target and draft of a family, in float32. Its towers run once a scene: they are not what is measured."""

    def __init__(self, family: str, device: str) -> None:
        self.family = family
        self.target = load(model_folder(f"embedded:{family}/target"), "float32", device)
        self.draft = load(model_folder(f"embedded:{family}/plain"), "float32", device)

    @torch.inference_mode()
    def scene(self, number: int, wanted: Sequence[Setting]) -> list[Row]:
        used = {name: pruner for name, pruner in pruners().items() if name in {setting.pruner for setting in wanted}}
        with TemporaryDirectory() as folder:
            file = None
            if any(pruner.needs & CODEC_SIGNALS for pruner in used.values()):
                encode(number, file := Path(folder) / "scene.mp4")
            prompt, gold = scene_request(self.target, self.family, "caption", number, file)
            rows: list[Row] = []
            for group in groups(used, self.target.layers):
                mine = [setting for setting in wanted if setting.pruner in group.members]
                more = frozenset().union(*(drafter_for(self.family, s.drafter, prompt).needs for s in mine))
                scene = Scene(self, number, prompt, collector_for(group, self.target, prompt, more))
                rows += [scene.row(setting) for setting in mine]
        exact = exactly(self.target, scene.answer, gold)
        digest = zlib.crc32(json.dumps(scene.answer).encode())  # rows of several machines are of one answer, or not comparable
        about = {"video_tokens": len(prompt.video_index), "torch": torch.__version__}
        return [{"scene": number, "exact": exact, "tokens": len(scene.answer), "answer": digest} | about, *rows]


def encode(number: int, path: Path) -> None:
    from experiments.embedded_pair.clips import write_mp4  # which needs PyAV

    seed = FIRST_SCENE + number
    write_mp4(path, synthetic.render(synthetic.sample_scene(seed, min_objects=2), seed))


class Scene:
    """A prompt whose answer is known, and what one prefill of the target gathered for some pruners."""

    def __init__(self, pair: Pair, number: int, prompt: VideoPrompt, collector: AttentionCollector | None) -> None:
        self.pair, self.number, self.prompt, self.collector = pair, number, prompt, collector
        target, draft = pair.target, pair.draft
        sight = collector.sight if collector is not None else None
        self.features_ND: Tensor = target.features(prompt, sight=sight) if sight else target.features(prompt)
        self.draft_features_ND: Tensor = draft.features(prompt)
        self.answer, self.cache = answered(target, prompt, self.features_ND, collector, LIMIT)

    def row(self, setting: Setting) -> Row:
        pair, prompt = self.pair, self.prompt
        pruner, drafter = Timed(pruners()[setting.pruner]), drafter_for(pair.family, setting.drafter, prompt)
        graph = DecodingGraph(
            pair.target, pair.draft, pruner, drafter, GreedyVerifier(), GenerationOptions(ratio=setting.ratio)
        )
        generator = generator_for(self.number)
        self.cache.length = len(prompt)
        with known_features(pair.draft, self.draft_features_ND):
            keep = graph.select(prompt, self.collector, self.features_ND, generator)
            signals = gathered(drafter.needs, prompt, self.collector, self.features_ND)
            context = DraftContext(
                prompt, keep, self.answer[0], pair.target, pair.draft, self.features_ND, "original", LIMIT, graph.vocabulary,
                Sampling(), generator, signals=signals, cache=self.cache,
            )  # fmt: skip
            session = drafter.start(context)
            with passes_of(pair.target) as target_passes, passes_of(pair.draft) as draft_passes:
                rounds = replay(session, self.answer, self.cache, len(prompt))
        seen = drafter.own_budget(prompt)
        return {
            "scene": self.number,
            "drafter": setting.drafter,
            "pruner": setting.pruner,
            "ratio": setting.ratio,
            "kept": len(keep) if seen is None else seen,
            "frames": frames_of(keep, prompt),
            "select_ms": None if pruner.seconds is None else round(1e3 * pruner.seconds, 3),
            "rounds": len(rounds),
            "accepted": [accepted for accepted, full in rounds if full],
            "draft_passes": len(draft_passes),
            "target_passes": len(target_passes),  # of drafting; every round is one more
        }


def frames_of(keep: KeepSet, prompt: VideoPrompt) -> int:
    """Frames of the grids at least one of whose tokens is kept."""
    count, start = 0, 0
    for grid in prompt.grids:
        inside = keep.index[(keep.index >= start) & (keep.index < start + grid.cells)] - start
        count += len((inside // grid.per_frame).unique())
        start += len(grid)
    return count


@contextmanager
def known_features(draft: VideoLM, features_ND: Tensor) -> Iterator[None]:
    """Inside, the draft's video features are these."""
    draft.features = lambda *_, **__: features_ND  # type: ignore[method-assign]
    try:
        yield
    finally:
        del draft.features  # type: ignore[method-assign]


@contextmanager
def passes_of(model: VideoLM) -> Iterator[list[int]]:
    """Rows of each pass behind a prefill, as they happen inside."""
    counted: list[int] = []
    append_hidden = model.append_hidden

    def counting(tokens_Q: Tensor, *others: Any) -> Tensor:
        counted.append(len(tokens_Q))
        return append_hidden(tokens_Q, *others)

    model.append_hidden = counting  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        del model.append_hidden  # type: ignore[method-assign]


# ---- many scenes -----------------------------------------------------------------------------------------------------

_pair: Pair | None = None


def _start(family: str, device: str) -> None:
    global _pair
    torch.set_num_threads(1)
    _pair = Pair(family, device)


def _scene(job: tuple[int, list[Setting]]) -> list[Row]:
    assert _pair is not None
    return _pair.scene(*job)


def key_of(row: Row) -> tuple[int, Setting]:
    return row["scene"], Setting(row["drafter"], row["pruner"], row["ratio"])


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(family: str, scenes: Sequence[int], wanted: Sequence[Setting], workers: int, device: str, out: Path) -> None:
    """Rows appended as scenes are done; those that are in the file already are not made again."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{family}_caption.jsonl"
    done: dict[int, set[Setting]] = defaultdict(set)
    for row in read(path):
        if "pruner" in row:
            done[row["scene"]].add(key_of(row)[1])
    jobs = [(number, missing) for number in scenes if (missing := [s for s in wanted if s not in done[number]])]
    print(f"{family}: {len(jobs)} scenes, {sum(len(missing) for _, missing in jobs)} rows to make", flush=True)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (family, device)) as pool, path.open("a") as file:
        for count, future in enumerate(as_completed([pool.submit(_scene, job) for job in jobs]), start=1):
            file.write("".join(json.dumps(row) + "\n" for row in future.result()))
            file.flush()
            print(f"{family}: {count} of {len(jobs)} scenes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="both, if none is named")
    parser.add_argument("--first", type=int, default=FIRST, help=f"number of the first scene, its seed less {FIRST_SCENE:,}")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--pruner", action="append", choices=list(pruners()), help="rows of these alone")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for family in args.family or FAMILIES:
        print(*left_out(family), sep="\n", flush=True)
        wanted = [setting for setting in settings(family) if not args.pruner or setting.pruner in args.pruner]
        run(family, range(args.first, args.first + args.scenes), wanted, args.workers, args.device, args.out)


if __name__ == "__main__":
    main()
