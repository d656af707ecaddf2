"""Model families, checkpoints, forward passes and KV caches."""
