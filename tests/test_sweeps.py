"""Jobs and sweeps: what they write, how they resume, and what survives when something fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from filelock import FileLock
from sweeping import ASK, end, finished, install, jobs, start, table, uninstall, untimed, videos
from towers import videos_encoded_once

from specvlm import load
from specvlm.__main__ import main
from specvlm.app import baselines, launch
from specvlm.app import compose as composing
from specvlm.app import request as answer
from specvlm.app.baselines import Baselines, inputs
from specvlm.app.compose import compose
from specvlm.app.compose import jobs as planned
from specvlm.app.job import Job
from specvlm.app.job_names import folder_name, split_shared
from specvlm.app.model_cache import MODEL_CACHE
from specvlm.app.placement import places_of
from specvlm.app.prepare import read, set_up
from specvlm.app.request import threads
from specvlm.config import model_folder
from specvlm.decoding.lossless import Comparison
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.errors import UserError, worst
from specvlm.results import metrics
from specvlm.results.rows import Rows, room, rows_of, steps_of, summary_of
from specvlm.strategies import registry
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.testing import tiny
from specvlm.types import Step, VideoPrompt

THREE, TWO = "pruner=two_stage,uniform,random", "pruner=two_stage,uniform"
WHOLE = (TWO, "dataset.scenes=3")  # which several tests compare with, as `whole` leaves it
TINY = [*ASK, "dataset.scenes=1", "max_new_tokens=3"]
PLAIN = [*ASK, "dataset.scenes=2", "baseline=false", "max_new_tokens=2"]


@pytest.fixture(autouse=True, scope="module")
def videos_once():
    with videos_encoded_once():
        yield


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def wrong(monkeypatch):
    """Install what fails, see sweeping.py."""
    install(monkeypatch)
    videos(Path("videos"))
    yield
    uninstall()


@pytest.fixture
def decodes(monkeypatch):
    """Record the prompt lengths of decoded baselines, without warm-ups."""
    calls, real = [], answer.decode_alone
    monkeypatch.setattr(
        "specvlm.app.job.decode_alone", lambda request, *rest: calls.append(len(request.prompt)) or real(request, *rest)
    )
    return calls


@pytest.fixture
def loads(monkeypatch):
    """Record loaded models, family and name; none is cached at first."""
    MODEL_CACHE.clear()
    calls = []

    def loading(path, *rest, **named):
        calls.append("/".join(path.parts[-2:]))
        return load(path, *rest, **named)

    monkeypatch.setattr("specvlm.app.model_cache.load", loading)
    return calls


def sweep(*words: str, folder: str = "sweep") -> int:
    return main(["-m", *ASK, *words, f"hydra.sweep.dir={folder}"])


def whole(folder: str = "whole") -> Path:
    """Run a sweep without disturbance."""
    return finished(folder, "-m", *ASK, *WHOLE)


# What is written


@pytest.mark.slow
def test_a_job_writes_a_row_a_sample_and_its_rounds_and_totals(capsys):
    assert main([*ASK, "dataset.scenes=3", "hydra.run.dir=out"]) == 0
    folder = Path("out")
    rows, steps, totals = rows_of(folder), steps_of(folder), summary_of(folder)
    assert [row["sample"] for row in rows] == [f"scene-{number:04d}" for number in range(3)]
    for row in rows:
        assert set(metrics.KEYS) - set(metrics.OF_JOB) < set(row)
        assert (row["status"], row["verdict"], row["dataset"], row["split"]) == ("ok", "identical", "synthetic", "held_out")
        rounds = steps[row["sample"]]
        assert row["token_ids"] == [token for line in rounds for token in line["tokens"]] == row["baseline_token_ids"]
        assert row["kept"] == rounds[1]["kept"] and len(row["kept"]) == row["kept_tokens"]
        assert Path(f"out/baselines/{row['baseline']}.json").is_file()
        assert row["question"] and row["answer"] and row["meta"]["objects"] >= 2 and row["order"] == 0
    assert totals["status"] == "complete" and totals["verdicts"] == {"identical": 3} and totals["ok"] == 3
    assert totals["accepted_per_round"] == pytest.approx(sum(row["accepted_per_round"] for row in rows) / 3)
    assert totals["speedup_decode"] == pytest.approx(
        sum(row["baseline_decode_s"] for row in rows) / sum(row["decode_s"] for row in rows)
    )
    shown = capsys.readouterr().out
    assert "3/3 scene-0002" in shown and "3 identical" in shown
    assert {path.name for path in folder.iterdir() if not path.name.endswith(".lock")} == {
        "config.yaml",
        "samples.jsonl",
        "steps.jsonl",
        "summary.json",
        "baselines",
    }


@pytest.mark.slow
def test_models_are_loaded_once_and_each_baseline_is_decoded_once(decodes, loads):
    assert sweep(TWO, "dataset.scenes=2") == 0
    assert loads == ["qwen2_5_vl/target", "qwen2_5_vl/plain"] and len(decodes) == 2
    assert sweep("ratio=0.5", "seed=3", "dataset.scenes=2", "baselines=sweep/baselines", folder="other") == 0
    assert len(decodes) == 2, "neither the ratio nor the seed is of any matter to a greedy baseline"
    found = [*jobs(Path("sweep")).values(), *jobs(Path("other")).values()]
    assert len(found) == 3 and len({str([row["baseline"] for row in rows_of(job)]) for job in found}) == 1


@pytest.mark.slow
def test_what_an_answer_or_its_times_depend_on_makes_another_baseline(decodes):
    target = shutil.copytree(model_folder("embedded:qwen2_5_vl/target"), Path("target"))
    first = [*ASK, "dataset.scenes=1", "max_new_tokens=4", f"target.path={target}", "baselines=kept"]
    changes = [["max_new_tokens=3"], ["dtype=bfloat16"], ["frames=6"], ["verifier=sampling", "verifier.temperature=0.7"],
               ["verifier=sampling", "verifier.temperature=0.7", "seed=1"]]  # fmt: skip
    for number, change in enumerate([[], *changes]):
        assert main([*first, *change, f"hydra.run.dir={number}"]) == 0
        assert len(decodes) == number + 1, change
    assert main([*first, "hydra.run.dir=again"]) == 0 and len(decodes) == len(changes) + 1
    weights = target / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # one bit of the last tensor
    weights.write_bytes(content)
    assert main([*first, "hydra.run.dir=changed"]) == 0 and len(decodes) == len(changes) + 2


@pytest.mark.slow
def test_no_sample_is_timed_while_a_step_is_captured(monkeypatch):
    """Jobs share caches: if two draft with models of different shapes, each finds its captured steps gone."""
    engine, spent = GraphsEngine("direct"), {"speculate": 0, "decode_alone": 0}
    monkeypatch.setattr("specvlm.app.model_cache.engine_for", lambda *_: engine)
    MODEL_CACHE.clear()

    def counted(name):
        real = getattr(answer, name)

        def timed(*args):
            before = engine.capture_s
            steps = list(real(*args))
            spent[name] += engine.capture_s > before
            return steps

        return timed

    for name in spent:
        monkeypatch.setattr(f"specvlm.app.job.{name}", counted(name))
    try:
        assert sweep("pruner=uniform", "drafter=tree,self", "dataset.scenes=3") == 0
    finally:
        MODEL_CACHE.clear()
    rows = [row for job in jobs(Path("sweep")).values() for row in rows_of(job)]
    assert spent == {"speculate": 0, "decode_alone": 0} and not any("capture" in row["times_s"] for row in rows)
    assert len(rows) == 6 and sum(row["capture_s"] > 0 for row in rows) == 4, "two behind themselves find all there"


@pytest.mark.slow
def test_what_captures_nothing_warms_up_once_a_job(monkeypatch):
    """However often other jobs change the caches: a warm-up takes as long as half a sample."""
    warmed, real = [], answer.warm_up
    monkeypatch.setattr("specvlm.app.job.warm_up", lambda *args: warmed.append(1) or real(*args))
    MODEL_CACHE.warm.clear()
    words = ["pruner=uniform", "drafter=tree,self", "dataset.scenes=3", "max_new_tokens=4"]
    assert sweep(*words) == 0
    assert len(warmed) == 3, "each once with its drafter, and once without"
    assert sweep(*words, folder="again") == 0
    assert len(warmed) == 3, "another sweep finds all of it warm"
    assert sweep(*words, "ratio=0.5", folder="other") == 0
    assert len(warmed) == 5, "what passes depend on is another"


@pytest.mark.slow
def test_ranks_warm_up_together(monkeypatch):
    """Otherwise one would wait for ever in an all-reduce."""
    asked, warmed, real = [], [], answer.warm_up
    MODEL_CACHE.warm.clear()

    def on_all(self, mine):
        asked.append(mine)
        return mine and len(asked) % 3 == 1  # of each sample the others: is another rank warm too, both ways? It is not

    monkeypatch.setattr(Job, "_all", on_all)
    monkeypatch.setattr("specvlm.app.job.warm_up", lambda *args: warmed.append(1) or real(*args))
    assert main([*ASK, "dataset.scenes=3", "hydra.run.dir=out"]) == 0
    assert asked == [True, False, False] + [True, True, True] * 2 and len(warmed) == 6


@pytest.mark.slow
def test_the_order_of_the_methods_moves_on_with_every_turn():
    assert sweep(THREE, "dataset.scenes=5", "turn=2", "baseline=false", "max_new_tokens=2") == 0
    orders = {name.rpartition("=")[2]: [row["order"] for row in rows_of(job)] for name, job in jobs(Path("sweep")).items()}
    assert orders == {"two_stage": [0, 0, 2, 2, 1], "uniform": [1, 1, 0, 0, 2], "random": [2, 2, 1, 1, 0]}


@pytest.mark.slow
def test_jobs_of_another_target_come_when_those_of_the_first_are_through(loads):
    pairs = "pair=embedded_qwen2_5_vl,embedded_llava_onevision,embedded_qwen2_5_vl_aware"
    assert sweep(pairs, "dataset.scenes=2", "baseline=false", "max_new_tokens=2") == 0
    one, other = "qwen2_5_vl", "llava_onevision"
    assert loads == [f"{one}/target", f"{one}/plain", f"{one}/aware", f"{other}/target", f"{other}/plain"]


# Going on


@pytest.mark.slow
def test_half_a_line_and_rounds_without_a_row_are_cut_off():
    words = [*ASK, "dataset.scenes=3", "max_new_tokens=8", "hydra.run.dir=out"]
    assert main(words) == 0
    folder, before = Path("out"), (untimed(rows_of(Path("out"))), untimed(steps_of(Path("out"))))
    samples, steps = folder / "samples.jsonl", folder / "steps.jsonl"
    lines = samples.read_bytes().splitlines(keepends=True)
    for left in (lines[0] + lines[1] + lines[2][:-1], lines[0] + lines[1] + lines[2][:40], lines[0][:1], b""):
        samples.write_bytes(left)
        done = left.count(b"\n")
        assert [row["index"] for row in rows_of(folder)] == list(range(done)) == [int(name[-1]) for name in steps_of(folder)]
        steps.write_bytes(steps.read_bytes() + b'{"sample": "scene-0002", "rou')
        assert main([*words, "resume=true"]) == 0
        assert (untimed(rows_of(folder)), untimed(steps_of(folder))) == before
        assert len(samples.read_text().splitlines()) == 3
        assert len(steps.read_text().splitlines()) == sum(map(len, before[1].values()))


@pytest.mark.slow
def test_rounds_of_a_shard_that_was_killed_do_not_count_where_another_answered():
    words = [*ASK, "dataset.scenes=2", "baseline=false", "hydra.run.dir=out"]
    assert main([*words, "shard=0/2"]) == 0
    before, samples = steps_of(Path("out")), Path("out/samples.0-of-2.jsonl")
    samples.write_bytes(b"")  # killed before the row: the rounds of scene 0 are there
    assert len(before["scene-0000"]) > 1 and main([*words, "resume=true"]) == 0
    found = steps_of(Path("out"))
    assert untimed({"scene-0000": found["scene-0000"]}) == untimed(before) and list(found) == ["scene-0000", "scene-0001"]
    assert all(len(found[row["sample"]]) == row["rounds"] + 1 for row in rows_of(Path("out")))


@pytest.mark.slow
def test_a_damaged_line_in_the_middle_is_named(capsys):
    finished("out", *PLAIN)
    lines = Path("out/samples.jsonl").read_text().splitlines(keepends=True)
    Path("out/samples.jsonl").write_text(lines[0][:50] + "\n" + lines[1])
    capsys.readouterr()
    assert main([*PLAIN, "resume=true", "hydra.run.dir=out"]) == 2
    assert "samples.jsonl, line 1: not a JSON object" in capsys.readouterr().err


DAMAGED = {
    "no row": ("samples.jsonl", '{"sample": "scene-0000"}\n', "has a line without sample, index or status"),
    "no object": ("samples.jsonl", "[1]\n", "samples.jsonl, line 1: not a JSON object"),
    "no round": ("steps.jsonl", '"x"\n', "steps.jsonl, line 1: not a JSON object"),
    "no YAML": ("config.yaml", "pruner: [", "config.yaml is not a configuration"),
    "no configuration": ("config.yaml", "- a", "config.yaml is not a configuration"),
    "nothing": ("config.yaml", None, "holds samples but no config.yaml"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_one_line(case, capsys):
    name, text, why = DAMAGED[case]
    finished("job", *TINY)
    Path("job", name).unlink()
    if text is not None:
        Path("job", name).write_text(text)
    capsys.readouterr()
    assert main([*TINY, "hydra.run.dir=job", "resume=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


@pytest.mark.slow
def test_a_folder_of_an_older_configuration_is_not_gone_on_with(capsys):
    words, path = [*TINY, "hydra.run.dir=job"], finished("job", *TINY) / "config.yaml"
    path.write_text(path.read_text().replace("record: false\n", "recorded: true\n"))
    assert main([*words, "resume=true"]) == 2
    assert "was made with recorded=True, this is without recorded: take" in capsys.readouterr().err
    path.write_text(path.read_text().replace("recorded: true\n", ""))
    assert main([*words, "resume=true"]) == 2
    assert "was made without record, this is record=False: take" in capsys.readouterr().err


def test_a_file_where_the_sweep_should_be_is_named(capsys):
    Path("file").write_text("")
    assert sweep("dataset.scenes=1", folder="file") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"'{Path.cwd()}/file'")


@pytest.mark.slow
def test_results_are_not_overwritten_nor_mixed(capsys):
    words = [*PLAIN, "hydra.run.dir=out"]
    finished("out", *PLAIN)
    before = Path("out/samples.jsonl").read_bytes()
    for more, why in (
        ([], "holds 2 samples already: give resume=true to continue"),
        (["resume=true", "ratio=0.5"], "was made with ratio=0.9, this is ratio=0.5"),
        (["resume=true", "dataset.first=3"], "was made with dataset.first=0, this is dataset.first=3"),
    ):
        capsys.readouterr()
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
    assert main(["hydra.run.dir=out", "max_new_tokens=2"]) == 2, "a single run does not take a job's folder"
    assert "holds the samples of a job" in capsys.readouterr().err
    assert Path("out/samples.jsonl").read_bytes() == before
    assert main(["hydra.run.dir=run", "max_new_tokens=2"]) == 0 and main([*PLAIN, "hydra.run.dir=run"]) == 2
    assert main([*words, "resume=true", "fail_fast=true", "turn=4"]) == 0, "these change no row"


def test_resume_wants_to_know_where(capsys):
    for line in (["-m", *ASK, "resume=true"], [*ASK, "resume=true"]):
        assert main(line) == 2
        assert "give hydra." in capsys.readouterr().err
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_a_sweep_that_grew_does_only_what_is_new(decodes):
    few = ["dataset.scenes=1", "max_new_tokens=3"]
    assert sweep("ratio=0.5,0.9", *few) == 0
    times = {name: rows_of(job) for name, job in jobs(Path("sweep")).items()}
    assert sweep("ratio=0.25,0.5,0.75,0.9", *few, "resume=true") == 0
    found = {name: rows_of(job) for name, job in jobs(Path("sweep")).items()}
    assert len(found) == 4 and found | times == found and len(decodes) == 1


# Several processes


@pytest.mark.slow
def test_what_is_held_and_used_again_counts_as_free_and_what_is_not_makes_room(monkeypatch, loads):
    def prepared(*words):
        cfg = compose([*ASK, "dataset.scenes=1", "prefixes=false", *words])
        setup = set_up(cfg, places_of(cfg))
        return setup, read(setup, SyntheticDataset(1).samples()[0])

    plain, aware = prepared(), prepared("pair=embedded_qwen2_5_vl_aware")
    request = MODEL_CACHE.plan(*plain)
    list(MODEL_CACHE.graph(request).decode(request.prompt, 4))
    (device,) = request.plans
    parts = request.plans[device].parts
    held = MODEL_CACHE.caches.bytes_on(device) + sum(model.bytes_on(device) for model in MODEL_CACHE.models.values())
    assert parts["target weights"] + parts["draft weights"] <= held < request.planned
    monkeypatch.setattr("specvlm.models.memory_plan.free_bytes", lambda _: request.planned - held)
    assert MODEL_CACHE.plan(*plain).planned == request.planned and len(MODEL_CACHE.models) == 2
    monkeypatch.setattr("specvlm.models.memory_plan.free_bytes", lambda _: request.planned - held - 1)
    with pytest.raises(UserError, match="the run needs about"):
        MODEL_CACHE.plan(*plain)
    monkeypatch.setattr("specvlm.models.memory_plan.free_bytes", lambda _: request.planned)
    MODEL_CACHE.graph(MODEL_CACHE.plan(*aware))
    assert len(MODEL_CACHE.models) == 3, "there is room for two drafts"
    monkeypatch.setattr("specvlm.models.memory_plan.free_bytes", lambda _: 0)
    with pytest.raises(UserError, match="the run needs about"):
        MODEL_CACHE.plan(*aware)
    assert len(MODEL_CACHE.models) == 2, "the other draft made room"
    assert loads == ["qwen2_5_vl/target", "qwen2_5_vl/plain", "qwen2_5_vl/aware"]


def test_what_a_baseline_depends_on_is_in_its_key():
    cfg = compose([*ASK, "dataset.scenes=1", "prefixes=false"])
    setup = set_up(cfg, places_of(cfg))
    request = MODEL_CACHE.plan(setup, read(setup, SyntheticDataset(1).samples()[0]))
    graph = MODEL_CACHE.graph(request)
    first = inputs(request, graph, 0)
    graph.target.repetition_penalty = 1.2
    assert inputs(request, graph, 0) != first
    graph = MODEL_CACHE.graph(request)
    with threads(torch.get_num_threads() + 1):
        assert inputs(request, graph, 0) != first
    loose, sampling = (replace(graph, verifier=registry.build("verifier", name)) for name in ("loose", "sampling"))
    assert inputs(request, loose, 0) == first, "it is plain decoding's, whatever rule it is compared with"
    seeded = replace(graph.options, seed=5)
    assert inputs(request, replace(graph, options=replace(seeded, ratio=0.1)), 0) == first
    drawn = inputs(request, sampling, 0)
    assert drawn != first and inputs(request, replace(sampling, options=seeded), 0) != drawn
    assert inputs(request, graph, 1) != first, "other weights"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(graph.target), "version", "other")
        assert inputs(request, graph, 0) != first, "another version of the family"
    request.prompt.videos[0]["pixels"][0, 0] += 1
    assert inputs(request, graph, 0) != first


def test_a_baselines_key_tells_a_video_from_an_image_in_the_same_slots():
    """In a family whose videos and images have one slot token, the tokens may be equal."""
    lm, ids = tiny.model("qwen3_vl"), torch.tensor([5, tiny.IMAGE, tiny.IMAGE, 6])
    (grid, video), first, second = lm.tiny_video(1, torch.Generator()), torch.tensor([1]), torch.tensor([2])
    grid, image = replace(grid, height=1, width=1), {"pixels": video["pixels"], "tokens": 1}
    prompts = [VideoPrompt(ids, a, (grid,), (video,), (image,), b) for a, b in ((first, second), (second, first))]
    assert len({baselines.digest(prompt) for prompt in prompts}) == 2


def test_a_baselines_key_has_the_code_of_prompts_and_features(monkeypatch):
    read, of = set[str](), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(f"{path.parent.name}/{path.name}") or of(path))
    baselines.revision.__wrapped__()
    assert {"types/video.py", "types/features.py", "models/video_lm.py", "engine/lean.py"} <= read


@pytest.mark.slow
def test_a_second_process_is_refused_in_one_line(capsys):
    whole("sweep")
    job = next(iter(jobs(Path("sweep")).values()))
    with FileLock(job / ".samples.jsonl.lock"):
        for more in ([], ["shard=0/2"]):
            capsys.readouterr()
            assert sweep(*WHOLE, "resume=true", *more) == 2
            captured = capsys.readouterr()
            assert "another process writes into" in captured.err and captured.err.count("\n") == 1
            assert "kept" not in captured.out, "there is no table of what is another's"
    assert sweep(*WHOLE, "resume=true") == 0


@pytest.mark.slow
def test_a_sample_that_is_answered_counts_wherever_it_failed_before():
    job = next(iter(jobs(whole("sweep")).values()))
    lines = (job / "samples.jsonl").read_text().splitlines()
    failed = json.loads(lines[0]) | {"status": "failed", "reason": "a broken video"}
    (job / "samples.jsonl").write_text("\n".join([json.dumps(failed), *lines[1:]]) + "\n")
    (job / "steps.jsonl").write_text("")
    assert sweep(*WHOLE, "resume=true", "shard=0/2") == 0
    assert [row["status"] for row in rows_of(job)] == ["ok"] * 3 and rows_of(job)[0]["sample"] in steps_of(job)


@pytest.mark.slow
def test_shards_of_two_configurations_are_not_mixed_before_there_are_rows(capsys):
    def cfg(ratio: float, shard: str):
        return compose([*ASK, f"ratio={ratio}", f"shard={shard}"])

    first = Rows(cfg(0.9, "0/2"), Path("job"), (0, 2))
    with pytest.raises(UserError, match="made with ratio=0.9"):
        Rows(cfg(0.5, "1/2"), Path("job"), (1, 2))
    Rows(cfg(0.9, "1/2"), Path("job"), (1, 2)).close()
    first.close()
    Rows(cfg(0.5, "1/2"), Path("job"), (1, 2)).close()  # nothing was done, and nobody is at it


@pytest.mark.slow
def test_two_processes_at_once_leave_the_rows_of_one():
    both = [start(["-m", *ASK, *WHOLE, "hydra.sweep.dir=sweep", "resume=true"]) for _ in range(2)]
    codes = sorted(map(end, both))
    assert codes in ([0, 2], [2, 2]) or codes == [0, 0]
    if codes == [2, 2]:  # each had a folder first
        assert sweep(*WHOLE, "resume=true") == 0
    assert table(Path("sweep")) == table(whole())


@pytest.mark.slow
def test_shards_make_the_table_of_one_process(capsys):
    alone = whole("alone")
    undisturbed = table(alone)
    both = [start(["-m", *ASK, *WHOLE, "hydra.sweep.dir=shards", f"shard={number}/2"]) for number in (0, 1)]
    assert [end(pid) for pid in both] == [0, 0], Path("log.txt").read_text()
    assert table(Path("shards")) == undisturbed
    assert sweep(*WHOLE, "shard=0/2,1/2", folder="swept") == 0 and table(Path("swept")) == undisturbed
    for one, parts in zip(jobs(alone).values(), jobs(Path("shards")).values(), strict=True):
        assert len(list(parts.glob("samples.*-of-2.jsonl"))) == 2 and not (parts / "samples.jsonl").exists()
        assert untimed(summary_of(parts)) == untimed(summary_of(one)) and summary_of(parts)["status"] == "complete"
    assert sweep(*WHOLE, "resume=true", folder="shards") == 0 and table(Path("shards")) == undisturbed


@pytest.mark.slow
def test_who_comes_while_a_baseline_is_decoded_waits_for_it(tmp_path, decodes):
    words = [*ASK, "dataset.scenes=2", "baselines=kept"]
    both = [start([*words, f"ratio={ratio}", f"hydra.run.dir={ratio}"]) for ratio in (0.5, 0.9)]
    assert [end(pid) for pid in both] == [0, 0], Path("log.txt").read_text()
    assert [path.suffix for path in Path("kept").iterdir()] == [".json"] * 2
    one, two = (rows_of(Path(ratio)) for ratio in ("0.5", "0.9"))
    assert [row["baseline_decode_s"] for row in one] == [row["baseline_decode_s"] for row in two]


@pytest.mark.slow
def test_two_workers_of_a_launcher_make_the_table_of_one_process():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    whole()
    assert sweep(*WHOLE, "hydra/launcher=workers", "shard=0/2,1/2", folder="workers") == 0
    assert unordered("workers") == unordered("whole")


def unordered(folder):
    """The table of a sweep whose workers have one job at a time."""
    return {name: ([row | {"order": 0} for row in rows], steps) for name, (rows, steps) in table(Path(folder)).items()}


@pytest.mark.slow
def test_jobs_on_a_ray_cluster_make_the_table_of_one_process_and_resume():
    for name in ("ray", "hydra_plugins.hydra_ray_launcher"):
        pytest.importorskip(name, reason="needs pip install 'specvlm[ray]', then pip install --no-deps hydra-ray-launcher")
    whole()
    cluster = ["hydra.launcher.ray.init.num_cpus=2", "hydra.launcher.ray.remote.num_gpus=0"]
    words = [*ASK, *WHOLE, "hydra/launcher=ray", *cluster, "shard=0/2,1/2", "hydra.sweep.dir=rays"]
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "OMP_NUM_THREADS": "1"}
    env = os.environ | own | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for more in ([], ["resume=true"]):
        command = [sys.executable, "-m", "specvlm", "-m", *words, *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert unordered("rays") == unordered("whole")
        assert done.stdout.count("3/3") >= 2


def test_one_line_says_how_to_install_the_launcher_of_ray(monkeypatch, capsys):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert sweep("pruner=uniform,random", "hydra/launcher=ray") == 2
    how = 'pip install "specvlm[ray]", then pip install --no-deps hydra-ray-launcher'
    assert capsys.readouterr().err == f"specvlm: hydra/launcher=ray is not installed: {how}\n" and not Path("sweep").exists()


@pytest.mark.slow
def test_ranks_that_share_a_target_answer_a_data_set(tmp_path):
    words = [*ASK, "dataset.scenes=2", "pair=embedded_llava_onevision"]
    assert main([*words, "hydra.run.dir=one"]) == 0
    for more in ([], ["resume=true"]):
        line = [*words, "target.parallel=tensor", "hydra.run.dir=two", *more]
        done = forked.ranks(partial(main, line), tmp_path, 300)
        assert done.codes == (0, 0), done.err
        assert [row["token_ids"] for row in rows_of(Path("two"))] == [row["token_ids"] for row in rows_of(Path("one"))]
        assert {(row["verdict"], row["devices"]) for row in rows_of(Path("two"))} == {("identical", 2)}


# What goes wrong


@pytest.mark.slow
def test_a_broken_video_and_a_plugin_that_raises_leave_the_rest_intact(wrong, capfd):
    words = [
        "-m",
        "dataset=broken",
        "pruner=uniform,raising,two_stage",
        "frames=4",
        "max_new_tokens=6",
        "hydra.sweep.dir=sweep",
    ]
    assert main(words) == 5
    good, bad = jobs(Path("sweep"))["dataset=broken,frames=4,max_new_tokens=6,pruner=two_stage"], None
    for name, job in jobs(Path("sweep")).items():
        rows = rows_of(job)
        fails = name.endswith("raising")
        assert [row["status"] for row in rows] == (
            ["failed", "failed", "skipped", "failed"] if fails else ["ok", "failed", "skipped", "ok"]
        )
        assert "is truncated" in rows[1]["reason"] and "no such file" in rows[2]["reason"]
        assert set(rows[0]) == set(rows[1]) and rows[1]["verdict"] is None
        assert sorted(steps_of(job)) == ([] if fails else ["s0", "s3"])
        bad = job if fails else bad
    assert rows_of(bad)[0]["reason"] == "ZeroDivisionError: the pruner divides by zero (in pruner=raising)"
    assert (bad / "steps.jsonl").read_text() == "", "rounds of a sample that failed do not stay"
    captured = capfd.readouterr()
    assert captured.err.count("Traceback") == 1 and "s0 of pruner=raising fails" in captured.err
    line = next(line for line in captured.out.splitlines() if line.startswith("pruner=raising") and "0/4" in line)
    assert line.split()[-2:] == ["3", "1"]
    assert "pruner=raising: s0: ZeroDivisionError: the pruner divides by zero" in captured.out
    before = rows_of(good)
    shutil.copy(Path("videos/cut.mp4"), "videos/missing.mp4")
    assert main([*words, "resume=true"]) == 5
    assert rows_of(good)[0] == before[0] and rows_of(good)[2]["status"] == "failed", "what was skipped is tried again"


@pytest.mark.slow
def test_a_job_that_cannot_begin_is_named_and_the_others_are_done(capfd):
    few = ["dataset.scenes=1", "max_new_tokens=3", "draft.path=nowhere"]
    assert sweep("drafter=tree,prompt_lookup", *few) == 2
    captured = capfd.readouterr()
    assert "nowhere: no such model folder" in captured.err and "drafter=tree: nowhere: no such model folder" in captured.out
    states = {
        name.rpartition("drafter=")[2].partition(",")[0]: summary_of(job)["status"] for name, job in jobs(Path("sweep")).items()
    }
    assert states == {"tree": "failed", "prompt_lookup": "complete"}
    shutil.copytree(model_folder("embedded:qwen2_5_vl/plain"), "nowhere")
    assert sweep("drafter=tree,prompt_lookup", *few, "resume=true") == 0


@pytest.mark.slow
def test_a_job_that_differs_from_no_other_is_called_after_its_data_set(capsys):
    assert sweep("dataset.scenes=1", "draft.path=nowhere") == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["synthetic", "-", "failed"] for line in lines)
    assert any(line.startswith("synthetic: nowhere: no such model folder") for line in lines)


@pytest.mark.slow
def test_weights_that_cannot_be_loaded_fail_the_job_and_not_each_sample(capfd):
    shutil.copytree(model_folder("embedded:qwen2_5_vl/plain"), "plain")
    Path("plain/model.safetensors").unlink()
    assert sweep("drafter=tree,prompt_lookup", "dataset.scenes=3", "max_new_tokens=3", "draft.path=plain") == 2
    captured = capfd.readouterr()
    assert captured.err.count("no *.safetensors weights") == 1
    found = [summary_of(job) for name, job in jobs(Path("sweep")).items()]
    assert sorted(summary["status"] for summary in found) == ["complete", "failed"]
    assert next(s for s in found if s["status"] == "failed")["missing"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("words", [["dataset=broken", "frames=4"], ["dataset=synthetic", "pruner=raising,uniform", "frames=4"]])
def test_fail_fast_ends_at_the_first_failure(wrong, words):
    assert main(["-m", *words, "max_new_tokens=3", "fail_fast=true", "hydra.sweep.dir=sweep"]) == 5
    rows = [row for job in jobs(Path("sweep")).values() for row in rows_of(job)]
    assert [row["status"] for row in rows][-1] == "failed" and len(rows) <= 2


@pytest.mark.slow
def test_fail_fast_holds_for_single_runs_too():
    assert main(["-m", "video=nowhere.mp4,synthetic_1", "max_new_tokens=2", "hydra.sweep.dir=a"]) == 2
    assert len(list(Path("a").glob("*/summary.json"))) == 1
    assert main(["-m", "video=nowhere.mp4,synthetic_1", "max_new_tokens=2", "hydra.sweep.dir=b", "fail_fast=true"]) == 2
    assert not list(Path("b").glob("*/summary.json"))


@pytest.mark.slow
def test_a_mismatch_sets_the_exit_code_and_stands_in_the_table(monkeypatch, capsys):
    from specvlm.decoding.loop import Output

    take = Output.take
    monkeypatch.setattr(Output, "take", lambda self, tokens: take(self, [5 if len(tokens) > 1 else token for token in tokens]))
    assert sweep(TWO, "dataset.scenes=2", "max_new_tokens=8") == 1
    assert "2 MISMATCH" in capsys.readouterr().out
    (row, *_) = rows_of(next(iter(jobs(Path("sweep")).values())))
    assert row["verdict"].startswith("MISMATCH at token") and row["difference"]["candidates"]


@pytest.mark.slow
def test_a_mismatch_is_the_worst_news(wrong, monkeypatch, capfd):
    """In a job with a failing sample, in a sweep with a failing job, and in one that ends at the first failure."""
    from specvlm.decoding.loop import Output

    take = Output.take
    monkeypatch.setattr(Output, "take", lambda self, tokens: take(self, [5 if len(tokens) > 1 else token for token in tokens]))
    assert main(["dataset=broken", "frames=4", "max_new_tokens=8", "hydra.run.dir=job"]) == 1
    assert summary_of(Path("job"))["verdicts"] == {"MISMATCH": 2} and summary_of(Path("job"))["failed"] == 1
    few = ["dataset.scenes=1", "pruner=uniform", "max_new_tokens=8"]
    assert sweep("drafter=tree,prompt_lookup,self", "draft.path=nowhere", *few) == 1
    assert sweep("pruner=raising,uniform", "dataset.scenes=1", folder="faults") == 1
    assert sweep("pruner=raising", "dataset.scenes=1", folder="fails") == 5
    assert [worst(codes) for codes in ([], [0, 5, 2], [3, 1, 5], [1, 0])] == [0, 5, 1, 1]


@pytest.mark.slow
def test_a_mismatch_of_a_workers_job_is_not_hidden_by_one_that_failed_before(wrong):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    words = ["dataset.scenes=1", "hydra/launcher=workers", "pruner=uniform", "drafter=tree,self", "draft.path=nowhere"]
    assert sweep(*words) == 2
    (job,) = (job for job in jobs(Path("sweep")).values() if rows_of(job))
    (row,) = rows_of(job)
    Path(job / "samples.jsonl").write_text(json.dumps(row | {"verdict": "MISMATCH at token 3: made up"}) + "\n")
    assert sweep(*words, "resume=true") == 1


@pytest.mark.slow
def test_a_tie_has_its_control(monkeypatch):
    monkeypatch.setattr("specvlm.app.request.lossless.compare", lambda *_: Comparison("tie", 3, 0.01, 0.02, "", (5, 6), -0.01))
    assert main([*ASK, "dataset.scenes=1", "hydra.run.dir=out"]) == 0
    (row,) = rows_of(Path("out"))
    assert row["verdict"] == "numeric tie at token 3 (gap 0.01)" and row["difference"]["control"] is True
    assert len(row["difference"]["candidate_texts"]) == 2 and row["difference"]["gap_many_rows"] == -0.01
    assert summary_of(Path("out"))["verdicts"] == {"numeric tie": 1}


@pytest.mark.slow
def test_a_target_that_does_not_repeat_itself_has_no_ties(monkeypatch):
    def compare(*_):
        monkeypatch.setattr("specvlm.app.request.alone", lambda *_: iter([Step((1,))]))
        return Comparison("tie", 3, 0.01, 0.02, "", (5, 6), -0.01)

    monkeypatch.setattr("specvlm.app.request.lossless.compare", compare)
    assert main([*ASK, "dataset.scenes=1", "hydra.run.dir=out"]) == 1
    (row,) = rows_of(Path("out"))
    assert row["verdict"] == "MISMATCH at token 3: the target alone, decoded again, gives another output"
    assert row["difference"]["control"] is False


@pytest.mark.slow
def test_a_disk_that_is_too_small_or_not_to_be_written_is_found_before_weights_are_loaded(monkeypatch, capfd):
    def load(*_, **__):
        raise AssertionError("loaded")

    MODEL_CACHE.clear()
    monkeypatch.setattr("specvlm.app.model_cache.load", load)
    Path("file").write_text("")
    for words in (["hydra.sweep.dir=file/x"], ["baselines=file/x", "hydra.sweep.dir=sweep"]):
        assert main(["-m", *ASK, "ratio=0.5,0.9", *words]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "Not a directory" in error
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("specvlm.results.rows.shutil.disk_usage", lambda path: usage._replace(free=2**20))
    assert sweep("ratio=0.5,0.9") == 2
    error = capfd.readouterr().err
    assert "has 1 MiB left, but results may take" in error and error.count("\n") == 1


def test_shards_that_look_for_room_at_once_do_not_see_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: room(tmp_path / "baselines", 1, 1), range(400)))
    assert not list((tmp_path / "baselines").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_one_line(capfd):
    Path("mine").mkdir(mode=0o500)
    assert sweep(THREE, folder="mine") == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_sweep_and_loses_nothing(monkeypatch, capfd):
    undisturbed, real, calls = table(whole()), os.fsync, []

    def fsync(file):
        calls.append(1)
        if len(calls) == 6:  # of the third row
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert sweep(*WHOLE) == 2
    error = capfd.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    assert sum(len(rows_of(job)) for job in jobs(Path("sweep")).values()) == 2
    assert sweep(*WHOLE, "resume=true") == 0 and table(Path("sweep")) == undisturbed


@pytest.mark.slow
def test_out_of_memory_of_a_sample_fails_it_alone(monkeypatch):
    real, seen = answer.decode_alone, []

    def full(*args):
        seen.append(1)
        return real(*args[:3], nothing_left if len(seen) == 2 else args[3])

    def nothing_left():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("specvlm.app.job.decode_alone", full)
    assert main([*ASK, "dataset.scenes=3", "hydra.run.dir=out"]) == 5
    rows = rows_of(Path("out"))
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["out_of_memory"] == "decoding without a drafter" and "ran out of memory while" in rows[1]["reason"]


@pytest.mark.slow
def test_an_interrupted_sweep_tells_what_is_there(monkeypatch, capsys):
    real = Baselines.get
    calls = []

    def get(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Baselines, "get", get)
    assert sweep(THREE, "dataset.scenes=2") == 130
    shown, folder = capsys.readouterr().out, Path("sweep").absolute()
    assert "1/2" in shown and f"written to {folder}\n" in shown
    assert f"with resume=true hydra.sweep.dir={folder} to continue" in shown
    assert {summary_of(job)["status"] for job in jobs(Path("sweep")).values()} == {"incomplete"}


# Names and presets


def test_folders_are_called_after_what_makes_a_job_what_it_is():
    same = {
        folder_name(words) for words in (["ratio=0.5", "pruner=none"], ["pruner=none", "resume=true", "ratio=0.5", "shard=1/2"])
    }
    assert same == {"pruner=none,ratio=0.5"}
    names = {folder_name([f"target.path={path}"]) for path in ("/a/b", "/a-b", "../a/b", "x" * 400, "x" * 401)}
    assert len(names) == 5 and all("/" not in name and len(name) < 200 for name in names)
    assert folder_name([]) == "job"
    assert split_shared(["a=1 b=2", "a=1 b=3"]) == (["b=2", "b=3"], "a=1") and split_shared(["a=1"]) == ([""], "a=1")


REWRITTEN = [["baseline=false", "ratio=0.90"], ["repetition_penalty=1.0", "draft.path='a, b'"], ["drafter.shape=4x2"]]


@pytest.mark.slow
@pytest.mark.parametrize("words", REWRITTEN, ids=str)
def test_the_folder_that_was_planned_is_the_one_that_is_written(words, monkeypatch):
    """Hydra rewrites values: it passes on false as False."""
    found = []

    def add(self, cfg, folder, _):
        found.append((folder, folder in self.labels))
        return 0

    monkeypatch.setattr("specvlm.app.sweep.Sweep.add", add)
    assert sweep("drafter=tree", "pruner=uniform,random", *words, "max_new_tokens=4") == 0
    assert len({folder for folder, _ in found}) == 2 and all(there for _, there in found), found


@pytest.mark.slow
def test_a_sweep_whose_folder_is_called_after_the_time_has_one_folder(capsys):
    """Each job's configuration resolves the time anew; the sweep does so once."""
    assert main(["-m", *ASK, THREE, "dataset.scenes=1"]) == 0
    table = capsys.readouterr().out.partition("\njob ")[2]
    assert table.count("1/1") == table.count("identical") == 3 and "never" not in table
    assert f"written to {Path.cwd() / 'multirun'}" in table and "resume" not in table


@pytest.mark.slow
def test_shapes_of_trees_have_folders_of_their_own():
    shapes = ["-m", "drafter=tree", "drafter.shape=paper,chain:5,'[[0],[1]]'", *ASK]
    folders = {job.folder for job in planned(shapes[1:], sweep=True)}
    assert len(folders) == 3


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["main_table", "ratio_by_pruner", "stage_one_mass", "positions", "tree_shapes", "frames"])
def test_every_ablation_runs(preset, monkeypatch):
    """For ratio_by_pruner, whose 28 jobs test_conf.py composes, every pruner at three of the seven ratios; frames for one."""
    few = ["dataset.scenes=1", "dataset.ask=question", "max_new_tokens=4"]
    few += ["pruner=two_stage" if preset == "frames" else "frames=4"]
    few += ["ratio=0,0.5,1"] if preset == "ratio_by_pruner" else []
    plan, checked = [], composing.jobs_of
    monkeypatch.setattr(composing, "jobs_of", lambda configs: plan.extend(checked(configs)) or plan)
    assert main(["-m", f"experiment={preset}", *few, "hydra.sweep.dir=sweep"]) == 0
    found = [summary_of(job) for job in jobs(Path("sweep")).values()]
    assert len(found) == len(plan) > 1 and all(one["ok"] == 1 for one in found)
    assert len(list(Path("sweep/baselines").iterdir())) == (4 if preset == "frames" else 1)


@pytest.mark.parametrize("word", ["video=synthetic_2", "question=Why?", "+question='a, b'"])
@pytest.mark.parametrize("sweeping", [["-m", "pruner=uniform,random"], []], ids=["sweep", "job"])
def test_what_a_single_run_is_asked_is_refused_beside_a_data_set(word, sweeping, capsys):
    assert main([*sweeping, *ASK, word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not go with dataset=synthetic" in line and "dataset=folder" in line and list(Path().iterdir()) == []


@pytest.mark.parametrize("word", ["resume=true", "shard=0/2", "tracker=wandb"])
def test_what_needs_a_data_set_is_refused_without_one(word, capsys):
    assert main([word, "hydra.run.dir=out"]) == 2
    assert "give dataset=…, or leave it out" in capsys.readouterr().err and list(Path().iterdir()) == []


@pytest.mark.parametrize("word", ["shard=4/4", "shard=1", "shard=a/b", "turn=0", "resume=maybe"])
def test_bad_words_are_one_line(word, capsys):
    assert main([*ASK, word]) == 2
    assert word.partition("=")[0] in capsys.readouterr().err and list(Path().iterdir()) == []
