"""Where kernels are tested: a GPU, or Triton's interpreter (TRITON_INTERPRET=1). Elsewhere, importers are skipped."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if GPU else "cpu"
# The interpreter cuts numbers off where bfloat16 is meant to be rounded.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
