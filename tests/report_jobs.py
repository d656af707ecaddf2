"""Job folders as a sweep leaves them, with invented figures, for tests of what reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from omegaconf import OmegaConf

from specvlm.results import metrics

CONFIG = {
    "pruner": {"name": "uniform"},
    "drafter": {"name": "tree", "shape": "chain:5"},
    "verifier": {"name": "greedy"},
    "dataset": {"name": "synthetic", "scenes": 4},
    "target": {"path": "embedded:qwen2_5_vl/target"},
    "draft": {"path": "embedded:qwen2_5_vl/plain"},
    "ratio": 0.9,
    "video": "synthetic_1",
    "question": None,
    "mrope": "hf",
    "frames": None,
    "fps": None,
    "max_pixels": None,
    "reader": "decord",
}


def row(index: int, accepted: float = 3.0, ours: float = 1.0, alone: float = 2.0, kept: int | None = 102, **changes) -> dict:
    """Make a sample's row. ours, alone: decoding seconds; adds 0.5 s before the first token and 0.2 s for reading."""
    figures = {
        "verdict": "identical",
        "text": f"answer {index}",
        "token_ids": [1, 2, 3],
        "kept_tokens": kept,
        "video_tokens": 1024,
        "prompt_tokens": 1046,
        "new_tokens": 100,
        "rounds": 25,
        "accepted_per_round": accepted,
        "tokens_per_round": accepted + 1,
        "drafted_per_round": 5.0,
        "acceptance_by_depth": [0.9, 0.7, 0.6, 0.5, 0.3],
        "time_to_first_token_s": 0.5,
        "drafter_start_s": 0.1,
        "decode_s": ours,
        "end_to_end_s": ours + 0.6,
        "tokens_per_second": 99 / (ours + 0.1),
        "file_to_first_token_s": 0.7,
        "file_to_last_token_s": ours + 0.8,
        "baseline_file_to_first_token_s": 0.7,
        "baseline_file_to_last_token_s": alone + 0.7,
        "speedup_file_to_last_token": (alone + 0.7) / (ours + 0.8),
        "baseline_decode_s": alone,
        "baseline_end_to_end_s": alone + 0.5,
        "speedup_decode": alone / ours,
        "speedup_end_to_end": (alone + 0.5) / (ours + 0.6),
        "times_s": {
            "video": 0.2,
            "embed": 0.3,
            "prefill": 0.2,
            "prune": 0.01,
            "draft_prefill": 0.09,
            "draft": 0.4,
            "verify": 0.6,
        },
        "peak_memory_bytes": 5 * 2**30 + index,
        "capture_s": 0.0,
    }
    whose = {"sample": f"scene-{index:04d}", "index": index, "dataset": "synthetic", "split": "held_out", "version": "1"}
    return dict.fromkeys(metrics.KEYS) | whose | {"status": "ok", "reason": None, "answer": None} | figures | changes


def scattered(seed: int, gain: float = 0.0, count: int = 8, **changes) -> list[dict]:
    """Make samples that differ much from each other, and are alike in every job but for `gain`."""
    hard, dice = random.Random(0), random.Random(seed)
    found = []
    for index in range(count):
        ease = hard.uniform(1, 4)
        accepted, ours = ease + gain + dice.uniform(-0.1, 0.1), 4 / (1 + ease + gain)
        found.append(row(index, accepted, ours, hard.uniform(2, 3), **changes))
    return found


def job(folder: Path, rows: list[dict], steps: dict[str, list[dict]] | None = None, **changes) -> Path:
    """Write a job folder. changes: of the configuration, with "__" for the dots of keys."""
    config = OmegaConf.create(CONFIG)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    lines = ({"sample": sample} | step for sample, some in (steps or {}).items() for step in some)
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(metrics.totals(rows, len(rows))))
    return folder


def sweep(place: Path) -> Path:
    """Write a sweep of three pruners at two ratios; at each, two_stage is the best and random the worst."""
    for ratio, kept in ((0.5, 512), (0.9, 102)):
        for number, (pruner, gain) in enumerate((("random", -0.4), ("two_stage", 0.5), ("uniform", 0.0))):
            lines = scattered(number, gain - ratio, kept=kept)
            job(place / f"{pruner}_{ratio}", lines, pruner__name=pruner, ratio=ratio)
    return place
