"""OpenAI's client gets what was recorded, and what the session gives alone."""

from __future__ import annotations

import base64
import json
import runpy
from io import BytesIO
from pathlib import Path

import openai
import pytest
from PIL import Image
from serving import FEW, MODEL, data_url, live, served
from session_pairs import COUPLED, QUESTION, session

pytestmark = pytest.mark.slow
FILE = Path(__file__).parent / "data" / "exchanges.json"
RECORDED = json.loads(FILE.read_text()) if FILE.exists() else []
SAME = ("answers", "usage", "speculation", "frames")


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def png(colour):
    file = BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, "PNG")
    return file.getvalue()


def sent(given):
    """The arguments, with pictures as data URLs."""
    text = json.dumps(given)
    for colour in ("red", "blue", "green"):
        text = text.replace(f"picture:{colour}", f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}")
    return json.loads(text)


def answered(server, given):
    """What the client gets: the same of a stream and of a whole answer, as far as both have it."""
    found = client_of(server).chat.completions.create(**sent(given))
    if not given.get("stream"):
        answers = [
            {"text": one.message.content, "reason": one.finish_reason, "logprobs": logprobs_of(one.logprobs)}
            for one in found.choices
        ]
        rest = found
    else:
        answers, rest = [{"text": "", "reason": None, "logprobs": None} for _ in range(given.get("n") or 1)], None
        for chunk in found:
            for one in chunk.choices:
                answer = answers[one.index]
                answer["text"] += one.delta.content or ""
                answer["reason"] = one.finish_reason or answer["reason"]
                if one.logprobs:
                    answer["logprobs"] = (answer["logprobs"] or []) + logprobs_of(one.logprobs)
            rest = chunk if chunk.usage else rest
    if rest is None:
        return {"answers": answers}
    usage = {key: getattr(rest.usage, key) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {
        "answers": answers,
        "usage": usage,
        "frames": rest.specvlm["frames"],
        "speculation": rest.metrics["speculative_decoding"],
    }


def logprobs_of(found):
    return found and [[one.token, round(one.logprob, 3), [top.token for top in one.top_logprobs]] for one in found.content]


def own(given):
    """The texts of the session alone."""
    extra = given["extra_body"]
    spec, media = extra.get("specvlm", {}), extra.get("media_io_kwargs", {}).get("video", {})
    options = {key: spec[key] for key in ("pruner", "drafter", "ratio", "speculate") if key in spec}
    options["max_new_tokens"] = given.get("max_completion_tokens") or given["max_tokens"]
    options |= {key: given[key] for key in ("stop", "presence_penalty", "frequency_penalty") if key in given}
    options |= {key: extra[key] for key in ("repetition_penalty",) if key in extra}
    if "logit_bias" in given:
        options["logit_bias"] = {int(key): value for key, value in given["logit_bias"].items()}
    if given.get("temperature"):
        settings = {"temperature": given["temperature"], "top_p": given.get("top_p", 1.0), "top_k": extra.get("top_k", 0)}
        options |= {"verifier": COUPLED | settings, "seed": given["seed"]}
    options |= {"frames": media["num_frames"]} if "num_frames" in media else {"fps": extra["mm_processor_kwargs"]["fps"]}

    def part(one):
        if one["type"] == "text":
            return one
        url = one[one["type"]]["url"]
        if one["type"] == "image_url":
            return {"type": "image", "image": png(url.partition(":")[2])}
        return {"type": "video", "video": url.removeprefix("embedded:")}

    messages = []
    for message in given["messages"]:
        content = message["content"]
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": content if isinstance(content, str) else [part(one) for one in content]})
    return [one.text for one in session().generate(messages, n=given.get("n") or 1, **options)]


def test_there_are_forty_exchanges_of_every_kind():
    all_asked = runpy.run_path(str(FILE.with_name("make_exchanges.py")))["all_asked"]
    assert [row["asked"] for row in RECORDED] == json.loads(json.dumps(all_asked())) and len(RECORDED) == 40
    text = json.dumps(RECORDED)
    for kind in (
        '"stream": true',
        '"n": ',
        '"stop": ',
        '"seed": ',
        '"logprobs": true',
        '"include_usage"',
        "picture:",
        "embedded:",
        "assistant",
    ):
        assert kind in text


@pytest.mark.parametrize("number", range(40))
def test_an_exchange_goes_as_it_was_recorded_and_as_the_session_answers(number):
    row = RECORDED[number]
    found, want = answered(live(), row["asked"]), row["answered"]
    assert set(found) == set(want)
    for mine, recorded in zip(found["answers"], want["answers"], strict=True):
        assert (mine["text"], mine["reason"]) == (recorded["text"], recorded["reason"])
        assert (mine["logprobs"] is None) == (recorded["logprobs"] is None)
        for (token, logprob, top), (old, before, best) in zip(mine["logprobs"] or (), recorded["logprobs"] or (), strict=True):
            assert (token, top) == (old, best) and logprob == pytest.approx(before, abs=2e-3)
    assert [one["text"] for one in found["answers"]] == own(row["asked"])
    assert {key: found.get(key) for key in SAME[1:]} == {key: want.get(key) for key in SAME[1:]}


def test_errors_are_the_clients_own_exceptions(tmp_path):
    client, ask = client_of(live()), {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**ask | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as found:
        client.chat.completions.create(**ask, tools=[{"type": "function", "function": {"name": "f"}}])
    assert found.value.param == "tools" and found.value.code == "unsupported_parameter"
    file = tmp_path / "keys"
    file.write_text("secret\n")
    with served(f"api_keys={file}") as one:
        with pytest.raises(openai.AuthenticationError):
            client_of(one).models.list()
        assert [model.id for model in client_of(one, "secret").models.list()] == [MODEL]


def test_an_error_within_a_stream_is_raised_by_the_client(monkeypatch):
    from specvlm.serve import generation

    def broken(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(generation, "result_of", broken)
    stream = client_of(live()).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], max_tokens=4, stream=True
    )
    with pytest.raises(openai.APIError, match="internal server error"):
        list(stream)


def test_the_code_of_the_guide_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "guides" / "serve.md").read_text()
    (code,) = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    exec(compile(code.replace("http://localhost:8000", live().url), "serve.md", "exec"), {})
    text = session().generate("how many objects appear?", videos="synthetic_2", frames=8, max_new_tokens=16).text
    assert capsys.readouterr().out.count(text) == 2 and FEW and data_url
