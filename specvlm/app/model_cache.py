"""Keep models, KV caches and engines from one run of a process to the next."""

import gc
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from specvlm.app.baselines import fingerprint
from specvlm.app.prepare import KEPT, Prepared, Reading, Setup, plan
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefix_budget import host_bytes
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.watch import blame, compared
from specvlm.engine import Engine, engine_for
from specvlm.errors import StrategyError, UserError
from specvlm.models.integrity import CODE, Snapshot, structure, weights_of
from specvlm.models.known_videos import KnownVideos
from specvlm.models.kv_cache import CachePool
from specvlm.models.load import load, skeleton
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import SINGLE, ProcessGroup
from specvlm.process.memo import restored
from specvlm.strategies import Strategy
from specvlm.strategies.fence import THIRD_PARTY_CALLS, is_ours


class ModelCache:
    """Holds one target, the drafts used with it, and their caches and engines.

    `plan` drops all of them if the request is for another target.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop everything, models included."""
        self.caches = CachePool()
        self.prefixes: PrefixStore | None = None
        self.owner: object = None  # the job whose samples left what `prefixes` keeps
        self.videos = KnownVideos()
        self.models: dict[Hashable, VideoLM] = {}
        self.weights: WeakKeyDictionary[VideoLM, int] = WeakKeyDictionary()  # checksum at load time
        self.structures: WeakKeyDictionary[VideoLM, dict[str, Any]] = WeakKeyDictionary()  # structure at load time
        self.layers: list[int] = []  # number of the target's layers on each device, if split
        self.calls = THIRD_PARTY_CALLS.calls  # number of plugin calls at the last check of the models
        self.release_memory()

    def release_memory(self) -> None:
        """Drop KV caches, kept prompts and engines but no models, for example after a request ran out of memory."""
        self.caches.empty()
        self.prefixes = None
        self.engines: dict[Hashable, Engine] = {}
        # What was warmed up -> (cache slots, `caches.changes` after the warm-up).
        self.warm: dict[Hashable, tuple[int, int]] = {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def target_of(self, setup: Setup) -> Hashable:
        """Cache key of the target: equal for setups that can share one loaded target."""
        return _key(setup, "target")

    def plan(self, setup: Setup, reading: Reading) -> Prepared:
        """Plan the memory of a request. If memory does not suffice, drop models that it does not use and plan again.

        Raises UserError if it still does not suffice.
        """
        target, draft = (_key(setup, side) for side in ("target", "draft"))
        if target not in self.models:
            self.clear()
        try:
            return plan(setup, reading, self._reusable(setup, (target, draft)), self.layers)
        except UserError:
            if not self.models.keys() - {target, draft}:
                raise
            self.models = {key: model for key, model in self.models.items() if key in (target, draft)}
            self.release_memory()
            return plan(setup, reading, self._reusable(setup, (target, draft)), self.layers)

    def _reusable(self, setup: Setup, keys: tuple[Hashable, ...]) -> dict[torch.device, int]:
        """Return, per device, the bytes that a request uses again: models with these keys, all caches, kept prompts."""
        mine = [self.models[key] for key in keys if key in self.models]
        kept = 0 if self.prefixes is None else self.prefixes.shelf.nbytes() // len(setup.places.target)
        kept_on = {d: kept if d in setup.places.target else 0 for d in setup.places.devices}
        return {
            d: sum(model.bytes_on(d) for model in mine) + self.caches.bytes_on(d) + kept_on[d] for d in setup.places.devices
        }

    def graph(self, request: Prepared, ranks: ProcessGroup = SINGLE, owner: object = None) -> DecodingGraph:
        """Build the graph of a request, loading the models that are not held.

        If only rank 0 holds the draft, it is a skeleton (a model without weights) on the other ranks.

        Args:
            request: The request, from `plan`.
            ranks: The ranks that share the target.
            owner: The job. Prompts that another job has kept are dropped, since they would make this one faster.
        """
        self._restore_shared_state()
        cfg, places, progress = request.cfg, request.places, ranks.rank == 0
        layers = list(zip(request.layers, places.target, strict=True)) if request.layers else []

        def load_target() -> VideoLM:
            options = (cfg.dtype, str(places.first), cfg.mrope, cfg.target.weights)
            return load(model_folder(cfg.target.path), *options, progress, layers, ranks)

        def load_draft() -> VideoLM:
            folder, options = model_folder(cfg.draft.path), (cfg.dtype, str(places.draft), cfg.mrope, cfg.draft.weights)
            if ranks.rank and not places.draft_shared:
                return skeleton(folder, cfg.mrope)
            return load(folder, *options, progress, ranks=ranks if places.draft_shared else SINGLE)

        target = self._model(_key(request, "target"), load_target)
        self.layers = request.layers
        draft = self._model(_key(request, "draft"), load_draft) if request.drafter.model == "draft" else None
        if places.first.type == "cuda":
            torch.cuda.set_device(places.first)  # graph capture and kernel launches use the current device
        engine = self.engines.setdefault((cfg.engine, places.first), engine_for(cfg.engine, places.first))
        strategies = (request.pruner, request.drafter, request.verifier)
        kept = self._kept(sum(plan.parts.get(KEPT, 0) for plan in request.plans.values()), places.target, owner)
        return DecodingGraph(target, draft, *strategies, request.options, request.vocabulary, self.caches, engine, kept)

    def _kept(self, size: int, devices: Sequence[torch.device], owner: object) -> PrefixStore | None:
        """Return the store of kept prompts, limited to `size` bytes; None if prompts are not kept."""
        if owner is not self.owner or self.prefixes is None:
            self.prefixes, self.owner = PrefixStore(size, host_bytes(devices)), owner
        self.prefixes.resize(size)
        return self.prefixes if size else None

    def _restore_shared_state(self) -> None:
        """Undo changes that strategies made outside of a request, such as in constructors.

        Drops everything if a model has changed.
        """
        if CODE.watched:
            CODE.look()
            CODE.undo()
        changed = any(structure(model) != found for model, found in self.structures.items())
        # Checksums of all weights take a while: compute them only if a plugin has run.
        if not changed and THIRD_PARTY_CALLS.calls > self.calls:
            changed = any(weights_of(model) != found for model, found in self.weights.items())
        if changed:
            self.clear()
        restored()
        self.calls = THIRD_PARTY_CALLS.calls

    def _model(self, key: Hashable, make: Callable[[], VideoLM]) -> VideoLM:
        """Return the held model of this key; load it if there is none."""
        if key not in self.models:
            model = make()
            self.weights[model], self.structures[model] = weights_of(model), structure(model)
            self.models[key] = model
        return self.models[key]

    @contextmanager
    def guard(self, graph: DecodingGraph) -> Iterator[None]:
        """Guard models, caches and code while strategies run: undo their changes, or drop everything if that fails.

        Also drops everything if a plugin started a thread that may still run.

        Raises:
            StrategyError: A strategy changed something that other requests use, and the request raised nothing itself.
        """
        models = [model for model in (graph.target, graph.draft) if model is not None]
        snapshot = Snapshot(CODE, models, [self.weights[model] for model in models], graph.caches, graph.engine)
        threads, foreign = set(threading.enumerate()), any(not is_ours(one) for one in _strategies(graph))
        failed = True
        try:
            yield
            failed = False
        finally:
            undone, spoilt = compared(snapshot)
            if spoilt or (foreign and not set(threading.enumerate()) <= threads):
                self.clear()  # a thread that is still running may hold references
            self.calls = THIRD_PARTY_CALLS.calls
            if (undone or spoilt) and not failed:
                raise StrategyError(blame(_strategies(graph), [*undone, *spoilt]))


def _strategies(graph: DecodingGraph) -> tuple[Strategy, ...]:
    return graph.pruner, graph.drafter, graph.verifier


# The cache of this process. Tensor-parallel runs use their own: a process group does not outlive its run.
MODEL_CACHE = ModelCache()


def _key(setup: Setup, side: str) -> Hashable:
    """Cache key of a loaded model; None for a draft that is not used. side: "target" or "draft"."""
    model = setup.target if side == "target" else setup.draft
    if model is None:
        return None
    cfg, places = setup.cfg, setup.places
    where = places.target if side == "target" else places.draft
    return (side, model.folder, fingerprint(model.folder), cfg.dtype, cfg.mrope, setup.kinds[side], places.parallel, where)
