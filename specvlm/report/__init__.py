"""Report runs and sweeps as one HTML file, and the drafter's view as a film. Command: `python -m specvlm.report`.

`reading` reads folders as jobs, `statistics` computes metrics with intervals, `table` and `charts` show them, `seen`
collects the drafter's view of a sample, `page` and `film` write the files.
"""
