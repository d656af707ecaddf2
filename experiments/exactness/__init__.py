"""How many rows of a pass have other bits than in a pass of their own. `python -m experiments.exactness --help`."""
