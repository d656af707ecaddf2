"""The exactness experiment on the CPU: planted guesses are accepted, faults are seen, the page has the rows' table."""

from __future__ import annotations

import json
import random

import pytest
import tiny
import torch

from experiments.exactness import answers, decodes, nodes, report
from experiments.gpu_pair.models import wrap_of
from experiments.gpu_pair.shapes import build, pair_of
from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.models.kv_cache import CachePool
from specvlm.results.metrics import tokens_of
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions


def small(dtype: torch.dtype = torch.float64):
    shape = pair_of("tiny").target
    return build(shape, wrap_of(shape.family), torch.device("cpu"), dtype)


def test_caches_of_any_capacity_hold_the_same_rows():
    lm = small()
    few, many = lm.new_cache(1100), lm.new_cache(2900)
    nodes.fill(few)
    nodes.fill(many)
    pairs = zip(nodes.tensors_of(few), nodes.tensors_of(many), strict=True)
    assert all(torch.equal(a, b[:, :, :, :1100]) and a.std() > 0.9 for a, b in pairs)


@torch.no_grad()
def test_nodes_are_those_of_sequential_steps_in_float64(monkeypatch):
    """Equal but for rounding, also where a tree begins in the slots of an earlier one; a wrong position is not."""
    lm, near = small(), lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-9)
    monkeypatch.setattr(torch, "equal", near)
    found = nodes.measure(lm, "ours", 700, 60)
    assert found["bits"] == found["argmax"] == found["nodes"] >= 60 and found["trees"] > 1
    theirs, attention = nodes.measure(lm, "sdpa", 700, 20), lm.hf.config.get_text_config()._attn_implementation
    assert theirs["bits"] == theirs["nodes"] >= 20 and attention == "specvlm"  # as it was
    real = nodes._lean
    monkeypatch.setattr(nodes, "_lean", lambda lean, tree, cache, base, by: real(lean, tree, cache, base - (len(tree) > 1), by))
    assert nodes.measure(lm, "ours", 700, 60)["bits"] < 30


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_planted_guesses_are_accepted_and_change_no_token(family):
    found = [decodes.compare(tiny.model(family), tiny.prompt(family), Engine(), CachePool(), 40, seed) for seed in range(4)]
    assert all(one["first"] is None and one["tokens"] == 40 for one in found)
    assert 1 < sum(one["accepted"] for one in found) / sum(one["rounds"] for one in found) < 3


@torch.no_grad()
def test_guesses_are_planted_on_all_branches_and_only_of_the_known_answer():
    lm, prompt = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    paths = set()
    for known in (True, False):
        options = GenerationOptions(max_new_tokens=40, stop_ids=frozenset())
        plain = tuple(tokens_of(list(decodes.autoregressive(lm, prompt, options, GreedyVerifier()))))
        answer = plain if known else tuple((token + 1) % lm.vocabulary for token in plain)
        drafter = decodes.PlantedDrafter(answer, 1)
        taken = list(DecodingGraph(lm, None, UniformPruner(), drafter, GreedyVerifier(), options).decode(prompt))
        assert tuple(tokens_of(taken)) == plain
        if known:
            paths = {step.verdict.path for step in taken[1:]}
        else:
            assert sum(step.accepted for step in taken[1:]) <= 3  # by chance
    assert any(path[1] > 1 for path in paths if len(path) > 1) and max(map(len, paths)) > 3


def test_a_random_head_has_close_logits():
    """Its two best logits are within a tenth of the spread of all, for some rows: rounding changes the best token."""
    lm = small()
    decodes.use_random_head(lm)
    rows = torch.randn(200, lm.text.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    best = lm.head(rows).topk(2).values
    assert ((best[:, 0] - best[:, 1]) < 0.1 * lm.head(rows).std()).float().mean() > 0.1


def test_jobs_cover_each_sample_once(tmp_path):
    lines = [json.dumps({"id": str(n), "video": "a.mp4", "question": "what?"}) for n in range(30)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.mp4").write_bytes(b"x")
    found = [(family, source, n) for family, source, numbers in answers.jobs(10, tmp_path) for n in numbers]
    assert len(found) == len(set(found)) == 3 * (10 + 30)


def test_random_trees_are_trees():
    for seed in range(50):
        parents = nodes.random_parents(random.Random(seed), 64)
        assert len(parents) == 64 and all(-1 <= parent < node for node, parent in enumerate(parents))


def test_the_page_has_the_table_of_the_committed_rows(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text(report.PAGE.read_text())
    monkeypatch.setattr(report, "PAGE", page)
    assert report.write() == 0
    assert page.read_text() == (report.ROWS.with_name("README.md")).read_text()


def test_a_difference_is_no_agreement():
    rows = [json.loads(line) for line in report.ROWS.read_text().splitlines()]
    assert report.agreed(rows)
    for part, change in (("nodes", {"bits": 1}), ("decodes", {"first": 3}), ("answers", {"different": ["tree greedy"]})):
        place = next(n for n, row in enumerate(rows) if row["part"] == part and row.get("by") != "control")
        assert not report.agreed([*rows[:place], rows[place] | change, *rows[place + 1 :]])
