"""Caches for features and passes of a model, for tests that decode the same video hundreds of times."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import pytest
import torch
from torch import Tensor

from specvlm.app import model_cache
from specvlm.app.baselines import fingerprint
from specvlm.models.pauses import Pause
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import ProcessGroup
from specvlm.types import Features, VideoPrompt


def remember_features(lm: VideoLM, known: dict[Hashable, Tensor | Features] | None = None) -> VideoLM:
    """Make `lm` encode each video once. Prompts are compared by content, since strategies get copies.

    It changes `lm`: pass a copy of a model that other tests use.

    known: Shared with other models of the same weights.
    """
    known = {} if known is None else known

    def features(prompt: VideoPrompt, keep=None, sight=None, compute=lm.features):
        if sight is not None:
            return compute(prompt, keep, sight)
        key = tuple(contents(prompt.videos))
        if key not in known:
            known[key] = compute(prompt)  # of all frames, whatever is kept: a row does not depend on other frames
        return known[key][torch.arange(len(known[key]))]  # a copy

    def encoding(prompt: VideoPrompt, number: int, sight=None, compute=lm.encoding):
        if sight is not None:
            return (yield from compute(prompt, number, sight))
        key = tuple(contents(prompt.videos[number : number + 1]))
        if key not in known:
            known[key] = yield from compute(prompt, number)
        else:
            yield Pause(lm.device)
        return known[key][torch.arange(len(known[key]))]

    lm.features, lm.encoding = features, encoding
    return lm


_KNOWN: dict[Hashable, dict[Hashable, Tensor | Features]] = {}


@contextmanager
def videos_encoded_once() -> Iterator[None]:
    """Let the command line's models encode each video once per process: hundreds of commands ask about the same scenes."""
    real = model_cache.load

    def loading(path, dtype, device, mrope, weights, *rest, **named):
        lm = real(path, dtype, device, mrope, weights, *rest, **named)
        shared = any(isinstance(one, ProcessGroup) and one.size > 1 for one in (*rest, *named.values()))
        return lm if shared else remember_features(lm, _KNOWN.setdefault((fingerprint(path), dtype, weights), {}))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model_cache, "load", loading)
        yield
    model_cache.MODEL_CACHE.clear()


def remember_passes(lm: VideoLM, least: int = 1) -> VideoLM:
    """Make `lm` run each pass of at least so many rows once.

    A pass depends on its rows, their positions and mask, and the cache before them. If these are equal byte by byte,
    so are its result and what it writes. Passes with guidance are run each time.
    """
    known: dict[Hashable, tuple[Tensor, list[Tensor]]] = {}

    def layers(embeds_QD, positions_AQ, cache, mask_QK, collector, states, compute=lm._layers):
        if collector is not None or states is not None or len(embeds_QD) < least:
            return (yield from compute(embeds_QD, positions_AQ, cache, mask_QK, collector, states))
        start, end = cache.length, cache.length + len(embeds_QD)
        stores, seen = [tensor for store in cache.stores for tensor in store], sha256()
        masked = [] if mask_QK is None else [mask_QK]
        rows = [embeds_QD.rows, embeds_QD.added] if isinstance(embeds_QD, Features) else [embeds_QD]
        for tensor in (*rows, positions_AQ, *masked, *(tensor[:, :, :, :start] for tensor in stores)):
            seen.update(tensor.numpy().tobytes())
        key = (start, end, len(masked), seen.digest())
        if key not in known:
            hidden_QD = yield from compute(embeds_QD, positions_AQ, cache, mask_QK, None, None)
            known[key] = hidden_QD, [tensor[:, :, :, start:end].clone() for tensor in stores]
            return hidden_QD.clone()
        hidden_QD, written = known[key]
        for tensor, values in zip(stores, written, strict=True):
            tensor[:, :, :, start:end] = values
        cache.advance(end - start)
        return hidden_QD.clone()

    lm._layers = layers  # of `forward` and of `prefilling`
    return lm


def contents(value: Any) -> Iterator[Hashable]:
    """List every value in an object, in order: tensors as bytes, other objects by their type only."""
    if isinstance(value, Tensor):
        yield str(value.dtype), tuple(value.shape), value.contiguous().cpu().numpy().tobytes()
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from contents(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from contents(part)
    else:
        yield value if isinstance(value, (int, float, str, bool, type(None))) else type(value)
