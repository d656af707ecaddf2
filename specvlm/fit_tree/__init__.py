"""Fit a tree to what runs measured: `python -m specvlm.fit_tree`."""
