"""Write chats.json: the prompts that Hugging Face's own processors make of the conversations in tests/chat_cases.py.

They need torchvision, so this runs in an environment of its own, on the CPU, as make_prompts.py does:

    python tests/data/make_chats.py
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from chat_cases import FAMILIES, conversations, media, messages  # noqa: E402
from make_prompts import runs  # noqa: E402

ASSETS = HERE.parents[1] / "specvlm" / "assets"


def processor(family: str) -> Any:
    from transformers import LlavaOnevisionProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor

    made = {"qwen2_5_vl": Qwen2_5_VLProcessor, "llava_onevision": LlavaOnevisionProcessor, "qwen3_vl": Qwen3VLProcessor}
    return made[family].from_pretrained(ASSETS / family / "target")


def ids_of(made: Any, conversation: list[tuple[str, list[Any]]]) -> list[int]:
    text = made.apply_chat_template(messages(conversation, empty=True), add_generation_prompt=True)
    videos, images = media(conversation, 4), media(conversation, 2)
    begun = made.tokenizer.bos_token is not None and text.startswith(made.tokenizer.bos_token)
    given: dict[str, Any] = {"add_special_tokens": False} if begun else {}
    if videos:
        given["videos"] = [torch.zeros(count, 3, height, width, dtype=torch.uint8) for count, height, width, _ in videos]
        given["video_metadata"] = [
            {"total_num_frames": count, "fps": fps, "frames_indices": list(range(count))} for count, _, _, fps in videos
        ]
        given["do_sample_frames"] = False
    if images:
        # One list a conversation, as apply_chat_template(tokenize=True) does: LLaVA cuts only a lone image into tiles.
        given["images"] = [[Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)) for size in images]]
    return list(map(int, made(text=[text], **given)["input_ids"][0]))


def main() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # its compiled part wants CUDA; without these two it imports
    for name in ("nms", "qnms"):
        with suppress(RuntimeError):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    found = []
    for family in FAMILIES:
        made = processor(family)
        found += [{"family": family, "number": n, "ids": runs(ids_of(made, one))} for n, one in enumerate(conversations())]
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in found)
    (HERE / "chats.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
