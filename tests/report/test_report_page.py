"""The command writes one file that asks for nothing, and every mistake is one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from report_jobs import job, row, sweep

pytest.importorskip("altair")

from specvlm.report.__main__ import main
from specvlm.report.page import best, bundle, chosen, page, sha
from specvlm.report.reading import failures, read_jobs
from specvlm.report.seen import Seen, View

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def data_of(text: str, name: str) -> dict:
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)[1])


@pytest.mark.slow
def test_a_page_asks_for_nothing_and_runs_no_script_but_its_own(tmp_path):
    text = page(read_jobs([sweep(tmp_path)]), [], "pruners")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    allowed = set(re.findall(r"'sha256-([^']*)'", policy))
    scripts = re.findall(r'<script(?: type="module")?>(.*?)</script>', text, re.S)
    assert {sha(script) for script in scripts} == allowed and len(allowed) == 2
    own = text.replace(bundle(), "")
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[a-z/]+[:/]""", own) and len(own) < 200_000


def test_texts_of_models_and_files_are_no_markup(tmp_path):
    line = row(0, text=HOSTILE) | {"sample": HOSTILE}
    gone = row(1) | {"sample": "other", "status": "failed", "reason": HOSTILE, "verdict": None}
    jobs = read_jobs([job(tmp_path / "a", [line, gone], pruner__name=HOSTILE)])
    seen = Seen(HOSTILE, HOSTILE, HOSTILE, problem=HOSTILE, views=[View(jobs[0], jobs[0].rows[0])])
    text = page(jobs, [(HOSTILE, seen)], HOSTILE, failed=[HOSTILE]).replace(bundle(), "")
    assert "taken" in text and "<img" not in text and text.count("<script") == text.count("</script>") == 4
    (sample,) = data_of(text, "data")["samples"]
    assert sample["question"] == sample["problem"] == sample["views"][0]["text"] == HOSTILE


def test_the_median_the_worst_and_the_best_sample_are_looked_at(tmp_path):
    jobs = read_jobs([job(tmp_path / "a", [row(index, accepted) for index, accepted in enumerate((3, 1, 5, 4, 2))])])
    assert list(chosen(jobs, [])) == ["scene-0000", "scene-0001", "scene-0002"]
    assert list(chosen(jobs, ["scene-0004", "scene-0003"])) == ["scene-0004", "scene-0003"]


def test_the_fastest_job_that_prunes_comes_first(tmp_path):
    job(tmp_path / "a", [row(0, ours=0.1, kept=1024)], pruner__name="none")
    job(tmp_path / "b", [row(0, ours=0.5)], pruner__name="uniform")
    job(tmp_path / "c", [row(0, ours=0.4)], pruner__name="two_stage")
    job(tmp_path / "d", [row(0, ours=0.2, verdict="lossy")], verifier__name="loose")
    assert best(read_jobs([tmp_path])).config["pruner"]["name"] == "two_stage"


@pytest.mark.slow
def test_the_command_writes_a_page_and_says_where(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job(tmp_path / "jobs" / "a", [row(index) for index in range(4)])
    assert main(["jobs", "--samples", "scene-0002", "--title", "mine", "-o", "out/mine.html"]) == 0
    assert "written: out/mine.html (" in capsys.readouterr().out
    text = Path("out/mine.html").read_text(encoding="utf-8")
    (sample,) = data_of(text, "data")["samples"]
    assert "<title>mine</title>" in text and sample["sample"] == "scene-0002" and sample["views"][0]["verdict"] == "identical"


def test_a_job_that_did_nothing_is_named(tmp_path):
    job(tmp_path / "a", [row(0)])
    begun = job(tmp_path / "b", [])
    (begun / "samples.jsonl").unlink()
    (begun / "summary.json").write_text('{"status": "failed", "reason": "no such model folder"}')
    assert failures([tmp_path]) == ["b: no such model folder"]
    assert "b: no such model folder" in page(read_jobs([tmp_path]), [], "", failed=failures([tmp_path]))


@pytest.mark.parametrize(
    "words, says",
    [
        (["nowhere"], "nowhere is not a results folder of python -m specvlm"),
        (["jobs", "--samples", "scene-00"], 'no job has a finished sample .scene-00.. Did you mean "scene-0000"'),
        (["jobs", "--baseline", "uniforn"], "no job is called 'uniforn'"),
        (["jobs", "--video", "saw.avi"], "a film ends in .mp4 or .gif"),
        (["jobs", "--job", "two_stage", "--video", "saw.mp4"], "no job is called 'two_stage'"),
        (["jobs", "--frames", "0"], "--frames 0: expected at least 1"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    job(tmp_path / "jobs" / "a", [row(0)])
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("specvlm: ") and told.count("\n") == 1 and re.search(says, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs"]


def test_without_the_extra_the_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("altair", "specvlm.report."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    job(tmp_path / "a", [row(0)])
    assert main([str(tmp_path)]) == 2
    assert "pip install 'specvlm[report]'" in capsys.readouterr().err
