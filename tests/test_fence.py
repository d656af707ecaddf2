"""Strategies are foreign code: what they raise, return or change must not harm requests that share state."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from sweeping import end, start
from torch.utils._python_dispatch import TorchDispatchMode

from specvlm.__main__ import main
from specvlm.app.baselines import digest_of
from specvlm.app.model_cache import ModelCache
from specvlm.decoding import evidence, lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.decoding.output import Output
from specvlm.errors import MissingVideo, StrategyError, UserError, one_line
from specvlm.models import integrity
from specvlm.models.checksum import checksum
from specvlm.models.kv_cache import CachePool, KVCache, Store
from specvlm.models.passes import Pass
from specvlm.process.memo import restored
from specvlm.results import metrics
from specvlm.results.metrics import tokens_of
from specvlm.results.rows import CannotWrite, rows_of
from specvlm.strategies import Drafter, DraftSession, Pruner, registry
from specvlm.strategies.drafters.tree import TreeDrafter, TreeSession
from specvlm.strategies.fence import (
    checked_item,
    checked_tree,
    checked_verdict,
    defined_here,
    inside,
    is_ours,
    label_of,
    needs_of,
    sizes_of,
)
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier, _layout
from specvlm.testing import tiny as contract_tiny
from specvlm.types import DraftTree, GenerationOptions, Verdict, ancestor_mask

FAMILY = "qwen2_5_vl"
TREE = DraftTree(torch.tensor([5, 6, 7, 8]), (-1, 0, 0, 1))


# ---- what a strategy raises ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(0),
        GeneratorExit(),
        type("Odd", (BaseException,), {})("x"),
        OSError(28, "No space left"),
        BrokenPipeError(),
        CannotWrite("the disk is full"),
        type("Mine", (UserError,), {})("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_would_pass_for_something_else_is_the_strategys(error):
    with pytest.raises(StrategyError, match=f"pruner=uniform raised {type(error).__name__}"), inside(UniformPruner()):
        raise error


@pytest.mark.parametrize("error", [UserError("give another key"), MissingVideo("no such file"), StrategyError("x")])
def test_the_users_own_mistakes_pass(error):
    with pytest.raises(type(error)) as caught, inside(UniformPruner()):
        raise error
    assert caught.value is error and one_line(error) == str(error)


@pytest.mark.parametrize("error", [ValueError("x"), ZeroDivisionError(), RuntimeError("CUDA out of memory")], ids=repr)
def test_a_plain_error_names_its_strategy(error):
    with pytest.raises(type(error)), inside(UniformPruner()):
        raise error
    assert one_line(error).endswith("(in pruner=uniform)")


def test_a_strategy_is_named_by_its_class_whatever_that_is():
    assert label_of(TreeDrafter()) == label_of(TreeDrafter) == "drafter=tree"
    assert label_of(object()) == "strategy=object"


# ---- what a strategy returns -----------------------------------------------------------------------------------------


def tree(tokens=(5, 6, 7, 8), parents=(-1, 0, 0, 1), q=None, ranks=None, cls=DraftTree):
    made = cls(tokens if isinstance(tokens, torch.Tensor) else torch.tensor(tokens), parents, q)
    object.__setattr__(made, "ranks", ranks)
    return made


@pytest.mark.parametrize(
    ("proposal", "why"),
    [
        (None, "expected a DraftTree"),
        ([5, 6], "expected a DraftTree"),
        (tree(parents=()), "parents"),
        (tree(parents=(0, 0, 0, 1)), "parents"),
        (tree(parents=(-1, 0, 3, 1)), "parents"),
        (tree(parents=(-1, 1, 0, 1)), "parents"),
        (tree(parents=(-1, -1, 0, 1)), "parents"),
        (tree(parents=[-1, 0, 0, 1]), "parents|unhashable"),
        (tree(parents=(-1, 0, 0.0, True)), "parents"),
        (tree(parents=(-1, 0, 0)), r"\(3,\) int64"),
        (tree(tokens=torch.tensor([5.0, 6, 7, 8])), "int64"),
        (tree(tokens=torch.tensor([[5, 6, 7, 8]])), "int64"),
        (tree(tokens=(5, 6, 7, 97)), "0..96"),
        (tree(tokens=(5, -1, 7, 8)), "guessed token -1"),
        (tree((0,) * 9, (-1,) * 1 + (0,) * 8), "max_nodes of 8"),
        (tree(q=torch.ones(3, 97)), r"q must be \(4, V\)"),
        (tree(q=torch.ones(4, 97, dtype=torch.int64)), "q must be"),
        (tree(q="q"), "q must be"),
        (tree(ranks=(0, 1)), "ranks"),
        (tree(ranks=(0, 0, 0, "1")), "ranks"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_is_no_tree_is_refused_by_the_drafters_name(proposal, why):
    with pytest.raises(StrategyError, match="drafter=tree: ") as caught:
        checked_tree(TreeDrafter(), proposal, 5, 8, 97)
    assert caught.match(why)


GONE = property(lambda self: self.gone)


class Startless(str):
    def startswith(self, *args):
        return True

    def __hash__(self):
        return hash("specvlm.strategies.drafters.tree")

    def __eq__(self, other):
        return True


@pytest.mark.parametrize("home", [Startless(__name__), "specvlm.more", "specvlm", "specvlm.strategies.drafters.tree"], ids=repr)
def test_a_class_that_only_says_so_is_none_of_specvlms(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "specvlm.more", sys.modules[__name__])
    monkeypatch.setattr(Idle, "__module__", home)
    assert not defined_here(Idle) and not is_ours(Idle()) and is_ours(TreeDrafter())


@pytest.mark.parametrize("name", ["start", "own_budget", "propose", "more"])
def test_a_strategy_of_specvlms_with_something_set_on_it_is_a_strangers(name):
    drafter = TreeDrafter()
    object.__setattr__(drafter, name, lambda *args: None)
    assert not is_ours(drafter)


def test_a_class_that_makes_another_of_itself_is_refused(monkeypatch):
    monkeypatch.setattr(Idle, "__new__", lambda cls: TreeDrafter(), raising=False)
    info = replace(registry.collect()["drafter"]["prompt_lookup"], cls=Idle)
    monkeypatch.setattr(registry, "find", lambda *args: info)
    with pytest.raises(TypeError, match=r"Idle\(\) returned a TreeDrafter"):
        registry.build("drafter", Idle())


def of_class(**attributes):
    return type("Odd", (TreeDrafter,), {"name": "odd"} | attributes)()


@pytest.mark.parametrize(
    "value", ["many", 2.0, True, 0, -3, None, GONE], ids=["text", "float", "bool", "none", "negative", "null", "raises"]
)
@pytest.mark.parametrize("what", ["max_nodes", "max_rows"])
def test_a_drafter_of_no_size_is_refused_by_its_name(what, value):
    with pytest.raises((StrategyError, ValueError, AttributeError)) as caught:
        sizes_of(of_class(**{what: value}))
    assert "drafter=odd" in str(caught.value) or "in drafter=odd" in caught.value.__notes__


@pytest.mark.parametrize("value", ["features", {"features"}, frozenset({1}), None], ids=repr)
def test_needs_that_are_no_set_of_names_are_refused_by_the_strategys_name(value):
    with pytest.raises(TypeError, match="needs must be a frozenset of names") as caught:
        needs_of(of_class(needs=value))
    assert "in drafter=odd" in caught.value.__notes__


def test_the_loop_takes_a_tree_of_its_own_with_the_last_token_at_its_root():
    class Lying(DraftTree):
        def __len__(self):
            return 1

        def way_to(self, node):
            return (0,)

    given = tree(tokens=(1, 6, 7, 8), ranks=(0, 0, 1, 0), cls=Lying)
    found = checked_tree(TreeDrafter(), given, 5, 8, 97)
    assert type(found) is DraftTree and len(found) == 4 and found.way_to(3) == (0, 1, 3)
    assert found.tokens.tolist() == [5, 6, 7, 8] and given.tokens.tolist() == [1, 6, 7, 8]
    given.tokens.zero_()
    assert found.tokens.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict((), 1),
        Verdict((1,), 1),
        Verdict((0, 3), 1),
        Verdict((0, 2, 3), 1),
        Verdict((0, 0), 1),
        Verdict((0, 9), 1),
        Verdict((0, -1), 1),
        Verdict([0, 1], 1),
        Verdict((0, True), 1),
        Verdict((0, 1), 97),
        Verdict((0, 1), -1),
        Verdict((0, 1), 1.0),
        Verdict((0, 1), torch.tensor(1)),
        None,
    ],
    ids=str,
)
def test_what_is_no_verdict_is_refused_by_the_verifiers_name(verdict):
    with pytest.raises(StrategyError, match="verifier=greedy: "):
        checked_verdict(GreedyVerifier(), verdict, TREE, 97)
    assert checked_verdict(GreedyVerifier(), Verdict((0, 1, 3), 96), TREE, 97) == Verdict((0, 1, 3), 96)


# ---- what requests share ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditsWhatItGets(Pruner):
    """Overwrites everything it can reach through its context."""

    name = "edits"
    needs = frozenset({"features", "verifier_attention", "verifier_attention_weighted"})

    def row_weights(self, text_TD, features_ND):
        text_TD.zero_()
        features_ND.zero_()
        return super().row_weights(text_TD, features_ND)

    def select(self, ctx):
        for values in ctx.signals.values():
            values.zero_()
        return UniformPruner().select(ctx)


@dataclass(frozen=True)
class EditsThePrompt(TreeDrafter):
    """Overwrites the prompt and its pixels, before and after its own prefill."""

    name = "edits"

    def own_budget(self, prompt):
        prompt.tokens.zero_()
        assert not prompt.videos and not prompt.images
        return None

    def start(self, ctx):
        for video in ctx.prompt.videos:
            for tensor in filter(torch.is_tensor, video.values()):
                tensor.zero_()
        session = super().start(ctx)
        ctx.prompt.tokens.zero_()
        return session


@pytest.mark.parametrize("strategies", [(EditsWhatItGets(), TreeDrafter()), (UniformPruner(), EditsThePrompt())], ids=repr)
def test_a_strategy_gets_copies(strategies):
    target, request = tiny.model(FAMILY), tiny.prompt(FAMILY)
    alone = tokens_of(list(autoregressive(target, request, 16, GreedyVerifier())))
    graph = DecodingGraph(target, tiny.draft_of(FAMILY), *strategies, GreedyVerifier(), GenerationOptions(ratio=0.5))
    for _ in "ab":
        assert tokens_of(list(graph.decode(request, 16))) == alone


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[0].zero_(),
        lambda t: t.copy_(t[torch.tensor([1, 0, *range(2, len(t))])]),
        lambda t: t.copy_(t[:, torch.tensor([1, 0, *range(2, t.shape[1])])]),
        lambda t: t.copy_(t.flip(1)),
        lambda t: t[3].add_(1e-2),
        lambda t: t[-1, -1].mul_(2),
        lambda t: t.neg_(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_checksum_sees_what_is_subtle(change, dtype):
    made = torch.randn(257, 1030, generator=torch.Generator().manual_seed(0)) * 30
    before = made.to(dtype)
    changed = before.float().clone()
    change(changed)
    assert checksum([before]) != checksum([changed.to(dtype)])
    assert checksum([before]) == checksum([before.clone()])


def test_a_checksum_knows_tensors_of_any_size_and_their_order():
    parts = [torch.arange(n) for n in (0, 1, 7, 8191, 8192, 65_536, 65_537, 65_538)] + [torch.tensor(True), torch.ones(3, 5).T]
    assert checksum(parts) == checksum(parts) != checksum(parts[::-1])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pair", [(0, 1), (3, 1027), (5, 261), (7, 1023)], ids=str)
def test_a_checksum_sees_rows_and_columns_of_a_large_matrix_that_changed_places(axis, pair):
    made = torch.randint(2**40, (1024 + 4, 1024 + 4))
    changed = made.clone()
    changed.index_copy_(axis, torch.tensor(pair), made.index_select(axis, torch.tensor(pair[::-1])))
    assert checksum([made]) != checksum([changed])


def held_graph() -> tuple[ModelCache, DecodingGraph]:
    held, target = ModelCache(), contract_tiny.wrapped(copy.deepcopy(contract_tiny.model(FAMILY).hf))
    held.models, held.weights = {"target": target}, {target: integrity.weights_of(target)}
    held.structures = {target: integrity.structure(target)}
    return held, DecodingGraph(
        target, None, UniformPruner(), Idle(), GreedyVerifier(), GenerationOptions(ratio=0.5), caches=held.caches
    )


@dataclass(frozen=True)
class Idle(Drafter):
    name = "idle"
    model = None
    max_nodes = 1

    def start(self, ctx) -> DraftSession:
        raise NotImplementedError


def patch_argmax(graph):
    torch.argmax = lambda *args, **kwargs: torch.zeros((), dtype=torch.int64)


def patch_inherited(graph):
    torch.Tensor.argmax = lambda *args, **kwargs: torch.zeros((), dtype=torch.int64)


def shadow_a_builtin(graph):
    lossless.max = lambda *args: 0


def patch_compare(graph):
    lossless.compare = lambda *args: lossless.Comparison("identical")


def patch_code(graph):
    metrics.tokens_of.__code__ = (lambda steps: [1]).__code__


def patch_table(graph):
    evidence.DRIFT[torch.float32] = 1e9


def patch_class(graph):
    type(graph).decode = lambda *args: iter(())


def hook(graph):
    graph.target.hf.lm_head.register_forward_hook(lambda module, args, out: -out)


def swap(graph):
    graph.target.text.layers[0], graph.target.text.layers[1] = graph.target.text.layers[1], graph.target.text.layers[0]


def write(graph):
    graph.target.text.norm.weight.data[0] += 1e-2


class Doubled(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Tripled(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def patch_take(graph):
    """Patch the loop itself, which runs in no strategy's fence."""
    real = Output.take
    Output.take = lambda self, tokens: (Doubled().__enter__(), real(self, tokens))[1]
    Output(4, frozenset()).take([1])


def kept_cache(graph: DecodingGraph) -> KVCache:
    """A cache of the pool, which the target alone and later requests use."""
    graph.caches.reserve("target", graph.target, 64)
    return graph.caches.held[-1]


def swap_layers(cache: KVCache) -> None:
    """Make two layers use each other's slots."""
    cache._layers[0], cache._layers[1] = cache._layers[1], cache._layers[0]


def share_slots(cache: KVCache) -> None:
    """All layers write to the slots of the first one, in the stores and in what is made of them."""
    cache.stores = tuple(Store(*(x[:1].expand(len(x), -1, -1, -1, -1) for x in store)) for store in cache.stores)
    cache._layers = [(store.keys[row], store.values[row]) for store in cache.stores for row in range(len(store.keys))]


CHANGES = {
    "a function of torch": (patch_argmax, "argmax"),
    "a method that is inherited": (patch_inherited, "Tensor.argmax"),
    "a built-in, in a module of ours": (shadow_a_builtin, "lossless.max"),
    "a function of ours": (patch_compare, "lossless.compare"),
    "a function's code": (patch_code, "metrics.tokens_of"),
    "a method of ours": (patch_class, "DecodingGraph.decode"),
    "the default dtype": (lambda graph: torch.set_default_dtype(torch.float64), "default dtype"),
    "the threads": (lambda graph: torch.set_num_threads(3), "threads"),
    "a function mode": (lambda graph: Doubled().__enter__(), "torch's modes"),
    "a dispatch mode": (lambda graph: Tripled().__enter__(), "torch's modes"),
    "a mode that a later call enters": (patch_take, "torch's modes"),
    "a kept tensor": (lambda graph: ancestor_mask((-1, 0, 0)).fill_(True), "tensors that specvlm keeps"),
    "another kept tensor": (lambda graph: _layout((-1, 0, 0), torch.device("cpu"))[3].zero_(), "tensors that specvlm keeps"),
    "a hook": (hook, "module lm_head"),
    "a global hook": (
        lambda graph: torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None),
        "hooks of every module",
    ),
    "modules": (swap, "module"),
    "weights": (write, "weights of"),
    "stop ids": (lambda graph: setattr(graph.target, "stop_ids", frozenset({66})), "stop_ids"),
    "the penalty": (lambda graph: setattr(graph.target, "repetition_penalty", 1.5), "repetition_penalty"),
    "a configuration": (lambda graph: setattr(graph.target.hf.config.get_text_config(), "rms_norm_eps", 1.0), "configuration"),
    "the engine": (lambda graph: setattr(graph.engine, "check", lambda *args: None), "engine"),
    "the pool of caches": (lambda graph: setattr(graph.caches, "take", lambda *args: None), "caches"),
    "a cache's layers": (lambda graph: swap_layers(kept_cache(graph)), "caches"),
    "a cache's stores": (lambda graph: share_slots(kept_cache(graph)), "caches"),
}


SPOILT = ("a hook", "modules", "weights", "stop ids", "the penalty", "a configuration", "the engine", "the pool of caches")
SPOILT += ("a cache's layers", "a cache's stores")


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_is_named_and_does_not_last(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, said = CHANGES[name]
    held, graph = held_graph()
    target, request = graph.target, tiny.prompt(FAMILY)
    before = tokens_of(list(autoregressive(target, request, 6, GreedyVerifier())))
    mask = ancestor_mask((-1, 0, 0)).clone()
    with pytest.raises(StrategyError, match="drafter=idle changed ") as caught, held.guard(graph):
        change(graph)
    assert said in str(caught.value)
    assert not torch.nn.modules.module._global_forward_hooks and torch.equal(ancestor_mask((-1, 0, 0)), mask)
    assert lossless.compare(target, request, [1], [1]).verdict == "identical" and torch.argmax(torch.arange(3)) == 2
    assert bool(held.models) != (name in SPOILT) and "take" not in vars(held.caches)
    after = tokens_of(list(autoregressive(held_graph()[1].target, request, 6, GreedyVerifier())))
    assert after == before and Path.cwd() == tmp_path and torch.get_default_dtype() == torch.float32 and "PATH" in os.environ


@pytest.mark.parametrize("inferring", [False, True], ids=["outside", "in_a_request"])
def test_a_table_is_put_back_wherever_it_was_made(inferring):
    parents = (-1, *range(40 + inferring))
    with torch.inference_mode(inferring):
        mask = ancestor_mask(parents)
        before = mask.clone()
        mask.fill_(True)
    assert restored() and torch.equal(ancestor_mask(parents), before) and not restored()


@pytest.mark.parametrize(("mode", "said"), [(Doubled, "a function mode"), (Tripled, "a dispatch mode")])
def test_a_mode_of_torch_is_left_before_the_loop_goes_on(mode, said):
    with pytest.raises(StrategyError, match=f"drafter=idle left torch in {said}"), inside(Idle()):
        mode().__enter__()
    with inside(Idle()), mode():
        pass  # one that is left again is no harm
    assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("before", [False, True], ids=["outside", "in_a_request"])
def test_inference_mode_is_put_back_before_the_loop_goes_on(before):
    other = torch.inference_mode(not before)  # kept: torch leaves a mode that nobody holds
    with torch.inference_mode(before):
        with pytest.raises(StrategyError, match="drafter=idle left torch in an inference mode"), inside(Idle()):
            other.__enter__()
        assert torch.is_inference_mode_enabled() is before
    assert not torch.is_inference_mode_enabled()


class Sly(Pass):
    """Another pass once it has been checked."""

    def placed(self):
        return "unchecked"


def test_a_subclass_of_a_pass_is_none():
    lm = contract_tiny.model("qwen2_5_vl")
    with CachePool().lease(drafter=True) as lease:
        cache = lease.take("draft", lm, 64)
        tokens = torch.zeros(1, dtype=torch.int64)
        checked_item(Idle(), lease, Pass(lm, cache, tokens, (0,), None, 0, 0))
        with pytest.raises(StrategyError, match="propose yielded a Sly"):
            checked_item(Idle(), lease, Sly(lm, cache, tokens, (0,), None, 0, 0))


def test_a_handler_of_ctrl_c_is_put_back_before_the_next_call():
    before = signal.getsignal(signal.SIGINT)
    with inside(Idle()):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before


def test_weights_that_were_written_to_between_two_requests_are_loaded_again():
    held, graph = held_graph()
    held._restore_shared_state()
    write(graph)
    held._restore_shared_state()
    assert held.models, "nobody was there: they are not read again"
    with inside(Idle()):
        pass
    held._restore_shared_state()
    assert not held.models


def test_what_a_thread_that_goes_on_may_hold_is_let_go():
    held, graph = held_graph()
    end = threading.Event()
    with held.guard(graph):
        (thread := threading.Thread(target=end.wait)).start()
    end.set()
    thread.join()
    assert not held.models
    held, graph = held_graph()
    with held.guard(graph):
        (thread := threading.Thread(target=int)).start()
        thread.join()
    assert held.models, "this one has ended"


def test_what_reading_ahead_may_change_too_is_put_back_without_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held, graph = held_graph()
    stdout, path, handler = sys.stdout, os.environ["PATH"], signal.getsignal(signal.SIGTERM)
    with held.guard(graph):
        os.chdir("/")
        os.environ |= {"PATH": "x", "NEW_OF_A_LIBRARY": "y"}
        sys.stdout = None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert (sys.stdout, os.environ["PATH"], signal.getsignal(signal.SIGTERM)) == (stdout, path, handler)
    assert Path.cwd() == tmp_path and os.environ.pop("NEW_OF_A_LIBRARY") == "y" and held.models


def test_a_strategy_may_compile():
    held, graph = held_graph()
    with held.guard(graph):
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
    assert held.models


def test_a_guard_lets_through_what_changes_nothing_and_what_fails_anyway():
    held, graph = held_graph()
    with held.guard(graph):
        list(autoregressive(graph.target, tiny.prompt(FAMILY), 4, GreedyVerifier(), graph.caches))
    assert held.models
    with pytest.raises(ZeroDivisionError), held.guard(graph):
        write(graph)
        raise ZeroDivisionError
    assert not held.models, "spoilt models are let go all the same"


# ---- kept baselines --------------------------------------------------------------------------------------------------


def resigned(content: dict) -> dict:
    return content | {"digest": digest_of(content)}


TAMPERED = {
    "tokens": lambda content: content | {"tokens": [*content["tokens"][:-1], 3]},
    "times": lambda content: content | {"times_s": {key: 100 * value for key, value in content["times_s"].items()}},
    "no numbers": lambda content: content | {"times_s": {"prefill": float("nan")}},
    "types": lambda content: content | {"tokens": "12"},
    "a list": lambda content: [],
    "another's key": lambda content: resigned(content | {"key": "0" * 32}),
    "tokens that do not exist": lambda content: resigned(content | {"tokens": [10**6] * len(content["tokens"])}),
    "too many tokens": lambda content: resigned(content | {"tokens": content["tokens"] * 2}),
    "no tokens": lambda content: resigned(content | {"tokens": []}),
    "no times": lambda content: resigned(content | {"times_s": {}}),
    "a half": lambda content: json.dumps(content)[:50],
}


@pytest.mark.slow
def test_a_tampered_baseline_is_decoded_again_and_said_so(tmp_path, monkeypatch, capsys):
    """The baseline of each sample is tampered with in another way."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    words = ["dataset=synthetic", "frames=2", "max_new_tokens=3", "baselines=kept"]
    every = f"dataset.scenes={len(TAMPERED)}"
    assert main([*words, every, "hydra.run.dir=first"]) == 0
    rows = rows_of(Path("first"))
    paths = [Path("kept", f"{row['baseline']}.json") for row in rows]
    contents = [json.loads(path.read_text()) for path in paths]
    assert main([*words, "dataset.scenes=1", "hydra.run.dir=again"]) == 0 and "decoded again" not in capsys.readouterr().out
    for change, path, content in zip(TAMPERED.values(), paths, contents, strict=True):
        bad = change(content)
        path.write_text(bad if isinstance(bad, str) else json.dumps(bad))
    assert main([*words, every, "hydra.run.dir=tampered"]) == 0
    said = "".join(capsys.readouterr().out.split())  # a long path is broken anywhere
    for name, row, found, path, content in zip(TAMPERED, rows, rows_of(Path("tampered")), paths, contents, strict=True):
        assert f"{path.name}isdecodedagain" in said, name
        assert found["verdict"] == "identical" and found["baseline_token_ids"] == row["baseline_token_ids"], name
        assert json.loads(path.read_text())["tokens"] == content["tokens"], name


# ---- threads and Ctrl-C ----------------------------------------------------------------------------------------------


def test_a_thread_that_waits_in_a_strategy_keeps_no_other_from_the_graph():
    graph = DecodingGraph(
        tiny.model(FAMILY), tiny.draft_of(FAMILY), Waiting(), TreeDrafter(), GreedyVerifier(), GenerationOptions(ratio=0.5)
    )
    request, found = tiny.prompt(FAMILY), []
    alone = tokens_of(list(autoregressive(tiny.model(FAMILY), request, 8, GreedyVerifier())))
    thread = threading.Thread(target=lambda: found.extend(tokens_of(list(graph.decode(request, 8)))))
    thread.start()
    assert STARTED.wait(60)
    quick = replace(graph, pruner=UniformPruner())
    for steps in (quick.decode(request, 8), autoregressive(graph.target, request, 8, GreedyVerifier(), graph.caches)):
        assert tokens_of(list(steps)) == alone and not found
    GO_ON.set()
    thread.join(60)
    assert found == alone
    assert tokens_of(list(graph.decode(request, 8))) == alone


STARTED, GO_ON = threading.Event(), threading.Event()


@dataclass(frozen=True)
class Waiting(UniformPruner):
    name = "waiting"

    def select(self, ctx):
        STARTED.set()
        assert GO_ON.wait(60)
        return super().select(ctx)


@pytest.mark.slow
@pytest.mark.parametrize(("catches", "presses", "said"), [(False, 1, ""), (True, 2, ", and ended at once")])
def test_a_hang_is_broken_off_by_ctrl_c_and_names_its_strategy(catches, presses, said, tmp_path, monkeypatch):
    def propose(self, last):
        print("proposing", flush=True)
        while True:
            try:
                while True:
                    time.sleep(0.01)
            except BaseException:
                if not catches:
                    raise

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TreeSession, "propose", propose)
    torch.set_num_threads(1)  # a fork has none of the other threads
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    child = start(["frames=4", "max_new_tokens=4", "baseline=false", "threads=1"])
    signal.signal(signal.SIGINT, before)
    log, stop = Path("log.txt"), time.monotonic() + 60
    while time.monotonic() < stop and not (log.exists() and "proposing" in log.read_text()):
        time.sleep(0.05)
    for _ in range(presses):
        time.sleep(0.5)  # until it hangs, and until it has caught the first
        os.kill(child, signal.SIGINT)
    code, told = end(child, 60), log.read_text()
    assert code == 130 and f"specvlm: interrupted in drafter=tree{said}" in told and "Traceback" not in told, told
