"""Answers of Hugging Face's own models, in a process that never imports specvlm.

Reads lines of JSON, [FOLDER, REQUESTS, ANSWERS], and writes a line after each. REQUESTS: inputs of `generate` by name,
from torch.save. ANSWERS: file for the token ids by name.
"""

import json
import sys

import torch
from transformers import AutoModelForImageTextToText

LIMIT = 24


def answer(folder: str, requests: str, answers: str) -> None:
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    found = {}
    for name, inputs in torch.load(requests).items():
        out = hf.generate(**inputs, max_new_tokens=LIMIT, do_sample=False, pad_token_id=0)
        found[name] = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert not any(module.partition(".")[0] == "specvlm" for module in sys.modules)
    with open(answers, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        answer(*json.loads(line))
        print("answered", flush=True)
