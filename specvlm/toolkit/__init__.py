"""Building blocks for pruners: clustering, segmentation, budgets."""
