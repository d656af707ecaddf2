"""Count how often the number of rows of a pass changes its results. See `python -m specvlm.exact_probe --help`."""
