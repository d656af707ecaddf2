"""What DeepStack does in the embedded Qwen3-VL target: its exact answers with the added rows set to zero, all or one level.

Scenes are those of `evaluate.py`: held out, a caption and a question each. Nothing is trained anew, so this shows what the
trained target relies on, not what a target trained without DeepStack would do.

    python -m experiments.embedded_pair.deepstack --scenes 64 --workers 2
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from experiments.embedded_pair.evaluate import RESULTS, answered, exactly, scene_request
from specvlm.config import model_folder
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.types import Features

FAMILY, LIMIT = "qwen3_vl", 160  # tokens of an answer; the longest gold one has 141
KINDS = ("caption", "question")


def variants(levels: int) -> dict[str, tuple[int, ...]]:
    """Levels whose rows are set to zero, by name."""
    each = {f"without level {level + 1}": (level,) for level in range(levels)}
    return {"whole": ()} | each | {"without DeepStack": tuple(range(levels))}


def without(features: Features, levels: tuple[int, ...]) -> Features:
    """Features whose rows of these levels are zero."""
    added = features.added.clone()
    added[:, list(levels)] = 0
    return Features(features.rows, added)


_target: VideoLM | None = None


def _start(folder: str) -> None:
    global _target
    torch.set_num_threads(1)
    _target = load(model_folder(folder), "float32")


@torch.inference_mode()
def scene(job: tuple[str, int]) -> list[dict[str, Any]]:
    """Rows of one held-out scene: is the answer exact, and how many of its first tokens are those of the whole target."""
    kind, number = job
    assert _target is not None
    prompt, gold = scene_request(_target, FAMILY, kind, number)
    features, rows, whole = _target.features(prompt), list[dict[str, Any]](), list[int]()
    assert isinstance(features, Features)
    for name, levels in variants(_target.levels).items():
        answer, _ = answered(_target, prompt, without(features, levels), None, LIMIT)
        whole = whole or answer
        same = next((at for at, pair in enumerate(zip(answer, whole, strict=False)) if pair[0] != pair[1]), len(whole))
        row = {"scene": number, "kind": kind, "variant": name, "exact": exactly(_target, answer, gold)}
        rows.append(row | {"same_tokens": min(same, len(answer)), "tokens": len(whole)})
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| target | exact captions | exact questions | tokens before the first that differs: captions | questions |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys(row["variant"] for row in rows):
        its = [[row for row in rows if (row["variant"], row["kind"]) == (name, kind)] for kind in KINDS]
        exact = [f"{sum(row['exact'] for row in mine)} of {len(mine)}" for mine in its]
        same = [f"{sum(row['same_tokens'] for row in mine)} of {sum(row['tokens'] for row in mine)}" for mine in its]
        yield f"| {' | '.join([name, *exact, *same])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=f"embedded:{FAMILY}/target")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    jobs = [(kind, number) for kind in KINDS for number in range(args.scenes)]
    with ProcessPoolExecutor(args.workers, get_context("spawn"), _start, (args.target,)) as pool:
        rows = [row for found in pool.map(scene, jobs) for row in found]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{FAMILY}_deepstack.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "\n".join(["# DeepStack in the embedded Qwen3-VL target\n", *(__doc__ or "").splitlines()[2:4], "", *table(rows)])
    (args.out / "DEEPSTACK.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
