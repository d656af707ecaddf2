"""Run campaigns: all, or those that are named. Ends with 1 where one found something."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from time import perf_counter
from types import ModuleType

import campaign


def campaigns() -> dict[str, ModuleType]:
    """Every module of the package that is a campaign, by name."""
    names = [module.name for module in pkgutil.iter_modules(campaign.__path__) if module.name != "__main__"]
    modules = {name: importlib.import_module(f"campaign.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "run")}


def main(argv: Sequence[str] | None = None) -> int:
    known = campaigns()
    parser = argparse.ArgumentParser(prog="make campaign", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}; all where none is named")
    parser.add_argument("--count", type=int, help="attacks of each (each has its own default)")
    parser.add_argument("--sample", action="store_true", help="as few attacks as the whole suite makes")
    parser.add_argument("--few", action="store_true", help="a third of the sample, as `make test` does")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no campaign {unknown[0]!r}; there are {', '.join(known)}")
    found = 0
    for name in options.names or known:
        module = known[name]
        sample = getattr(module, "FEW", max(1, module.SAMPLE // 3)) if options.few else module.SAMPLE
        count = options.count or (sample if options.sample or options.few else module.COUNT)
        found += attack(name, known[name], count, options.seed)
    return 1 if found else 0


def attack(name: str, module: ModuleType, count: int, seed: int) -> int:
    """Run one campaign and say what it found; returns how much that is."""
    start = perf_counter()
    findings = module.run(count, seed)
    for finding in findings:
        print(f"{name}: FOUND {finding}", flush=True)
    print(f"{name}: {count} attacks, {len(findings)} findings, {perf_counter() - start:.0f} s, seed {seed}", flush=True)
    return len(findings)


if __name__ == "__main__":
    sys.exit(main())
