"""How many frames a checkpoint's own settings ask for, as Hugging Face's video processors read them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from specvlm.data.settings import read_video_settings
from specvlm.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """What a video processor says of sampling; None where it says nothing.

    A processor with ``do_sample_frames=false`` leaves sampling to whoever calls it: then all of it is None.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None

    @classmethod
    def from_folder(cls, folder: Path, families: tuple[str, ...]) -> Self:
        """Read a model folder. Raises UserError as `read_video_settings`, and for both a rate and a number of frames."""
        found = read_video_settings(folder, families)
        if found.get("do_sample_frames") is False:
            return cls()
        given = {f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None}
        if "fps" in given and "num_frames" in given:
            raise UserError(
                f"{folder}: fps={given['fps']} and num_frames={given['num_frames']} of the video processor exclude each other:"
                " set frames=… or fps=…"
            )
        return cls(**given)
