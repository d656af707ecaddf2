"""Let a draft reuse rows and features that it has computed for earlier requests.

Shape suffixes: K kept slots, D hidden size.
"""

from __future__ import annotations

from hashlib import sha256

from torch import Tensor

from specvlm.decoding.prefix_keys import PromptKeys
from specvlm.decoding.prefixes import PrefixStore
from specvlm.models.kept import rows_of, write_rows
from specvlm.models.kv_cache import KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import VIDEO_SIGNALS, DraftPrefill, Pruner
from specvlm.types import Features, KeepSet, VideoPrompt


class ReusedDraftPrefill(DraftPrefill):
    """Keeps a draft's video features, and its rows of the pruned video if other questions will keep the same tokens.

    Rows that are computed apart from the question round otherwise. So they are reused only where a guess cannot change
    the output.

    Args:
        store: Store for both.
        keys: Keys of the request's prompt.
        pruner: Chooses the tokens to keep.
        free: Whether no guess can change the output.
    """

    def __init__(self, store: PrefixStore, keys: PromptKeys, pruner: Pruner, free: bool) -> None:
        self._store, self._keys = store, keys
        self._rows = free and pruner.needs <= VIDEO_SIGNALS and not pruner.draft_layers

    def features(self, model: VideoLM, prompt: VideoPrompt, keep: KeepSet) -> Tensor | Features:
        key = self._key("draft features", model, [*self._keys.videos, frames_of(prompt, keep)])
        if (kept := self._store.other(key)) is not None:
            return kept[0].clone() if len(kept) == 1 else Features(*(part.clone() for part in kept))
        found = model.features(prompt, keep)
        parts = (found.rows, found.added) if isinstance(found, Features) else (found,)
        self._store.keep_other(key, lambda: [part.clone() for part in parts], sum(part.nbytes for part in parts))
        return found

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
        cache.length = cut
        model.prefill(embeds_KD[cut:], positions_AK[:, cut:], cache)

    def _key(self, what: str, model: VideoLM, parts: list[str]) -> bytes:
        return sha256(" ".join([what, str(self._store.number(model)), *parts]).encode()).digest()


def frames_of(prompt: VideoPrompt, keep: KeepSet) -> str:
    """Tell which frames are encoded for the kept tokens: a digest of theirs, or "all"."""
    if keep.pool is not None:
        return "all"
    found, start = list[str](), 0
    for grid in prompt.grids:
        inside = keep.index[(keep.index >= start) & (keep.index < start + grid.cells)] - start
        frames = (inside // grid.per_frame).unique()
        found.append("all" if len(frames) == grid.frames else str(frames.tolist()))
        start += len(grid)
    return "all" if set(found) <= {"all"} else sha256(" ".join(found).encode()).hexdigest()
