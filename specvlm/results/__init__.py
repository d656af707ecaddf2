"""Results of a run: rows, metrics, folders, and their mirror on W&B."""
