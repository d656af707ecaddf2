"""The packages' own tests start from what tests/conftest.py sets up: run `pytest` from the root, or in a package's folder."""

import torch

torch.set_num_threads(1)  # thousands of tiny operations: two threads on busy cores are ten times slower
