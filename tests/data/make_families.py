"""Write families.json: what Hugging Face's own processors make of the requests in tests/family_folders.py.

    python tests/data/make_families.py

They need torchvision, or what stands in for it: `stand_in.py`, with which this writes the same of the families that were
frozen with torchvision. With either, this runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import family_folders  # noqa: E402
import stand_in  # noqa: E402


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]


def messages(videos: list, images: list) -> list[dict[str, Any]]:
    """One turn: images, videos, and the question."""
    content = [{"type": "image", "image": image(*size)} for size in images]
    content += [{"type": "video", "video": video(*size)} for size in videos]
    return [{"role": "user", "content": [*content, {"type": "text", "text": family_folders.QUESTION}]}]


def video(count: int, height: int, width: int, fps: float) -> tuple[torch.Tensor, dict[str, Any]]:
    index = list(range(0, 4 * count, 4))
    return family_folders.frames(count, height, width), {
        "total_num_frames": 4 * count, "fps": 4 * fps, "frames_indices": index, "duration": count / fps,
    }  # fmt: skip


def image(height: int, width: int) -> torch.Tensor:
    return family_folders.frames(1, height, width)[0]


def asked(processor: Any, chat: list[dict[str, Any]]) -> dict[str, Any]:
    """Token ids as [token, length] runs, grids, and digests of the videos' pixels (images need PIL's processor)."""
    parts = [part for turn in chat for part in turn["content"]]
    videos, images = ([part[kind] for part in parts if part["type"] == kind] for kind in ("video", "image"))
    more: dict[str, Any] = {"images": images} if images else {}
    if videos:
        more |= {"videos": [frames for frames, _ in videos], "video_metadata": [about for _, about in videos]}
        more["do_sample_frames"] = False
    bare = [[part if part["type"] == "text" else {"type": part["type"]} for part in turn["content"]] for turn in chat]
    turns = [turn | {"content": content} for turn, content in zip(chat, bare, strict=True)]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    out = processor(text=[text], return_tensors="pt", **more)
    found = {"ids": [[token, len(list(same))] for token, same in groupby(out["input_ids"][0].tolist())]}
    found |= {name: out[name].tolist() for name in ("video_grid_thw", "image_grid_thw") if name in out}
    if videos and not images:
        found["pixels"] = digest(out["pixel_values_videos"] if "pixel_values_videos" in out else out["pixel_values"])
    return found


def make_importable() -> None:
    """Make torchvision importable: its compiled part wants CUDA. Without it, let ours stand in for it."""
    if find_spec("torchvision") is None:
        stand_in.install()
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with suppress(RuntimeError):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def of_family(family: str) -> dict[str, Any]:
    """Make every request of a family with its own processor."""
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory() as scratch:
        folder = family_folders.make(Path(scratch), family) / "target"
        processor = AutoProcessor.from_pretrained(folder)
        requests = {name: messages(*parts) for name, parts in family_folders.requests(family).items()}
        if family == "llava_next_video":  # its processor stacks videos
            del requests["unlike videos"]
        requests |= {name: family_folders.chat(name, video, image) for name in family_folders.CHATS}
        return {name: asked(processor, chat) for name, chat in requests.items()}


def main() -> None:
    make_importable()
    found = {family: of_family(family) for family in family_folders.FAMILIES}
    assert not any(module.partition(".")[0] == "specvlm" for module in sys.modules)
    (HERE / "families.json").write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
