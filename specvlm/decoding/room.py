"""Compute the memory that a request needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specvlm.decoding.collect import held_bytes
from specvlm.decoding.loop import DecodingGraph
from specvlm.engine.batch import bytes_for
from specvlm.models.kv_cache import pooled
from specvlm.models.memory_plan import Need, kv_bytes
from specvlm.models.video_lm import VideoLM
from specvlm.strategies.fence import needs_of, sizes_of
from specvlm.types import GenerationOptions, VideoPrompt


def needs_for(
    graph: DecodingGraph,
    prompt: VideoPrompt,
    options: GenerationOptions,
    dtypes: Mapping[str, torch.dtype],
    kinds: Mapping[str, str | None],
    ranks: int = 1,
    joined: bool = False,
) -> list[Need]:
    """Return the memory needs (`Need`) of the target and, if a model drafts, of that model.

    Args:
        graph: Models and strategies. The models may be skeletons.
        prompt: The request's prompt.
        options: The request's options.
        dtypes: Dtype of "target" and "draft".
        kinds: Quantisation of "target" and "draft", or None.
        ranks: Number of processes that share the target.
        joined: Whether passes of several requests are captured.
    """
    target, pruner, drafter = graph.target, graph.pruner, graph.drafter
    nodes, rows = sizes_of(drafter)
    slots, total = len(prompt) + options.max_new_tokens + nodes, len(prompt.video_index)
    kept = graph.budget(prompt, options.ratio)
    pruned = slots - total + kept + rows - nodes
    if pruner.draft_layers and 0 < kept < total:
        pruned = max(pruned, len(prompt))  # its signal needs a draft pass over the whole prompt
    asked = needs_of(pruner) | needs_of(drafter)
    signals = held_bytes(asked, graph.verifier.reads_hidden, target, total, dtypes["target"], ranks)
    found = [_need(target, slots, dtypes["target"], kinds.get("target"), signals, joined)]
    if drafter.model is not None:
        side = drafter.model
        model = target if side == "target" else graph.draft
        assert model is not None
        found.append(_need(model, pruned, dtypes[side], kinds.get(side), 0, joined))
    return found


def _need(model: VideoLM, slots: int, dtype: torch.dtype, kind: str | None, signals: int, joined: bool) -> Need:
    """Make the need of a model. joined: add the memory of captured passes that requests share."""
    return Need(model, slots, dtype, kind, signals, bytes_for(model, slots, dtype) if joined else 0)


def cache_bytes(graph: DecodingGraph, prompt: VideoPrompt, options: GenerationOptions | int | None = None) -> int:
    """Return the bytes of KV caches that a request leases from its graph's pool, for a `Scheduler` with `room`.

    An upper bound for the drafters of specvlm. A plugin's drafter may take more caches.

    options: As in `DecodingGraph.work`.
    """
    dtypes = {side: model.dtype for side, model in (("target", graph.target), ("draft", graph.draft)) if model is not None}
    target, *drafting = needs_for(graph, prompt, graph.options.asked(options), dtypes, {})
    slots = [(target.model, target.slots), *((need.model, need.slots + 2) for need in drafting)]  # the root, and one before
    return sum(kv_bytes(model, pooled(most), model.dtype) for model, most in slots)
