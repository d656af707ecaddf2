"""What a run leaves behind: rows, figures, folders, and their mirror on W&B."""
