"""Results of runs and jobs: metrics, the files that hold them, and their mirror on a tracker."""
