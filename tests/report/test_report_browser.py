"""The page in headless Chromium: no message on the console, a player that moves, figures equal to the JSON's.

Needs Debian's `chromium` (or another Chromium on the path) and the Python package `playwright`, which brings no browser here.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("playwright", reason="needs the Python package playwright")
pytest.importorskip("altair")

import report_jobs
from playwright.sync_api import sync_playwright

from specvlm.__main__ import main as run
from specvlm.report.__main__ import main as report
from specvlm.report.page import page as page_of
from specvlm.report.reading import read_jobs
from specvlm.report.seen import Round, Seen, View, target_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")]

LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
KEYS = ("accepted_per_round", "speedup_decode", "speedup_end_to_end", "tokens_per_second", "time_to_first_token_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two jobs over two samples, and their report."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("report")
    words = ["-m", "pruner=two_stage,uniform", "ratio=0.9", "record=true", "max_new_tokens=40"]
    assert run([*words, "dataset=synthetic", "dataset.scenes=2", f"hydra.sweep.dir={place / 'sweep'}"]) == 0
    assert report([str(place / "sweep"), "-o", str(place / "report.html")]) == 0
    return place


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, folder):
    """Opens the report; whatever the console says, or is asked of a network, fails the test."""
    heard, contexts = [], []

    def opened(size=LAPTOP, scheme="light", name="report.html"):
        context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=size is PHONE, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else heard.append(asked.url))
        page.goto((folder / name).as_uri())
        page.wait_for_selector("body[data-drawn]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_word_and_fits(open_page, size, scheme):
    page = open_page(size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    plots = page.query_selector_all(".plot svg")
    assert len(plots) == int(page.get_attribute("body", "data-drawn")) == 6
    for plot in plots:
        box = plot.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"] and box["height"] > 80
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(", "))) > 3 * 128
    assert light == (scheme == "light")
    label = page.evaluate("getComputedStyle(document.querySelector('.plot svg .role-axis-title text')).fill")
    assert label == page.evaluate("getComputedStyle(document.querySelector('.note')).color")


def test_the_figures_are_those_of_the_json(open_page, folder):
    page, jobs = open_page(), read_jobs([folder / "sweep"])
    lines = page.query_selector_all("table.summary tbody tr")
    assert len(lines) == len(jobs) == 2
    for line in lines:
        job = jobs[int(line.get_attribute("data-job"))]
        summary = json.loads((job.folder / "summary.json").read_text())
        assert line.query_selector("th").inner_text().split("\n")[:3] == [
            job.series, job.drops, f"keeps {summary['kept_tokens']:.0f} of {summary['video_tokens']:.0f}"]  # fmt: skip
        for key in KEYS:
            cell = line.query_selector(f"td[data-key={key}]")
            assert float(cell.get_attribute("data-value")) == pytest.approx(summary[key], rel=1e-9)
        assert (
            line.query_selector("td[data-key=accepted_per_round]")
            .inner_text()
            .startswith(f"{summary['accepted_per_round']:.2f}\n[")
        )
        assert line.query_selector("td[data-key=verdict]").inner_text() == "2 identical"


def test_a_click_sorts_the_table(open_page):
    page = open_page()
    for order in ("descending", "ascending"):
        page.click("table.summary th:nth-child(2) button")
        values = [
            float(cell.get_attribute("data-value")) for cell in page.query_selector_all("td[data-key=accepted_per_round]")
        ]
        assert page.get_attribute("table.summary th:nth-child(2)", "aria-sort") == order
        assert values == sorted(values, reverse=order == "descending")


def test_the_player_moves_by_itself_and_by_hand(open_page):
    page = open_page()
    page.wait_for_selector('body[data-frame="0"]')
    page.click("#play")
    page.wait_for_selector('body[data-frame="2"]', timeout=60_000)  # a busy machine draws slowly
    page.click("#play")
    stopped = page.get_attribute("body", "data-frame")
    page.wait_for_timeout(700)
    assert page.get_attribute("body", "data-frame") == stopped
    page.focus("#frame")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("body", "data-frame") == "1" and "frame 2 of 16" in page.inner_text("#time")
    box = page.locator("#strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.97, box["y"] + 10)
    assert page.get_attribute("body", "data-frame") == "15"


def drawn(page, canvas: str) -> np.ndarray:
    """(H, W, 3) of a canvas."""
    uri = page.evaluate("(id) => document.getElementById(id).toDataURL()", canvas)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


def cells(picture: np.ndarray, count: int = 8) -> np.ndarray:
    """(count * count,) brightness in the middle of each cell."""
    tall, wide = (side // count for side in picture.shape[:2])
    return picture.sum(-1)[tall // 2 :: tall, wide // 2 :: wide].flatten()


def test_kept_tokens_are_bright_and_dropped_ones_dim(open_page, folder):
    page, jobs = open_page(), read_jobs([folder / "sweep"])
    for job in jobs:
        page.select_option("#job", label=job.label)
        page.select_option("#sample", label="scene-0001")
        kept = next(step["kept"] for step in job.steps["scene-0001"] if "kept" in step)
        for frame in (0, 11):
            page.fill("#frame", str(frame))
            page.uncheck("#whole")
            dim = cells(drawn(page, "kept"))
            page.check("#whole")
            whole = cells(drawn(page, "kept"))
            shown = {frame * 64 + cell for cell in range(64) if dim[cell] == whole[cell]}
            assert shown == {token for token in kept if token // 64 == frame}
            assert all(dim[cell] < whole[cell] for cell in range(64) if frame * 64 + cell not in shown)


def test_the_answer_stands_beside_it_with_its_guesses_marked(open_page, folder):
    page, jobs = open_page(), read_jobs([folder / "sweep"])
    tokenizer = target_of("embedded:qwen2_5_vl/target", "hf").tokenizer
    for job, summary in ((one, line) for one in jobs for line in one.done):
        steps = job.steps[summary["sample"]]
        page.select_option("#sample", label=summary["sample"])
        page.select_option("#job", label=job.label)
        assert page.inner_text("#question") == summary["question"]
        refused = page.query_selector_all("#answer .refused")
        assert len(refused) == sum(bool(step.get("refused")) for step in steps)
        own = [step["tokens"][-1] for step in steps if step["accepted"] < len(step["tokens"])]
        assert len(page.query_selector_all("#answer .own")) == sum(
            bool(tokenizer.decode([token], skip_special_tokens=True)) for token in own
        )
        page.uncheck("#refused")
        assert page.inner_text("#answer").strip() == summary["text"]
        page.check("#refused")
        assert page.inner_text("#result").startswith(f"identical: {summary['new_tokens']} tokens in {summary['rounds']} rounds")


def test_the_heat_is_shown_where_it_was_recorded(open_page):
    page = open_page()
    assert page.is_visible("#heat") and "times the mean" in page.inner_text("#heat-note")
    page.fill("#frame", "11")
    assert len(np.unique(cells(drawn(page, "heat")))) > 8


def test_texts_of_models_and_files_stay_texts(open_page, folder):
    jobs = read_jobs(
        [report_jobs.job(folder / "hostile", [report_jobs.row(0, text=HOSTILE) | {"sample": HOSTILE}], pruner__name=HOSTILE)]
    )
    view = View(jobs[0], jobs[0].rows[0], rounds=[Round([HOSTILE], [HOSTILE], HOSTILE)])
    seen = Seen(HOSTILE, HOSTILE, HOSTILE, problem=HOSTILE, views=[view])
    (folder / "hostile.html").write_text(page_of(jobs, [(HOSTILE, seen)], "harmless", failed=[HOSTILE]))
    page = open_page(name="hostile.html")
    assert page.title() == "harmless" and not page.query_selector("img") and page.inner_text("#answer") == HOSTILE * 3
    assert page.inner_text("table.summary th b") == f"{HOSTILE}" == page.inner_text("#problem")


# Texts of the figures that reach beyond their plot, or end in an ellipsis.
CUT = """() => [...document.querySelectorAll('.plot')].flatMap((plot) => { const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('svg text')].map((text) => [text.textContent, text.getBoundingClientRect()])
    .filter(([word, at]) => at.width && (at.left < box.left - 1 || at.right > box.right + 1 || word.includes('…')))
    .map(([word]) => `${plot.dataset.spec}: ${word}`); })"""


@pytest.mark.parametrize("ratios", [(0.9,), (0.5, 0.9)], ids=["one ratio", "two ratios"])
def test_no_label_of_twelve_jobs_with_long_names_is_cut_on_a_laptop_or_a_phone(ratios, open_page, folder, tmp_path):
    for number in range(12):
        names = {"pruner__name": f"pruner_{number}_" + "x" * 4 * number, "target__path": f"a/target_of_a_kind_{number % 3}"}
        for ratio in ratios:
            report_jobs.job(tmp_path / f"{number}_{ratio}", [report_jobs.row(0), report_jobs.row(1)], ratio=ratio, **names)
    (folder / "long.html").write_text(page_of(read_jobs([tmp_path]), [], "long"), encoding="utf-8")
    for size in (LAPTOP, PHONE):
        opened = open_page(size, name="long.html")
        assert opened.evaluate(CUT) == []
        assert opened.evaluate("document.documentElement.scrollWidth") == size["width"]
        half = opened.evaluate("document.querySelector('figure.half').getBoundingClientRect().width")
        assert size is LAPTOP or half > 350  # every chart has the width of the phone
