"""A report of runs and sweeps as one HTML file, and what a drafter saw as a film.

`python -m specvlm.report` (see `__main__`); `reading`: from folders to jobs; `statistics`: from jobs to figures with intervals;
`charts`, `seen`, `film`, `page`: from there to what is shown.
"""
