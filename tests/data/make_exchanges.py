"""Record 40 exchanges of OpenAI's client with the server: `PYTHONPATH=.:tests python tests/data/make_exchanges.py`.

Each has the arguments of `chat.completions.create`, and what came back. Answers must be those of the session alone, so
that a record is only made if they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("exchanges.json")
MODEL = "embedded:qwen2_5_vl"
FEW = {"media_io_kwargs": {"video": {"num_frames": 4}}}
ASK = "describe the video."


def video(name: str = "synthetic_1") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"embedded:{name}"}}


def image(colour: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"picture:{colour}"}}  # made into a data URL by who asks


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}


def asked(*messages: Any, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": list(messages), "max_tokens": 8, "extra_body": FEW} | options


def all_asked() -> list[dict[str, Any]]:
    one, story = user(video(), ASK), user(video(), "tell me a story")
    system = {"role": "system", "content": "answer with one word."}
    said = {"role": "assistant", "content": "four objects."}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    hot = {"temperature": 2.0, "seed": 3}
    plain = [
        asked(one),
        asked(one, max_tokens=20),
        asked(user(video("synthetic_2"), "how many objects appear?")),
        asked(user(video("synthetic_3"), ASK), max_completion_tokens=6, max_tokens=None),
        asked(user(video("synthetic_4"), ASK), temperature=0),
        asked(user(ASK)),
        asked({"role": "user", "content": "a text alone"}),
        asked(system, one),
        asked({**system, "role": "developer"}, one),
        asked(one, said, user("what color is the background?")),
        asked(system, one, said, user("and now?"), said, user("which one comes last?")),
        asked(user(image("red"), "what color is it?")),
        asked(user(image("red"), image("blue"), "compare them.")),
        asked(user(image("red"), video(), "and the picture?")),
        asked(user(video(), video("synthetic_2"), "compare them.")),
        asked(one, stop=["navy"]),
        asked(one, stop="background", max_tokens=20),
        asked(one, logprobs=True),
        asked(one, logprobs=True, top_logprobs=3),
        asked(one, presence_penalty=1.5, frequency_penalty=0.5),
        asked(one, logit_bias={"17": -100, "23": 5}),
        asked(one, extra_body=FEW | {"repetition_penalty": 1.3}),
        asked(one, extra_body={"mm_processor_kwargs": {"fps": 0.5}}),
        asked(one, extra_body={"media_io_kwargs": {"video": {"num_frames": 6}}}),
        asked(one, extra_body=FEW | {"specvlm": {"speculate": False}}),
        asked(one, extra_body=FEW | {"specvlm": {"pruner": "uniform", "ratio": 0.5}}),
        asked(one, extra_body=FEW | {"specvlm": {"drafter": {"name": "tree", "shape": "2x2"}}}),
        asked(one, extra_body=FEW | {"specvlm": {"drafter": "prompt_lookup"}}),
        asked(story, **hot),
        asked(story, **hot, n=3),
        asked(story, temperature=1.5, top_p=0.7, seed=11, extra_body=FEW | {"top_k": 8}),
        asked(one, user="somebody", metadata={"a": "b"}, store=False),
    ]
    streams = [
        asked(one, **usage),
        asked(one, stream=True, max_tokens=20),
        asked(user(image("green"), "what color is it?"), **usage),
        asked(system, one, said, user("what color is the background?"), **usage),
        asked(one, stop=["checkered"], **usage),
        asked(story, **hot, n=2, **usage),
        asked(one, logprobs=True, top_logprobs=1, **usage),
        asked(one, extra_body=FEW | {"specvlm": {"explain": True}}, **usage),
    ]
    return [*plain, *streams]


def main() -> None:
    from serving import live
    from test_serve_openai import answered, own

    rows = []
    for number, given in enumerate(all_asked()):
        found = answered(live(), given)
        assert [one["text"] for one in found["answers"]] == own(given), number
        rows.append({"asked": given, "answered": found})
    assert len(rows) == 40
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
