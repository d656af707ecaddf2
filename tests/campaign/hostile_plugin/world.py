"""Attacks on what the whole process shares: torch's settings and functions, specvlm's own, Python's, and files."""

from __future__ import annotations

import builtins
import gc
import io
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import specvlm.app.job
import specvlm.app.request
import specvlm.decoding.loop
import specvlm.decoding.lossless
import specvlm.engine.repetition
import specvlm.errors
import specvlm.models.kv_cache
import specvlm.results.metrics
import specvlm.strategies.pruners.uniform
import specvlm.strategies.registry
import specvlm.strategies.verifiers.greedy
import specvlm.types.tree

from .makers import caller, proposes, select, starts, strategy

# ---- torch -----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "default_dtype": lambda: torch.set_default_dtype(torch.float64),
    "default_device": lambda: torch.set_default_device("meta"),
    "grad_enabled": lambda: torch.set_grad_enabled(True),
    "inference_mode_off": lambda: torch.inference_mode(False).__enter__(),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "threads": lambda: torch.set_num_threads(3),
    "seed": lambda: torch.manual_seed(7),
    "matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
    "no_mkldnn": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "no_fast_attention": lambda: torch.backends.cuda.enable_math_sdp(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16).__enter__(),
    "flush_denormal": lambda: torch.set_flush_denormal(True),
}
for name, change in SETTINGS.items():
    strategy("pruner", f"sets_{name}", "settings", attack=lambda self, ctx, change=change: change())


class AddsOne(TorchFunctionMode):
    """To every argmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found + 1 if getattr(func, "__name__", "") == "argmax" else found


class Rolls(TorchDispatchMode):
    """What every embedding gives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found.roll(1, -1) if "embedding" in str(func) else found


@select("patches of torch")
def enters_a_function_mode(self, ctx):
    AddsOne().__enter__()


@select("patches of torch")
def enters_a_dispatch_mode(self, ctx):
    Rolls().__enter__()


def wrapped(owner, name, change):
    """Patch `owner.name`: it gives `change` of what it gave."""
    before = getattr(owner, name)
    setattr(owner, name, lambda *args, **other: change(before(*args, **other)))


TORCH = {
    "argmax": lambda: wrapped(torch, "argmax", lambda found: found + 1),
    "tensor_argmax": lambda: wrapped(torch.Tensor, "argmax", lambda found: found + 1),
    "linear": lambda: wrapped(torch.nn.functional, "linear", lambda found: found * 1.1),
    "attention": lambda: wrapped(torch.nn.functional, "scaled_dot_product_attention", lambda found: found * 0.9),
    "rsqrt": lambda: wrapped(torch, "rsqrt", lambda found: found * 1.1),
    "embedding": lambda: wrapped(torch.nn.Embedding, "forward", lambda found: found.roll(1, -1)),
    "linear_forward": lambda: wrapped(torch.nn.Linear, "forward", lambda found: found.roll(1, -1)),
    "tolist": lambda: wrapped(torch.Tensor, "tolist", lambda found: found[::-1] if isinstance(found, list) else found),
    "equal": lambda: setattr(torch, "equal", lambda one, other: True),
    "cat": lambda: wrapped(torch, "cat", lambda found: found * 2),
    "arange": lambda: wrapped(torch, "arange", lambda found: found.flip(0)),
}
for name, patch in TORCH.items():
    strategy("drafter", f"patches_torch_{name}", "patches of torch", attack=lambda self, ctx, patch=patch: patch())


# ---- specvlm ---------------------------------------------------------------------------------------------------------

SAME = specvlm.decoding.lossless.Comparison("identical")
OURS = {
    "compare": lambda: setattr(specvlm.decoding.lossless, "compare", lambda *args, **other: SAME),
    "judge": lambda: setattr(specvlm.app.request, "judge", lambda *args: ("identical", "identical", None)),
    "tokens_of": lambda: wrapped(specvlm.results.metrics, "tokens_of", lambda found: found[::-1]),
    "autoregressive": lambda: setattr(specvlm.app.request, "autoregressive", lambda *args: iter(())),
    "take": lambda: wrapped(specvlm.decoding.output.Output, "take", lambda found: tuple(token + 1 for token in found)),
    "greedy": lambda: wrapped(specvlm.strategies.verifiers.greedy.GreedyVerifier, "decide", lambda found: found + 1),
    "keep": lambda: wrapped(specvlm.models.kv_cache.KVCache, "advance", lambda found: found),
    "uniform": lambda: wrapped(specvlm.strategies.pruners.uniform.UniformPruner, "select", lambda found: found.everything(1)),
    "penalty": lambda: wrapped(specvlm.engine.repetition.RepetitionPenalty, "__call__", lambda found: found.roll(1, -1)),
    "prefill": lambda: wrapped(specvlm.decoding.loop, "prefill", lambda found: (found[0], found[1].roll(1, -1))),
    "mask": lambda: wrapped(specvlm.types.tree, "ancestor_mask", torch.ones_like),
    "kept_masks": lambda: specvlm.types.tree.ancestor_mask((-1, 0, 1, 2, 3, 4)).fill_(True),
    "code": lambda: setattr(specvlm.app.job.Job, "code_of", staticmethod(lambda rows: 0)),
    "worst": lambda: setattr(specvlm.errors, "worst", lambda codes: 0),
    "one_line": lambda: setattr(specvlm.errors, "one_line", lambda error: ""),
    "registry": lambda: specvlm.strategies.registry.collect()["pruner"].clear(),
}
for name, patch in OURS.items():
    strategy("drafter", f"patches_{name}", "patches of specvlm", attack=lambda self, ctx, patch=patch: patch())


@proposes("patches of specvlm")
def lies_and_patches_compare(self, ctx, last, tree):
    """Wrong tokens, by the target's cache, and nobody who compares."""
    OURS["compare"](), OURS["judge"]()
    for store in ctx.cache.stores:
        store.values.mul_(0.5)
    return tree


# ---- Python ----------------------------------------------------------------------------------------------------------


def dumps_wrongly():
    before = json.dumps
    json.dumps = lambda value, **other: before({**value, "status": "ok"} if isinstance(value, dict) else value, **other)


PYTHON = {
    "json": dumps_wrongly,
    "len": lambda: setattr(builtins, "len", lambda value, before=len: min(before(value), 5)),
    "max": lambda: setattr(builtins, "max", lambda *args, before=max, **other: before(*args, **other) and 0),
    "print": lambda: setattr(builtins, "print", lambda *args, **other: None),
    "sum": lambda: setattr(builtins, "sum", lambda *args, **other: 0),
    "environment": lambda: os.environ.update(HYDRA_FULL_ERROR="1", SPECVLM_PLUGINS="", OMP_NUM_THREADS="7"),
    "empty_environment": lambda: os.environ.clear(),
    "folder": lambda: os.chdir("/"),
    "handlers": lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)],
    "warnings": lambda: warnings.simplefilter("error"),
    "stdout": lambda: setattr(sys, "stdout", io.StringIO()),
    "stderr": lambda: setattr(sys, "stderr", None),
    "recursion": lambda: sys.setrecursionlimit(300),
    "excepthook": lambda: setattr(sys, "excepthook", lambda *args: None),
    "profile": lambda: sys.setprofile(lambda *args: None),
    "modules": lambda: [sys.modules.pop(name) for name in list(sys.modules) if name.startswith("specvlm.")],
    "gc": gc.disable,
    "random": lambda: random.seed(1),
    "logging": lambda: logging.disable(logging.CRITICAL),
    "argv": lambda: sys.argv.clear(),
    "umask": lambda: os.umask(0o777),
}
for name, change in PYTHON.items():
    strategy("pruner", f"changes_{name}", "globals", attack=lambda self, ctx, change=change: change())


# ---- threads ---------------------------------------------------------------------------------------------------------


def behind(action, every_s=0.002, lasting_s=3.0):
    """Left running beside what comes next."""

    def work():
        end = time.monotonic() + lasting_s
        while time.monotonic() < end:
            action()
            time.sleep(every_s)

    threading.Thread(target=work, daemon=True).start()


@starts("threads")
def edits_weights_behind(self, ctx):
    weight = ctx.target.hf.lm_head.weight.detach().numpy()
    behind(lambda: weight.__imul__(0.9))


@starts("threads")
def edits_the_prompt_behind(self, ctx):
    tokens = ctx.prompt.tokens.numpy()
    behind(lambda: tokens.__setitem__(slice(-8, -2), 3))


@starts("threads")
def edits_the_cache_behind(self, ctx):
    values = ctx.cache.stores[0].values
    behind(lambda: values.mul_(0.9))


@select("threads")
def raises_in_a_thread(self, ctx):
    threading.Thread(target=lambda: sys.exit(3)).start()


# ---- files -----------------------------------------------------------------------------------------------------------


def folder_above():
    return caller("Job").above


def rewrite(change):
    for path in (folder_above() / "baselines").glob("*.json"):
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))


FILES = {
    "tokens": lambda found: found.update(tokens=[3] * len(found["tokens"])),
    "last_token": lambda found: found["tokens"].__setitem__(-1, found["tokens"][-1] + 1),
    "times": lambda found: found.update(times_s={part: 1000.0 for part in found["times_s"]}),
    "types": lambda found: found.update(tokens="12 13 14"),
    "nan": lambda found: found.update(times_s={"verify": float("nan")}),
    "nothing": lambda found: found.update(tokens=[]),
    "beyond": lambda found: found.update(tokens=[10**9, -4]),
    "key": lambda found: found.update(key="0" * 32),
}
for name, change in FILES.items():
    strategy("pruner", f"writes_baselines_{name}", "files", attack=lambda self, ctx, change=change: rewrite(change))


@select("files")
def makes_baselines_a_list(self, ctx):
    for path in (folder_above() / "baselines").glob("*.json"):
        path.write_text("[]")


@select("files")
def removes_baselines(self, ctx):
    for path in (folder_above() / "baselines").glob("*.json"):
        path.unlink()
