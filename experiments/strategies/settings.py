"""What is compared: every registered pruner, some of their variants, and every drafter; and what they need of one prefill."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from torch import Tensor

from specvlm.strategies import CODEC_SIGNALS, STATE_SIGNALS, Drafter, PruneContext, Pruner, plugins, registry
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.types import KeepSet, VideoPrompt

HERE = Path(__file__).parent
PLUGINS = HERE.parents[1] / "plugins"
RESULTS = HERE / "results"
RATIOS = (0.5, 0.75, 0.9, 0.95)
RATIO = 0.9  # of the verdicts, the drafters and what else is tried at one ratio alone
TREE = "tree"  # the drafter of the pruners' table, the paper's

# name of the pruner: fields, each a variant worth a row of its own. Where the default is one, it has no other row, so that rows
# keep their meaning when the default changes.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "window": [{"where": "front"}, {"where": "back"}],
    "two_stage": [{"mass": "auto"}, {"mass": 0.2}, {"spread": "frame"}],
    "fastv": [{"source": "draft", "layer": 1}],
    "flashvid": [{"saliency": "verifier_attention"}, {"saliency": "vision_attention"}],
    "fastvid": [{"saliency": "verifier_attention"}, {"saliency": "vision_attention"}],
    "holitom": [{"saliency": "verifier_attention"}, {"saliency": "vision_attention"}],
    "dart": [{"states": "raw"}],
    "oneclip": [{"centres": "peaks", "shares": "length"}],
    "streaming": [{"chunk": 1}],
    "visionzip": [{"dominant": 0.864}],
}
# What a strategy did before it followed its paper this closely, by the name its rows bear.
OURS: dict[str, tuple[str, dict[str, object]]] = {
    "flashvid ours": (
        "flashvid",
        {"saliency": "verifier_attention", "relevance": False, "quota": "video", "mean": "token"},
    ),
    "memstream ours": (
        "memstream",
        {
            "experts": ("verifier_attention", "verifier_attention_last_row", "features"),
            "change": -1.0,
            "fusion": "mean",
            "detrend": True,
            "unit": "token",
        },
    ),
}
MERGERS = (
    "fastvid saliency=verifier_attention", "flashvid saliency=verifier_attention", "holitom saliency=verifier_attention", "lvc",
    "metok", "prunevid", "storm", "visionzip",
)  # fmt: skip
DRAFTER_PRUNERS = ("uniform", "two_stage mass=0.2")
FITTED = ("fitted_tree", "fitted_tree depth=8")
KEPT_SPARSE = "sparse length=5, as many video tokens as uniform keeps"


@dataclass(frozen=True)
class Setting:
    """One row a scene. drafter, pruner: as the tables name them."""

    drafter: str
    pruner: str
    ratio: float


@cache
def registered() -> dict[str, type[Pruner]]:
    """Every pruner by name: of this repository's plugins/ as they lie there, installed or not, and what else is registered."""
    found: dict[str, type[Pruner]] = {}
    for file in sorted(PLUGINS.glob("*/specvlm_*.py")):
        sys.path.insert(0, str(file.parent))  # so that an installed package is the one that lies here, too
        module = importlib.import_module(file.stem)
        found |= {cls.name: cls for cls in plugins.strategies_of(module) if cls.kind == "pruner"}
    return {name: info.cls for name, info in registry.collect()["pruner"].items()} | found  # type: ignore[misc]


@cache
def pruners() -> dict[str, Pruner]:
    """Every pruner and variant by the name its rows bear."""
    found: dict[str, Pruner] = {}
    for name, cls in registered().items():
        variants = {named(name, fields): cls(**fields) for fields in VARIANTS.get(name, [])}
        found |= variants if cls() in variants.values() else {name: cls()} | variants
        found |= {ours: cls(**fields) for ours, (of, fields) in OURS.items() if of == name}
    return found | {f"{name} unmerged": Unmerged(found[name]) for name in MERGERS if name in found}


def named(name: str, fields: Mapping[str, object]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in fields.items())])


def drafters(family: str) -> dict[str, Drafter]:
    """By the name its rows bear. Of KEPT_SPARSE the entries depend on the prompt: `drafter_for` has them."""
    fitted = {name: tree_file(family, name) for name in FITTED}
    return {
        TREE: TreeDrafter(),
        "chain:5": TreeDrafter("chain:5"),
        **{name: TreeDrafter(str(file)) for name, file in fitted.items() if file.is_file()},
        "dynamic_tree": DynamicTreeDrafter(),
        "dynamic_tree depth=8": DynamicTreeDrafter(depth=8),
        "entropy_tree": EntropyTreeDrafter(),
        "dynamic_tree nodes=63 depth=8": DynamicTreeDrafter(nodes=63, depth=8),  # as many and as deep as SAGE's largest
        "self chain:5": SelfDrafter("chain:5"),
        "sparse": SparseDrafter(),
        KEPT_SPARSE: SparseDrafter(length=5),
        "prompt_lookup": PromptLookupDrafter(),
    }


def tree_file(family: str, name: str) -> Path:
    return RESULTS / f"{family}_{name.replace(' depth=', '_')}.json"


def drafter_for(family: str, name: str, prompt: VideoPrompt) -> Drafter:
    if name != KEPT_SPARSE:
        return drafters(family)[name]
    total = len(prompt.video_index)
    return SparseDrafter(entries=len(prompt) - total + KeepSet.budget(total, RATIO), length=5)


def left_out(family: str) -> list[str]:
    """What has no rows here, in lines."""
    lines = [
        f"{family}: pruner={name} is left out: PyAV is not installed (pip install av)"
        for name, pruner in pruners().items()
        if not readable(pruner)
    ]
    return lines + [
        f"{family}: drafter={name} is left out: python -m experiments.strategies.fit makes {tree_file(family, name).name}"
        for name in FITTED
        if not tree_file(family, name).is_file()
    ]


def readable(pruner: Pruner) -> bool:
    """Can all that it reads be read here?"""
    return not pruner.needs & CODEC_SIGNALS or find_spec("av") is not None


def settings(family: str) -> Iterator[Setting]:
    """All rows of a scene."""
    for name, pruner in pruners().items():
        if pruner.keeps_all:
            yield Setting(TREE, name, 0.0)
        elif isinstance(pruner, Unmerged):
            yield Setting(TREE, name, RATIO)
        elif readable(pruner):
            yield from (Setting(TREE, name, ratio) for ratio in RATIOS)
    yield Setting(TREE, "uniform", 1.0)  # the text alone
    for drafter in drafters(family):
        if drafter != TREE:
            blind = drafter in ("prompt_lookup", "sparse", KEPT_SPARSE)  # to what the pruner leaves
            yield from (Setting(drafter, pruner, RATIO) for pruner in DRAFTER_PRUNERS[: 1 if blind else 2])


# ---- several pruners, one prefill ------------------------------------------------------------------------------------


class Together(Pruner):
    """Pruners that one prefill can gather for: at most one layer of states, at most one rule of weighing rows."""

    name = "together"

    def __init__(self, members: Mapping[str, Pruner], layers: int) -> None:
        self.members = dict(members)
        self._layer = next((layer for pruner in members.values() if (layer := layer_of(pruner, layers))), 0)
        self._weigher = next((pruner for pruner in members.values() if weighs(pruner)), None)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(pruner.needs for pruner in self.members.values()))

    def state_layer(self, layers: int) -> int:
        return self._layer

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        assert self._weigher is not None
        return self._weigher.row_weights(text_TD, features_ND)

    def select(self, ctx: PruneContext) -> KeepSet:
        raise NotImplementedError("its members select")


def layer_of(pruner: Pruner, layers: int) -> int:
    """Behind how many layers it reads states; 0 where it reads none."""
    return pruner.state_layer(layers) if pruner.needs & STATE_SIGNALS else 0


def weighs(pruner: Pruner) -> bool:
    return "verifier_attention_weighted" in pruner.needs


def groups(named: Mapping[str, Pruner], layers: int) -> list[Together]:
    """Few prefills, by first fit: pruners part where they read states behind other layers, or weigh rows otherwise."""
    parts: list[dict[str, Pruner]] = []
    for name, pruner in named.items():
        fitting = (part for part in parts if all(_agree(pruner, other, layers) for other in part.values()))
        home = next(fitting, None)
        if home is None:
            parts.append(home := {})
        home[name] = pruner
    return [Together(part, layers) for part in parts]


def _agree(one: Pruner, other: Pruner, layers: int) -> bool:
    mine, theirs = layer_of(one, layers), layer_of(other, layers)
    if mine and theirs and mine != theirs:
        return False
    return not (weighs(one) and weighs(other)) or one == other


# ---- a pruner looked at from outside ---------------------------------------------------------------------------------


class Wrapped(Pruner):
    """Another pruner in all it asks for."""

    def __init__(self, inner: Pruner) -> None:
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.keeps_all = inner.keeps_all  # type: ignore[misc]

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    @property
    def draft_layers(self) -> int:
        return self.inner.draft_layers

    def state_layer(self, layers: int) -> int:
        return self.inner.state_layer(layers)

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        return self.inner.row_weights(text_TD, features_ND)

    def select(self, ctx: PruneContext) -> KeepSet:
        return self.inner.select(ctx)


class Unmerged(Wrapped):
    """The tokens that a merger merges onto, as they were: what the merging itself is worth."""

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet(self.inner.select(ctx).index, ctx.total)


class Timed(Wrapped):
    """seconds: what `select` took; None where it was not called, since all or nothing is kept."""

    seconds: float | None = None

    def select(self, ctx: PruneContext) -> KeepSet:
        start = perf_counter()
        keep = super().select(ctx)
        self.seconds = perf_counter() - start
        return keep
