"""The server's page in headless Chromium: a chat about a video, its marks, errors, and texts that stay texts.

Needs Debian's `chromium` (or another Chromium on the path) and the Python package `playwright`, which brings no browser here.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import time

import pytest

pytest.importorskip("playwright", reason="needs the Python package playwright")
pytest.importorskip("starlette")

from playwright.sync_api import sync_playwright
from serving import MODEL, Live, data_url, events_of, live, served, text_of, until
from session_pairs import QUESTION, session

from specvlm.serve.marks import Marks
from specvlm.video.clips import find_clip

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")]

LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SECOND = "how many objects appear?"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
REFUSED = "Failed to load resource: the server responded with a status of"  # what Chromium itself says of an error's status
ENDED = "#turns li:nth-child({}) .result:not(:empty)"
DROP = """([name, data, type]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragenter", "dragover", "drop"])
    document.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens the page. Other requests than to its server, and messages on the console, fail the test."""
    heard, contexts = [], []

    def opened(server: Live | None = None, size=LAPTOP, scheme="light"):
        url = (server or live()).url
        context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=size is PHONE)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # a busy machine
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda asked: None if re.match(f"{url}/|data:|blob:{url}/", asked.url) else heard.append(asked.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in heard if not text.startswith(REFUSED) and "net::ERR_" not in text] == []


@pytest.fixture
def slow_rounds(monkeypatch):
    of = Marks.of
    monkeypatch.setattr(Marks, "of", lambda self, step: time.sleep(0.4) or of(self, step))


def choose(page, name="synthetic_1"):
    page.get_by_role("button", name=name).click()
    page.wait_for_selector(f"#chosen:text-is('{name}')")


def ask(page, question=QUESTION):
    page.fill("#question", question)
    page.press("#question", "Enter")


def drop(page, name, content=b"no video", kind="video/mp4"):
    page.evaluate(DROP, [name, base64.b64encode(content).decode(), kind])


def problem(page) -> str:
    page.wait_for_selector("#problem:not([hidden])")
    return page.inner_text("#problem")


def marks(page, turn=1) -> list[list[str]]:
    """Kinds and texts of the words of an answer."""
    found = "(answer) => [...answer.children].map((word) => [word.className, word.textContent])"
    return page.eval_on_selector(f"#turns li:nth-child({turn}) .answer", found)


def wanted(messages) -> tuple[list[list[str]], str]:
    """The words and the text that the server tells of the same chat."""
    asked = {"model": MODEL, "messages": messages, "stream": True, "specvlm": {"explain": True}}
    events = events_of(live().ask(asked).text)
    rounds = [one["specvlm"]["round"] for one in events[:-1] if "specvlm" in one]
    words = [pair for one in rounds for pair in words_of(one)]
    return [[kind, text.lstrip()] for kind, text in words if text], text_of(events)


def words_of(one):
    return [("accepted", "".join(one["accepted"])), ("refused", "".join(one["refused"])), ("own", one["own"] or "")]


def of_user(text, video=None):
    video = [{"type": "video_url", "video_url": {"url": video}}] if video else []
    return {"role": "user", "content": [*video, {"type": "text", "text": text}]}


def test_two_questions_about_a_clip_with_the_marks_that_the_server_tells(open_page):
    page = open_page()
    choose(page)
    page.wait_for_function("document.getElementById('preview').readyState > 0")
    ask(page)
    page.wait_for_selector(ENDED.format(1))
    first = [of_user(QUESTION, "embedded:synthetic_1")]
    words, text = wanted(first)
    assert marks(page) == words and {kind for kind, _ in words} == {"accepted", "refused", "own"}
    ask(page, SECOND)
    page.wait_for_selector(ENDED.format(2))
    words, _ = wanted([*first, {"role": "assistant", "content": text}, of_user(SECOND)])
    assert marks(page, 2) == words
    page.uncheck("#refused")
    assert page.inner_text("#turns li:first-child .answer").strip() == text.strip()
    assert "accepted per round; the drafter saw" in page.inner_text(ENDED.format(1))


def test_what_the_drafter_saw_is_shown_and_the_target_alone_says_the_same(open_page):
    page = open_page()
    choose(page, "synthetic_2")
    with page.expect_response(re.compile("/specvlm/views/")) as told:
        ask(page)
    kept = told.value.json()["kept"][0]["per_frame"]
    page.wait_for_selector("body[data-frame='0']")
    page.focus("#frame")
    for place in (0, 1):
        assert f"kept: {kept[place]} of" in page.inner_text("#kept-note")
        page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".beside .bar >> nth=1")
    assert page.inner_text(".verdict") == "identical"
    speeds = page.locator(".bar .speed").all_inner_texts()
    assert all(re.fullmatch(r"≈ (\d\.\d|\d{1,2}|0\.\d\d?|\d\d0+) tokens/s", speed) for speed in speeds), speeds


def test_escape_cancels_and_the_question_can_be_asked_again(open_page, slow_rounds):
    page = open_page()
    choose(page)
    ask(page)
    page.wait_for_selector("#turns .own")
    assert page.is_visible("#cancel") and page.is_disabled("#send")
    page.keyboard.press("Escape")
    page.wait_for_selector(".turn.left")
    assert until(live().idle)
    assert page.input_value("#question") == QUESTION and page.is_enabled("#send") and page.is_hidden("#cancel")
    assert page.is_hidden("#problem")


def test_a_dropped_file_is_asked_about_and_a_bad_one_is_one_clear_line(open_page):
    page = open_page()
    page.wait_for_selector("#limit:not(:empty)")
    for name, content, kind, told in [
        ("notes.txt", b"text", "text/plain", "notes.txt is not a video."),
        ("empty.mp4", b"", "video/mp4", "empty.mp4 is empty."),
    ]:
        drop(page, name, content, kind)
        page.wait_for_selector(f"#problem:text-is('{told}')")
    ask(page)
    assert problem(page) == "Choose a video first."
    drop(page, f"{HOSTILE}.mp4")
    page.wait_for_selector("#chosen:not([hidden])")
    assert page.inner_text("#chosen") == f"{HOSTILE}.mp4" and page.is_hidden("#problem")
    page.press("#question", "Enter")
    assert "not a video" in problem(page) and page.input_value("#question") == QUESTION
    drop(page, "mine.mp4", find_clip("synthetic_1").read_bytes())
    page.wait_for_selector("#chosen:text-is('mine.mp4')")
    page.press("#question", "Enter")
    page.wait_for_selector(ENDED.format(1))
    assert marks(page) == wanted([of_user(QUESTION, data_url())])[0]


def test_a_file_over_the_limit_is_refused_before_it_is_sent(open_page):
    with served("max_body_mib=1", of=session()) as server:
        page = open_page(server)
        page.wait_for_selector("#limit:not(:empty)")
        drop(page, "large.mp4", b"0" * 2**20)
        assert problem(page) == "large.mp4 has 1.0 MiB. This server takes at most 0.5 MiB."


def test_a_server_that_stops_amid_an_answer_and_after_it(open_page, slow_rounds):
    with served("shutdown_timeout=0", of=session()) as server:
        page = open_page(server)
        choose(page)
        ask(page)
        page.wait_for_selector("#turns .own")
        server.server.force_exit = server.server.should_exit = True
        assert "Check that the server still runs" in problem(page) or "shutting down" in problem(page)
        assert page.inner_text(".turn.left .result") == "not finished: no part of the chat"
        server.thread.join(20)
        page.press("#question", "Enter")
        page.wait_for_selector("#problem:has-text('does not answer')")


def test_a_key_is_asked_for_and_kept_in_memory_alone(open_page):
    with served(of=session(), variables={"SPECVLM_API_KEY": "secret-1"}) as server:
        page = open_page(server)
        page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#problem:text-is('The server does not know this API key.')")
        page.fill("#key", "secret-1")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-form", state="hidden")
        choose(page)
        ask(page)
        page.wait_for_selector("body[data-frame]")  # clip, answer and view need the key
        page.wait_for_selector(ENDED.format(1))
        kept = page.evaluate("[document.cookie, JSON.stringify(localStorage), JSON.stringify(sessionStorage), location.href]")
        assert "secret-1" not in "".join([*kept, page.content(), page.input_value("#key")])


def test_a_busy_server_says_how_long_to_wait(open_page):
    page = open_page()
    choose(page)
    error = json.dumps({"error": {"message": "the queue is full: try again later", "type": "rate_limit_error"}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, headers={"retry-after": "7"}, body=error))
    ask(page)
    assert problem(page) == "The server is busy. Ask again in 7 s."


def test_a_models_words_stay_texts(open_page):
    page = open_page()
    choose(page)
    chunk = {
        "choices": [{"index": 0, "delta": {"content": HOSTILE * 2}}],
        "specvlm": {"round": {"round": 1, "accepted": [HOSTILE], "refused": [HOSTILE], "own": HOSTILE}},
    }
    error = {"error": {"message": HOSTILE}}
    told = "".join(f"data: {json.dumps(one)}\n\n" for one in (chunk, error))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=told))
    ask(page, HOSTILE)
    assert HOSTILE in problem(page)
    assert marks(page) == [["accepted", HOSTILE], ["refused", HOSTILE], ["own", HOSTILE]]
    assert page.inner_text(".question") == HOSTILE and not page.query_selector("img") and "taken" not in page.title()


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_every_control_has_a_name(open_page, size, scheme):
    page = open_page(size=size, scheme=scheme)
    page.wait_for_selector("#examples button")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 3 * 128) == (scheme == "light")
    nameless = "[...document.querySelectorAll('input, textarea, button')].filter((one) => !one.labels?.length"
    assert page.evaluate(f"{nameless} && !one.textContent && !one.ariaLabel).map((one) => one.id)") == []
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.querySelector('.drop')).outlineStyle") == "solid"


def test_clips_are_served_by_name_alone():
    client = live().client
    assert client.get("/specvlm/clips/synthetic_1").content == find_clip("synthetic_1").read_bytes()
    for name in ("x", "synthetic.json", "..%2fclips%2fsynthetic_1", "synthetic_1.mp4"):
        assert client.get(f"/specvlm/clips/{name}").status_code == 404
    for name in ("player.js", "look.css", "page.js", "calls.js"):
        assert client.get(f"/{name}").status_code == 200
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
