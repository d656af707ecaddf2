"""Parse and check the adviser's own options."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from specvlm.advise import acceptance
from specvlm.advise.acceptance import Known
from specvlm.advise.costs import Costs
from specvlm.config import RunConfig
from specvlm.errors import UserError, did_you_mean
from specvlm.strategies import Drafter, registry
from specvlm.strategies.drafters.shapes import AUTO
from specvlm.types import Within

OWN = {
    "acceptance": "guesses accepted per round of the paper's tree, as 3.5, or by ratio, as 0:4.8,0.9:4; or folders of earlier "
    "runs; left out: measured on the video",
    "drafters": "the drafters to consider, such as tree,dynamic_tree (all that are installed)",
    "tokens": "most new tokens per decode (128)",
    "check": "true: decode with the recommended configuration and two others, and compare with the prediction (false)",
    "requests": "also predict up to this many requests at once, 1 to 16; those that fit are measured (1)",
    "costs": "the costs.json of an earlier profile, instead of a new profile; needs acceptance=",
}
TREES = ("tree", "self")  # fixed shapes: predicted from a few measured trees; other drafters are measured as they are
RATIOS, RATIOS_OF_SELF = (0.0, 0.5, 0.75, 0.9, 1.0), (0.9,)  # to predict for tree, and for self
CHAINS = tuple(f"chain:{depth}" for depth in range(2, 9))
SHAPES = ("paper", *CHAINS, "2x1x1x1x1x1", "2x2x1x1x1", "4x1x1x1x1", "4x2x1x1", "4x2x2x1", "8x1x1x1", "4x4x1")
TOKENS = Within(8, 131_072)  # bounds of tokens=…
REQUESTS = Within(1, 16)  # of requests=…


@dataclass(frozen=True)
class Wishes:
    """Checked values of the adviser's own options (OWN).

    known: Acceptance by drafter and ratio; measured if empty. costs: Costs of an earlier profile; measured if None.
    """

    drafters: tuple[str, ...]
    known: Known = field(default_factory=dict)
    tokens: int = 128
    check: bool = False
    costs: Costs | None = None
    requests: int = 1

    @classmethod
    def of_words(cls, own: dict[str, str]) -> Self:
        """Parse and check the options. Raises UserError if one is wrong or they conflict. own: values by key of OWN."""
        every = list(registry.collect()["drafter"])
        names = [name.strip() for name in own.get("drafters", ",".join(every)).split(",")]
        if unknown := [name for name in names if name not in every]:
            hint = did_you_mean(unknown[0], every)
            raise UserError(f"drafters={unknown[0]}: expected some of {', '.join(every)}.{hint}")
        check = own.get("check", "false")
        tokens, requests = (whole(own, *each) for each in (("tokens", "128", TOKENS), ("requests", "1", REQUESTS)))
        if check not in ("true", "false"):
            raise UserError(f"check={check}: expected true or false")
        known = acceptance.of_words(own["acceptance"]) if "acceptance" in own else {}
        if known and not (names := [name for name in names if any(name == of for of, _ in known)]):
            raise UserError(f"acceptance={own['acceptance']} does not cover drafters={own['drafters']}")
        costs = Costs.read(Path(own["costs"])) if "costs" in own else None
        if costs and (not known or check == "true"):
            raise UserError("costs= loads no model: it needs acceptance=, and cannot be combined with check=true")
        if costs:
            names = [name for name in names if any(name == start.drafter for start in costs.starts)]
            if not names:
                raise UserError(f"costs={own['costs']} has no drafter that acceptance={own['acceptance']} covers")
            if requests > 1 and not ("tree" in names and costs.shared):
                raise UserError(
                    f"costs={own['costs']} has no rounds of several requests: make a profile with requests={requests}"
                )
        return cls(tuple(names), known, tokens, check == "true", costs, requests)

    def trees(self, cfg: RunConfig) -> dict[str, tuple[tuple[str, ...], tuple[float, ...]]]:
        """Shapes and ratios to predict, for each requested drafter of TREES. `tree` includes the run's own shape."""
        ratios = sorted({*RATIOS, float(cfg.ratio)})
        if self.known:  # ratio 1: do not assume that a drafter without video guesses as well
            ratios = [ratio for ratio in ratios if ratio < 1 or any(at == 1 for _, at in self.known)]
        if registry.build("pruner", cfg.pruner).keeps_all:
            ratios = [0.0]
        own = getattr(cfg.drafter, "shape", None)
        own = None if own == AUTO else own
        every = {
            "tree": (tuple(dict.fromkeys([*SHAPES, own or SHAPES[0]])), tuple(ratios)),
            "self": (CHAINS[:4], RATIOS_OF_SELF if len(ratios) > 1 else (0.0,)),
        }
        return {name: every[name] for name in self.drafters if name in TREES}

    def others(self, cfg: RunConfig) -> list[Drafter]:
        """Build the requested drafters that are not in TREES: the run's own as configured, others with their defaults.

        Leaves out `overlap` if `draft.device` is not set, since it then drafts as `tree` does.
        """
        names = [name for name in self.drafters if name not in TREES and (name != "overlap" or cfg.draft.device)]
        return [registry.build("drafter", cfg.drafter if cfg.drafter.name == name else name) for name in names]


def whole(own: dict[str, str], key: str, default: str, bounds: Within) -> int:
    """Read a whole number. Raises UserError if it is not one, or out of bounds."""
    value = own.get(key, default)
    if not (re.fullmatch("[0-9]{1,9}", value) and int(value) in bounds):
        raise UserError(f"{key}={value}: expected a whole number from {bounds.low}, {bounds.most}")
    return int(value)
