"""Several processes and GPUs that share one model."""
