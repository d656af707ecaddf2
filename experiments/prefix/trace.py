"""Time calls inside a request, by the host's clock and by events on the GPU, without changing what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from types import GeneratorType
from typing import Any
from unittest.mock import patch

import torch

from specvlm.decoding import draft_prefix, prefill, prefixes
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.selection import Selection
from specvlm.engine import exact_prefill
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.attention import AttentionCollector
from specvlm.models.text_passes import TextPasses
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import DraftPrefill

# Name of a part, and the function or method that it is. Some lie inside others.
PARTS: Sequence[tuple[str, object, str]] = (
    ("keys", prefixes.PrefixStore, "keys"),
    ("match", prefixes.PrefixStore, "_find"),
    ("known_features", prefill.Prefill, "_kept_features"),
    ("copy_rows", prefill.Match, "write"),
    ("module_passes", TextPasses, "prefilling"),
    ("exact_passes", exact_prefill, "run_pass"),
    ("collect", AttentionCollector, "observe"),
    ("keep", prefixes.PrefixStore, "keep"),
    ("copy_prompt", prefill.Prefilled, "copy"),
    ("prune", Selection, "select"),
    ("draft_start", DecodingGraph, "_session"),
    ("draft_features", draft_prefix.ReusedDraftPrefill, "features"),
    ("draft_tower", VideoLM, "features"),
    ("draft_embed", VideoLM, "pruned"),
    ("draft_fill", draft_prefix.ReusedDraftPrefill, "fill"),
    ("draft_fill_anew", DraftPrefill, "fill"),
    ("draft_passes", GraphsEngine, "_draft"),
    ("check", GraphsEngine, "_run_check"),
)


class Trace:
    """Times the calls of PARTS within `on`.

    Args:
        device: Device whose stream is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[str, list[tuple[Any, Any, float]]] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Time calls in this block."""
        with ExitStack() as stack:
            for part, owner, name in PARTS:
                stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
            yield

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        calls = self._found.setdefault(part, [])

        @wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            start, began = self._now(), perf_counter()
            found = call(*args, **named)
            if isinstance(found, GeneratorType):
                return self._driven(found, calls)
            calls.append((start, self._now(), perf_counter() - began))
            return found

        return timed

    def _driven(self, work: Any, calls: list[tuple[Any, Any, float]]) -> Any:
        """Time a generator from its first step to its end."""
        start, began = self._now(), perf_counter()
        found = yield from work
        calls.append((start, self._now(), perf_counter() - began))
        return found

    def _now(self) -> Any:
        """Return the time, or on a GPU an event that will hold it."""
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def take(self) -> dict[str, dict[str, float]]:
        """Return the calls of each part, and their milliseconds on the device's clock and of the host; start anew."""
        found = {}
        for part, calls in self._found.items():
            if calls:
                spans = (self._ms(start, end) for start, end, _ in calls)
                host = sum(seconds for *_, seconds in calls)
                found[part] = {"calls": len(calls), "ms": round(sum(spans), 2), "host_ms": round(1000 * host, 2)}
            calls.clear()
        return found

    def _ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self._device.type == "cuda" else 1000 * (end - start)
