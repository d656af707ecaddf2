"""Fit a static draft tree, one with the same shape in every round, to recorded runs: `python -m specvlm.fit_tree`."""
