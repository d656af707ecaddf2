"""Is the captured output the target's own? The embedded pairs on a GPU: every pruner and drafter, on held-out scenes.

float32: captured = eager = Hugging Face's `generate`, token by token. bfloat16: where the captured output leaves our own
autoregressive one, and by which gap in logits (see specvlm/lossless.py). Synthetic scenes, trained small models.

    python -m experiments.gpu_pair.agreement --scenes 32 --workers 8 --out agreement.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from experiments.embedded_pair.evaluate import FAMILIES, PRUNERS, scene_request
from specvlm import lossless
from specvlm.cache import CachePool
from specvlm.config import model_folder
from specvlm.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.drafters.self_draft import SelfDrafter
from specvlm.drafters.tree import TreeDrafter
from specvlm.engine import Engine, engine_for
from specvlm.graph import DecodingGraph, autoregressive
from specvlm.metrics import tokens_of
from specvlm.models.load import load
from specvlm.pruners.none import NonePruner
from specvlm.strategy import Drafter, Pruner
from specvlm.types import VideoPrompt
from specvlm.verifiers.greedy import GreedyVerifier

DRAFTERS: dict[str, Drafter] = {
    "tree": TreeDrafter(),
    "chain": TreeDrafter(shape="chain:5"),
    "self": SelfDrafter(shape="chain:5"),
    "prompt_lookup": PromptLookupDrafter(),
}
PAIRS = list(product((PRUNERS | {"none": NonePruner()}).items(), DRAFTERS.items()))
LIMIT = 96
CHUNK = 8


def scenes(family: str, dtype: str, numbers: list[int], eager: int, share: int, device: str) -> list[dict[str, Any]]:
    """Rows of one worker: its own models, engine and caches. eager: of the first so many scenes also by the eager engine;
    share: of the pairs of a pruner and a drafter, one in so many a scene, each in its turn.
    """
    torch.set_num_threads(1)
    target, draft = (load(model_folder(f"embedded:{family}/{name}"), dtype, device) for name in ("target", "plain"))
    caches, engine = CachePool(), engine_for("auto", device)

    def graph(pruner: Pruner, drafter: Drafter, with_engine: Engine) -> DecodingGraph:
        return DecodingGraph(target, draft, pruner, drafter, GreedyVerifier(), 0.9, caches=caches, engine=with_engine)

    rows = []
    for number in numbers:
        request, _ = scene_request(target, family, "caption", number)
        alone = tokens_of(list(autoregressive(target, request, LIMIT, GreedyVerifier(), caches=caches, engine=engine)))
        about = {"family": family, "dtype": dtype, "scene": number, "tokens": len(alone), "engine": engine.name}
        if dtype == "float32":
            right = generated(target, request)
            rows.append(about | {"what": "autoregressive", "same": alone == right})
        for turn, ((pruner_name, pruner), (name, drafter)) in enumerate(PAIRS):
            if turn % share != number % share:
                continue
            if dtype != "float32" and pruner_name not in ("none", "uniform", "two_stage"):
                continue
            what = {"what": "decode", "pruner": pruner_name, "drafter": name}
            tokens = tokens_of(list(graph(pruner, drafter, engine).decode(request, LIMIT)))
            if dtype == "float32":
                row = what | {"same": tokens == right}
                if number < eager:
                    row["eager_same"] = tokens_of(list(graph(pruner, drafter, Engine()).decode(request, LIMIT))) == right
                rows.append(about | row)
            else:
                said = lossless.compare(target, request, alone, tokens, caches)
                rows.append(about | what | {"same": tokens == alone, **asdict(said)})
    return rows


def generated(target: Any, request: VideoPrompt) -> list[int]:
    """Hugging Face's own answer."""
    out = target.hf.generate(**target.generate_inputs(request), max_new_tokens=LIMIT, do_sample=False)
    return out[0, len(request) :].tolist()


def jobs(count: int, eager: int, share: int) -> Iterator[tuple[str, str, list[int], int, int]]:
    """A few scenes each, both dtypes and families in turn, so that a run cut short has seen something of all."""
    for start in range(0, count, CHUNK):
        for dtype, family in product(("float32", "bfloat16"), FAMILIES):
            yield family, dtype, list(range(start, min(start + CHUNK, count))), eager, share


def report(rows: list[dict[str, Any]]) -> str:
    lines = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["dtype"], row["family"]].append(row)
    for (dtype, family), members in sorted(groups.items(), reverse=True):
        decodes = [row for row in members if row["what"] == "decode"]
        same = sum(row["same"] for row in decodes)
        line = f"{dtype} {family}: {same} of {len(decodes)} outputs are "
        if dtype == "float32":
            loops = [row for row in members if row["what"] == "autoregressive"]
            eager = [row["eager_same"] for row in decodes if "eager_same" in row]
            line += f"generate's (autoregressive: {sum(r['same'] for r in loops)} of {len(loops)}"
            line += f"; eager engine: {sum(eager)} of {len(eager)})"
        else:
            gaps = sorted(row["gap"] for row in decodes if not row["same"] and row.get("gap") is not None)
            line += f"our autoregressive one's; verdicts {dict(Counter(row['verdict'] for row in decodes))}"
            line += f"; gaps at the first difference {gaps[0]:.3g} to {gaps[-1]:.3g}" if gaps else ""
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--eager", type=int, default=32, help="scenes also decoded by the eager engine")
    parser.add_argument("--share", type=int, default=1, help="one in so many pairs of pruner and drafter a scene, in turn")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("agreement.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool, options.out.open("w") as file:
        waiting = [pool.submit(scenes, *job, options.device) for job in jobs(options.scenes, options.eager, options.share)]
        for done in waiting:
            for row in done.result():
                rows.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
    print(report(rows))


if __name__ == "__main__":
    main()
