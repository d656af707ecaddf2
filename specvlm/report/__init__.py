"""Report runs and sweeps as one HTML file, and the drafter's view as a film. Command: `python -m specvlm.report`.

The drafter's view is the part of the video that the drafter saw: the tokens that the pruner kept. `reading` reads
folders as jobs, `statistics` computes metrics with intervals, `table` and `charts` show them, `seen` collects the
drafter's view of a sample, `page` renders the HTML file and `film` writes the film.
"""
