"""Values that no key should have: each run ends well or with one line, exit code 2, and nothing written."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

from campaign.fork import Child, preload, specvlm

COUNT, SAMPLE = 700, 12

VALUES = (
    *("nan", "inf", "-inf", "-1", "0", "0.5", "1e308", "9223372036854775808", "99999999999999999999999"),
    *("abc", "", " ", "null", "true", "???", "[1,2]", "{a:1}", "${oc.env:HOME}", "a\\0b", "a\nb", "'\"", "it's"),
    *("日本語\u202e😀", "x" * 5000),
)
KEYS = (
    *("ratio", "positions", "mrope", "video", "question", "frames", "fps", "max_pixels", "reader", "max_new_tokens"),
    *("repetition_penalty", "seed", "device", "dtype", "engine", "threads", "baseline", "baselines", "resume", "fail_fast"),
    *("check", "shard", "turn", "record", "target.path", "draft.path", "target.weights", "draft.weights", "target.parallel"),
    *("draft.parallel", "draft.device", "pruner", "drafter", "verifier", "dataset", "tracker", "pair", "experiment"),
)
OPTIONS = {  # of strategies: the word that chooses one, and its keys
    "pruner=two_stage": ("pruner.mass", "pruner.spread"),
    "pruner=window": ("pruner.where",),
    "pruner=fastv": ("pruner.layer",),
    "drafter=tree": ("drafter.shape", "drafter.children"),
    "drafter=dynamic_tree": ("drafter.nodes", "drafter.depth"),
    "drafter=entropy_tree": ("drafter.nodes",),
    "drafter=sparse": ("drafter.keep",),
    "drafter=prompt_lookup": ("drafter.longest",),
    "verifier=sampling": ("verifier.temperature", "verifier.top_k", "verifier.top_p"),
    "verifier=loose": ("verifier.relaxed",),
    "dataset=synthetic": ("dataset.scenes", "dataset.ask"),
    "dataset=folder": ("dataset.root",),
}
SHORT = {"frames": "4", "max_new_tokens": "3", "baseline": "false"}


def cases() -> list[tuple[str, ...]]:
    """The words of every case."""
    own = [(f"{key}={value}",) for key, value in itertools.product(KEYS, VALUES)]
    chosen = [(choice, key) for choice, keys in OPTIONS.items() for key in keys]
    return own + [(choice, f"{key}={value}") for (choice, key), value in itertools.product(chosen, VALUES)]


def shortened(words: tuple[str, ...]) -> list[str]:
    """With what makes the run short, where the case does not say otherwise."""
    taken = {word.partition("=")[0] for word in words}
    few = ["dataset.scenes=1"] if "dataset=synthetic" in words and "dataset.scenes" not in taken else []
    return [*(f"{key}={value}" for key, value in SHORT.items() if key not in taken), *few, *words]


def run(count: int, seed: int) -> list[str]:
    preload()
    everything, found = cases(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, words in enumerate(random.Random(seed).sample(everything, min(count, len(everything)))):
            place = Path(folder, str(number))
            ended = Child(specvlm(*shortened(words), f"hydra.run.dir={place}/run"), place).wait()
            faults = ended.faults()
            if ended.code == 2 and (place / "run").exists():
                faults.append("a refused run left its folder behind")
            found += [f"{[word[:100] for word in words]}: {fault}" for fault in faults]
    return found
