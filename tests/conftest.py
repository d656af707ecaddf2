"""What every test starts from: no hub, no tracker, no plugins of the developer's, and no CUDA tests without CUDA."""

import os

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "SPECVLM_PLUGINS": ""}
os.environ.pop("HYDRA_FULL_ERROR", None)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
