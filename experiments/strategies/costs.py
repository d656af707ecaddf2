"""What selection costs: every pruner over a grid of 16,384 tokens, on signals invented in the shapes and types it would meet.

    python -m experiments.strategies.costs --device cuda
    python -m experiments.strategies.costs --device cpu --threads 1

One video of 64 frames of 16 x 16 tokens, features of 3,584 numbers, ratio 0.9. Two contents, since what a pruner loops over
goes by what it sees: "shots", eight of eight frames, in which most cells hardly change, and "noise", in which all frames
differ. `select` alone, the median of several calls behind one that warms up, and that first one, too; row_weights where there
is such a rule; and how many operations it takes, each of them a launch on a GPU. Signals lie where the target's prefill leaves
them; those of a codec come from the file, whose reading is not counted. Rows are appended to results/costs.jsonl; of rows for
the same thing the last one counts. A pruner that fails is a row.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.gpu_pair.__main__ import commit_of
from experiments.strategies.settings import RATIO, RESULTS, Unmerged, pruners, weighs
from specvlm.decoding.loop import generator_for
from specvlm.results import metrics
from specvlm.strategies import PruneContext, Pruner
from specvlm.toolkit import segments
from specvlm.types import KeepSet, TokenGrid

GRID, WIDTH = TokenGrid(64, 16, 16), 3584
LAYERS, KV_HEADS, KEY_WIDTH, TEXT = 64, 8, 80, 48  # of Qwen2.5-VL-32B; its tower's keys; rows of text
CONTENTS = ("shots", "noise")
SHOT = 8  # frames
Row = dict[str, Any]


def features(content: str, grid: TokenGrid, width: int, generator: torch.Generator) -> Tensor:
    """(N, D) float32. shots: seven cells in ten keep a cosine near 0.95 to the frame before, the others are always new; all of
    a shot share something, as features do, so that its frames' means are alike.
    """
    noise_FPD = torch.randn(grid.frames, grid.per_frame, width, generator=generator)
    if content == "shots":
        shots = -(-grid.frames // SHOT)
        scene_SPD = torch.randn(shots, grid.per_frame, width, generator=generator)
        scene_FPD = scene_SPD.repeat_interleave(SHOT, 0)[: grid.frames]
        still_P = torch.rand(grid.per_frame, generator=generator) < 0.7
        shared_F1D = torch.randn(shots, 1, width, generator=generator).repeat_interleave(SHOT, 0)[: grid.frames]
        noise_FPD = torch.where(still_P[:, None], scene_FPD + 0.23 * noise_FPD, noise_FPD) + 0.5 * shared_F1D
    return noise_FPD.flatten(0, 1)


def signals_for(pruner: Pruner, content: str, grid: TokenGrid, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every signal it needs, on the CPU: states in the model's dtype, all that is computed on the side in float32."""
    total, generator = len(grid), generator_for(0)
    states = {"features", "hidden", "hidden_text", "final_norm"}
    shapes: dict[str, tuple[int, ...]] = {
        "verifier_attention_per_layer": (LAYERS, total),
        "verifier_attention_per_kv_head": (LAYERS, KV_HEADS, total),
        "verifier_attention_last_row": (LAYERS, total),
        "verifier_attention_weighted": (LAYERS, total),
        "draft_attention_last_row": (max(pruner.draft_layers, 1), total),
        "vision_keys": (total, KEY_WIDTH),
        "text_similarity": (2, total),
        "hidden_text": (TEXT, width),
        "final_norm": (width,),
        "key_norm_text": (TEXT,),
    }
    found = {}
    for name in sorted(pruner.needs):
        if name in ("features", "hidden"):
            signal = features(content, grid, width, generator)
        elif name in ("hidden_text", "vision_keys", "text_similarity"):
            signal = torch.randn(shapes[name], generator=generator)
        else:  # attention and the like: positive, a few much larger than the others
            signal = torch.rand(shapes.get(name, (total,)), generator=generator).pow(-0.5)
        found[name] = signal.to(dtype) if name in states else signal
    if "intra" in found:
        found["intra"] = (torch.arange(grid.frames) % SHOT == 0).float().repeat_interleave(grid.per_frame)
    return found


class Operations(TorchDispatchMode):
    """Counts what is computed inside, views not: on a GPU about as many kernels are launched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        view = returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        self.count += not view
        return func(*args, **(kwargs or {}))


def operations_of(call: Callable[[], object], device: torch.device) -> int:
    """On a CPU in the pieces that a GPU would take, so that the count is about that wherever it is made."""
    pieces = segments.at_once(torch.device("cuda")) if device.type == "cpu" else segments.ELEMENTS
    with patch.object(segments, "ELEMENTS", pieces), Operations() as operations:
        call()
    return operations.count


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """ms of the first call, and the median ms of `repeats` more."""
    ms = []
    for _ in range(1 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ms.append(1e3 * (perf_counter() - start))
    return ms[0], median(ms[1:])


@torch.inference_mode()
def measure(
    pruner: Pruner,
    content: str,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    grid: TokenGrid = GRID,
    width: int = WIDTH,
) -> Row:
    """Figures of one pruner, or the error it ended with."""
    try:
        signals = {name: x.to(device) for name, x in signals_for(pruner, content, grid, width, dtype).items()}
        kept: list[KeepSet] = []

        def select() -> None:
            context = PruneContext((grid,), KeepSet.budget(len(grid), RATIO), signals, generator_for(0), device)
            kept[:] = [pruner.select(context)]

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        first, middle = timed(select, device, repeats)
        row: Row = {"first_ms": round(first, 3), "ms": round(middle, 3)}
        row |= {"operations": operations_of(select, device), "kept": len(kept[0]), "merges": kept[0].pool is not None}
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        if weighs(pruner):
            text_TD, features_ND = torch.randn(TEXT, width).to(device, dtype), torch.randn(len(grid), width).to(device, dtype)
            row["row_weights_ms"] = round(timed(lambda: pruner.row_weights(text_TD, features_ND), device, repeats)[1], 3)
        return row
    except Exception as error:  # one that fails must not end the others
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the states: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 0 for all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pruner", action="append", choices=list(pruners()), help="rows of these alone")
    parser.add_argument("--commit", default="", help="where git cannot say it")
    parser.add_argument("--out", type=Path, default=RESULTS / "costs.jsonl")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    about = {
        "machine": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": len(GRID),
        "width": WIDTH,
        "ratio": RATIO,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or commit_of(),
        "versions": {k: v for k, v in metrics.versions().items() if k in ("python", "torch", "transformers")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, pruner in pruners().items():
        if pruner.keeps_all or isinstance(pruner, Unmerged) or (args.pruner and name not in args.pruner):
            continue
        for content in CONTENTS if pruner.needs & {"features", "hidden"} else CONTENTS[:1]:
            row = about | {"pruner": name, "content": content} | measure(pruner, content, device, dtype, args.repeats)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name:40} {content:6} {row.get('ms', row.get('error'))}", flush=True)
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
