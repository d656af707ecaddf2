"""Answers of Hugging Face's own model: `python pristine_worker.py FOLDER REQUESTS ANSWERS`. Never imports specvlm.

REQUESTS: inputs of `generate` by name, from torch.save. ANSWERS: file for the token ids by name.
"""

import json
import sys

import torch
from transformers import AutoModelForImageTextToText

LIMIT = 24


def main(folder: str, requests: str, answers: str) -> None:
    torch.set_num_threads(1)
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    found = {}
    for name, inputs in torch.load(requests).items():
        out = hf.generate(**inputs, max_new_tokens=LIMIT, do_sample=False, pad_token_id=0)
        found[name] = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert not any(module.partition(".")[0] == "specvlm" for module in sys.modules)
    with open(answers, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
