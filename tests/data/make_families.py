"""Write families.json: what Hugging Face's own processors make of the requests in tests/family_folders.py.

They need torchvision, so this runs in an environment of its own, like make_prompts.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import family_folders  # noqa: E402


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]


def asked(processor: Any, videos: list, images: list) -> dict[str, Any]:
    """Token ids as [token, length] runs, grids, and digests of the videos' pixels (images need PIL's processor)."""
    content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    turn = [{"role": "user", "content": [*content, {"type": "text", "text": family_folders.QUESTION}]}]
    more: dict[str, Any] = {}
    if videos:
        more["videos"] = [family_folders.frames(*video[:3]) for video in videos]
        more["video_metadata"] = [
            {"total_num_frames": 4 * count, "fps": 4 * fps, "frames_indices": list(range(0, 4 * count, 4))}
            for count, _, _, fps in videos
        ]
        more["do_sample_frames"] = False
    if images:
        more["images"] = [family_folders.frames(1, *size)[0] for size in images]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    out = processor(text=[text], return_tensors="pt", **more)
    found = {"ids": [[token, len(list(same))] for token, same in groupby(out["input_ids"][0].tolist())]}
    found |= {name: out[name].tolist() for name in ("video_grid_thw", "image_grid_thw") if name in out}
    if videos and not images:
        pixels = out["pixel_values_videos"] if "pixel_values_videos" in out else out["pixel_values"]
        found["pixels"] = digest(pixels)
    return found


def main() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # its compiled part wants CUDA; without these two it imports
    for name in ("nms", "qnms"):
        with suppress(RuntimeError):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers import AutoProcessor

    found = {}
    for family in family_folders.FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = family_folders.make(Path(scratch), family) / "target"
            processor = AutoProcessor.from_pretrained(folder)
            found[family] = {request: asked(processor, *parts) for request, parts in family_folders.requests(family).items()}
    assert not any(module.partition(".")[0] == "specvlm" for module in sys.modules)
    (HERE / "families.json").write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
