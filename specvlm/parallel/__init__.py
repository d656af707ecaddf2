"""Tensor parallelism: several processes and GPUs that share one model."""
