"""Output in terminals of 80 and 120 columns: whole words and job names, no meaningless digits, time left."""

import re
from io import StringIO
from types import SimpleNamespace

import pytest
from report_jobs import row
from rich.console import Console

from specvlm.__main__ import main
from specvlm.app import console as show
from specvlm.app.console import RunConsole, Terminal, times, two_digits
from specvlm.app.terminal import Stream
from specvlm.results import metrics
from specvlm.results.rows import summary_of


def screen(columns: int, terminal: bool = True) -> RunConsole:
    console = Terminal()
    console.file, console._force_terminal, console.no_color = StringIO(), terminal, True
    made = RunConsole(console)
    console.width = columns
    return made


def said(made: RunConsole) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", made.console.file.getvalue())


TEXT = "A photograph shows three red squares, which move slowly from the left-hand side to the right. " * 5


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_streamed_words_do_not_break(columns, piece):
    made = screen(columns)
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(tokens))
    with made.answer(tokenizer) as show_step:
        for at in range(0, len(TEXT), piece):
            show_step(SimpleNamespace(tokens=[TEXT[at : at + piece]]))
    lines = said(made).strip().split("\n")
    assert max(map(len, lines)) <= columns and len(lines) > len(TEXT) // columns
    assert " ".join(line.strip() for line in lines) == TEXT.strip()


def test_streamed_text_is_the_answer_itself_where_the_output_is_no_terminal():
    made = screen(80, terminal=False)
    stream = Stream(made.console)
    for letter in TEXT:
        stream.add(letter)
    stream.add("", last=True)
    assert said(made) == TEXT


def test_all_but_the_last_word_is_shown_at_once_and_scripts_without_spaces_go_on():
    made = screen(80)
    stream = Stream(made.console)
    stream.add("two wor")
    assert said(made) == "two "
    stream.add("ds\n" + "图" * 50)
    assert said(made) == "two words\n" + "图" * 40 + "\n" + "图" * 9
    stream.add("", last=True)
    assert said(made).endswith("图" * 10)


NAMES = ["pruner=two_stage drafter=dynamic_tree ratio=0.5", "pruner=verifier_attention drafter=entropy_tree ratio=0.9", "none"]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("ties", [0, 2])
def test_the_table_of_a_sweep_keeps_the_names_of_jobs(columns, ties):
    rows = [row(0), row(1), *(row(2 + tie, verdict="numeric tie at token 3 (gap 0.1)") for tie in range(ties))]
    jobs = [*((name, metrics.totals(rows, len(rows))) for name in NAMES), ("pruner=broken", {"reason": "it cannot begin"})]
    made = screen(columns)
    made.jobs(jobs, "", None, "")
    lines = said(made).splitlines()
    assert max(map(len, lines)) <= columns and not any("…" in line for line in lines)
    text = " ".join(said(made).split())
    for name in [*NAMES, "pruner=broken"]:
        assert any(line.startswith(name) for line in lines) or (columns == 120 and name.split()[0] in text)
    shares = f"{len(rows)}/{len(rows)}"
    assert text.count(shares) == 3 and text.count("2.0 x") == 3 and text.count("failed") == 1 and "skipped" not in text
    assert text.count("2 identical") == 3
    columns_of = [line.index(shares) for line in lines if shares in line]
    assert len(set(columns_of)) == 1


def test_a_column_that_tells_nothing_is_left_out_and_one_that_does_is_there():
    made = screen(120)
    made.jobs([("a", metrics.totals([row(0), row(1, status="failed")], 3)), ("b", metrics.totals([row(0)], 1))], "", None, "")
    head = next(line for line in said(made).splitlines() if line.startswith("job"))
    assert head.split()[-2:] == ["verdicts", "failed"]


def test_speeds_have_two_digits():
    assert [times(value) for value in (0.873, 1.0, 1.0649, 9.94, 10.4, 123.4)] == [
        "0.87 x",
        "1.0 x",
        "1.1 x",
        "9.9 x",
        "10 x",
        "120 x",
    ]
    assert two_digits(118.2) == "120"
    assert "118" not in dict(show.rows({key: None for key in metrics.KEYS} | RUN))["speed"]


RUN = {
    **{key: 1.0 for key in metrics.KEYS if key.endswith("_s") or key.startswith("speedup")},
    "new_tokens": 9, "rounds": 3, "tokens_per_second": 118.2, "times_s": {"video": 1.0}, "peak_memory_bytes": 1,
}  # fmt: skip


def test_the_time_left_is_told_from_what_was_done(monkeypatch):
    monkeypatch.setattr(show, "monotonic", lambda: 130.0)
    assert show.left(3, 6, since=100.0) == ", 0:01:00 left"
    assert show.left(0, 6, since=100.0) == show.left(3, 0, since=100.0) == ""


@pytest.mark.slow
def test_a_sweep_tells_how_long_the_rest_will_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["dataset=synthetic", "dataset.scenes=2", "dataset.ask=question", "frames=4", "max_new_tokens=4", "baseline=false"]
    assert main(["-m", *words, "pruner=uniform,none", "hydra.sweep.dir=sweep"]) == 0
    done = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\d/2 ", line)]
    assert [bool(re.search(r", \d+:\d\d:\d\d left$", line)) for line in done] == [True, True, True, False]


@pytest.mark.slow
def test_a_sweep_over_one_video_ends_with_a_table_of_its_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["frames=4", "max_new_tokens=4", "question=how many ?"]
    assert main(["-m", *words, "pruner=uniform,none", "hydra.sweep.dir=sweep"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\[2/2\] .*pruner=none, \d+:\d\d:\d\d left$", out, re.M)
    table = out.partition("\njob ")[2].splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["pruner=uniform", "1/1"], ["pruner=none", "1/1"]]
    assert all("1 identical" in line for line in table[1:3])
    (folder,) = (tmp_path / "sweep").glob("0_*")
    assert times(summary_of(folder)["speedup_decode"]) in table[1]


def test_a_console_of_a_pipe_has_the_width_of_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert Console().width == Terminal().width == 80
