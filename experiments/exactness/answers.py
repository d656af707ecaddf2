"""Decode answers of the embedded pairs with drafters and without, and compare them token by token.

The videos are held-out scenes, and real footage in a folder with a questions.jsonl (see `specvlm.strategies.datasets.
folder`). The pairs know nothing of such footage: their answers to it are nonsense, of which few guesses are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from experiments.embedded_pair.evaluate import DRAFTS
from experiments.gpu_pair.agreement import DRAFTERS
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine, engine_for
from specvlm.models.kv_cache import CachePool
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Dataset, Sample, Verifier
from specvlm.strategies.datasets.folder import FolderDataset
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt
from specvlm.video.video import probe, read_video

FAMILIES = tuple(DRAFTS)
ALWAYS = ("tree", "dynamic_tree")
OTHERS = tuple(name for name in DRAFTERS if name not in ALWAYS)
FEW = 16  # scenes that the other drafters decode too
VERIFIERS: dict[str, Verifier] = {"greedy": GreedyVerifier(), "coupled": CoupledVerifier(0.8, top_p=0.95)}
EACH = {"scenes": 4, "footage": 12}  # samples of a job
LIMIT = 64  # tokens of an answer, at most


@cache
def loaded(family: str, dtype: str, device: str) -> tuple[VideoLM, VideoLM, CachePool, Engine]:
    """Load a worker's models, caches and engine once."""
    target, draft = (load(model_folder(f"embedded:{family}/{name}"), dtype, device) for name in ("target", "plain"))
    return target, draft, CachePool(), engine_for("auto", device)


def jobs(scenes: int, footage: Path | None) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield family, source and numbers of samples: first those with many drafters, which take longest."""
    counts = {"scenes": scenes, "footage": len(_dataset("footage", footage).samples()) if footage else 0}
    for source, family in product(counts, FAMILIES):
        for start in range(0, counts[source], EACH[source]):
            yield family, source, tuple(range(start, min(start + EACH[source], counts[source])))


def measure(
    family: str, source: str, numbers: tuple[int, ...], footage: Path | None, dtype: str, device: str
) -> list[dict[str, Any]]:
    """Decode samples with and without drafters. Returns a row for each sample."""
    samples = _dataset(source, footage).samples()
    return [_answers(family, source, number, samples[number], dtype, device) for number in numbers]


def _dataset(source: str, footage: Path | None) -> Dataset:
    return FolderDataset(root=str(footage)) if source == "footage" else SyntheticDataset(scenes=100)


def _answers(family: str, source: str, number: int, sample: Sample, dtype: str, device: str) -> dict[str, Any]:
    """Decode a sample by every rule and drafter, and list the differences from decoding without a drafter."""
    target, draft, caches, engine = loaded(family, dtype, device)
    request, options = _request(target, sample), GenerationOptions(max_new_tokens=LIMIT, ratio=0.9, seed=number)
    drafters = ALWAYS if source == "footage" or number >= FEW else (*ALWAYS, *OTHERS)
    plain = {
        name: tokens_of(list(autoregressive(target, request, options, verifier, caches, engine)))
        for name, verifier in VERIFIERS.items()
    }
    row: dict[str, Any] = {"family": family, "source": source, "sample": number, "engine": engine.runs(target)}
    row |= {
        "exact": engine.exact(target),
        "prompt": len(request),
        "tokens": {name: len(found) for name, found in plain.items()},
    }
    row |= {"decodes": 0, "accepted": {}, "different": []}
    for drafter, (name, verifier) in product(drafters, VERIFIERS.items()):
        pruner = NonePruner() if drafter == "sparse" else TwoStagePruner()
        graph = DecodingGraph(target, draft, pruner, DRAFTERS[drafter], verifier, options, caches=caches, engine=engine)
        taken = list(graph.decode(request))
        row["decodes"] += 1
        row["accepted"][f"{drafter} {name}"] = [sum(step.accepted for step in taken[1:]), len(taken) - 1]
        if tokens_of(taken) != plain[name]:
            row["different"].append(f"{drafter} {name}")
    return row


def _request(target: VideoLM, sample: Sample) -> VideoPrompt:
    """Read a sample's frames as a run does, and make the prompt."""
    source = sample.video() if callable(sample.video) else sample.video
    part: dict[str, Any] = {"start": sample.start, "end": sample.end}
    return target.prompt(sample.question, [read_video(source, **part, **target.sampling(probe(source, **part)))])
