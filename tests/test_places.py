"""Which device holds what, what is refused in one line, and the memory plan of each device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from experiments.embedded_pair.evaluate import DRAFTS
from specvlm.app import compose
from specvlm.app.placement import places_of
from specvlm.config import model_folder
from specvlm.errors import UserError
from specvlm.models import memory_plan
from specvlm.models.checkpoint import config_of
from specvlm.models.load import skeleton, spread_of
from specvlm.models.partition import check_shares, tensor_plan
from specvlm.models.placement import Placement, device_of
from specvlm.parallel.ranks import SINGLE


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have so many GPUs, and to be one of so many ranks of torchrun."""

    def make(gpus: int = 0, ranks: int = 1, rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        if ranks > 1:
            for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks),
                                ("RANK", rank), ("LOCAL_RANK", rank)):  # fmt: skip
                monkeypatch.setenv(name, str(value))

    return make


def places(*words: str) -> Placement:
    return places_of(compose.compose(words))


def gpu(*numbers: int) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", number) for number in numbers)


@pytest.mark.slow
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
    assert places("target.parallel=tensor", "draft.device=cuda:2").devices == gpu(1)  # the draft is the first rank's
    machine(gpus=3, ranks=2, rank=0)
    assert places("target.parallel=tensor", "draft.device=cuda:2").devices == gpu(0, 2)


@pytest.mark.parametrize(
    ("gpus", "ranks", "words", "said"),
    [
        (0, 1, ["target.parallel=layers"], "splits a target over GPUs, but there is no GPU"),
        (1, 1, ["target.parallel=layers"], "needs two GPUs or more, but there is 1"),
        (
            2,
            1,
            ["target.parallel=layers", "draft.device=cuda:1"],
            "or more beside draft.device=cuda:1, but there is 1",
        ),
        (2, 1, ["target.parallel=layers", "device=cuda:1"], "uses every GPU, not device=cuda:1"),
        (2, 1, ["target.parallel=tensor"], "needs two ranks or more: torchrun --nproc-per-node 2"),
        (1, 2, ["target.parallel=tensor"], "torchrun started 2 ranks for 1 GPUs: use --nproc-per-node 1"),
        (2, 2, ["target.parallel=tensor", "device=cpu"], "uses GPUs if there are any"),
        (2, 2, [], "torchrun started 2 ranks: give target.parallel=tensor"),
        (2, 2, ["target.parallel=layers"], "torchrun started 2 ranks"),
        (2, 1, ["draft.device=cuda:7"], "draft.device=cuda:7: there are 2 CUDA devices here; use draft.device=cpu"),
        (2, 1, ["device=cuda:7"], "device=cuda:7: there are 2 CUDA devices here; use device=cpu or device=auto"),
        (
            3,
            2,
            ["target.parallel=tensor", "draft.device=cuda:1"],
            "draft.device=cuda:1 is the GPU of a rank: name one from cuda:2",
        ),
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
        (["draft.parallel=tensor"], "needs target.parallel=tensor"),
        (
            ["target.parallel=layers", "target.weights=int8"],
            "layers cannot be combined with target.weights=int8",
        ),
        (["target.parallel=tensor", "draft.parallel=tensor", "draft.device=cuda:1"], "draft.device=cuda:1"),
        (["draft.device=gpu"], "draft.device=gpu: expected cuda:1, cpu or null"),
    ],
)
def test_keys_that_do_not_go_together(words, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        compose.compose(words)


def test_heads_that_ranks_cannot_share_are_refused():
    config = config_of(model_folder("embedded:qwen2_5_vl/target"))
    words = ("draft.parallel=tensor", "leave draft.parallel out")
    check_shares(config, 2, *words)
    said = "draft.parallel=tensor: 2 KV heads cannot be shared by 3 ranks; use --nproc-per-node 2, or leave draft.parallel out"
    with pytest.raises(UserError, match=f"^{said}$"):
        check_shares(config, 3, *words)


def test_ranks_that_are_advised_divide_all_there_is():
    text = SimpleNamespace(num_key_value_heads=4, num_attention_heads=28, intermediate_size=18_942)
    config = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(UserError, match="18942 MLP columns cannot be shared by 4 ranks; use --nproc-per-node 2, or x"):
        check_shares(config, 4, "target.parallel=tensor", "x")
    text.intermediate_size = 7
    with pytest.raises(UserError, match="7 MLP columns cannot be shared by 2 ranks; x"):
        check_shares(config, 2, "target.parallel=tensor", "x")


def test_quantised_weights_and_a_missing_accelerate_are_refused(monkeypatch):
    config = config_of(model_folder("embedded:qwen2_5_vl/target"))
    split = [(2, torch.device("cpu"))]
    with pytest.raises(UserError, match="weights=int8 does not go with layers split"):
        spread_of(config, split, SINGLE, "int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'specvlm"):
        spread_of(config, split, SINGLE, None)


def test_the_plan_shares_a_head_of_its_own_alone():
    untied, tied = tiny.model("qwen2_5_vl").hf.config, config_of(model_folder("embedded:qwen2_5_vl/target"))
    assert tensor_plan(untied, 97)["lm_head"] == "colwise_gather_output"
    assert tensor_plan(untied, 2).get("lm_head") != "colwise_gather_output"  # 97 rows
    assert tensor_plan(tied, 2).get("lm_head") != "colwise_gather_output"


WEIGHTS, KV = ("target weights", "draft weights"), ("target KV cache", "draft KV cache")
ACTIVATIONS, LOADING = "activations (estimate)", "extra while loading"
ONE = Placement(None, gpu(0), gpu(0)[0])


def model(name: str, family: str = "llava_onevision", tied: bool = True):
    lm = skeleton(model_folder(f"embedded:{family}/{name}"))
    if not tied:
        with torch.device("meta"):
            lm.hf.lm_head.weight = torch.nn.Parameter(torch.empty(lm.hf.lm_head.weight.shape))
        lm.hf.config.tie_word_embeddings = lm.hf.config.get_text_config().tie_word_embeddings = False
    return lm


def planned(where: Placement, free=(1e9, 1e9), drafts="draft", kinds=(None, None), family="llava_onevision", tied=True):
    target = memory_plan.Need(model("target", family, tied), 1000, torch.float32, kinds[0])
    second = target.model if drafts == "self" else model("plain", family, tied) if drafts else None
    draft = memory_plan.Need(second, 300, torch.float32, kinds[1]) if second else None
    have = dict(zip(where.target, map(int, free), strict=False))
    plans, layers = memory_plan.plan(target, draft, 100, where, have)
    assert all(count > 0 for plan in plans.values() for count in plan.parts.values())
    assert all(plan.parts for plan in plans.values())
    return {device: plan.parts for device, plan in plans.items()}, layers


def of(plans, part: str) -> int:
    return sum(parts.get(part, 0) for parts in plans.values())


@pytest.mark.parametrize("family", DRAFTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("drafts", ["draft", "self", None])
def test_a_split_target_is_planned_device_by_device(drafts, tied, family):
    whole, _ = planned(ONE, drafts=drafts, tied=tied, family=family)
    plans, layers = planned(Placement("layers", gpu(0, 1), gpu(0)[0]), (4e7, 8e7), drafts, tied=tied, family=family)
    first, last = (plans[device] for device in gpu(0, 1))
    assert sum(layers) == model("target", family).layers and layers[0] < layers[1] and all(layers)
    head = model("target", family).hf.lm_head.weight.numel() * 4 if tied else 0  # the embedding on one, its copy on the other
    assert of(plans, "target weights") == of(whole, "target weights") + head
    for part in (*KV, "draft weights"):
        assert of(plans, part) == of(whole, part)
    assert ("draft weights" in first) == (drafts == "draft") and "draft weights" not in last
    assert ("draft KV cache" in last) == (drafts == "self")  # a second cache lies as the first does
    assert first[ACTIVATIONS] == last[ACTIVATIONS] == whole[gpu(0)[0]][ACTIVATIONS]


@pytest.mark.parametrize("parallel", [None, "layers"])
def test_a_draft_on_a_gpu_of_its_own_has_activations_there(parallel):
    mine = gpu(0, 1) if parallel else gpu(0)
    plans, _ = planned(Placement(parallel, mine, gpu(2)[0]))
    assert set(plans) == {*mine, *gpu(2)}
    assert set(plans[gpu(2)[0]]) == {"draft weights", "draft KV cache", ACTIVATIONS}
    assert 0 < plans[gpu(2)[0]][ACTIVATIONS] < plans[gpu(0)[0]][ACTIVATIONS]
    assert all(not {"draft weights", "draft KV cache"} & set(plans[device]) for device in mine)


@pytest.mark.parametrize(
    ("where", "first", "last"),
    [
        (ONE, 3, 3),  # target and draft on one GPU
        (Placement(None, gpu(0), gpu(1)[0]), 1, 2),
        (Placement("layers", gpu(0, 1), gpu(2)[0]), 0, 2),  # a split target's passes are not joined
    ],
)
def test_joined_passes_are_planned_where_their_model_is(where, first, last):
    needs = [memory_plan.Need(model(name), 300, torch.float32, joined=size) for name, size in (("target", 1), ("plain", 2))]
    plans, _ = memory_plan.plan(*needs, 100, where, dict.fromkeys(where.devices, 10**9))
    assert [plans[device].parts.get(memory_plan.JOINED, 0) for device in (where.first, where.draft)] == [first, last]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("drafts", ["shared", "lone", "self"])
def test_ranks_plan_their_shares(machine, rank, drafts):
    whole, _ = planned(ONE, drafts="self" if drafts == "self" else "draft")
    machine(gpus=2, ranks=2, rank=rank)
    plans, _ = planned(Placement("tensor", gpu(rank), gpu(rank)[0], 2, drafts == "shared"), drafts=drafts)
    (mine,) = plans.values()
    assert 0.5 * of(whole, "target weights") < mine["target weights"] < 0.8 * of(whole, "target weights")
    assert 2 * mine["target KV cache"] == of(whole, "target KV cache")
    assert ("draft weights" in mine) == (drafts == "shared" or (drafts == "lone" and rank == 0))
    assert ("draft KV cache" in mine) == (drafts != "lone" or rank == 0)
    if drafts != "lone":
        assert 2 * mine["draft KV cache"] == of(whole, "draft KV cache")


def test_quantised_shares_are_shares(machine):
    """A rank keeps its shard. Hugging Face's copy while loading is planned too, if it is larger than the rest."""
    machine(gpus=2, ranks=2)
    where = Placement("tensor", gpu(0), gpu(0)[0], 2)
    one, plain, whole, ours = (
        planned(place, drafts=None, tied=False, kinds=(kind, None))[0]
        for place, kind in ((ONE, None), (where, None), (ONE, "int8"), (where, "int8"))
    )
    saved, quarter = (of(a, "target weights") - of(b, "target weights") for a, b in ((whole, ours), (one, plain)))
    assert saved == pytest.approx(quarter / 4, rel=0.03)  # of 32 bits, 8; and the scales
    assert LOADING not in plain[gpu(0)[0]] and LOADING not in whole[gpu(0)[0]]
    target = memory_plan.Need(model("target", tied=False), 8, torch.float32, "int4")
    plans, _ = memory_plan.plan(target, None, 1, where, {})
    (parts,) = (plan.parts for plan in plans.values())
    assert sum(parts.values()) == of(plain, "target weights") and parts[LOADING] > 0


@pytest.mark.slow
def test_a_drafter_without_a_draft_model_has_no_place_for_one(machine):
    machine(gpus=2)
    for drafter in ("self", "prompt_lookup"):
        assert places("draft.device=cuda:1", f"drafter={drafter}").devices == (places().first,)
        assert places("target.parallel=layers", "draft.device=cuda:1", f"drafter={drafter}").target == gpu(0, 1)
    machine(gpus=3, ranks=2)
    assert not places("target.parallel=tensor", "draft.parallel=tensor", "drafter=self").draft_shared


def test_the_screen_says_how_the_target_lies():
    from specvlm.app.console import spread

    job = SimpleNamespace(
        places=Placement("layers", gpu(0, 1), gpu(0)[0]), layers=[3, 5], drafter=SimpleNamespace(model="draft")
    )
    assert spread(job) == "3 layers on cuda:0, 5 layers on cuda:1"
    job = SimpleNamespace(places=Placement("tensor", gpu(0), gpu(0)[0], 2), layers=[], drafter=SimpleNamespace(model="draft"))
    assert spread(job) == "every layer shared by 2 ranks, the draft on rank 0 alone"


def test_a_gpu_has_one_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert {str(device_of(name)) for name in ("auto", "cuda", "cuda:0")} == {"cuda:0"}
    assert str(device_of("cuda:1")) == "cuda:1"
