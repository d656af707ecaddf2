"""Four unlike requests joined, for every family, drafter, verifier and dtype: each has the tokens that it has alone."""

from __future__ import annotations

import itertools
import random

from campaign import fork  # noqa: F401  (its environment: no hub, no plugins of the developer's)

COUNT, SAMPLE = 112, 1  # crossings; the suite has those in which any two choices meet


def run(count: int, seed: int) -> list[str]:
    import test_passes as suite
    import tiny

    every = list(itertools.product(tiny.FAMILIES, suite.DRAFTERS, suite.VERIFIERS, ("float64", "float32")))
    found = []
    for family, drafter, verifier, dtype in random.Random(seed).sample(every, min(count, len(every))):
        try:
            suite.test_four_unlike_requests_joined_have_the_tokens_of_each_alone(family, drafter, verifier, dtype)
        except AssertionError as fault:
            found.append(f"{family}, {drafter}, {verifier}, {dtype}: {fault}")
    return found
