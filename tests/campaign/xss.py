"""Hostile texts in questions, data sets and in a run folder that somebody else wrote: none of them becomes part of the page.

Needs the packages of a report. Where Chromium and Playwright are there, the page is opened and clicked through too.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from campaign.fork import Child, preload, specvlm

COUNT, SAMPLE = 24, 1

PAYLOADS = (
    *("<script>window.PWN=1</script>", "<img src=x onerror=window.PWN=1>", "</script><script>window.PWN=1</script>"),
    *('"><svg onload=window.PWN=1>', "javascript:window.PWN=1", "{{7*7}}", "{% raw %}", "'+(window.PWN=1)+'"),
    *("</style><script>window.PWN=1</script>", "<!--<script>", "\u2028window.PWN=1", "datum.x','y'))||(window.PWN=1)||(("),
    *("<iframe srcdoc='<script>parent.PWN=1</script>'>", "<base href=//evil>", "<a href=javascript:window.PWN=1>x</a>"),
    *("<meta http-equiv=refresh content='0;url=javascript:window.PWN=1'>", "]]><x/>", "\\u003cscript\\u003e"),
)
ALL = " ".join(PAYLOADS)
NAMES = (
    "status",
    "sample",
    "verdict",
    "path",
    "mrope",
    "root",
    "name",
    "reader",
    "questions",
    "dataset",
    "prompt",
    "positions",
)
ACTIVE = ("script", "iframe", "base", "object", "embed", "meta", "link", "form", "svg")


def run(count: int, seed: int) -> list[str]:
    preload()
    from specvlm.report import page as of_report

    of_report.bundle()  # kept for every fork to find there
    chance, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        plain, honest = (swept(work / kind, texts) for kind, texts in (("plain", ("a", "b")), ("honest", PAYLOADS[:2])))
        expected = active_parts(report(plain, work / "plain.html", "a title", work / "plain.log"))
        folders = [(honest, "honest"), *((poisoned(honest, work / f"evil{n}", chance), f"evil{n}") for n in range(count))]
        pages = [report(folder, work / f"{label}.html", ALL, work / f"{label}.log") for folder, label in folders]
        for page in pages:
            more = active_parts(page) - expected
            found += [f"{page.stem}: {number} more of {what} than in a plain report" for what, number in more.items()]
        written = [page for page in pages if page.stat().st_size]
        print(f"xss: {len(written)} pages, {len(pages) - len(written)} folders refused", flush=True)
        found += opened(written)
    return found


def swept(folder: Path, texts: tuple[str, ...]) -> Path:
    """A sweep over a data set whose questions, answers and names are these texts."""
    from specvlm.video.clips import find_clip

    folder.mkdir()
    shutil.copy(find_clip("synthetic_1"), folder / "video.mp4")
    lines = [{"video": "video.mp4", "id": t, "question": t, "answer": t, "options": [t, "b"], f"more {t}": t} for t in texts]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("-m", "dataset=folder", f"dataset.root={folder}", "pruner=uniform,two_stage", "frames=4", "max_new_tokens=6")
    ended = Child(specvlm(*words, "record=true", f"hydra.sweep.dir={folder}/sweep"), folder / "log").wait(300)
    assert ended.code == 0, ended.err
    return folder / "sweep"


def poisoned(folder: Path, copy: Path, chance: random.Random) -> Path:
    """A copy of a sweep in which about half of all strings were edited by someone hostile."""
    shutil.copytree(folder, copy)
    edits: dict[str, Callable[[str], str]] = {
        "*/samples.jsonl": lambda text: "".join(json.dumps(hostile(json.loads(x), chance)) + "\n" for x in text.splitlines()),
        "*/summary.json": lambda text: json.dumps(hostile(json.loads(text), chance) | {"versions": {ALL: ALL}}),
        "*/config.yaml": lambda text: yaml.safe_dump(hostile(yaml.safe_load(text), chance) | {ALL: ALL}, allow_unicode=True),
    }
    for pattern, edit in edits.items():
        for path in copy.glob(pattern):
            path.write_text(edit(path.read_text()))
    return copy


def hostile(value: Any, chance: random.Random, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: hostile(inner, chance, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner, chance, key) for inner in value]
    if key == "verdict":
        return f"MISMATCH at token 1: {ALL}" if chance.random() < 0.3 else value
    return value + ALL if isinstance(value, str) and key not in NAMES and chance.random() < 0.5 else value


def report(folder: Path, page: Path, title: str, log: Path) -> Path:
    """The report of a folder; empty where it was refused in one line."""
    from specvlm.report.__main__ import main

    ended = Child(partial(main, [str(folder), "-o", str(page), "--title", title]), log, memory_gb=None).wait(
        300
    )  # V8 reserves more
    assert not ended.faults(allowed=(0, 2)), ended.faults(allowed=(0, 2))
    if ended.code == 2:
        page.write_text("")
    return page


class Parts(HTMLParser):
    """Counts what can act in a page: elements, attributes that hold code, addresses of elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[f"<{tag}>"] += tag in ACTIVE
        for name, value in attrs:
            self.counts[f"{name}=…"] += name.startswith("on") or name == "srcdoc"
            self.counts[f"{name}={value}"] += (value or "").strip().lower().startswith(("javascript:", "//", "http"))


def active_parts(page: Path) -> Counter[str]:
    parts = Parts()
    parts.feed(page.read_text(encoding="utf-8"))
    return +parts.counts


def opened(pages: list[Path]) -> list[str]:
    """What the pages do in a browser that they should not, with every choice made and every column sorted."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        chromium = None
    if chromium is None:
        print("xss: no Chromium or no Playwright: the pages were not opened", flush=True)
        return []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found = [f"{page.stem}: {what}" for page in pages for what in behaviour(browser, page)]
        browser.close()
    return found


def behaviour(browser: Any, page: Path) -> list[str]:
    tab, found = browser.new_page(), []
    tab.on("dialog", lambda dialog: (found.append("it opened a dialog"), dialog.dismiss()))
    tab.on("pageerror", lambda error: found.append(f"an error in its code: {str(error)[:200]}"))
    tab.on("request", lambda asked: found.append(f"it asked for {asked.url[:100]}") if foreign(asked.url) else None)
    tab.goto(page.as_uri())
    tab.wait_for_selector("body[data-drawn]", timeout=60_000)
    for choice in ("#sample", "#job"):
        for value in tab.eval_on_selector_all(f"{choice} option", "options => options.map(option => option.value)"):
            tab.select_option(choice, value)
    for button in tab.query_selector_all("th button")[:4]:
        button.click()
    if tab.evaluate("window.PWN") is not None:
        found.append("a text ran as code")
    tab.close()
    return found


def foreign(address: str) -> bool:
    return not address.startswith(("file:", "data:", "blob:"))
