"""Shared test setup: no hub, no tracker, no plugins of the developer's, and no CUDA tests without CUDA.

A test that takes more than SLOW_S of processor time, its setup and child processes included, is marked `slow`, and
`make quick` skips it. Tests that take longer without the mark are listed at the end of a run. What repeats a test with
more crossings of its options is marked `exhaustive`: `make test` runs a sample that meets each option, `make test-all` all.
"""

import gc
import os
import sys
from dataclasses import replace
from functools import lru_cache, wraps

import pytest

SLOW_S = 0.5
NOTICED_S = 4 * SLOW_S  # the first test of a kind pays for imports, and some processors are slower

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "SPECVLM_PLUGINS": ""}
os.environ.pop("HYDRA_FULL_ERROR", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores already: what they start, and torch here, takes one of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Freeze imported objects, so that the many `gc.collect` calls of tests skip them, and collect rarely otherwise.

    Composing a configuration makes so many objects that the default would spend a tenth of the suite on collecting.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Behind the last test of a file, drop what it cached, and freeze what is left, such as imports.

    Else each of a hundred files would make later collections, and forks of a process of gigabytes, slower.
    """
    if nextitem is not None and item.path != nextitem.path:
        for value in vars(item.module).values():
            if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == item.module.__name__:
                value.cache_clear()
        if "specvlm.app.model_cache" in sys.modules:  # what is frozen stays in memory: models must not
            sys.modules["specvlm.app.model_cache"].MODEL_CACHE.clear()
        gc.collect()
        gc.freeze()


def spent_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = spent_s()
    try:
        return (yield)
    finally:
        if not (item.get_closest_marker("slow") or item.get_closest_marker("gpu")):
            item.user_properties.append(("unmarked_s", spent_s() - before))


def pytest_terminal_summary(terminalreporter):
    reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    costs = {report.nodeid: dict(report.user_properties).get("unmarked_s", 0) for report in reports}
    for name, seconds in costs.items():
        if seconds > NOTICED_S:
            terminalreporter.write_line(f"not marked slow, and took {seconds:.1f} s of the processor: {name}")


@pytest.fixture(autouse=True, scope="session")
def scenes_drawn_once():
    """Give the data set of synthetic scenes copies of clips that were drawn before: the same few hundreds of times."""
    from specvlm.strategies.datasets import synthetic

    drawn = lru_cache(maxsize=16)(synthetic.clip)

    @wraps(synthetic.clip)  # so that another process finds its own by name
    def clip(number):
        found = drawn(number)
        return replace(found, frames=found.frames.clone())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(synthetic, "clip", clip)
        yield


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Make a tokenizer of single bytes, as released models spell rare characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<end>"])
