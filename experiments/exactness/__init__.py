"""Counts tree rows that differ in any bit from a pass of one row. See `python -m experiments.exactness --help`."""
