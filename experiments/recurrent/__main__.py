"""Compare chains with `generate`: python -m experiments.recurrent [name,...] [prompts]. Writes a line for each."""

from __future__ import annotations

import json
import sys
import time

import torch

from experiments.recurrent.chain import Count, Reader, decode
from experiments.recurrent.models import NAMES, pair
from experiments.recurrent.state import published, restore, row_bytes, save

LIMIT, GUESSES = 32, 4


def prompt_of(seed: int) -> list[int]:
    """Make a random prompt of 3 to 150 tokens: some are longer than a chunk of the recurrent layers' prefill."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(3, 150, (1,), generator=generator))
    return torch.randint(1, 97, (length,), generator=generator).tolist()


def compared(name: str, prompts: int, replay: str) -> dict[str, object]:
    """Decode prompts and compare every answer with that of `generate`. Returns what it took."""
    target, draft = pair(name)
    total, equal = Count(), 0
    for seed in range(prompts):
        prompt = prompt_of(seed)
        asked = {"max_new_tokens": LIMIT, "do_sample": False, "pad_token_id": 0}
        want = target.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist()
        found = decode(target, draft, prompt, LIMIT, GUESSES, replay)
        equal += found.tokens == want
        for key in ("rounds", "accepted", "passes", "rows", "again", "copies"):
            setattr(total, key, getattr(total, key) + getattr(found, key))
    took = {key: round(getattr(total, key) / total.rounds, 2) for key in ("accepted", "passes", "rows", "again", "copies")}
    return {"model": name, "replay": replay, "equal": equal, "tried": prompts} | took


def costs(name: str) -> dict[str, object]:
    """Measure a tiny model's state beside a row of KV, and how long a copy and a pass take on this machine."""
    reader = Reader(pair(name)[0])
    with torch.inference_mode():
        reader.read(prompt_of(0))
        saved = save(reader.cache, reader.length)
        times = {}
        for what, work in (
            ("copy_us", lambda: save(reader.cache, reader.length)),
            ("restore_us", lambda: restore(reader.cache, saved)),
            ("pass_us", lambda: (reader.read([1]), restore(reader.cache, saved))),
        ):
            marks = []
            for _ in range(30):
                begin = time.perf_counter()
                work()
                marks.append(time.perf_counter() - begin)
            times[what] = round(sorted(marks)[15] * 1e6)
    return {"model": name, "state_bytes": saved.nbytes, "kv_row_bytes": row_bytes(reader.cache)} | times


def main(names: list[str], prompts: int) -> None:
    torch.set_num_threads(1)
    for name in names:
        for replay in ("now", "later"):
            print(json.dumps(compared(name, prompts, replay)), flush=True)
        print(json.dumps(costs(name)), flush=True)
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3NextConfig

    for config in (Qwen3_5Config(), Qwen3_5MoeConfig(), Qwen3NextConfig()):
        state, row = published(config)
        print(
            json.dumps({"default config": config.model_type, "state_bytes": state, "kv_row_bytes": row, "rows": state // row})
        )


if __name__ == "__main__":
    main(sys.argv[1].split(",") if sys.argv[1:] else list(NAMES), int(sys.argv[2]) if sys.argv[2:] else 50)
