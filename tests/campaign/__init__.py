"""Attacks on specvlm that must find nothing: `make campaign` runs them all, the suite a sample of each.

A campaign is a module of this package with

- `run(count: int, seed: int) -> list[str]`: `count` random attacks; returns what it found, one line each;
- `COUNT`: as many attacks as `make campaign` makes;
- `SAMPLE`: as many as `make test-all` makes, in a few seconds; `make test` makes a third of them, or `FEW`.

The runner finds such modules by itself. A campaign makes its own files, in a temporary folder, and imports of specvlm no more
than the command line, where that will do: so it outlives the next renaming.
"""
