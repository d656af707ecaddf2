"""Set up the packages' own tests as tests/conftest.py does. Run `pytest` from the root, or in a package's folder."""

import torch

torch.set_num_threads(1)  # thousands of tiny operations: two threads on busy cores are ten times slower
