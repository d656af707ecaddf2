"""Model families, and how a checkpoint folder becomes one."""
