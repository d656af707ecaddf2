"""Check on a GPU that captured decoding is lossless: the embedded pairs, every pruner and drafter, on held-out scenes.

In float32, captured, eager and Hugging Face's `generate` must agree token by token. In bfloat16, report where captured
output leaves our autoregressive one, and by which gap in logits (see specvlm/decoding/lossless.py). The models are
small and trained; the scenes are synthetic.

    python -m experiments.gpu_pair.agreement --scenes 32 --workers 4 --out agreement.jsonl

Four workers per GPU decode four times as much as one; eight decode no more. Workers are spread over all GPUs. Rows are
written as they finish, and a rerun skips those in the file. The exit code is 1 if a float32 decode differs, or a
bfloat16 one by more than a tie.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from itertools import product
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from experiments.embedded_pair.evaluate import DRAFTS, PRUNERS, scene_request
from specvlm.config import model_folder
from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine, engine_for
from specvlm.models.kv_cache import CachePool
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Drafter, Pruner
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt

DRAFTERS: dict[str, Drafter] = {
    "tree": TreeDrafter(),
    "chain": TreeDrafter(shape="chain:5"),
    "self": SelfDrafter(shape="chain:5"),
    "prompt_lookup": PromptLookupDrafter(),
    "dynamic_tree": DynamicTreeDrafter(),
    "entropy_tree": EntropyTreeDrafter(),
    "sparse": SparseDrafter(entries=256),  # fewer than the video has; it uses no pruner
}
# Drafters are the outer loop: a change of the drafting model makes a new cache and captures its steps again.
PAIRS = [
    (pruner, drafter)
    for drafter, pruner in product(DRAFTERS.items(), (PRUNERS | {"none": NonePruner()}).items())
    if drafter[0] != "sparse" or pruner[0] == "none"
]
BF16 = ("none", "uniform", "two_stage")  # pruners compared in bfloat16
KEYS = {"captured": "decodes", "eager": "eager_decodes"}  # row keys: number of decodes by engine
LIMIT = 96


def settle(numbers: Queue[int]) -> None:
    """Assign the next GPU to a worker, round robin."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


@cache
def loaded(family: str, dtype: str, device: str) -> tuple[VideoLM, VideoLM, CachePool, Engine]:
    """Load a worker's models, caches and engine once."""
    target, draft = (load(model_folder(f"embedded:{family}/{name}"), dtype, device) for name in ("target", "plain"))
    return target, draft, CachePool(), engine_for("auto", device)


def scene(family: str, dtype: str, number: int, by: tuple[str, ...], share: int, device: str) -> dict[str, Any]:
    """Decode a scene and return its row, with all differences.

    by: "captured", "eager" or both. share: Run one in `share` of the (pruner, drafter) pairs per scene, in rotation.
    """
    target, draft, caches, engine = loaded(family, dtype, device)
    request, _ = scene_request(target, family, "caption", number)

    def decoded(pruner: Pruner, drafter: Drafter, engine: Engine) -> list[int]:
        graph = DecodingGraph(
            target, draft, pruner, drafter, GreedyVerifier(), GenerationOptions(ratio=0.9), caches=caches, engine=engine
        )
        return tokens_of(list(graph.decode(request, LIMIT)))

    alone = tokens_of(list(autoregressive(target, request, LIMIT, GreedyVerifier(), caches=caches, engine=engine)))
    row: dict[str, Any] = {"family": family, "dtype": dtype, "scene": number, "tokens": len(alone)}
    row |= {"engine": engine.runs(target), "different": []}
    pairs = [pair for turn, pair in enumerate(PAIRS) if turn % share == number % share]
    right = alone
    if dtype == "float32":
        right = generated(target, request)
        row |= {"autoregressive_same": alone == right} if "captured" in by else {}
    else:
        pairs = [pair for pair in pairs if pair[0][0] in BF16]
    for (pruner_name, pruner), (drafter_name, drafter) in pairs:
        for name in by:
            one = Engine() if name == "eager" else engine
            row[KEYS[name]] = row.get(KEYS[name], 0) + 1
            tokens = decoded(pruner, drafter, one)
            if tokens != right:
                said = lossless.compare(target, request, right, tokens, caches, one)
                which = {"engine": one.name, "pruner": pruner_name, "drafter": drafter_name}
                row["different"].append(which | asdict(said))
    return row


def generated(target: Any, request: VideoPrompt) -> list[int]:
    """Decode with Hugging Face's `generate`."""
    out = target.hf.generate(**target.generate_inputs(request), max_new_tokens=LIMIT, do_sample=False)
    return out[0, len(request) :].tolist()


def jobs(
    count: int, eager: int, share: int, rows: list[dict[str, Any]], families: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[str, str, int, tuple[str, ...], int]]:
    """Yield the jobs that these rows lack. Scenes are the outer loop, so that a partial run covers all families."""
    done = {(row["family"], row["dtype"], row["scene"], name) for row in rows for name, key in KEYS.items() if row.get(key)}
    for number, dtype, family in product(range(count), dtypes, families):
        wanted = ("captured", "eager") if dtype == "float32" and number < eager else ("captured",)
        if missing := tuple(name for name in wanted if (family, dtype, number, name) not in done):
            yield family, dtype, number, missing, share


def report(rows: list[dict[str, Any]]) -> str:
    """Summarise the rows, one line per dtype and family."""
    lines = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["dtype"], row["family"]].append(row)
    for (dtype, family), members in sorted(groups.items(), reverse=True):
        found = [(one["engine"] == "eager", one) for row in members for one in row["different"]]
        count = {key: sum(row.get(key, 0) for row in members) for key in ("decodes", "eager_decodes", "autoregressive_same")}
        line = f"{dtype} {family}: {count['decodes'] - sum(not eager for eager, _ in found)} of {count['decodes']} outputs are "
        if dtype == "float32":
            scenes = sum("autoregressive_same" in row for row in members)
            line += f"generate's (autoregressive: {count['autoregressive_same']} of {scenes}; eager engine: "
            line += f"{count['eager_decodes'] - sum(eager for eager, _ in found)} of {count['eager_decodes']})"
        else:
            line += "our autoregressive one's"
        if found:
            gaps = sorted(one["gap"] for _, one in found if one["gap"] is not None)
            line += f"; differences: {dict(Counter(one['verdict'] for _, one in found))}"
            line += f"; gaps at the first one {gaps[0]:.3g} to {gaps[-1]:.3g}" if gaps else ""
        lines.append(line)
    return "\n".join(lines)


def agreed(rows: list[dict[str, Any]]) -> bool:
    """Whether every float32 decode equals `generate`, and bfloat16 decodes differ only by ties."""
    exact = [row for row in rows if row["dtype"] == "float32"]
    if any(row["different"] or not row.get("autoregressive_same", True) for row in exact):
        return False
    return not any(one["verdict"] == "mismatch" for row in rows for one in row["different"])


def main() -> int:
    """Run the command line. Returns 1 if outputs disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--eager", type=int, default=32, help="scenes also decoded by the eager engine")
    parser.add_argument("--share", type=int, default=1, help="run one in SHARE (pruner, drafter) pairs per scene, in rotation")
    parser.add_argument("--families", default=",".join(DRAFTS), help="with commas (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="with commas (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("agreement.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    todo = list(
        jobs(options.scenes, options.eager, options.share, rows, options.families.split(","), options.dtypes.split(","))
    )
    turns, begun = get_context("spawn").Queue(), perf_counter()
    for number in range(options.workers):
        turns.put(number)
    workers = ProcessPoolExecutor(options.workers, get_context("spawn"), settle, (turns,))
    with workers as pool, options.out.open("a") as file:
        for count, ready in enumerate(as_completed([pool.submit(scene, *job, options.device) for job in todo]), start=1):
            rows.append(ready.result())
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(f"{perf_counter() - begun:5.0f} s  {count} of {len(todo)}", flush=True)
    print(report(rows))
    return 0 if agreed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
