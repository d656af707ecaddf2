"""Every drafter with every penalty and filter of the suite, over other seeds: answers have the target's distribution."""

from __future__ import annotations

import itertools

from campaign import fork  # noqa: F401  (its environment: no hub, no plugins of the developer's)

COUNT, SAMPLE = 16, 1  # crossings, of RUNS answers each; fewer for the sample, whose crossing the suite has anyway
RUNS, SAMPLED = 1000, 200


def run(count: int, seed: int) -> list[str]:
    from test_sampling_graph import CHANCE, DRAFTERS, PENALISED, PLAIN, expected, p_value, sampled

    runs, found = SAMPLED if count == SAMPLE else RUNS, []
    for drafter, how in itertools.islice(itertools.product(DRAFTERS, (PLAIN, PENALISED)), count):
        answers, _, _ = sampled(drafter, runs=runs, first=(seed + 1) * 10_000, **how)
        p = p_value(answers, expected(**how))
        found += [f"{drafter}, {how}: another distribution than the target's, p = {p:.1e}"] * int(p <= CHANCE)
    return found
