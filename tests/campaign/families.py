"""Requests of every kind to every family, with every pruner, drafter and ratio: each answer is `generate`'s own.

The suite has those crossings in which any two options meet. The models are the tiny ones of `family_folders`, and the
embedded pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from campaign import fork  # noqa: F401  (its environment: no hub, no plugins of the developer's)

COUNT, SAMPLE = 600, 1

PACKAGES = ("specvlm-internvl", "specvlm-qwen2-vl", "specvlm-video-llama-3")


def run(count: int, seed: int) -> list[str]:
    import family_checks as checks
    import packages

    found = []
    with packages.installed(*PACKAGES):
        for number, (family, request, draft, pruner, drafter, how) in enumerate(drawn(random.Random(seed), count)):
            if checks.decode(family, request, draft, pruner, drafter, **how) != checks.answers(family)[request]:
                found.append(f"case {number} of seed {seed}: {family}, {request}, {draft}, {pruner!r}, {drafter!r}, {how}")
    return found


def drawn(chance: random.Random, count: int) -> Iterator[tuple[str, str, str, Any, Any, dict[str, Any]]]:
    """Families in turn; the rest at random."""
    import family_checks as checks
    import family_folders

    from experiments.embedded_pair.evaluate import DRAFTS

    drafts = {family: (*names, "target") for family, names in DRAFTS.items()}
    drafts |= {family: ("draft", "small", "target") for family in family_folders.FAMILIES}
    families, pruners, drafters = list(drafts), checks.all_pruners(), checks.all_drafters()
    for number in range(count):
        family = families[number % len(families)]
        how = {"ratio": chance.choice((0.0, 0.5, 0.7, 0.9, 1.0)), "positions": chance.choice(checks.POSITIONS)}
        request = chance.choice(checks.requests(family))
        yield family, request, chance.choice(drafts[family]), chance.choice(pruners), chance.choice(drafters), how
