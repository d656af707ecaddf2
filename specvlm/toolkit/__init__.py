"""Building blocks for pruners: cluster tokens, cut videos into segments, divide budgets."""
