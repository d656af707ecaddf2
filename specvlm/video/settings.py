"""Read the video processor settings of a model folder, from the same files as Hugging Face's AutoVideoProcessor."""

from dataclasses import dataclass, fields
from pathlib import Path
from sys import float_info
from typing import Any, Self

from specvlm.errors import UserError
from specvlm.parsing.files import json_of, read_text

LARGEST = 2**31  # upper bound of most settings that are whole numbers
MOST_PIXELS = 16384 * 28 * 28  # upper bound of min_pixels: the max_pixels of the released checkpoints
WHOLE = {  # settings that must be a whole number from 1 to this value
    **dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size"), 1024),
    **dict.fromkeys(("height", "width"), 8192),
    **dict.fromkeys(("min_pixels", "shortest_edge"), MOST_PIXELS),
    **dict.fromkeys(("max_pixels", "longest_edge", "max_video_tokens"), LARGEST),
    **dict.fromkeys(("num_frames", "min_frames", "max_frames"), LARGEST),
}
WAYS = {1: "Lanczos", 2: "bilinear", 3: "bicubic"}  # names of PIL's numbers for methods of resizing
POSITIVE = ("fps", "rescale_factor")
FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_sample_frames", "cap_pixels_per_frame")


@dataclass(frozen=True)
class SamplingSettings:
    """Frame sampling settings of a video processor. All fields are None if ``do_sample_frames`` is false.

    Attributes:
        fps: Sampled frames per second; None if not set.
        num_frames: Number of sampled frames; None if not set.
        min_frames: Minimum number of sampled frames; None if not set.
        max_frames: Maximum number of sampled frames; None if not set.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, families: tuple[str, ...]) -> Self:
        """Read the settings of a model folder.

        Args:
            folder: The model folder.
            families: Allowed beginnings of the processor's class name.

        Raises:
            UserError: Settings are missing, invalid or not supported (see `read_video_settings`), or both a rate and a
                number of frames are set.
        """
        found = read_video_settings(folder, families)
        if found.get("do_sample_frames") is False:
            return cls()
        given = {f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None}
        if "fps" in given and "num_frames" in given:
            raise UserError(
                f"{folder}: fps={given['fps']} and num_frames={given['num_frames']} of the video processor cannot both be set:"
                " set frames=… or fps=…"
            )
        return cls(**given)


def read_video_settings(folder: str | Path, families: tuple[str, ...], resamples: tuple[int, ...] = (3,)) -> dict[str, Any]:
    """Read the settings of the video processor, or those of the image processor if a folder has no others.

    Args:
        folder: The model folder.
        families: Allowed beginnings of the processor's class name.
        resamples: Allowed values of ``resample``, PIL's numbers in WAYS.

    Returns:
        The settings as in the file, by name. Missing ones are left out.

    Raises:
        UserError: There is no such folder, it has no settings or a broken file, or the settings belong to another
            family, have an invalid value, turn off a step of ``preprocess.py``, or ask for another way of resizing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    found: dict[str, Any] | None = read_json(folder / "processor_config.json").get("video_processor")
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        content = read_json(folder / name)  # a broken file is an error even if another one would do
        if found is None and (folder / name).is_file():
            found = content
    if found is None:
        raise UserError(
            f"{folder} has no video processor settings: expected processor_config.json with a video_processor in it,"
            " video_preprocessor_config.json or preprocessor_config.json"
        )
    _check(folder, found)
    kind = found.get("video_processor_type") or found.get("image_processor_type") or ""
    if kind and not str(kind).startswith(families):
        raise UserError(f"{folder} is set up for {kind}; expected one of {', '.join(families)}")
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if found.get(name) is False]
    if off or found.get("resample") not in (None, *resamples):
        known = " or ".join(f"{WAYS[way]} ({way})" for way in resamples)
        what = f"{off[0]}=false" if off else f"resample={found['resample']}, which is not {known},"
        raise UserError(f"{folder}: {what} of the video processor is not supported")
    return found


def _check(folder: Path, found: Any) -> None:
    """Raise UserError if the settings are not a dict, or one of them has an invalid value."""
    if not isinstance(found, dict):
        raise UserError(f"{folder}: video_processor in processor_config.json is not an object of settings")
    size = found.get("size")
    for name, value in [*found.items(), *(size.items() if isinstance(size, dict) else ())]:
        if value is not None and (wanted := _wanted(name, value)):
            raise UserError(f"{folder}: {name}={value!r} of the video processor: expected {wanted}")


def _wanted(name: str, value: Any) -> str:
    """Describe the values that a setting may have. Empty if its value is valid, or the setting is not checked."""
    if name in WHOLE:
        return "" if type(value) is int and 1 <= value <= WHOLE[name] else f"a whole number from 1 to {WHOLE[name]}"
    if name in POSITIVE:
        return "" if _number(value) and value > 0 else "a number more than 0"
    if name in FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if name in ("image_mean", "image_std"):
        three = isinstance(value, list) and len(value) == 3 and all(map(_number, value))
        return "" if three and (name == "image_mean" or min(value) > 0) else "three numbers, those of image_std more than 0"
    return ""


def _number(value: Any) -> bool:
    """Return True for a finite number; a bool is not one."""
    return type(value) in (int, float) and abs(value) < float_info.max


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if there is no file.

    Raises UserError if the file cannot be read or does not contain a JSON object.
    """
    if not path.exists():
        return {}
    try:
        content = json_of(read_text(path))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of settings")
    return content
