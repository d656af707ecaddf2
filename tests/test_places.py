"""Which device holds what, what is refused in one line, and the memory plan of each device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from specvlm import compose, memory
from specvlm.errors import UserError
from specvlm.models.load import config_of, skeleton, spread_of
from specvlm.models.spread import check_shares, tensor_plan
from specvlm.places import Places, device_of, places_of
from specvlm.ranks import ALONE
from specvlm.run import model_folder


@pytest.fixture
def machine(monkeypatch):
    """So many GPUs, and so many ranks of torchrun, of which this is one."""

    def make(gpus: int = 0, ranks: int = 1, rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        if ranks > 1:
            for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks),
                                ("RANK", rank), ("LOCAL_RANK", rank)):  # fmt: skip
                monkeypatch.setenv(name, str(value))

    return make


def places(*words: str) -> Places:
    return places_of(compose.compose(words))


def gpu(*numbers: int) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", number) for number in numbers)


def test_where_everything_goes(machine):
    machine(gpus=3)
    assert places("device=cuda:1").devices == gpu(1)
    assert places("target.parallel=layers").target == gpu(0, 1, 2)
    split = places("target.parallel=layers", "draft.device=cuda:2")
    assert (split.target, split.draft, split.devices) == (gpu(0, 1), *gpu(2), gpu(0, 1, 2))
    assert places("device=cuda:0", "draft.device=cuda:2").devices == gpu(0, 2)
    machine(gpus=3, ranks=2, rank=1)
    shared = places("target.parallel=tensor", "draft.parallel=tensor")
    assert (shared.target, shared.draft, shared.ranks, shared.draft_shared) == (gpu(1), *gpu(1), 2, True)
    assert places("target.parallel=tensor", "draft.device=cuda:2").draft == gpu(2)[0]


@pytest.mark.parametrize(
    ("gpus", "ranks", "words", "said"),
    [
        (0, 1, ["target.parallel=layers"], "splits a target over GPUs, and there is none to use"),
        (1, 1, ["target.parallel=layers"], "needs two GPUs or more, there is 1"),
        (2, 1, ["target.parallel=layers", "draft.device=cuda:1"], "two GPUs or more beside draft.device=cuda:1, there is 1"),
        (2, 1, ["target.parallel=layers", "device=cuda:1"], "takes every GPU there is, not device=cuda:1"),
        (2, 1, ["target.parallel=tensor"], "needs two ranks or more: torchrun --nproc-per-node 2"),
        (1, 2, ["target.parallel=tensor"], "torchrun started 2 ranks for 1 GPUs: use --nproc-per-node 1"),
        (2, 2, ["target.parallel=tensor", "device=cpu"], "takes the GPUs where there are some"),
        (2, 2, [], "torchrun started 2 ranks, which share a target: give target.parallel=tensor"),
        (2, 2, ["target.parallel=layers"], "torchrun started 2 ranks"),
        (2, 1, ["draft.device=cuda:7"], "device=cuda:7: there are 2 CUDA devices here"),
    ],
)
def test_what_cannot_be_had_is_refused(machine, gpus, ranks, words, said):
    machine(gpus, ranks)
    with pytest.raises(UserError) as refused:
        places(*words)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target.parallel=tensors"], 'expected one of null, layers, tensor. Did you mean "tensor"'),
        (["draft.parallel=layers"], "draft.parallel=layers: expected one of null, tensor"),
        (["draft.parallel=tensor"], "goes with target.parallel=tensor"),
        (["target.parallel=layers", "target.weights=int8"], "target.parallel=layers does not go with target.weights=int8"),
        (["target.parallel=tensor", "draft.parallel=tensor", "draft.device=cuda:1"], "draft.device=cuda:1"),
        (["draft.device=gpu"], "draft.device=gpu: expected cuda:1, cpu or null"),
    ],
)
def test_keys_that_do_not_go_together(words, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        compose.compose(words)


def test_heads_that_ranks_cannot_share_are_refused():
    config = config_of(model_folder("embedded:qwen2_5_vl/target"))
    check_shares(config, 2, "target")
    with pytest.raises(UserError, match="2 KV heads cannot be shared by 3 ranks; use --nproc-per-node 2"):
        check_shares(config, 3, "target")


def test_quantised_weights_and_a_missing_accelerate_are_refused(monkeypatch):
    config = config_of(model_folder("embedded:qwen2_5_vl/target"))
    split = [(2, torch.device("cpu"))]
    with pytest.raises(UserError, match="weights=int8 does not go with layers split"):
        spread_of(config, split, ALONE, "int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'specvlm"):
        spread_of(config, split, ALONE, None)


def test_the_plan_shares_a_head_of_its_own_alone():
    untied, tied = tiny.model("qwen2_5_vl").hf.config, config_of(model_folder("embedded:qwen2_5_vl/target"))
    assert tensor_plan(untied, 97)["lm_head"] == "colwise_gather_output"
    assert tensor_plan(untied, 2).get("lm_head") != "colwise_gather_output"  # 97 rows
    assert tensor_plan(tied, 2).get("lm_head") != "colwise_gather_output"


def planned(where: Places, free: tuple[float, ...] = (1e9, 1e9), drafts: str = "draft"):
    target = skeleton(model_folder("embedded:llava_onevision/target"))
    draft = skeleton(model_folder("embedded:llava_onevision/plain")) if drafts == "draft" else target
    whole = memory.plan(target, draft, 1000, 300, torch.float32, 100)
    plans, layers = memory.by_device(whole, target, draft, 1000, torch.float32, where, free)
    return whole, plans, layers


def test_a_split_target_is_planned_device_by_device():
    whole, plans, layers = planned(Places("layers", gpu(0, 1), gpu(0)[0]), (4e7, 8e7))
    assert sum(layers) == 8 or sum(layers) > 1
    first, last = (plans[device].parts for device in gpu(0, 1))
    for part in ("target weights", "target KV cache"):
        assert abs(first[part] + last[part] - whole.parts[part]) <= 0.02 * whole.parts[part]
    assert layers[0] < layers[1] and "draft weights" in first and "draft weights" not in last
    assert first["activations (estimate)"] == last["activations (estimate)"] == whole.parts["activations (estimate)"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("draft_shared", [False, True])
def test_ranks_plan_their_shares(machine, rank, draft_shared):
    machine(gpus=2, ranks=2, rank=rank)
    whole, plans, _ = planned(Places("tensor", gpu(rank), gpu(rank)[0], 2, draft_shared))
    (mine,) = plans.values()
    assert 0.5 * whole.parts["target weights"] < mine.parts["target weights"] < 0.8 * whole.parts["target weights"]
    assert 2 * mine.parts["target KV cache"] == whole.parts["target KV cache"]
    share = {"draft weights", "draft KV cache"} & mine.parts.keys()
    assert bool(share) == (draft_shared or rank == 0)


def test_a_target_that_drafts_for_itself_has_one_cache_more_on_its_own_devices():
    whole, plans, _ = planned(Places("layers", gpu(0, 1), gpu(0)[0]), drafts="self")
    kv = sum(plan.parts["target KV cache"] for plan in plans.values())
    assert abs(kv - whole.parts["target KV cache"] - whole.parts["draft KV cache"]) < 0.02 * kv
    assert all("draft KV cache" not in plan.parts for plan in plans.values())


def test_the_screen_says_how_the_target_lies():
    from specvlm.show import spread

    job = SimpleNamespace(places=Places("layers", gpu(0, 1), gpu(0)[0]), layers=[3, 5], drafter=SimpleNamespace(model="draft"))
    assert spread(job) == "3 layers on cuda:0, 5 layers on cuda:1"
    job = SimpleNamespace(places=Places("tensor", gpu(0), gpu(0)[0], 2), layers=[], drafter=SimpleNamespace(model="draft"))
    assert spread(job) == "every layer shared by 2 ranks, the draft on the first alone"


def test_a_gpu_has_one_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert {str(device_of(name)) for name in ("auto", "cuda", "cuda:0")} == {"cuda:0"}
    assert str(device_of("cuda:1")) == "cuda:1"
