"""Run one command line: configuration, model loading, jobs and terminal output."""
