"""Let a draft reuse KV rows and video features that it has computed for earlier requests.

Shape suffixes: N video tokens, F frames of all videos, K kept slots, D hidden size, A rotary axes.
"""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from specvlm.decoding.prefix_keys import PromptKeys
from specvlm.decoding.prefixes import PrefixStore
from specvlm.engine import Engine
from specvlm.models.kept import rows_of, write_rows
from specvlm.models.kv_cache import KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import VIDEO_SIGNALS, DraftPrefill, Pruner
from specvlm.types import Features, KeepSet, VideoPrompt

ALL = 0.75  # once this share of the frames is needed, all are encoded: other questions keep tokens of other frames
STEPS = 256  # most rows of text that the engine runs as it runs steps; more run through Hugging Face's modules


class ReusedDraftPrefill(DraftPrefill):
    """Prefills a draft with what is known from earlier requests, and keeps what is new for later ones.

    Keeps video features, by frame. Keeps the KV rows of the pruned prompt up to its last video if the pruner decides by
    the video alone, so that other questions keep the same tokens. Features of frames that were encoded separately, and
    rows that were computed separately from the question, differ by rounding from those computed together. So if guesses
    can change the output, no rows are reused, and features only for exactly the same frames.

    Args:
        store: Store of features and rows.
        keys: Keys of the request's prompt.
        engine: Runs the text after reused rows.
        pruner: Chooses the tokens to keep.
        free: Whether no guess can change the output.
    """

    def __init__(self, store: PrefixStore, keys: PromptKeys, engine: Engine, pruner: Pruner, free: bool) -> None:
        self._store, self._keys, self._engine, self._free = store, keys, engine, free
        self._rows = free and pruner.needs <= VIDEO_SIGNALS and not pruner.draft_layers

    def features(self, model: VideoLM, prompt: VideoPrompt, keep: KeepSet) -> Tensor | Features:
        wanted_F = frames_of(prompt, keep)
        apart = [] if self._free else [sha256(wanted_F.numpy().tobytes()).hexdigest()]
        key = self._key("draft features", model, [*self._keys.videos, *apart])
        found, seen_F = self._known(key, torch.zeros_like(wanted_F))
        if found is not None and not bool((wanted_F & ~seen_F).any()):
            return found
        if self._free and self._store.keeps and float((wanted_F | seen_F).float().mean()) >= ALL:
            wanted_F = torch.ones_like(wanted_F)
        first_K, new_N = frames_alone(prompt, wanted_F & ~seen_F)
        new = model.features(prompt, KeepSet(first_K, keep.total))
        if found is None:
            found = new
        else:
            new_N = new_N.to(found.device)
            found[new_N] = new[new_N]  # type: ignore[assignment]
        parts = [*((found.rows, found.added) if isinstance(found, Features) else (found,)), wanted_F | seen_F]
        self._store.keep_other(key, lambda: [part.clone() for part in parts], sum(part.nbytes for part in parts))
        return found

    def _known(self, key: bytes, none_F: Tensor) -> tuple[Tensor | Features | None, Tensor]:
        """Return a copy of the features kept under a key, and the frames they cover; without any, None and none_F."""
        if (kept := self._store.other(key)) is None:
            return None, none_F
        *parts, seen_F = kept
        return parts[0].clone() if len(parts) == 1 else Features(*(part.clone() for part in parts)), seen_F

    def fill(
        self, model: VideoLM, inputs: tuple[Tensor | Features, Tensor], cache: KVCache, prompt: VideoPrompt, keep: KeepSet
    ) -> None:
        cut = int((prompt.kept_slots(keep.index) < prompt.cut).sum())
        if not self._rows or keep.pool is not None or not cut:
            return super().fill(model, inputs, cache, prompt, keep)
        embeds_KD, positions_AK = inputs
        chosen = keep.index.cpu().numpy().tobytes() + positions_AK[:, :cut].cpu().contiguous().numpy().tobytes()
        key = self._key("draft rows", model, [self._keys.base.hex(), sha256(chosen).hexdigest()])
        if (kept := self._store.other(key)) is None:
            super().fill(model, inputs, cache, prompt, keep)
            size = cache.nbytes * cut // cache.capacity
            self._store.keep_other(key, lambda: rows_of(cache, 0, cut), size)
            return
        write_rows(cache, kept, 0, 0, cut)
        cache.length, tail_Q = cut, prompt.tokens[prompt.cut :]
        if prompt.text > prompt.cut or len(tail_Q) > STEPS:
            model.prefill(embeds_KD[cut:], positions_AK[:, cut:], cache)
        else:
            cache.offset = int(positions_AK[:, -1].max()) + 1 - len(embeds_KD)
            self._engine.append(model, tail_Q, cache)

    def _key(self, what: str, model: VideoLM, parts: list[str]) -> bytes:
        return sha256(" ".join([what, str(self._store.number(model)), *parts]).encode()).digest()


def frames_of(prompt: VideoPrompt, keep: KeepSet) -> Tensor:
    """Return which frames must be encoded for the kept tokens: (F,) bool, on the host."""
    seen_F, index, start, before = torch.ones(sum(g.frames for g in prompt.grids), dtype=torch.bool), keep.index.cpu(), 0, 0
    for grid in prompt.grids if keep.pool is None else ():
        inside = index[(index >= start) & (index < start + grid.cells)] - start
        seen_F[before : before + grid.frames] = torch.bincount(inside // grid.per_frame, minlength=grid.frames) > 0
        start, before = start + len(grid), before + grid.frames
    return seen_F


def frames_alone(prompt: VideoPrompt, frames_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first token of each chosen frame, and which tokens those frames have, (N,) bool.

    Both are on the host. frames_F: which frames are chosen, bool.
    """
    first, there, start, before = [prompt.video_index[:0]], [frames_F[:0]], 0, 0
    for grid in prompt.grids:
        chosen = frames_F[before : before + grid.frames]
        first.append(start + chosen.nonzero().flatten() * grid.per_frame)
        there += [chosen.repeat_interleave(grid.per_frame), chosen.new_zeros(grid.newline)]
        start, before = start + len(grid), before + grid.frames
    return torch.cat(first), torch.cat(there)
