"""Measurements of a pair, one method per part. Each returns a dict of figures, times in ms; none prints or writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from experiments.gpu_pair.drafter import GivenDrafter
from experiments.gpu_pair.spread import hooked, restored
from specvlm.advise import Costs, profile
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.models import memory_plan
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import local_shard
from specvlm.strategies import Pruner
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, Step, VideoPrompt

Figures = dict[str, Any]


@dataclass
class Counts:
    """Repeats: measured rounds or tokens, discarded warm-up rounds before them, and real prefills."""

    rounds: int = 20
    warmup: int = 5
    prefills: int = 3


def synchronize(device: torch.device) -> None:
    """Wait for a device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, repeats: int = 20) -> Figures:
    """Measure a device-to-device copy, in bytes read + written per second: the speed limit of passes of few rows."""
    gpu = device.type == "cuda"
    source = torch.empty(2**30 if gpu else 2**24, dtype=torch.uint8, device=device).fill_(1)
    sink = torch.empty_like(source)
    ms = []
    for _ in range(repeats + 3):
        if gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            sink.copy_(source)
            end.record()
            end.synchronize()
            ms.append(start.elapsed_time(end))
        else:
            before = perf_counter()
            sink.copy_(source)
            ms.append(1000 * (perf_counter() - before))
    middle = median(ms[3:])
    return {"ms": middle, "gb_per_s": 2 * source.nbytes / middle / 1e6}


def weight_bytes(lm: VideoLM, rows: int = 1) -> int:
    """Count the bytes of weights that a text pass of `rows` rows reads: text layers, final norm and head, as stored.

    With tensor parallelism, count those of one rank. Of experts, count those that so many rows are expected to choose
    if each chooses at random.
    """

    def held(module: nn.Module) -> int:
        return sum(local_shard(t).nbytes for t in (*module.parameters(), *module.buffers()))

    experts = sum(held(module) for name, module in lm.text.layers.named_modules() if name.endswith(".experts"))
    config = lm.text.config
    left = 1 - config.num_experts_per_tok / config.num_experts if experts else 0.0
    return held(lm.text.layers) + held(lm.text.norm) + held(lm.hf.lm_head) - round(experts * left**rows)


def kv_bytes(lm: VideoLM, slots: int) -> int:
    """Count the bytes of keys and values in so many slots."""
    return memory_plan.kv_bytes(lm, slots, lm.dtype)


@dataclass
class Bench:
    """Benchmark of one pair, one engine and one context.

    Attributes:
        target: Target model.
        draft: Draft model. None: the target drafts for itself.
        prompt: Prompt with pixels. None: no real prefill.
        unread: The same prompt without pixels: decoding it reuses the caches' last prefill, or random rows.
        tree: Shape of the draft tree.
        counts: Repeats.
        engine: Engine to run.
        caches: Caches kept between decodes.
        known: The target's answer, set by `autoregressive`.
        inner: The real drafter.
    """

    target: VideoLM
    draft: VideoLM | None
    prompt: VideoPrompt | None
    unread: VideoPrompt
    tree: str
    counts: Counts
    engine: Engine
    caches: CachePool = field(default_factory=CachePool)
    known: tuple[int, ...] = ()
    inner: TreeDrafter = field(init=False)

    def __post_init__(self) -> None:
        self.inner = TreeDrafter(self.tree) if self.draft is not None else SelfDrafter(self.tree)
        self.depth = GivenDrafter(self.inner).tree.depth
        # All requests have the same limit, and a tree's slots are reserved here, so the cache is allocated only once.
        self.limit = (self.counts.rounds + self.counts.warmup) * (self.depth + 1) + 2
        self.caches.reserve("target", self.target, len(self.unread) + self.limit + self.inner.max_nodes)

    @property
    def drafting(self) -> VideoLM:
        """The model that drafts."""
        return self.draft or self.target

    @property
    def device(self) -> torch.device:
        return self.target.device

    def graph(self, ratio: float, accepted: float = 0.0, pruner: Pruner | None = None) -> DecodingGraph:
        """Make a decoding graph with a given acceptance. The default pruner is `uniform`."""
        return DecodingGraph(
            self.target,
            self.draft,
            pruner or UniformPruner(),
            GivenDrafter(self.inner, self.known, accepted),
            GreedyVerifier(),
            GenerationOptions(ratio=ratio),
            caches=self.caches,
            engine=self.engine,
        )

    def alone(self, limit: int) -> Iterator[Step]:
        """Decode without a drafter."""
        return autoregressive(self.target, self.unread, limit, GreedyVerifier(), caches=self.caches, engine=self.engine)

    def draft_slots(self, ratio: float) -> int:
        """Count the draft's prompt tokens at a ratio."""
        return len(self.unread) - len(self.unread.video_index) + self.graph(ratio).budget(self.unread)

    # ---- the parts ---------------------------------------------------------------------------------------------------

    def capture(self, ratio: float) -> Figures:
        """Measure how much longer a first request takes than a second: compiling, capturing, loading libraries."""

        def seconds(steps: Iterator[Step]) -> float:
            start = perf_counter()
            list(islice(steps, 4))
            synchronize(self.device)
            return perf_counter() - start

        before = self.engine.capture_s
        alone = [seconds(self.alone(self.limit)) for _ in range(2)]
        rounds = [seconds(self.graph(ratio).decode(self.unread, self.limit)) for _ in range(2)]
        more_s = alone[0] - alone[1] + rounds[0] - rounds[1]
        return {"s": more_s, "of_engine_s": self.engine.capture_s - before}

    def start(self, ratio: float, repeats: int) -> Figures:
        """Measure the parts before the first round: medians over real prefills, skipping the first of several."""
        assert self.prompt is not None
        devices = {stage.device for stage in self.target.stages}
        for device in devices:
            memory_plan.reset_peak(device)
        seen = []
        for _ in range(repeats):
            steps = self.graph(ratio, pruner=TwoStagePruner()).decode(self.prompt, self.limit)
            first, second = next(steps), next(steps)
            steps.close()  # type: ignore[attr-defined]
            seen.append(first.times_s | {k: v for k, v in second.times_s.items() if k in ("prune", "draft_prefill")})
        kept = seen[1:] or seen
        parts = {f"{part}_ms": 1000 * median(s[part] for s in kept) for part in seen[0]}
        return parts | {
            "target_start_ms": parts["embed_ms"] + parts["prefill_ms"],
            "draft_start_ms": parts["prune_ms"] + parts["draft_prefill_ms"],
            "repeats": len(kept),
            "peak_gib": max(map(memory_plan.peak_bytes, devices)) / 2**30,
        }

    def hugging_face(self) -> Figures:
        """Measure Hugging Face's unmodified `generate` with SDPA: median time between tokens, and to the first one."""
        assert self.prompt is not None
        hf, stamps = self.target.hf, Stamps(self.device)
        parts = {"text_config": hf.config.get_text_config(), "vision_config": hf.config.vision_config}
        ours = {part: config._attn_implementation for part, config in parts.items()}
        hf.set_attn_implementation(dict.fromkeys(ours, "sdpa"))
        with hooked(self.target), restored(lambda: hf.set_attn_implementation(ours)):
            inputs = self.target.generate_inputs(self.prompt)
            many = self.counts.rounds + self.counts.warmup
            hf.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
            synchronize(self.device)
            stamps.start()
            out = hf.generate(
                **inputs, max_new_tokens=many, do_sample=False, eos_token_id=None, pad_token_id=0, streamer=stamps
            )
            end = perf_counter()
        gaps = [1000 * (b - a) for a, b in zip(stamps.at, stamps.at[1:], strict=False)][self.counts.warmup - 1 :]
        tokens = out[0, len(self.prompt) :].tolist()
        return {
            "ms_per_token": median(gaps),
            "mean_ms_per_token": 1000 * (end - stamps.at[0]) / (len(tokens) - 1),
            "first_token_ms": 1000 * (stamps.at[0] - stamps.begun_at),
            "repeats": len(gaps),
            "tokens": tokens,
        }

    def autoregressive(self) -> Figures:
        """Measure our autoregressive loop (medians), and keep its answer for the given drafter."""
        walls, steps = timed(self.alone(self.limit))
        self.known = tuple(token for step in steps for token in step.tokens)
        kept = walls[1 + self.counts.warmup :]
        return {"ms_per_token": 1000 * median(kept), "repeats": len(kept)}

    def profile(self, ratios: Sequence[float]) -> Costs:
        """Run the adviser's profile at this context. It uses other trees than the one whose rounds it will predict."""
        beyond = 40  # extra nodes of its largest tree over ours: the caches are already allocated
        graph, drafter = self.graph(ratios[0]), self.inner.name
        return profile(graph, self.unread, lambda: self.alone(60), {drafter: ratios}, self.limit - beyond).costs

    def rounds(self, ratio: float, accepted: float) -> Figures:
        """Measure rounds at a given acceptance (medians).

        The output may leave the known answer where bfloat16 logits nearly tie. Then take the new output as known and
        decode again, at most twice; `departures` counts how often.
        """
        wanted = 1 + self.counts.warmup + self.counts.rounds
        for departures in range(3):
            steps = self.graph(ratio, accepted).decode(self.unread, self.limit)
            walls, seen = timed(islice(steps, wanted))
            tokens = [token for step in seen for token in step.tokens]
            if tokens == list(self.known[: len(tokens)]):
                break
            if departures < 2:
                self.known = (*tokens, *(token for step in steps for token in step.tokens))
        else:
            departures += 1
        steps.close()  # type: ignore[attr-defined]
        walls, seen = walls[1 + self.counts.warmup :], seen[1 + self.counts.warmup :]
        draft, check = (median(step.times_s[part] for step in seen) for part in ("draft", "verify"))
        host = median(w - s.times_s["draft"] - s.times_s["verify"] for w, s in zip(walls, seen, strict=True))
        levels = len(GivenDrafter(self.inner).tree.levels)
        found = sum(step.accepted for step in seen) / len(seen)
        return {
            "accepted_found": found,
            "ms": 1000 * median(walls),
            "ms_per_token": 1000 * median(walls) / (1 + found),
            "draft_ms": 1000 * draft,
            "draft_pass_ms": 1000 * draft / levels,
            "check_ms": 1000 * check,
            "host_ms": 1000 * host,
            "levels": levels,
            "rows": self.inner.max_nodes,
            "draft_slots": self.draft_slots(ratio),
            "repeats": len(walls),
            "departures": departures,
        }


def timed(steps: Iterator[Step]) -> tuple[list[float], list[Step]]:
    """Run steps. Returns the seconds that each took, and the steps."""
    walls, seen = [], []
    while True:
        before = perf_counter()
        step = next(steps, None)
        if step is None:
            return walls, seen
        walls.append(perf_counter() - before)
        seen.append(step)


class Stamps:
    """Streamer for `generate` that records the time of each token. The first `put` is the prompt."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun, self.begun_at = device, False, 0.0
        self.at: list[float] = []

    def start(self) -> None:
        """Record when `generate` is called."""
        self.begun_at = perf_counter()

    def put(self, value: Any) -> None:
        synchronize(self.device)
        if self.begun:
            self.at.append(perf_counter())
        self.begun = True

    def end(self) -> None: ...
