"""The processor settings in a model folder, found where Hugging Face's AutoVideoProcessor finds them."""

import json
from pathlib import Path
from typing import Any

from specvlm.errors import UserError


def read_video_settings(folder: Path, families: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of the video processor; the image processor's where a folder has only those, as released ones.

    Raises UserError where there are none, where they are of another family than ``families`` (how class names begin),
    and for steps that ``preprocess.py`` does not do.
    """
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    found: dict[str, Any] | None = read_json(folder / "processor_config.json").get("video_processor")
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if found is None and (folder / name).is_file():
            found = read_json(folder / name)
    if found is None:
        raise UserError(
            f"{folder} has no video processor settings: wanted processor_config.json with a video_processor in it,"
            " video_preprocessor_config.json or preprocessor_config.json"
        )
    kind = found.get("video_processor_type") or found.get("image_processor_type") or ""
    if kind and not kind.startswith(families):
        raise UserError(f"{folder} is set up for {kind}; wanted one of {', '.join(families)}")
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if found.get(name) is False]
    if off or found.get("resample") not in (None, 3):
        what = f"{off[0]}=false" if off else f"resample={found['resample']}, which is not bicubic (3),"
        raise UserError(f"{folder}: {what} of the video processor is not supported")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is no file. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: wanted an object of settings")
    return content
