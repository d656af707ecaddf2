"""One command from argv to its folder: configuration, models, jobs, and what the terminal shows."""
