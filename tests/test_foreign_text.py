"""Text written by others stays text, never code, markup or control characters; messages are one line."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import report_jobs
import yaml
from foreign import FAST, empty_folder  # noqa: F401

from specvlm.__main__ import main
from specvlm.app.compose import compose
from specvlm.app.console import RunConsole, Terminal, outcome, styled
from specvlm.app.quoting import quoted
from specvlm.errors import line, message, one_line, visible
from specvlm.report.reading import read_jobs
from specvlm.report.seen import see
from specvlm.results.rows import config_of
from specvlm.strategies import registry


@pytest.mark.parametrize(
    "text",
    [
        "What does ${HOME} show?",
        "${oc.env:HOME}",
        "${",
        "a \\${b} \\\\",
        "'tis ${x",
        "choice(a) or b?",
        "it's [/b] #1, x=y",
        "'",
    ],
)
def test_a_question_on_the_command_line_is_text(text):
    assert compose(quoted([f"question={text}"], sweep=False)).question == text


def test_a_question_in_quotes_of_hydra_is_text_too():
    assert compose(quoted(["question='a ${b}, c'"], sweep=False)).question == "a ${b}, c"


@pytest.mark.parametrize("part", ["video", "target", "dataset"])
def test_what_a_folder_holds_is_never_resolved(part, monkeypatch):
    where = "${oc.env:SECRET}"
    monkeypatch.setenv("SECRET", "xyzzy-secret")
    changes = {"video": where, "target": {"path": where}, "dataset": {"name": "folder", "root": where}}
    folder = report_jobs.job(Path("job"), [report_jobs.row(0)])
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"dataset": None, part: changes[part]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    seen = see("scene-0000", read_jobs([folder]), 4)
    assert where in seen.problem and "xyzzy" not in seen.problem


@pytest.mark.parametrize("word", ["dataset.root=${oc.env:HOME}", "dataset.questions=${now:%Y}", "dataset.prompt=own"])
def test_a_strategy_built_from_what_was_read_back_is_not_resolved(word):
    key, _, value = word.partition("=")
    found = registry.build("dataset", {"name": "folder", "root": "x"} | {key.partition(".")[2]: value})
    assert value in (found.root, found.questions, found.prompt)


NASTY = "a[/b] [red]c[/] :smile: \x1b[31md\x07\r\u202ee\x9b\ud800"
PLAIN = "a[/b] [red]c[/] :smile: [31mde\ufffd"


def shown(tell) -> str:
    screen = RunConsole(Terminal())
    screen.console.file = StringIO()
    tell(screen)
    return screen.console.file.getvalue()


@pytest.mark.parametrize(
    "tell",
    [
        lambda screen: screen.note(NASTY),
        lambda screen: screen.console.print(NASTY),
        lambda screen: screen.console.print(styled((NASTY, "bold"), NASTY)),
        lambda screen: screen.written(Path(NASTY)),
        lambda screen: screen.jobs([(NASTY, {"reason": NASTY})], NASTY, Path(NASTY), NASTY),
        lambda screen: screen.console.print(styled(*outcome({"status": "failed", "reason": NASTY}))),
    ],
    ids=["note", "text", "styled", "folder", "table", "sample"],
)
def test_foreign_text_is_shown_as_it_is_without_control_characters(tell):
    text = shown(tell)
    assert PLAIN in text and not set("\x1b\x07\r\u202e\x9b\ud800") & set(text)


def test_messages_are_one_line_of_bearable_length():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert line("a\n\n b\x1b[0m") == "a b[0m"
    assert len(line("x" * 10_000)) < 250 and len(line("x " * 10_000)) < 1050


def test_an_error_whose_text_raises_is_told_all_the_same():
    class Worse(ValueError):
        def __str__(self):
            raise RuntimeError

    assert "RuntimeError" in message(Worse()) and one_line(Worse()).startswith("Worse: ")


@pytest.mark.slow
def test_a_run_with_markup_in_question_and_folder_is_shown(capfd):
    assert main([*FAST, "question=what is in list[/index]? ${HOME} [bold]", "hydra.run.dir=run[/b]"]) == 0
    out = capfd.readouterr().out
    assert "list[/index]? ${HOME} [bold]" in out and "run[/b]" in out
    assert config_of(Path("run[/b]"))["question"] == "what is in list[/index]? ${HOME} [bold]"
