"""Count how often the number of rows of a pass changes a row's results. See `python -m specvlm.exact_probe --help`."""
