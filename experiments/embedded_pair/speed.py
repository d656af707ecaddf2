"""Speed of the embedded pairs on this machine: drafters against our own autoregressive loop and Hugging Face `generate`.

Medians over held-out caption scenes; the order of methods rotates from scene to scene, after a warm-up of each. Decode
time is that of all rounds, without either prefill; Hugging Face's is the time of the whole call less that of a call for
one token. End-to-end time has everything, the drafter's vision tower and prefill included.

    python -m experiments.embedded_pair.speed --family qwen2_5_vl --scenes 20
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from experiments.embedded_pair.evaluate import DRAFTS, RESULTS, scene_request
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.models.load import load
from specvlm.results import metrics
from specvlm.strategies import Drafter, Pruner
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, Step, VideoPrompt

LIMIT = 200
# name: pruner, drafter; ratio 0.9 throughout
GRAPHS: dict[str, tuple[Pruner, Drafter]] = {
    "tree paper": (TwoStagePruner(), TreeDrafter("paper")),
    "tree 2x1x1x1x1": (TwoStagePruner(), TreeDrafter("2x1x1x1x1")),
    "chain 3": (TwoStagePruner(), TreeDrafter("chain:3")),
    "chain 5": (TwoStagePruner(), TreeDrafter("chain:5")),
    "chain 5, mass 0.2": (TwoStagePruner(mass=0.2), TreeDrafter("chain:5")),
    "chain 7": (TwoStagePruner(), TreeDrafter("chain:7")),
    "chain 5, full context": (NonePruner(), TreeDrafter("chain:5")),
    "self, tree paper": (TwoStagePruner(), SelfDrafter("paper")),
    "self, chain 3": (TwoStagePruner(), SelfDrafter("chain:3")),
    "prompt_lookup": (TwoStagePruner(), PromptLookupDrafter()),
}


class Bench:
    """One family: every method as a function from a prompt to (tokens, decode seconds, end-to-end seconds, accepted)."""

    def __init__(self, family: str) -> None:
        self.target = load(model_folder(f"embedded:{family}/target"), "float32")
        self.draft = load(model_folder(f"embedded:{family}/plain"), "float32")
        self.graphs = {
            name: DecodingGraph(self.target, self.draft, pruner, drafter, GreedyVerifier(), GenerationOptions(ratio=0.9))
            for name, (pruner, drafter) in GRAPHS.items()
        }

    def methods(self) -> dict[str, Callable[[VideoPrompt], dict]]:
        ours = {name: lambda prompt, g=graph: timed(list(g.decode(prompt, LIMIT))) for name, graph in self.graphs.items()}
        return {"Hugging Face generate": self.hugging_face, "autoregressive": self.alone} | ours

    def alone(self, prompt: VideoPrompt) -> dict:
        caches = next(iter(self.graphs.values())).caches
        return timed(list(autoregressive(self.target, prompt, LIMIT, GreedyVerifier(), caches)))

    def hugging_face(self, prompt: VideoPrompt) -> dict:
        seconds = []
        for limit in (1, LIMIT):
            inputs, start = self.target.generate_inputs(prompt), perf_counter()
            out = self.target.hf.generate(**inputs, max_new_tokens=limit, do_sample=False)
            seconds.append(perf_counter() - start)
        tokens = out[0, len(prompt) :].tolist()
        return {"tokens": tokens, "decode_s": seconds[1] - seconds[0], "end_to_end_s": seconds[1], "accepted": None}


def timed(steps: list[Step]) -> dict:
    speed = metrics.speed_of(steps)
    accepted = metrics.acceptance_of(steps)["accepted_per_round"] if any(step.drafted for step in steps) else None
    return {"tokens": metrics.tokens_of(steps), "accepted": accepted} | {k: speed[k] for k in ("decode_s", "end_to_end_s")}


def run(family: str, scenes: int, path: Path) -> list[dict]:
    bench = Bench(family)
    methods, rows = bench.methods(), []
    names = list(methods)
    for number in range(-1, scenes):  # scene -1 is the warm-up
        prompt, _ = scene_request(bench.target, family, "caption", max(number, 0))
        results = {name: methods[name](prompt) for name in names[number % len(names) :] + names[: number % len(names)]}
        expected = results["autoregressive"]["tokens"]
        for name, result in results.items():
            row = {"scene": number, "method": name, "new_tokens": len(expected), "same": result.pop("tokens") == expected}
            rows += [row | result] if number >= 0 else []
        print(f"{family}: scene {number + 1} of {scenes}", flush=True)
    about = {"family": family, "machine": platform.machine(), "threads": torch.get_num_threads()} | metrics.versions()
    path.write_text("\n".join(json.dumps(row) for row in [about, *rows]) + "\n")
    return rows


def table(rows: list[dict]) -> str:
    """Medians over scenes; speed-ups are medians of the per-scene quotients, in brackets 95 % bootstrap intervals."""
    by_scene = {(row["scene"], row["method"]): row for row in rows}
    scenes, names = sorted({row["scene"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    names.sort(key=lambda name: name not in ("Hugging Face generate", "autoregressive"))
    lines = ["| method | ms per token | decode | vs ours | vs HF | end to end | vs ours | vs HF | accepted | same output |"]
    lines.append("|---" * 10 + "|")
    for name in names:
        mine = [by_scene[scene, name] for scene in scenes]

        def quotient(base: str, key: str, mine: list[dict] = mine, name: str = name) -> str:
            values = [by_scene[row["scene"], base][key] / row[key] for row in mine]
            middle = f"{statistics.median(values):.2f}"
            if base == "autoregressive" and key == "decode_s" and name != base:
                picks = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
                spread = torch.tensor(values)[picks].quantile(0.5, 1).quantile(torch.tensor([0.025, 0.975])).tolist()
                middle += f" [{spread[0]:.2f}, {spread[1]:.2f}]"
            return middle

        per_token = statistics.median(row["decode_s"] / (row["new_tokens"] - 1) for row in mine)
        cells = [name, f"{1000 * per_token:.2f}"]
        for key in ("decode_s", "end_to_end_s"):
            cells.append(f"{1000 * statistics.median(row[key] for row in mine):.0f} ms")
            cells += [quotient(base, key) for base in ("autoregressive", "Hugging Face generate")]
        accepted = [row["accepted"] for row in mine if row["accepted"] is not None]
        cells += [f"{statistics.mean(accepted):.2f}" if accepted else "", f"{sum(row['same'] for row in mine)}/{len(mine)}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(out: Path) -> None:
    parts = ["# Speed of the embedded pairs\n", (__doc__ or "").split("\n\n")[1] + "\n"]
    for family in DRAFTS:
        path = out / f"{family}_speed.jsonl"
        if path.is_file():
            about, *rows = map(json.loads, path.read_text().splitlines())
            said = ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("family", "specvlm"))
            parts += [f"## {family}\n", f"{len({row['scene'] for row in rows})} scenes; {said}.\n", table(rows), ""]
    (out / "SPEED.md").write_text("\n".join(parts))
    print("\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=DRAFTS, default="qwen2_5_vl")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1, help="as the presets of the embedded pairs have it")
    parser.add_argument("--report", action="store_true", help="write SPEED.md from the rows that are there, run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if not args.report:
        run(args.family, args.scenes, args.out / f"{args.family}_speed.jsonl")
    report(args.out)


if __name__ == "__main__":
    main()
