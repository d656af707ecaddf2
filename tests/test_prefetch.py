"""Prefetching: the next video is read while a sample is decoded, and only the times in a row change."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from sweeping import end, jobs, start, table, untimed

from specvlm.__main__ import main
from specvlm.app import prepare
from specvlm.app import request as answer
from specvlm.app.compose import compose
from specvlm.app.job import Job
from specvlm.app.model_cache import MODEL_CACHE
from specvlm.app.placement import places_of
from specvlm.app.readings import Readings
from specvlm.app.sweep import take_turns
from specvlm.errors import ExitCode, JobFailed, UserError
from specvlm.results.rows import CannotWrite, rows_of
from specvlm.strategies import registry

FEW = ["dataset=folder", "dataset.root=films", "frames=4", "max_new_tokens=3", "baseline=false"]
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def films(tmp_path, monkeypatch):
    """Write three films of eight small pictures each, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for film in "abc":
        Path("films", film).mkdir(parents=True)
        for number in range(8):
            Image.effect_noise((64, 64), 10.0 * number).save(f"films/{film}/{number}.png")
    lines = [{"video": film, "fps": 2, "id": film, "question": "how many objects appear ?"} for film in "abc"]
    Path("films/questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def reads(monkeypatch):
    """Record each read: sample, whether in the background, and number of threads."""
    calls, real = [], prepare.read

    def read(setup, sample, known=None):
        behind = threading.current_thread() is not threading.main_thread()
        calls.append((sample.id, behind, torch.get_num_threads()))
        return real(setup, sample)

    monkeypatch.setattr("specvlm.app.job.read", read)
    return calls


def answer_all(out: str, *jobs_words: list[str]) -> int:
    """Run one job per list of words, as a sweep does. Returns the exit code."""
    started = []
    for number, words in enumerate(jobs_words):
        cfg = compose([*FEW, *words])
        started.append(Job(cfg, Path(out, str(number)), Path(out), MODEL_CACHE))
        started[-1].start()
    return take_turns(started, started[0].cfg.turn, lambda _: ExitCode.FAULT)


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


SHARED = [["pruner=random"], ["pruner=uniform"]]
APART = [["frames=4", "turn=2"], ["frames=6", "turn=2"]]


@pytest.mark.slow
@pytest.mark.parametrize("both", [SHARED, APART], ids=["shared", "apart"])
def test_rows_and_rounds_are_the_same_with_and_without(both, reads):
    """For jobs that share reads and jobs that do not, with a rule that uses random numbers."""
    for word in ("true", "false"):
        more = ["verifier=sampling", "verifier.temperature=0.8", f"prefetch={word}"]
        assert answer_all(word, *([*words, *more] for words in both)) == 0
        assert not running()
    assert len(jobs(Path("true"))) == 2 and table(Path("true")) == table(Path("false"))
    ahead, usual = reads[: len(reads) // 2], reads[len(reads) // 2 :]
    assert sorted(sample for sample, *_ in ahead) == sorted(sample for sample, *_ in usual), "nothing is read twice"
    assert len(usual) == (3 if both is SHARED else 6) and not any(behind for _, behind, _ in usual)
    assert [behind for _, behind, _ in ahead] == [False, *[True] * (len(ahead) - 1)]


@pytest.mark.slow
def test_the_next_video_is_read_while_a_sample_is_decoded_and_no_other(monkeypatch):
    """Each sample blocks decoding until the next one is read: without a background thread it would block for ever."""
    read, decoded, real, decode = [], [], prepare.read, answer.speculate
    come = threading.Condition()

    def reading(setup, sample, known=None):
        found = real(setup, sample)
        with come:
            read.append(sample.id)
            come.notify()
        return found

    def decoding(*args):
        with come:
            wanted = min(len(decoded) + 2, 3)
            assert come.wait_for(lambda: len(read) >= wanted, PATIENCE_S), "the next one is not read"
            assert not come.wait_for(lambda: len(read) > wanted, 0.05), "one ahead is enough"
        decoded.append(1)
        yield from decode(*args)

    monkeypatch.setattr("specvlm.app.job.read", reading)
    monkeypatch.setattr("specvlm.app.job.speculate", decoding)
    assert answer_all("out", ["prefetch=true"]) == 0
    assert len(decoded) == 3 and read == ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["prefetch=false"]])
def test_on_a_cpu_nothing_is_read_ahead_unless_it_is_asked_for(words, reads):
    assert answer_all("out", words) == 0
    assert [behind for _, behind, _ in reads] == [False] * 3


def test_where_the_target_is_on_a_gpu_the_next_video_is_read_ahead():
    cfg = compose(FEW)
    places = places_of(cfg)
    gpu = prepare.Placement(None, (torch.device("cuda:0"),), torch.device("cuda:0"))
    assert prepare.reads_ahead(cfg, gpu) and not prepare.reads_ahead(cfg, places)
    assert not prepare.reads_ahead(compose([*FEW, "prefetch=false"]), gpu)
    assert not prepare.reads_ahead(compose([]), gpu), "a run of one video has no next one"


@pytest.mark.slow
def test_threads_are_those_of_the_job_in_both_places(reads, monkeypatch):
    """Of the job that decodes, and in the background of the job that will need the video."""
    decoding, real = [], answer.speculate

    def speculate(request, *rest):
        decoding.append((request.cfg.threads, torch.get_num_threads()))
        return real(request, *rest)

    monkeypatch.setattr("specvlm.app.job.speculate", speculate)
    more = ["max_new_tokens=1", "prefetch=true"]
    assert answer_all("out", ["threads=2", "frames=6", *more], ["threads=1", *more]) == 0
    assert decoding == [(2, 2), (1, 1), (1, 1), (2, 2), (2, 2), (1, 1)] and torch.get_num_threads() == 1
    assert [count for *_, count in reads] == [2, 1, 1, 2, 2, 1]


@pytest.mark.slow
def test_without_a_number_of_threads_both_places_have_the_usual_one(reads):
    assert answer_all("out", ["prefetch=true"]) == 0
    assert [count for *_, count in reads] == [1, 1, 1]


@pytest.mark.slow
def test_a_video_that_cannot_be_read_costs_its_own_row(capfd):
    Path("films/b/3.png").write_text("no picture")
    shutil.rmtree("films/c")
    with Path("films/questions.jsonl").open("a") as file:
        file.write(json.dumps({"video": "a", "fps": 2, "id": "d", "question": "what ?"}) + "\n")
    for word in ("true", "false"):
        assert answer_all(word, [f"prefetch={word}"]) == ExitCode.FAILED
    rows, same = (untimed(rows_of(Path(word, "0"))) for word in ("true", "false"))
    assert rows == same and [row["status"] for row in rows] == ["ok", "failed", "skipped", "ok"]
    assert "3.png is damaged" in rows[1]["reason"] and "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_job_that_fails_whole_leaves_what_was_read_for_it_to_nobody(reads, monkeypatch):
    """Of two jobs with different frames, the second fails while its video is read; the first goes on."""
    real = MODEL_CACHE.graph

    def graph(request, ranks, owner):
        if request.cfg.frames == 6:
            raise ValueError("no weights")
        return real(request, ranks, owner)

    monkeypatch.setattr(MODEL_CACHE, "graph", graph)
    assert answer_all("out", ["frames=6", "prefetch=true"], ["frames=4", "prefetch=true"]) == ExitCode.FAULT
    assert [len(rows_of(Path("out", job))) for job in "01"] == [0, 3]
    assert not running() and len(reads) == 4


ENDS = {KeyboardInterrupt: KeyboardInterrupt(), CannotWrite: CannotWrite("the disk is full"), JobFailed: ValueError("no")}


@pytest.mark.parametrize("end_of_it", ENDS)
def test_nothing_runs_on_behind_a_job_that_ends_early(end_of_it, monkeypatch):
    """Ctrl-C, a full disk, or fail_fast, while the next video is read."""
    begun, go_on, real = threading.Event(), threading.Event(), prepare.read

    def reading(setup, sample, known=None):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(PATIENCE_S)
        return real(setup, sample)

    def ending(*_):
        assert begun.wait(PATIENCE_S)
        threading.Timer(0.1, go_on.set).start()
        raise ENDS[end_of_it]

    monkeypatch.setattr("specvlm.app.job.read", reading)
    monkeypatch.setattr("specvlm.app.job.speculate", ending)
    with pytest.raises(end_of_it):
        answer_all("out", ["prefetch=true", "fail_fast=true"])
    assert go_on.is_set() and not running()


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was():
    """Killed after its first row, while the next video is read or decoded."""
    words = ["-m", *FEW, "pruner=uniform", "prefetch=true"]
    assert main([*words, "hydra.sweep.dir=whole"]) == 0
    words += ["hydra.sweep.dir=out", "resume=true"]
    Path("out").mkdir()
    process, stop = start(words), time.monotonic() + PATIENCE_S
    while time.monotonic() < stop and not any(path.stat().st_size for path in Path("out").glob("*/samples.jsonl")):
        time.sleep(0.001)
    assert end(process, 0.001) in (0, -signal.SIGKILL)
    assert table(Path("out")) != {} and main(words) == 0
    assert table(Path("out")) == table(Path("whole"))


@pytest.mark.slow
def test_memory_is_planned_for_one_more_video():
    def parts(*words):
        cfg = compose([*FEW, *words])
        setup = prepare.set_up(cfg, places_of(cfg))
        (sample, *_) = registry.build("dataset", cfg.dataset).samples()
        reading = prepare.read(setup, sample)
        (plan,) = prepare.plan(setup, reading).plans.values()
        return plan.parts, reading

    with_one, reading = parts("prefetch=true")
    without, _ = parts()
    assert with_one == without | {"the next video": reading.read_bytes}
    assert reading.read_bytes == reading.prompt.videos[0]["pixels"].nbytes + 4 * 3 * 64 * 64


@pytest.mark.parametrize("word", ["maybe", "null", "[true]", "2"])
def test_other_words_are_refused(word):
    with pytest.raises(UserError, match=r"prefetch=.*expected auto, true or false"):
        compose([*FEW, f"prefetch={word}"])


def test_what_nobody_asks_for_is_waited_for_and_dropped():
    gate, log = threading.Event(), []

    def slow():
        assert gate.wait(PATIENCE_S)
        log.append("slow")
        return "slow"

    with Readings() as readings:
        readings.begin("a", slow, None)
        threading.Timer(0.1, gate.set).start()
        assert readings.get("b", lambda: log.append("b") or "b") == "b"
        assert log == ["slow", "b"], "one video is read at a time"
        assert readings.get("a", lambda: "anew") == "anew"
    assert not running()
