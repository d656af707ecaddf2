"""specvlm as a model of lmms-eval: `lmms-eval --model specvlm --model_args pretrained=…,draft=…`."""

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"  # for lmms-eval's --include_path


def manifest() -> Any:
    """Return what lmms-eval registers. Called through the entry point, when lmms-eval starts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("specvlm", chat_class_path=f"{__name__}.model.SpecVLM")
