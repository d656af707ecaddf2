"""Fit a static draft tree to recorded runs: `python -m specvlm.fit_tree`."""
