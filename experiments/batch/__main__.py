"""Measure many requests in one pass, with random weights of published shapes and given acceptance, on one GPU.

Each request has its own context and its own caches, filled with random numbers. Which guesses are right is drawn per
request and round. Baseline: as many requests, joined too, by the target alone. What is measured is a list of named cells,
or one of the other options; models are built once for all cells that share them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from experiments.batch.bench import Bench, measured, passes_of
from experiments.batch.cells import CELLS, Cell, chosen, missing
from experiments.batch.hugging_face import generated
from experiments.gpu_pair.__main__ import commit_of
from experiments.gpu_pair.measure import copy_bandwidth, synchronize
from experiments.gpu_pair.models import wrap_of
from experiments.gpu_pair.shapes import build, prompt_of
from specvlm.engine import engine_for
from specvlm.models import memory_plan
from specvlm.models.video_lm import VideoLM
from specvlm.results import metrics
from specvlm.types import VideoPrompt

OUT = Path(__file__).with_name("results.jsonl")


def line_of(row: dict[str, Any]) -> str:
    """Write a row's main figures in a line."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())


def parser() -> argparse.ArgumentParser:
    """Make the command line."""
    made = argparse.ArgumentParser(prog="python -m experiments.batch", description=__doc__)
    made.add_argument("--cells", default="", help="cells to measure, by name or pattern, with commas: 16k-b8,4k-*")
    made.add_argument("--list", action="store_true", help="name the cells, and say which of them the file has; run nothing")
    made.add_argument("--shape", default="qwen2_5_vl_32b_7b", help="pair of experiments.gpu_pair (default: %(default)s)")
    made.add_argument("--requests", default="1,8", help="numbers of requests, with commas (default: %(default)s)")
    made.add_argument(
        "--video-tokens", default="16384", help="video tokens; several with commas go round (default: %(default)s)"
    )
    made.add_argument("--ratios", default="0.9,0", help="shares of the video tokens to drop (default: %(default)s)")
    made.add_argument("--trees", default="chain:4,chain:5", help="trees to draft, or auto (default: %(default)s)")
    made.add_argument("--chance", type=float, default=0.8, help="chance that a best guess is right (default: %(default)s)")
    made.add_argument("--draft-weights", default="bf16", help="bf16, fp8, int8 or int4 (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=30, help="measured rounds (default: %(default)s)")
    made.add_argument("--commit", default="", help="if git is not available")
    made.add_argument("--out", type=Path, default=OUT, help="file to append a line of JSON per row to")
    return made


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Return the cells to measure: those named, or one for each number of requests."""
    if args.cells:
        return chosen(args.cells)
    sizes, ratios = tuple(map(int, args.video_tokens.split(","))), tuple(map(float, args.ratios.split(",")))
    more = args.chance, tuple(args.trees.split(",")), ratios, args.draft_weights
    return [Cell("", args.shape, int(count), sizes, *more) for count in args.requests.split(",")]


def models_of(cell: Cell, device: torch.device, dtype: torch.dtype) -> list[VideoLM]:
    """Build the target, and the draft if the cell needs one."""
    shapes = [(cell.pair.target, "bf16"), (cell.pair.draft, cell.draft_weights)][: 1 if cell.hugging_face else 2]
    with torch.inference_mode():
        return [build(shape, wrap_of(shape.family), device, dtype, weights) for shape, weights in shapes if shape is not None]


def rows_of(cell: Cell, models: Sequence[VideoLM], rounds: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Measure a cell. One that runs out of memory says so in its last row."""
    device, sizes, target = models[0].device, cell.video_tokens, cell.pair.target
    prompts: list[VideoPrompt] = [
        prompt_of(models[0], target, sizes[number % len(sizes)], cell.hugging_face, number) for number in range(cell.requests)
    ]
    memory_plan.reset_peak(device)
    try:
        if cell.hugging_face:
            with torch.inference_mode():
                yield {"part": "hugging_face", **generated(models[0], prompts, rounds, 4)}
            return
        bench = Bench(models[0], models[1], engine_for("auto", device), rounds)
        yield from measured(bench, prompts, cell, bandwidth)
        print(json.dumps(passes_of(bench.engine, cell.requests)), flush=True)
    except RuntimeError as error:
        if not memory_plan.ran_out(error):
            raise
        yield {"part": "out_of_memory", "reason": str(error).partition(chr(10))[0]}


def main(words: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    args = parser().parse_args(words)
    lines = args.out.read_text().splitlines() if args.out.is_file() else []
    if args.list:
        names = {json.loads(line).get("cell", "") for line in lines}
        print("\n".join(f"{cell.name:16} {'measured' if cell.name in names else 'not run'}" for cell in CELLS))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)["gb_per_s"] * 1e9
    about = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "commit": args.commit or commit_of(),
        "versions": {k: v for k, v in metrics.versions().items() if k in ("python", "torch", "transformers")},
        "weights": "random weights of the true shapes",
        "gb_per_s": round(bandwidth / 1e9),
    }
    for _, group in groupby(cells_of(args), key=lambda cell: cell.models):
        cells = list(group)
        models = models_of(cells[0], device, dtype)
        for cell in cells:
            of_cell = {
                "cell": cell.name,
                "shape": cell.shape,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "acceptance": f"given: each best guess right with probability {cell.chance}",
                "chance": cell.chance,
                "video_tokens": ",".join(map(str, cell.video_tokens)),
                "draft_weights": cell.draft_weights,
                "layers": cell.layers,
                "stagger": cell.stagger,
                "requests": cell.requests,
            }
            for row in rows_of(cell, models, args.rounds, bandwidth):
                whole = about | of_cell | {"peak_gib": memory_plan.peak_bytes(device) / 2**30} | row
                print(cell.name, line_of(row), flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(whole) + "\n")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del models
        gc.collect()
    synchronize(device)
    if args.cells:
        done = {json.loads(line).get("cell", "") for line in args.out.read_text().splitlines()}
        print("not run:", ", ".join(missing([*done])) or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
