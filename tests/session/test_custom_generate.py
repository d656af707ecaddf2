"""Hugging Face's `generate` gives the same with `custom_generate` as without."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from session_pairs import CHAIN, FAMILIES, QUESTION, clip, session
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopPLogitsWarper,
)

from specvlm import UserError, custom_generate
from specvlm.config import model_folder
from specvlm.models.video_lm import VideoLM
from specvlm.session.hf_config import Ending


@cache
def model(family: str, name: str = "target") -> Any:
    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(model_folder(f"embedded:{family}/{name}"), dtype=torch.float32).eval()


@cache
def method(family: str, name: str = "chain") -> Any:
    more = {
        "chain": {"drafter": CHAIN},
        "tree": {"drafter": "tree", "pruner": "uniform", "ratio": 0.5},
        "lookup": {"drafter": "prompt_lookup"},
    }
    return custom_generate(None if name == "lookup" else model(family, "plain"), **more[name])


def inputs(family: str, which: str = "video") -> dict[str, Any]:
    lm: VideoLM = session(family).target
    question = "how many objects appear?" if which == "other" else QUESTION
    clips = [] if which == "text" else [clip("synthetic_2" if which == "other" else "synthetic_1", 4)]
    return lm.generate_inputs(lm.prompt(question, clips))


class Downhill(LogitsProcessor):
    """A processor of the caller's: the more often a token came, the less likely it is."""

    def __call__(self, input_ids, scores):
        return scores - 0.3 * torch.nn.functional.one_hot(input_ids, scores.shape[1]).sum(1)


class AtMostTwo(StoppingCriteria):
    """A criterion of the caller's: the answer ends when its last token has come twice."""

    def __call__(self, input_ids, scores, **kwargs):
        row = input_ids[0, -12:].tolist()
        return torch.tensor([row.count(row[-1]) >= 2])


class HasText(StoppingCriteria):
    """A criterion that reads the text."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text = tokenizer, text

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([self.text in self.tokenizer.decode(input_ids[0])])


def words(family: str) -> Any:
    return session(family).target.tokenizer


CASES = {  # by name, the arguments of `generate` beside the inputs
    "plain": lambda f: {"max_new_tokens": 12},
    "length": lambda f: {"max_length": inputs(f)["input_ids"].shape[1] + 5},
    "one token": lambda f: {"max_new_tokens": 1},
    "a config": lambda f: {"generation_config": GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)},
    "stop ids": lambda f: {"max_new_tokens": 12, "eos_token_id": words(f).convert_tokens_to_ids(["a", "checkered"])},
    "no stop ids": lambda f: {"max_new_tokens": 14, "eos_token_id": None},
    "repetition": lambda f: {"max_new_tokens": 12, "repetition_penalty": 1.3},
    "n-grams": lambda f: {"max_new_tokens": 14, "no_repeat_ngram_size": 2},
    "at least": lambda f: {"max_new_tokens": 12, "min_new_tokens": 10},
    "bad words": lambda f: {"max_new_tokens": 12, "bad_words_ids": [[words(f).convert_tokens_to_ids("objects")]]},
    "suppressed": lambda f: {"max_new_tokens": 12, "suppress_tokens": words(f).convert_tokens_to_ids(["on", "a"])},
    "bias": lambda f: {"max_new_tokens": 12, "sequence_bias": [[[words(f).convert_tokens_to_ids("navy")], -9.0]]},
    "two processors": lambda f: {"max_new_tokens": 12, "no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
    "own processor": lambda f: {"max_new_tokens": 12, "logits_processor": [Downhill()]},
    "own criterion": lambda f: {"max_new_tokens": 14, "stopping_criteria": [AtMostTwo()]},
    "stop text": lambda f: {"max_new_tokens": 14, "stopping_criteria": [HasText(words(f), "checkered navy")]},
    "a dict": lambda f: {"max_new_tokens": 10, "return_dict_in_generate": True},
    "a forced end": lambda f: {"max_new_tokens": 8, "forced_eos_token_id": 3},
    "longer": lambda f: {"max_new_tokens": 24},
    "min length": lambda f: {"max_new_tokens": 8, "logits_processor": [MinLengthLogitsProcessor(10**4, 3)]},
}
EVERYWHERE = ("plain", "stop ids", "two processors", "a dict")  # with every family: it is of no matter to the arguments
IN_TURN = [
    (family, case)
    for (at, family), (number, case) in product(enumerate(FAMILIES), enumerate(CASES))
    if case in EVERYWHERE or number % len(FAMILIES) == at
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), IN_TURN)
def test_generate_gives_the_same_with_and_without(family, case):
    target, given, made = model(family), inputs(family, "other" if len(case) % 2 else "video"), CASES[case](family)
    name = ("chain", "tree", "lookup")[len(case) % 3]
    if case == "length":
        made = {"max_length": given["input_ids"].shape[1] + 5}
    want, found = target.generate(**given, **made), target.generate(**given, **made, custom_generate=method(family, name))
    if case == "a dict":
        assert found.statistics[0]["new_tokens"] == found.sequences.shape[1] - given["input_ids"].shape[1]
        want, found = want.sequences, found.sequences
    assert found.tolist() == want.tolist() and found.dtype == want.dtype


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_a_video_is_answered_alike(family):
    given = inputs(family, "text")
    want = model(family).generate(**given, max_new_tokens=8)
    assert torch.equal(model(family).generate(**given, max_new_tokens=8, custom_generate=method(family)), want)


class Recorder:
    """A streamer that notes what it is told."""

    def __init__(self):
        self.told, self.ended = [], 0

    def put(self, value):
        self.told += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamer_hears_the_same_with_and_without(family):
    given, heard = inputs(family), []
    for more in ({}, {"custom_generate": method(family)}):
        recorder, text = Recorder(), TextIteratorStreamer(words(family), skip_prompt=True, timeout=60)
        model(family).generate(**given, max_new_tokens=12, streamer=recorder, **more)
        model(family).generate(**given, max_new_tokens=12, streamer=text, **more)
        heard.append((recorder.told, recorder.ended, "".join(text)))
    assert heard[0] == heard[1] and heard[0][2]


@pytest.mark.slow
def test_a_seed_fixes_sampled_answers_and_several_are_drawn_at_once():
    given, asked = (
        inputs("qwen2_5_vl"),
        {"max_new_tokens": 10, "do_sample": True, "temperature": 4.0, "num_return_sequences": 3},
    )
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model("qwen2_5_vl").generate(**given, **asked, custom_generate=method("qwen2_5_vl")).tolist())
    assert found[0] == found[1] != found[2] and len(found[0]) == 3
    with pytest.raises(UserError, match="one prompt at a time"):
        model("qwen2_5_vl").generate(**given, **asked, streamer=Recorder(), custom_generate=method("qwen2_5_vl"))


@pytest.mark.slow
def test_sampled_tokens_have_the_distribution_of_the_target():
    """Of 400 first and second tokens: the counts of the most frequent pairs, against the target's own probabilities."""
    family, count = "qwen2_5_vl", 400
    target, given = model(family), inputs(family, "other")
    asked = {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0, "top_k": 5}
    torch.manual_seed(3)
    answer = target.generate(**given, **asked, num_return_sequences=count, custom_generate=method(family, "lookup"))
    with torch.no_grad():
        logits_V = target(**given).logits[0, -1] / 2.0
    best = logits_V.topk(5)
    for token, share in zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True):
        seen = int((answer[:, -1] == token).sum())
        assert abs(seen - count * share) <= 4 * (count * share * (1 - share)) ** 0.5 + 1


@pytest.mark.slow
def test_calls_of_several_threads_share_passes():
    target, made = model("qwen2_5_vl"), method("qwen2_5_vl")
    kinds = ("video", "other", "video", "other")
    want = [target.generate(**inputs("qwen2_5_vl", kind), max_new_tokens=12).tolist() for kind in kinds]
    target.generate(**inputs("qwen2_5_vl"), max_new_tokens=1, custom_generate=made)
    scheduler = made._sessions[target][0].scheduler
    asked, run = scheduler.asked, scheduler.run
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(target.generate, **inputs("qwen2_5_vl", kind), max_new_tokens=12, custom_generate=made)
            for kind in kinds
        ]
        assert [call.result().tolist() for call in calls] == want
    assert scheduler.run - run < scheduler.asked - asked


@pytest.mark.slow
def test_the_model_is_not_changed():
    target, given = model("qwen2_5_vl"), inputs("qwen2_5_vl")
    before = copy.deepcopy(target.config.to_dict()), target.config.text_config._attn_implementation
    target.generate(**given, max_new_tokens=2, custom_generate=method("qwen2_5_vl"))
    assert (target.config.to_dict(), target.config.text_config._attn_implementation) == before


@pytest.mark.slow
def test_a_target_whose_modules_are_replaced_is_followed():
    target = copy.deepcopy(model("llava_onevision"))
    given, made = inputs("llava_onevision"), custom_generate(None)
    before = target.generate(**given, max_new_tokens=6, custom_generate=made)
    with torch.no_grad():
        target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.roll(1, 0))
    want = target.generate(**given, max_new_tokens=6)
    assert not torch.equal(want, before)
    assert torch.equal(target.generate(**given, max_new_tokens=6, custom_generate=made), want)


class Calls(LogitsProcessor):
    """A processor that calls `generate` itself."""

    def __init__(self, generate):
        self.generate = generate

    def __call__(self, input_ids, scores):
        self.generate()
        return scores


@pytest.mark.slow
def test_a_processor_that_generates_is_refused_and_a_streamer_may():
    target, given, made = model("qwen2_5_vl"), inputs("qwen2_5_vl"), method("qwen2_5_vl")

    def again():
        return target.generate(**given, max_new_tokens=2, custom_generate=made)

    with pytest.raises(UserError, match="cannot wait for another one of the same session"):
        target.generate(**given, max_new_tokens=2, custom_generate=made, logits_processor=[Calls(again)])
    found, recorder = list[Any](), Recorder()
    recorder.end = lambda: found.append(again())
    want = target.generate(**given, max_new_tokens=2, custom_generate=made, streamer=recorder)
    assert torch.equal(found[0], want)


REFUSED = {
    "beams": ({"num_beams": 2}, "beam search"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "logits": ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
    "min_p": ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
    "guidance": ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidance"),
    "positions": ({"position_ids": torch.zeros(3, 1, 1, dtype=torch.long)}, "position_ids other than"),
    "another order": ({"do_sample": True, "logits_processor": [TopPLogitsWarper(0.9)]}, "TemperatureLogitsWarper after top_p"),
    "twice": (
        {
            "do_sample": True,
            "temperature": 1.0,
            "logits_processor": [TemperatureLogitsWarper(2.0), TemperatureLogitsWarper(3.0)],
        },
        "TemperatureLogitsWarper after temperature",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_speculative_is_refused_by_name(case):
    given, said = REFUSED[case]
    if case == "another order":
        given = given | {"temperature": 0.7}
    if case == "positions":
        given = {"position_ids": torch.full((3, 1, inputs("qwen2_5_vl")["input_ids"].shape[1]), 5)}
    with pytest.raises(UserError, match=said):
        model("qwen2_5_vl").generate(**inputs("qwen2_5_vl"), max_new_tokens=4, custom_generate=method("qwen2_5_vl"), **given)


def test_hugging_faces_own_stop_texts_end_an_answer_within_a_round(byte_tokenizer):
    text = "a naïve café, closed"
    criteria = StoppingCriteriaList([StopStringCriteria(byte_tokenizer, ["fé, c"])])
    tokens, prompt = byte_tokenizer(text)["input_ids"], torch.tensor(byte_tokenizer("what?")["input_ids"])
    ending = Ending(criteria, prompt, torch.device("cpu"))
    kept = (*ending.take(tokens[:3]), *ending.take(tokens[3:]), *ending.take(tokens))
    assert ending.done and byte_tokenizer.decode(kept) == "a naïve café, c"


@pytest.mark.slow
def test_several_prompts_are_refused():
    given = {name: torch.cat([value] * 2) for name, value in inputs("qwen2_5_vl").items()}
    with pytest.raises(UserError, match="one prompt at a time"):
        model("qwen2_5_vl").generate(**given, max_new_tokens=4, custom_generate=method("qwen2_5_vl"))


def test_an_option_of_generate_is_not_one_of_the_method():
    with pytest.raises(UserError, match="others go to generate"):
        custom_generate(None, max_new_tokens=4)
