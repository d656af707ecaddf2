"""Benchmark a pair: `python -m experiments.gpu_pair shape=qwen2_5_vl_32b_7b video_tokens=16384 ratio=0.9`.

Models have the released shapes and random weights, unless target=FOLDER draft=FOLDER are given. Acceptance is not
measured but given.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from experiments.gpu_pair import report
from experiments.gpu_pair.measure import Bench, Counts, copy_bandwidth, kv_bytes, weight_bytes
from experiments.gpu_pair.models import read, wrap_of
from experiments.gpu_pair.options import Options
from experiments.gpu_pair.shapes import Shape, build, model_class, pair_of, prompt_of
from experiments.gpu_pair.spread import skeleton, stages_for
from specvlm.advise import predict
from specvlm.app.cli import guarded, leave
from specvlm.config import model_folder
from specvlm.engine import engine_for
from specvlm.errors import UserError
from specvlm.models import memory_plan
from specvlm.models.checkpoint import DTYPES
from specvlm.models.partition import Stage, check_shares
from specvlm.models.placement import device_of
from specvlm.models.video_lm import VideoLM
from specvlm.parallel import torchrun
from specvlm.parallel.ranks import SINGLE, ProcessGroup, joined
from specvlm.results import metrics

HERE = Path(__file__).parent
REAL_UP_TO = 32768  # video tokens; a longer prefill takes minutes of a borrowed machine
T = TypeVar("T")


class Record:
    """Collects rows and appends them to a file. A part that fails leaves a row with its error; the rest goes on."""

    def __init__(self, path: Path, about: dict[str, Any], limit_s: float, ranks: ProcessGroup = SINGLE) -> None:
        self.path, self.about, self.limit_s, self.ranks = path, about, limit_s, ranks
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.failed = 0
        self.begun = perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **figures: Any) -> None:
        """Add a row."""
        row = self.about | {"part": part} | {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def attempt(self, name: str, what: Callable[[], T], **where: Any) -> T | None:
        """Run a part and return its result; None if it failed or the time limit is over."""
        if self.ranks.share(lambda: perf_counter() - self.begun > self.limit_s):
            self.skipped.append(name)
            return None
        print(f"{perf_counter() - self.begun:6.1f} s  {name}", flush=True)
        try:
            return what()
        except UserError:
            raise
        except Exception as error:
            if self.ranks.size > 1:
                raise  # other ranks are waiting
            memory_gone = memory_plan.ran_out(error)
            said = "out of memory" if memory_gone else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not memory_gone:
                traceback.print_exc()
                self.failed += 1
        self.add("failed", what=name, error=said, **where)
        free()  # after the except clause, whose traceback keeps allocations alive
        return None


def free() -> None:
    """Release unused memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def commit_of() -> str:
    """Return the git commit, or "unknown"."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about(options: Options, device: torch.device) -> dict[str, Any]:
    """Collect the columns that all rows of a run share."""
    gpu = device.type == "cuda"
    count = torch.cuda.device_count() if options.parallel == "layers" else torchrun.size_here()
    tiny = options.shape.startswith("tiny")
    machine = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU"
    if gpu and count > 1:
        machine = f"{count} x {machine}"
    made = "random weights of a tiny shape" if tiny else "random weights of the true shapes"
    return {
        "shape": options.shape,
        "machine": machine,
        "parallel": options.parallel or None,
        "draft_parallel": options.draft_parallel or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": options.commit or commit_of(),
        "versions": {k: v for k, v in metrics.versions().items() if k in ("python", "torch", "transformers")},
        "weights": f"checkpoints {options.target} and {options.draft or 'itself'}" if options.target else made,
        "acceptance": "given",
        "tree": options.tree,
    }


class Run:
    """Builds the models of one pair and runs the requested parts, context by context."""

    def __init__(self, options: Options, record: Record, device: torch.device, ranks: ProcessGroup = SINGLE) -> None:
        self.options, self.record, self.device, self.ranks = options, record, device, ranks
        self.pair = pair_of(options.shape)
        gpu = device.type == "cuda"
        self.dtype = DTYPES[options.dtype] if options.dtype != "auto" else torch.bfloat16 if gpu else torch.float32
        auto = options.target_weights == "auto"
        own = "bf16" if options.parallel else self.pair.target_weights
        self.target_weights = own if auto else options.target_weights
        self.counts = Counts(options.rounds, options.warmup, options.prefills)
        self.wanted = set(options.only.split(","))
        self.bandwidth = float("nan")
        self.hf_ms: dict[int, float] = {}  # by video tokens

    def all(self) -> None:
        """Run everything that was asked for."""
        if figures := self.record.attempt("copy", lambda: copy_bandwidth(self.device)):
            self.bandwidth = figures["gb_per_s"] * 1e9
            self.record.add("copy", **figures)
            free()
        where = {"target_weights": self.target_weights}
        target = self.record.attempt("make the target", lambda: self.model(self.pair.target, self.target_weights), **where)
        if target is None:
            return
        self.record.about["dtype"] = str(target.dtype).removeprefix("torch.")
        for number, weights in enumerate(self.options.draft_weights.split(",")):
            self.one_draft(target, weights, first=number == 0)
            free()

    def model(self, shape: Shape, weights: str, folder: str = "") -> VideoLM:
        """Load a model from its folder, or build it with random weights."""
        folder = folder or (self.options.target if shape is self.pair.target else "")
        if folder:
            return read(model_folder(folder), self.device, self.options.dtype, weights)
        wrap, seed, stages, ranks = wrap_of(shape.family), self.options.seed, (), SINGLE
        if shape is self.pair.target:
            ranks = self.ranks
            stages = self.stages() if self.options.parallel == "layers" else ()
        elif self.options.draft_parallel:
            ranks = self.ranks
        elif self.ranks.rank:  # only rank 0 has the draft
            return wrap(skeleton(model_class(shape), shape.config()))
        return build(shape, wrap, self.device, self.dtype, weights, seed, stages, ranks)

    def stages(self) -> tuple[Stage, ...]:
        """Choose the target's pipeline stages, leaving room for the draft on the first device."""
        beside, draft = 0, self.pair.draft
        if draft is not None:
            hf = skeleton(model_class(draft), draft.config())
            beside = sum(weight.numel() for weight in hf.parameters()) * self.dtype.itemsize
        return stages_for(self.pair.target.text.layers, self.device, beside)

    def one_draft(self, target: VideoLM, weights: str, first: bool) -> None:
        """Run all contexts with one storage type of the draft. first: also measure what does not depend on it."""
        shape, draft = self.pair.draft, None
        tags: dict[str, Any] = {"draft_weights": weights, "target_weights": self.target_weights}
        if shape is not None:
            making = f"make the draft, {weights}"
            draft = self.record.attempt(making, lambda: self.model(shape, weights, self.options.draft), **tags)
            if draft is None:
                return
        for number in self.options.numbers("video_tokens"):
            self.context(target, draft, int(number), tags, first)
            free()

    def context(self, target: VideoLM, draft: VideoLM | None, tokens: int, tags: dict[str, Any], first: bool) -> None:
        """Run all parts at one context, with caches and engine of its own."""
        attempt, add, wanted = self.record.attempt, self.record.add, self.wanted
        engine = engine_for(self.options.engine, self.device)
        if engine.note:
            print(engine.note)
        real = self.options.prefill == "real" or (self.options.prefill == "auto" and tokens <= REAL_UP_TO)
        unread = prompt_of(target, self.pair.target, tokens, False, self.options.seed)
        whole = prompt_of(target, self.pair.target, tokens, True, self.options.seed) if real else None
        name = f"{tokens} video tokens, draft {tags['draft_weights']}: "
        tags = tags | {"engine": engine.name, "video_tokens": len(unread.video_index), "prefill": "real" if real else "random"}
        made = attempt(
            f"{name}allocate the cache",
            lambda: Bench(target, draft, whole, unread, self.options.tree, self.counts, engine),
            **tags,
        )
        if made is None:
            return
        bench, ratios, slots = made, self.options.numbers("ratio"), len(unread)
        draft = bench.drafting
        alone_floor, check_floor = (
            1000 * (weight_bytes(target, rows) + kv_bytes(target, slots)) / self.bandwidth
            for rows in (1, bench.inner.max_nodes)
        )
        add("bytes", **tags, target_weight_bytes=weight_bytes(target), draft_weight_bytes=weight_bytes(draft),
            target_kv_bytes=kv_bytes(target, slots), check_floor_ms=check_floor)  # fmt: skip
        if "capture" in wanted and (figures := attempt(f"{name}capture", lambda: bench.capture(ratios[0]), **tags)):
            add("capture", **tags, **figures)
        if "start" in wanted and bench.prompt is not None:
            for ratio in ratios:
                repeats = self.counts.prefills if ratio == ratios[0] else 1
                label = f"{name}start, ratio {ratio:g}"
                if figures := attempt(label, lambda r=ratio, n=repeats: bench.start(r, n), **tags, ratio=ratio):
                    add("start", **tags, ratio=ratio, **figures)
        if not wanted & {"hf", "rounds"}:
            return
        alone = attempt(f"{name}autoregressive", bench.autoregressive, **tags)
        if alone is None:
            return
        add("autoregressive", **tags, **alone, floor_ms=alone_floor)
        # Skip quantised targets: Hugging Face has no layers for our quantised weights, and ours would slow its loop.
        if "hf" in wanted and first and bench.prompt is not None and self.target_weights == "bf16":
            hf = attempt(f"{name}Hugging Face generate", bench.hugging_face, **tags)
            free()
            if hf is not None:
                tokens = hf.pop("tokens")
                self.hf_ms[tags["video_tokens"]] = hf["ms_per_token"]
                add("hf", **tags, **hf, same_tokens=tokens == list(bench.known[: len(tokens)]))
        if "rounds" not in wanted:
            return
        costs = (
            attempt(f"{name}the adviser's profile", lambda: bench.profile(ratios), **tags)
            if "advise" in wanted and first
            else None
        )
        for ratio in ratios:
            draft_floor = 1000 * (weight_bytes(draft) + kv_bytes(draft, bench.draft_slots(ratio))) / self.bandwidth
            for accepted in self.options.numbers("accepted"):
                label = f"{name}ratio {ratio:g}, {accepted:g} accepted"
                where = tags | {"ratio": ratio, "accepted": accepted}
                figures = attempt(label, lambda r=ratio, a=accepted: bench.rounds(r, a), **where)
                if figures:
                    floors = {"draft_pass_floor_ms": draft_floor, "check_floor_ms": check_floor}
                    floors["floor_ms"] = check_floor + figures["levels"] * draft_floor
                    versus = {"against_ours": alone["ms_per_token"] / figures["ms_per_token"]}
                    if hf_ms := self.hf_ms.get(tags["video_tokens"]):
                        versus["against_hf"] = hf_ms / figures["ms_per_token"]
                    if costs is not None:
                        shape, drafter = self.options.tree, bench.inner.name
                        predicted = predict(costs, shape, ratio, figures["accepted_found"], drafter)
                        versus |= {
                            "predicted_ms_per_token": predicted,
                            "predicted_error": predicted / figures["ms_per_token"] - 1,
                        }
                    add("rounds", **where, **figures, **floors, **versus)


def main(words: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        print("  " + "\n  ".join(f"{f.name}={f.default}" for f in fields(Options)))
        return 0
    if torchrun.rank_here():  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return guarded(lambda: command(words), full=False)


def command(words: Sequence[str]) -> int:
    """Run the benchmark. Raises UserError, if at all, before it builds anything."""
    options = Options.parse(words)
    device = device_of(options.device)
    if options.parallel != "tensor":
        return measured(options, device, SINGLE)
    pair, ranks = pair_of(options.shape), torchrun.size_here()
    check_shares(pair.target.config(), ranks, "parallel=tensor", "take parallel=layers")
    if pair.draft is not None and options.draft_parallel:
        check_shares(pair.draft.config(), ranks, "draft_parallel=tensor", "leave draft_parallel out")
    if device.type == "cuda":
        device = torch.device("cuda", torchrun.local_rank())
    with joined(device) as found:
        return measured(options, device, found)


def measured(options: Options, device: torch.device, ranks: ProcessGroup) -> int:
    """Measure, print the report and return the exit code."""
    out = os.devnull if ranks.rank else options.out
    record = Record(Path(out), about(options, device), options.limit_s, ranks)
    with torch.no_grad():
        Run(options, record, device, ranks).all()
    print("\n" + report.text(record.rows))
    if record.skipped:
        print(f"skipped, limit_s={options.limit_s:g} was over: {'; '.join(record.skipped)}")
    print(f"{len(record.rows)} rows appended to {record.path}")
    return 1 if record.failed else 0


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
