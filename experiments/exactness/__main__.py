"""Count how often speculation changes bits or tokens in 16 bits: at published shapes, and with the embedded pairs.

    python -m experiments.exactness                      # everything, on one GPU of 96 GB or more
    python -m experiments.exactness nodes --shapes qwen2_5_vl_7b_3b --ways ours,mask,sdpa
    python -m experiments.exactness decodes --shapes qwen2_5_vl_7b_3b
    python -m experiments.exactness answers --footage FOLDER --workers 8
    python -m experiments.exactness report               # README.md's table from results.jsonl

Over two GPUs: `decodes --shapes llava_onevision_72b_7b --parallel layers`, or `torchrun --nproc-per-node 2 -m
experiments.exactness decodes … --parallel tensor`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from experiments.exactness import answers, decodes, nodes, report
from experiments.gpu_pair.__main__ import commit_of, free
from experiments.gpu_pair.agreement import settle
from experiments.gpu_pair.models import wrap_of
from experiments.gpu_pair.shapes import build, pair_of
from experiments.gpu_pair.spread import stages_for
from specvlm.engine import engine_for
from specvlm.models.video_lm import VideoLM
from specvlm.parallel import torchrun
from specvlm.parallel.ranks import SINGLE, ProcessGroup, joined

Row = dict[str, Any]
PARTS = ("nodes", "decodes", "answers")
PROMPTS = {"qwen2_5_vl_7b_3b": 30}  # of `decodes`; 10 of larger targets


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m experiments.exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=(*PARTS, "report", []), help="default: nodes decodes answers")
    parser.add_argument("--shapes", default="qwen2_5_vl_7b_3b,qwen2_5_vl_32b_7b", help="pairs of gpu_pair (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--video-tokens", type=int, default=16_384, help="of the longest prompt (%(default)s)")
    parser.add_argument("--nodes", type=int, default=2500, help="nodes: minimum per shape and arithmetic (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first tree or prompt (%(default)s)")
    parser.add_argument("--ways", default="ours", help=f"nodes: arithmetics, of {','.join(nodes.WAYS)} (%(default)s)")
    parser.add_argument("--prompts", type=int, help="decodes: number of prompts (30 for the 7B, 10 for others)")
    parser.add_argument("--tokens", type=int, default=256, help="decodes: tokens of an answer (%(default)s)")
    parser.add_argument("--control", type=int, default=0, help="decodes: prompts that Hugging Face's modules decode too")
    parser.add_argument("--parallel", default="", choices=("", "layers", "tensor"), help="decodes: split over several GPUs")
    parser.add_argument("--scenes", type=int, default=32, help="answers: held-out scenes per family (%(default)s)")
    parser.add_argument("--footage", type=Path, help="answers: folder with a questions.jsonl")
    parser.add_argument("--workers", type=int, default=4, help="answers: processes, over all GPUs (%(default)s)")
    parser.add_argument("--out", type=Path, default=report.ROWS, help="rows are appended to this file")
    parser.add_argument("--commit", default="", help="if git is not available")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 1 if speculation changed anything where the engine is exact."""
    options = parse(words)
    if "report" in options.parts:
        return report.write()
    torch.set_grad_enabled(False)
    device = torch.device("cuda", torchrun.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if options.parallel != "tensor":
        return run(options, device, SINGLE)
    with joined(device) as ranks:
        return run(options, device, ranks)


def run(options: argparse.Namespace, device: torch.device, ranks: ProcessGroup) -> int:
    """Measure the parts, append their rows and print a summary."""
    parts, found = options.parts or PARTS, []
    gpu = device.type == "cuda"
    shared: Row = {"dtype": options.dtype, "machine": torch.cuda.get_device_name(device) if gpu else "CPU"}
    shared |= {"commit": options.commit or commit_of(), "torch": torch.__version__.partition("+")[0]}
    for row in measured(parts, options, device, ranks):
        found.append(row | shared)
        if not ranks.rank:
            print(json.dumps(row), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    if not ranks.rank:
        print("\n".join(report.table(found)))
    return 0 if report.agreed(found) else 1


def measured(parts: Sequence[str], options: argparse.Namespace, device: torch.device, ranks: ProcessGroup) -> Iterator[Row]:
    """Yield the rows of all parts."""
    for name in options.shapes.split(",") if set(parts) & {"nodes", "decodes"} else ():
        model = built(name, options, device, ranks)
        about = {"shape": name, "parallel": options.parallel or None}
        if "nodes" in parts:
            for way in options.ways.split(","):
                found = nodes.measure(model, way, options.video_tokens, options.nodes, options.first)
                yield {"part": "nodes"} | about | {"slots": options.video_tokens, "first": options.first} | found
        if "decodes" in parts:
            decodes.use_random_head(model)
            numbers = range(options.first, options.prompts or PROMPTS.get(name, 10))
            engine = engine_for("auto", device)
            size = options.video_tokens, numbers, options.tokens, options.control
            for found in decodes.measure(model, pair_of(name).target, engine, *size):
                yield {"part": "decodes"} | about | found
            del engine
        del model
        free()
    if "answers" in parts:
        yield from answered(options, str(device.type))


def built(name: str, options: argparse.Namespace, device: torch.device, ranks: ProcessGroup) -> VideoLM:
    """Build the target of a pair with random weights."""
    shape = pair_of(name).target
    stages = stages_for(shape.text.layers, device, 0) if options.parallel == "layers" else ()
    return build(shape, wrap_of(shape.family), device, getattr(torch, options.dtype), stages=stages, ranks=ranks)


def answered(options: argparse.Namespace, device: str) -> Iterator[Row]:
    """Yield the rows of `answers`, from several processes."""
    turns = get_context("spawn").Queue()
    for number in range(options.workers):
        turns.put(number)
    with ProcessPoolExecutor(options.workers, get_context("spawn"), settle, (turns,)) as pool:
        todo = [
            pool.submit(answers.measure, *job, options.footage, options.dtype, device)
            for job in answers.jobs(options.scenes, options.footage)
        ]
        for ready in as_completed(todo):
            yield from ({"part": "answers"} | row for row in ready.result())


if __name__ == "__main__":
    sys.exit(main())
