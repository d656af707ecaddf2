"""Sessions answer as the graph does, together as alone, and their options change the target and speculation alike."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from session_pairs import CHAIN, COUPLED, FAMILIES, QUESTION, UNLIKE, all_at_once, clip, leased, new_session, session

from specvlm import DecodingGraph, GenerationOptions, GenerationResult, TextStream, UserError, autoregressive, registry
from specvlm.errors import StrategyError
from specvlm.results.metrics import tokens_of
from specvlm.session.options import Penalties
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier


def ask(of, name="synthetic_1", question=QUESTION, **options) -> GenerationResult:
    return of.generate(question, videos=clip(name), **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_tells_what_the_graph_decodes(family):
    of = session(family)
    prompt = of.target.prompt(QUESTION, [clip()])
    pruner, drafter = (registry.build(kind, getattr(of.options, kind)) for kind in ("pruner", "drafter"))
    graph = DecodingGraph(of.target, of.draft, pruner, drafter, GreedyVerifier(), GenerationOptions(16))
    steps, found = list(graph.decode(prompt)), ask(of, check=True)
    assert found.token_ids == tokens_of(steps) and len(found.token_ids) == 16
    assert found.text == of.target.tokenizer.decode(found.token_ids, skip_special_tokens=True)
    assert (found.finish_reason, found.verdict) == ("length", "identical")
    facts = found.statistics
    assert (facts["prompt_tokens"], facts["frames"], facts["rounds"]) == (len(prompt), 8, len(steps) - 1)
    assert facts["accepted_per_round"] > 0.5 and 0 < facts["kept_tokens"] < facts["video_tokens"]


@pytest.mark.slow
def test_eight_unlike_calls_of_gather_share_passes_and_answer_as_alone():
    of = new_session(stall_ms=60_000)  # else a busy machine lets them get out of step
    alone = [of.generate(question, videos=clip(name), **options) for name, question, options in UNLIKE]
    assert of.scheduler.run == of.scheduler.asked > 0
    asked, run = of.scheduler.asked, of.scheduler.run

    async def gathered():
        return await asyncio.gather(*(of.generate_async(q, videos=clip(name), **options) for name, q, options in UNLIKE))

    with all_at_once(of, len(UNLIKE)):
        together = asyncio.run(gathered())
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [(one.text, one.finish_reason) for one in together] == [(one.text, one.finish_reason) for one in alone]
    assert of.scheduler.run - run <= 0.6 * (of.scheduler.asked - asked)
    assert leased(of) == []


@pytest.mark.slow
def test_eight_unlike_calls_of_threads_share_passes_and_answer_as_alone():
    of = new_session(stall_ms=60_000)  # else a busy machine lets them get out of step
    alone = [of.generate(question, videos=clip(name), **options).token_ids for name, question, options in UNLIKE]
    asked, run = of.scheduler.asked, of.scheduler.run
    with all_at_once(of, len(UNLIKE)), ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(of.generate, question, clip(name), **options) for name, question, options in UNLIKE]
        assert [call.result().token_ids for call in calls] == alone
    assert of.scheduler.run - run <= 0.6 * (of.scheduler.asked - asked)


@pytest.mark.slow
def test_a_call_that_fails_does_not_disturb_the_others(monkeypatch):
    of = session()
    want = ask(of).token_ids

    def broken(self, ctx):
        raise ValueError("no selection today")

    monkeypatch.setattr(UniformPruner, "select", broken)
    with ThreadPoolExecutor(3) as pool:
        bad = pool.submit(ask, of, pruner="uniform")
        good = [pool.submit(ask, of) for _ in range(2)]
        with pytest.raises((ValueError, StrategyError), match="no selection today"):
            bad.result()
        assert [call.result().token_ids for call in good] == [want] * 2
    assert leased(of) == []


@pytest.mark.slow
@pytest.mark.parametrize("verifier", [COUPLED, {"name": "sampling", "temperature": 1.0}], ids=lambda v: v["name"])
def test_n_answers_share_a_prefill_and_are_those_of_their_seeds(verifier, monkeypatch):
    of, prefills = new_session(), []
    filling = type(of.target).prefilling
    noting = lambda self, *args, **named: prefills.append(self) or filling(self, *args, **named)  # noqa: E731
    monkeypatch.setattr(type(of.target), "prefilling", noting)
    several = ask(of, n=3, verifier=verifier, seed=7, max_new_tokens=12)
    assert [model for model in prefills if model is of.target] == [of.target]
    alone = [ask(of, verifier=verifier, seed=7 + number, max_new_tokens=12) for number in range(3)]
    assert [one.token_ids for one in several] == [one.token_ids for one in alone] and len(several) == 3
    assert leased(of) == []


@pytest.mark.slow
def test_n_is_checked_answer_by_answer_and_one_gives_a_list_too():
    of = session()
    assert [one.verdict for one in ask(of, n=2, verifier=COUPLED, check=True, max_new_tokens=8)] == ["identical"] * 2
    assert [one.token_ids for one in ask(of, n=1, max_new_tokens=4)] == [ask(of, max_new_tokens=4).token_ids]


@pytest.mark.slow
def test_a_sampled_or_lossy_answer_has_nothing_to_be_compared_with():
    of = session()
    assert ask(of, verifier={"name": "sampling"}, check=True, max_new_tokens=4).verdict == "sampled"
    assert ask(of, verifier="loose", check=True, max_new_tokens=4).verdict == "lossy"
    assert ask(of, max_new_tokens=4).verdict == "not checked"


CHANGES = {
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "bias": {"logit_bias": {77: -100.0, 50: 3.0}},
    "repetition": {"repetition_penalty": 1.4},
    "all": {"presence_penalty": 1.0, "frequency_penalty": -0.5, "logit_bias": {20: 2.5}, "repetition_penalty": 1.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("verifier", ["greedy", COUPLED], ids=["greedy", "coupled"])
def test_changes_to_the_targets_logits_keep_the_output_the_targets_own(change, verifier):
    of = session()
    for drafter in (CHAIN, "tree"):
        found = ask(of, check=True, verifier=verifier, drafter=drafter, max_new_tokens=14, **CHANGES[change])
        assert found.verdict == "identical"


def test_tensors_of_biases_are_made_once_for_each_place(monkeypatch):
    rule, made = Penalties(presence=1.0, bias={3: 2.0, 5: -4.0}), []
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *given, **options: made.append(given) or real(*given, **options))
    for dtype, count in ((torch.float32, 2), (torch.float32, 2), (torch.bfloat16, 2), (torch.float64, 4)):
        found = rule([], torch.zeros(8, dtype=dtype))
        assert found.tolist() == [0, 0, 0, 2, 0, -4, 0, 0] and len(made) == count
    assert rule == Penalties(presence=1.0, bias={3: 2.0, 5: -4.0}) != Penalties(presence=1.0, bias={3: 2.0})


@pytest.mark.slow
def test_penalties_are_those_of_their_formula():
    """The target alone, decoded here with the formula written out."""
    of = session()
    prompt, bias = of.target.prompt(QUESTION, [clip()]), {109: -20.0}
    seen: list[int] = []

    def by_hand(answer, logits_V):
        expected = logits_V.clone()
        for token in range(len(logits_V)):
            count = answer.count(token)
            expected[token] += bias.get(token, 0.0) - (2.0 if count else 0.0) - 1.5 * count
        seen.append(len(answer))
        return expected

    options = GenerationOptions(12, adjust=by_hand)
    want = tokens_of(list(autoregressive(of.target, prompt, options, GreedyVerifier())))
    found = ask(of, max_new_tokens=12, presence_penalty=2.0, frequency_penalty=1.5, logit_bias=bias)
    assert found.token_ids == want != ask(of, max_new_tokens=12).token_ids
    assert seen == list(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_hugging_faces_own_pass(family):
    of = session(family)
    found = ask(of, logprobs=3, max_new_tokens=10, presence_penalty=1.0)
    prompt = of.target.prompt(QUESTION, [clip()])
    longer = torch.cat([prompt.tokens, torch.tensor(found.token_ids[:-1])])
    inputs = of.target.hf_inputs(of.target.hf.config, type(prompt)(longer, prompt.video_index, prompt.grids, prompt.videos))
    with torch.inference_mode():
        logits_TV = of.target.hf(**inputs).logits[0, len(prompt) - 1 :].log_softmax(-1)
    assert [one.token for one in found.logprobs] == found.token_ids
    for one, row_V in zip(found.logprobs, logits_TV, strict=True):
        assert one.logprob == pytest.approx(float(row_V[one.token]), abs=1e-3)
        assert [logprob for _, logprob in one.top] == pytest.approx(row_V.topk(3).values.tolist(), abs=1e-3)
    assert found.token_ids == ask(of, max_new_tokens=10, presence_penalty=1.0).token_ids


@pytest.mark.slow
def test_a_stop_text_ends_answer_and_baseline_alike():
    of = session()
    whole = ask(of, max_new_tokens=24)
    for stop in ("checkered", "a checkered navy", " navy background.", ["yellow", "background"]):
        found = ask(of, stop=stop, max_new_tokens=24, check=True)
        first = min((whole.text.find(one), one) for one in ([stop] if isinstance(stop, str) else stop) if one in whole.text)[1]
        assert found.text == whole.text.partition(first)[0]
        assert (found.finish_reason, found.verdict) == ("stop", "identical")
        assert whole.token_ids[: len(found.token_ids)] == found.token_ids and len(found.token_ids) < 24


@pytest.mark.slow
def test_a_stop_id_of_the_request_replaces_the_checkpoints():
    of = session()
    whole = ask(of)
    found = ask(of, stop_ids=[whole.token_ids[5]])
    assert found.token_ids == whole.token_ids[:6] and found.finish_reason == "stop"


# ---- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_text_comes_before_the_second_round_and_all_add_up():
    of = new_session()
    stream = of.stream(QUESTION, videos=clip(), max_new_tokens=24, stop="bottom")
    assert next(stream) and of.scheduler.asked == 0  # the prefill is no pass: no round has begun
    rest = "".join(stream)
    whole = ask(of, max_new_tokens=24, stop="bottom")
    assert stream.result.text == whole.text and whole.text.endswith(rest) and stream.result.token_ids == whole.token_ids


@pytest.mark.slow
def test_closing_a_stream_frees_its_caches_at_once():
    of = new_session()
    stream = of.stream(QUESTION, videos=clip())
    next(stream)
    next(stream)
    asked = of.scheduler.asked
    assert leased(of)
    stream.close()
    assert leased(of) == [] and list(stream) == [] and stream.result is None
    ask(of, max_new_tokens=1)  # no pass of the closed stream runs
    assert of.scheduler.asked == asked
    with of.stream(QUESTION, videos=clip()) as another:
        next(another)
    assert leased(of) == []


@pytest.mark.slow
def test_a_stream_that_is_dropped_frees_its_caches():
    of = new_session()
    next(of.stream(QUESTION, videos=clip()))
    assert leased(of) == []
    of.stream(QUESTION, videos=clip())  # not even begun
    assert of.scheduler._scheduler.live == of.scheduler._new == []


@pytest.mark.slow
def test_a_stream_is_closed_by_another_thread_while_a_round_runs(monkeypatch):
    of = new_session()
    stream, running, told = of.stream(QUESTION, videos=clip(), max_new_tokens=64), threading.Event(), threading.Event()
    run = type(of.engine).run

    def slow(self, passes):
        running.set()
        told.wait(60)
        return run(self, passes)

    monkeypatch.setattr(type(of.engine), "run", slow)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(list, stream)
        assert running.wait(60)
        stream.cancel()
        told.set()
        read.result()
    assert leased(of) == [] and of.scheduler.asked == 1


@pytest.mark.slow
def test_streams_side_by_side_and_in_asyncio_read_as_alone():
    of = new_session()
    want = [list(of.stream(q, videos=clip(name), **options)) for name, q, options in UNLIKE[:3]]

    async def pieces(name, question, options):
        return [piece async for piece in of.stream_async(question, videos=clip(name), **options)]

    async def gathered():
        return await asyncio.gather(*(pieces(*one) for one in UNLIKE[:3]))

    assert asyncio.run(gathered()) == want


@pytest.mark.slow
def test_a_task_that_is_cancelled_ends_its_request():
    of = new_session()

    async def cancelled():
        task = asyncio.create_task(of.generate_async(QUESTION, videos=clip(), max_new_tokens=200))
        while not of.scheduler.asked:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    of._threads.shutdown()  # waits for the thread, which ends with the round
    assert leased(of) == [] and of.scheduler.asked < 60


@pytest.mark.slow
def test_a_stream_of_asyncio_that_is_left_frees_its_caches():
    of = new_session()

    async def one_piece():
        stream = of.stream_async(QUESTION, videos=clip())
        async for piece in stream:
            await stream.aclose()
            return piece

    assert asyncio.run(one_piece()) and leased(of) == []


def test_a_stream_is_one_answer():
    for option in ({"n": 2}, {"check": True}):
        with pytest.raises(UserError, match=r"call generate"):
            session().stream(QUESTION, videos=clip(), **option)
    assert isinstance(session().stream(QUESTION, videos=clip()), TextStream)
