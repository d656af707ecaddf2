"""`batch=4`: samples that are decoded together have the answers and the acceptance that they have alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sweeping
import torch
from sweeping import ASK

from specvlm.__main__ import main
from specvlm.app import prepare, together
from specvlm.app.compose import compose
from specvlm.app.placement import places_of
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine.batch import bytes_for
from specvlm.errors import ExitCode
from specvlm.models.memory_plan import JOINED, kv_bytes
from specvlm.results.metrics import OF_ONE_REQUEST, SPANS
from specvlm.results.rows import rows_of, steps_of, summary_of
from specvlm.strategies import registry

WORDS = [*ASK, "dataset.scenes=5", "dtype=float32", "drafter=tree"]
SIDES = ("target", "draft")
OTHER = {*OF_ONE_REQUEST, *(f"speedup_{span}" for span in SPANS), "times_s", "batch", "peak_memory_bytes", "baseline"}
OTHER |= {f"baseline_{span}_s" for span in (*SPANS, "file_to_first_token")}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def joined(monkeypatch):
    """Number of requests that each scheduler of a batch was given."""
    counts = []

    class Counted(Scheduler):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            counts.append(0)

        def submit(self, *given):
            counts[-1] += 1
            return super().submit(*given)

    monkeypatch.setattr(together, "Scheduler", Counted)
    return counts


def answers(folder: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in OTHER} for row in rows_of(Path(folder))]


def rounds(folder: str) -> list[tuple]:
    return [(line["sample"], line["tokens"], line["accepted"]) for lines in steps_of(Path(folder)).values() for line in lines]


@pytest.mark.slow
def test_samples_decoded_together_have_the_rows_that_they_have_alone_but_no_speeds_of_one_request(joined):
    assert main([*WORDS, "hydra.run.dir=alone"]) == 0 and not joined
    assert main([*WORDS, "batch=4", "hydra.run.dir=four"]) == 0
    assert joined == [4] and answers("four") == answers("alone") and rounds("four") == rounds("alone")
    for row in rows_of(Path("four")):
        assert row["batch"] == 4 and list(row["times_s"]) == ["video"] and row["peak_memory_bytes"] > 0
        assert all(row[key] is None for key in (*OF_ONE_REQUEST, *(f"speedup_{span}" for span in SPANS)))
        assert row["baseline_decode_s"] > 0 and row["verdict"] == "identical"
    one, four = (summary_of(Path(folder)) for folder in ("alone", "four"))
    assert (one["batch"], four["batch"]) == (1, 4) and four["speedup_decode"] is None and one["speedup_decode"] > 0
    for key in ("accepted_per_round", "acceptance_by_depth", "scores", "verdicts", "ok"):
        assert one[key] == four[key]


@pytest.mark.slow
def test_an_interrupted_job_goes_on_with_what_is_left_and_does_not_change_its_batch(joined, capsys):
    words = [*WORDS, "baseline=false", "batch=3", "hydra.run.dir=out"]
    assert main(words) == 0 and joined == [3, 2]
    whole, path = answers("out"), Path("out/samples.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[3])
    assert main([*words, "resume=true"]) == 0
    assert joined == [3, 2, 2] and answers("out") == whole
    capsys.readouterr()
    assert main([*words, "batch=2", "resume=true"]) == 2
    assert "was made with batch=3, this is batch=2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sample_that_fails_or_is_missing_hurts_no_other(monkeypatch, joined):
    sweeping.install(monkeypatch)
    sweeping.videos(Path("videos"))
    try:
        words = ["dataset=broken", "frames=4", "max_new_tokens=6", "baseline=false", "dtype=float32"]
        assert main([*words, "hydra.run.dir=alone"]) == main([*words, "batch=4", "hydra.run.dir=four"]) == ExitCode.FAILED
        assert joined == [2] and answers("four") == answers("alone")
        assert [row["status"] for row in answers("four")] == ["ok", "failed", "skipped", "ok"]
        assert main([*words, "pruner=raising", "batch=4", "hydra.run.dir=raising"]) == ExitCode.FAILED
        assert all("divides by zero" in row["reason"] for row in answers("raising") if row["sample"] in ("s0", "s3"))
    finally:
        sweeping.uninstall()


@pytest.mark.slow
def test_a_sample_that_runs_out_of_memory_in_company_is_decoded_again_alone(monkeypatch):
    words = [*WORDS, "baseline=false", "hydra.run.dir=out"]
    decode = together.decoded_together

    def full(graph, requests):
        tickets = decode(graph, requests)
        first = next(iter(tickets.values()))
        first.error = torch.OutOfMemoryError("no memory left")
        first.steps.pop()
        return tickets

    monkeypatch.setattr(together, "decoded_together", full)
    assert main([*words, "batch=5"]) == 0
    assert [row["status"] for row in rows_of(Path("out"))] == ["ok"] * 5
    lines = [json.loads(line) for line in Path("out/steps.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["sample"] == "scene-0000"] == list(
        range(rows_of(Path("out"))[0]["rounds"] + 1)
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch=4"], "batch=4 decodes together the samples of a data set: give dataset=…"),
        ([*ASK, "batch=4", "target.parallel=tensor"], "batch=4 cannot be combined with target.parallel=tensor yet"),
        ([*ASK, "batch=0"], "batch"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_in_one_line(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(("captured", "batch"), [(True, 4), (True, 1), (False, 4)])
def test_joined_passes_are_planned_and_leave_less_room_for_caches(captured, batch, monkeypatch):
    monkeypatch.setattr(prepare, "captures_on", lambda *_: captured)
    cfg = compose([*WORDS, f"batch={batch}"])
    setup = prepare.set_up(cfg, places_of(cfg))
    (sample, *_) = registry.build("dataset", cfg.dataset).samples()
    request = prepare.plan(setup, prepare.read(setup, sample))
    (plan,) = request.plans.values()
    planned = captured and batch > 1
    assert (JOINED in plan.parts) is planned
    if planned:
        models = (setup.target, setup.draft)
        slots = [plan.parts[f"{side} KV cache"] // kv_bytes(m, 1, torch.float32) for side, m in zip(SIDES, models, strict=True)]
        most = sum(bytes_for(m, count, torch.float32) for m, count in zip(models, slots, strict=True))
        assert 0.9 * most < plan.parts[JOINED] <= most
    monkeypatch.setattr(together.memory_plan, "free_bytes", lambda device: 10**9)
    room = together.room_beside(request, setup.graph())
    assert 10**9 - room == plan.parts["activations (estimate)"] + plan.parts.get(JOINED, 0) + plan.parts.get(prepare.KEPT, 0)
