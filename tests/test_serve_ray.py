"""Replicas behind a front: requests go where their video was, and no replica that ends makes an answer wrong."""

from __future__ import annotations

import asyncio
import json

import pytest

from specvlm.errors import UserError
from specvlm.serve.errors import ApiError
from specvlm.serve.ray import command, routed
from specvlm.serve.ray.numbers import merged
from specvlm.serve.ray.routed import Lost, RoutedChat, video_key
from specvlm.serve.ray.settings import HELP_OF_REPLICAS, RaySettings

HEADERS = [(b"content-type", b"application/json")]
START = {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"chatcmpl-1"), *HEADERS]}
WORDS = [{"type": "http.response.body", "body": word, "more_body": True} for word in (b"data: one\n\n", b"data: two\n\n")]
END = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
STREAM = [START, *WORDS, END]


def body_of(*parts, text="what?"):
    content = [*parts, {"type": "text", "text": text}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


def video(url):
    return {"type": "video_url", "video_url": {"url": url}}


class Fakes:
    """Replicas that play what is written for each attempt: messages, and errors to raise in between."""

    def __init__(self, *plays):
        self.plays, self.asked, self.closed, self.keys = list(plays), 0, 0, []

    async def answer(self, raw, key, waited_s):
        play, self.asked = self.plays[self.asked], self.asked + 1
        self.keys.append(key)
        try:
            for one in play:
                if isinstance(one, Exception):
                    raise one
                if one is None:
                    await asyncio.Event().wait()
                yield one
        finally:
            self.closed += 1

    async def view(self, name, key):
        return {"name": name, "key": key}

    async def defaults(self):
        self.asked += 1
        return await self.plays[self.asked - 1]()

    async def running(self):
        return len(self.plays)


class Front:
    """A front over fakes, asked in this event loop."""

    def __init__(self, fakes, *words):
        self.fakes, self.chat = fakes, RoutedChat(fakes, RaySettings.of_words(["replicas=1", *words]), "m")
        self.got, self.gone = [], asyncio.Event()

    async def ask(self, raw=None, headers=HEADERS):
        parts = [{"type": "http.request", "body": raw or body_of(video("file:///a.mp4")), "more_body": False}]

        async def receive():
            if parts:
                return parts.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            self.got.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "state": {}}
        await asyncio.wait_for(self.chat(scope, receive, send), 20)
        return self.got

    @property
    def status(self):
        return self.got[0]["status"]

    @property
    def body(self):
        return b"".join(one["body"] for one in self.got[1:])

    @property
    def error(self):
        found = json.loads(self.body.removeprefix(WORDS[0]["body"]).removeprefix(b"data: "))["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


def asked(fakes, *words, **given):
    async def go():
        front = Front(fakes, *words)
        await front.ask(**given)
        assert front.chat.admission.running == front.chat.admission.held_bytes == 0
        return front

    return asyncio.run(go())


def test_a_stream_passes_unchanged_and_names_its_replica():
    front = asked(Fakes(["r1", *STREAM]))
    assert front.got[1:] == STREAM[1:] and front.status == 200
    assert front.got[0]["headers"] == [*START["headers"], (b"x-specvlm-replica", b"r1")]


@pytest.mark.parametrize("before", [[], ["r1"], ["r1", START]])
def test_a_request_whose_replica_ends_before_the_first_word_goes_to_another_one(before):
    fakes = Fakes([*before, Lost()], [*before, Lost()], ["r3", *STREAM])
    front = asked(fakes)
    assert front.got[1:] == STREAM[1:] and (b"x-specvlm-replica", b"r3") in front.got[0]["headers"]
    assert fakes.asked == fakes.closed == 3 and len(set(fakes.keys)) == 1


def test_it_is_not_sent_more_often_than_the_key_says():
    fakes = Fakes(*[["r", Lost()]] * 9)
    front = asked(fakes, "retries=1")
    assert fakes.asked == 2 and front.status == 503
    assert (front.error["code"], front.error["type"]) == ("replica_lost", "service_unavailable_error")
    assert (b"retry-after", b"5") in front.got[0]["headers"]


def test_a_stream_whose_replica_ends_in_between_ends_with_an_error_and_is_not_sent_again():
    fakes = Fakes(["r1", START, WORDS[0], Lost()], ["r2", *STREAM])
    front = asked(fakes)
    assert fakes.asked == 1 and front.body.startswith(WORDS[0]["body"]) and b"[DONE]" not in front.body
    assert front.error["code"] == "replica_lost" and not front.got[-1]["more_body"]


@pytest.mark.parametrize("begun", [[], [START, WORDS[0]]])
def test_a_fault_of_a_replica_is_a_500_and_is_not_sent_again(begun, capsys):
    fakes = Fakes(["r1", *begun, KeyError("x")], ["r2", *STREAM])
    front = asked(fakes)
    assert fakes.asked == 1 and front.error["type"] == "server_error" and "KeyError" in capsys.readouterr().err
    assert front.status == (200 if begun else 500)


def test_a_request_that_no_replica_takes_in_time_gets_429():
    front = asked(Fakes([None]), "queue_timeout=0.05")
    assert (front.status, front.error["code"]) == (429, "busy") and front.fakes.closed == 1


def test_more_requests_than_run_and_wait_get_429():
    async def go():
        fakes = Fakes([None], [None], ["r1", *STREAM])
        one, other = Front(fakes, "running=1", "queue=1"), Front(fakes)
        other.chat = one.chat
        waiting = [asyncio.ensure_future(one.ask()) for _ in range(2)]
        while fakes.asked < 2:
            await asyncio.sleep(0)
        await other.ask()
        assert (other.status, other.error["code"]) == (429, "busy")
        one.gone.set()
        await asyncio.gather(*waiting)
        assert fakes.closed == 2 and not one.chat.admission.running

    asyncio.run(go())


@pytest.mark.parametrize("before", [[None], ["r1", None], ["r1", START, WORDS[0], None]])
def test_a_client_that_goes_ends_its_request(before):
    async def go():
        fakes = Fakes(before)
        front = Front(fakes)
        work = asyncio.ensure_future(front.ask())
        await asyncio.sleep(0.1)
        assert not work.done()
        front.gone.set()
        await work
        assert fakes.closed == 1 and not front.chat.admission.running

    asyncio.run(go())


@pytest.mark.parametrize("begun", [[], [START, WORDS[0]]])
def test_a_shutdown_cuts_off_what_does_not_end_in_time(begun):
    async def go():
        front = Front(Fakes(["r1", *begun, None]), "shutdown_timeout=0.05")
        work = asyncio.ensure_future(front.ask())
        await asyncio.sleep(0.1)
        await front.chat.drain()
        await work
        assert front.status == (200 if begun else 503) and front.error["code"] == "shutting_down"
        late = Front(Fakes(), "replicas=1")
        late.chat = front.chat
        await late.ask()
        assert (late.status, late.error["code"]) == (503, "shutting_down")

    asyncio.run(go())


def test_other_bodies_than_json_and_large_ones_are_refused():
    assert asked(Fakes(), headers=[(b"content-type", b"text/plain")]).status == 415
    assert asked(Fakes(), "max_body_mib=1", raw=b" " * (2**20 + 1)).status == 413


def test_what_the_drafter_saw_is_asked_of_the_replica_that_answered():
    async def go():
        front = Front(Fakes(["r1", START, WORDS[0], None]))
        work = asyncio.ensure_future(front.ask())  # a page asks while the answer still comes
        while not front.got:
            await asyncio.sleep(0)
        want = {"name": "chatcmpl-1", "key": video_key(body_of(video("file:///a.mp4")))}
        assert await front.chat.view("chatcmpl-1") == want
        assert await front.chat.view("chatcmpl-2") is None
        front.gone.set()
        await work

    asyncio.run(go())


def test_a_page_that_asks_while_replicas_are_full_or_end_gets_an_error_and_else_asks_once(monkeypatch):
    async def full():
        await asyncio.Event().wait()

    async def lost():
        raise Lost

    async def found():
        return {"ratio": 0.9}

    async def go():
        front = Front(Fakes(full, lost, found))
        for code in ("busy", "replica_lost"):
            with pytest.raises(ApiError) as error:
                await front.chat.defaults()
            assert error.value.code == code
        assert [await front.chat.defaults() for _ in range(2)] == [{"ratio": 0.9}] * 2 and front.fakes.asked == 3

    monkeypatch.setattr(routed, "SOON_S", 0.05)
    asyncio.run(go())


def test_requests_about_one_video_have_one_key_whatever_they_ask():
    url, image = "data:video/mp4;base64,AAAA", {"type": "image_url", "image_url": "data:image/png;base64,AA"}
    key = video_key(body_of(video(url)))
    assert key == video_key(body_of(video(url), text="and now?")) == video_key(body_of(video(url), video("file:///b")))
    others = [
        video_key(body_of(video("data:video/mp4;base64,AAAB"))),
        video_key(body_of(image)),
        video_key(body_of(image | {})),
    ]
    assert key not in others and others[1] == others[2] != others[0] and None not in others
    turns = json.loads(body_of(video(url)))
    turns["messages"] = [{"role": "system", "content": "short."}, *turns["messages"], {"role": "user", "content": "why?"}]
    assert video_key(json.dumps(turns).encode()) == key


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"\xff", b"[]", b"7", b'{"messages": 7}', b'{"messages": [7]}', b'{"messages": [{"content": [7, null, []]}]}'),
        b'{"messages": [{"content": [{"video_url": 7}, {"image_url": {"url": []}}, {"video_url": null}]}]}',
        b"[" * 100_000,
        body_of(),
    ],
)
def test_bodies_without_a_video_have_no_key(raw):
    assert video_key(raw) is None


def test_numbers_of_replicas_have_their_names():
    text = b'# HELP a_total what\n# TYPE a_total counter\na_total{m="x"} %d\n# TYPE h histogram\nh_bucket{le="+Inf"} 1\n'
    found = merged({"r1": text % 3, "r2": text % 4}).decode()
    assert 'a_total{m="x",replica="r1"} 3.0' in found and 'a_total{m="x",replica="r2"} 4.0' in found
    assert found.count("# TYPE a_total counter") == 1 and 'h_bucket{le="+Inf",replica="r2"} 1.0' in found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["max_replicas=1"], "max_replicas=1 is less than replicas=2"),
        (["replicas=0"], "replicas=0"),
        (["replica_gpus=1.5"], "a whole number of GPUs"),
        (["app=a/b"], "app=a/b"),
        (["retries=-1"], "retries=-1"),
        (["replica=3"], "replica"),
    ],
)
def test_wrong_keys_are_told(words, told):
    with pytest.raises(UserError, match=told):
        RaySettings.of_words(words)


def test_every_key_is_explained():
    assert set(HELP_OF_REPLICAS) == set(vars(RaySettings()))


def test_without_ray_one_line_says_what_to_install(monkeypatch, capsys):
    from specvlm.serve import command as serve_command
    from specvlm.serve.ray.__main__ import main

    real = serve_command.find_spec
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None if name == "ray" else real(name))
    assert main(["pair=embedded_qwen2_5_vl"]) == 2
    assert capsys.readouterr().err == "specvlm: the server needs ray: pip install 'specvlm[ray]'\n"


def test_a_cluster_of_our_own_is_guarded_and_silent_and_a_joined_one_is_left_as_it_is(monkeypatch):
    for address, guarded in ((None, True), ("auto", False)):
        variables = {}
        monkeypatch.setattr(command.os, "environ", variables)
        command.set_up(RaySettings(address=address))
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0" and (len(variables.get("RAY_AUTH_TOKEN", "")) == 64) is guarded
        command.set_up(RaySettings(address=address))
        assert variables.get("RAY_AUTH_MODE") == ("token" if guarded else None)


def test_a_front_whose_ray_does_not_answer_is_not_ready(monkeypatch):
    monkeypatch.setattr(routed, "SOON_S", 0.1)
    fakes = Fakes([STREAM])
    front = RoutedChat(fakes, RaySettings.of_words(["replicas=1"]), "m")
    assert asyncio.run(front.is_ready())

    async def ended():
        raise Lost

    async def hangs():
        await asyncio.Event().wait()

    for running in (ended, hangs):
        monkeypatch.setattr(fakes, "running", running)
        assert not asyncio.run(front.is_ready())


def test_a_body_that_arrives_while_the_front_shuts_down_is_refused_in_openais_form():
    async def go():
        front = Front(Fakes([STREAM]))
        parts = asyncio.Queue()

        async def receive():
            return await parts.get()

        async def send(message):
            front.got.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": HEADERS, "state": {}}
        work = asyncio.ensure_future(front.chat(scope, receive, send))
        await asyncio.sleep(0.05)
        await front.chat.drain()
        parts.put_nowait({"type": "http.request", "body": body_of(video("file:///a.mp4")), "more_body": False})
        await asyncio.wait_for(work, 20)
        return front

    front = asyncio.run(go())
    assert front.status == 503 and front.error["code"] == "shutting_down"
