"""Write prompts.json: the prompts that Hugging Face's own processors make of the folders in tests/prompt_folders.py.

They need torchvision, so this runs in an environment of its own, on the CPU:

    python -m venv apart && . apart/bin/activate
    pip install torch==2.13.0 && pip install transformers==5.23.0 pillow jinja2 && pip install --no-deps torchvision==0.28.0
    python tests/data/make_prompts.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import prompt_folders  # noqa: E402


def processor(family: str, folder: Path):
    from transformers import LlavaOnevisionProcessor, Qwen2_5_VLProcessor

    return {"qwen2_5_vl": Qwen2_5_VLProcessor, "llava_onevision": LlavaOnevisionProcessor}[family].from_pretrained(folder)


def asked(made, question: str, videos: list[tuple[int, int, int, float]]) -> dict:
    """What the processor makes of a user's turn: runs of tokens as [token, length], and what stands beside them."""
    content = [{"type": "video"} for _ in videos] + [{"type": "text", "text": question}]
    text = made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    begun = made.tokenizer.bos_token is not None and text.startswith(made.tokenizer.bos_token)
    out = made(  # as its apply_chat_template(tokenize=True) calls it
        text=[text],
        videos=[torch.zeros(frames, 3, height, width, dtype=torch.uint8) for frames, height, width, _ in videos],
        video_metadata=[{"total_num_frames": n, "fps": fps, "frames_indices": list(range(n))} for n, _, _, fps in videos],
        do_sample_frames=False,
        **({"add_special_tokens": False} if begun else {}),
    )
    ids, kinds = (out[name][0] if name in out else [] for name in ("input_ids", "mm_token_type_ids"))
    found = {"ids": runs(ids), "kinds": runs(kinds)}
    for name in ("video_grid_thw", "second_per_grid_ts"):
        if name in out:
            found[name] = torch.as_tensor(out[name]).tolist()
    return found


def runs(row) -> list:
    return [
        [token, length] if length > 1 else token for token, length in ((t, len(list(g))) for t, g in groupby(map(int, row)))
    ]


def main() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # its compiled part wants CUDA; without these two it imports
    for name in ("nms", "qnms"):
        with suppress(RuntimeError):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    found = []
    for family in prompt_folders.VIDEOS:
        for kind in prompt_folders.KINDS:
            with tempfile.TemporaryDirectory() as scratch:
                made = processor(family, prompt_folders.make(Path(scratch, "model"), family, kind))
                for where, question, videos in prompt_folders.cases(family):
                    if where == kind:
                        case = {"family": family, "kind": kind, "question": question, "videos": videos}
                        found.append(case | asked(made, question, videos))
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in found)
    (HERE / "prompts.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
