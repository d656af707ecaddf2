"""Run one configuration over the samples of a data set and append one row per sample."""

import sys
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specvlm.app.baselines import Baseline, Baselines
from specvlm.app.console import RunConsole, not_applied, too_many_ties
from specvlm.app.model_cache import ModelCache
from specvlm.app.placement import places_of
from specvlm.app.prepare import Prepared, read, reads_ahead, set_up
from specvlm.app.readings import Read, Readings
from specvlm.app.request import RequestResult, alone, begin, decode_alone, ran_out, row, speculate, summarize, threads, warm_up
from specvlm.app.samples import unique, writable_meta
from specvlm.app.scoring import Scorer
from specvlm.config import RunConfig, home
from specvlm.decoding.loop import DecodingGraph
from specvlm.errors import ExitCode, JobFailed, MissingVideo, UserError, line, one_line, worst
from specvlm.models import memory_plan
from specvlm.models.kv_cache import pooled
from specvlm.parallel.ranks import SINGLE, ProcessGroup
from specvlm.results import metrics
from specvlm.results.folder import write_attention, write_json, write_yaml
from specvlm.results.mirror import Mirror, Tracking
from specvlm.results.rows import CannotWrite, Rows, is_job, plain, room, rows_of, steps_of, writable
from specvlm.strategies import Dataset, Sample, registry
from specvlm.strategies.fence import contained, inside, is_ours, sizes_of
from specvlm.types import Step


class Job:
    """One configuration over many samples. Call `start`, then `turn` per sample, then `close`.

    A sample that fails gets a row with the reason. Raises errors that concern every sample, such as weights that cannot
    be loaded, and under torchrun also an error while decoding.

    folder: the job's; None on a rank that writes nothing. above: the sweep's folder, which keeps the baselines unless
    cfg.baselines is set. held: loaded models. label, group: names of job and sweep. tracking: None for no tracker.
    """

    quiet = True  # no progress bars, since several jobs share the screen

    def __init__(
        self,
        cfg: RunConfig,
        folder: Path | None,
        above: Path,
        held: ModelCache,
        ranks: ProcessGroup = SINGLE,
        label: str = "",
        group: str = "",
        tracking: Tracking | None = None,
    ) -> None:
        self.cfg, self.folder, self.above, self.held, self.ranks = cfg, folder, above, held, ranks
        self.label, self.group = label, group
        kept = home(cfg.baselines) if cfg.baselines else above / "baselines"
        self.screen, self.failure = RunConsole(quiet=self.quiet), ""
        self.left: Callable[[], str] = str  # estimated time left for the whole sweep
        self.baselines = Baselines(kept if folder else None, ranks, self.screen.note)
        self.mirror = Mirror(tracking)
        self.rows: Rows | None = None
        self._own = object()  # stands for this job in keys
        self._told: set[str] = set()  # notes and reasons printed so far
        self._rounds: list[dict[str, Any]] = []  # rounds of the last sample

    def start(self) -> None:
        """Check everything that needs no weights, open the folder and find the samples to answer. Raises UserError."""
        cfg = self.cfg
        self.setup = set_up(cfg, places_of(cfg))
        self.dataset: Dataset = registry.build("dataset", cfg.dataset)
        self.samples, self.scorer = unique(self.dataset), Scorer(cfg, self.dataset, self._note)
        self.ids = {sample.id for sample in self.samples}
        which, _, of = (cfg.shard or "").partition("/")  # checked by `config.validate`
        self.shard = (int(which), int(of)) if cfg.shard else None
        if self.folder:
            room(self.folder, len(self.shard_indices), cfg.max_new_tokens)
            if self.baselines.folder:
                room(self.baselines.folder, len(self.shard_indices), cfg.max_new_tokens)
        rows = self.rows = Rows(cfg, self.folder, self.shard)
        done = self.ranks.share(lambda: rows.done)
        self.todo = [index for index in self.shard_indices if self.samples[index].id not in done]
        name, shard = self.label or self.dataset.name, cfg.shard if self.shard else None
        self.screen.job(name, len(self.shard_indices) - len(self.todo), len(self.shard_indices), shard)
        if gone := len(done - self.ids):
            self._note(f"{gone} samples in {self.folder} are no longer in the data set: their rows stay, and are not counted")
        self._mirror()

    @property
    def shard_indices(self) -> range:
        """Indices in the data set of the samples that this process answers."""
        which, of = self.shard or (0, 1)
        return range(which, len(self.samples), of)

    def turn(
        self, index: int, readings: Readings, order: int | None = None, read_next: Callable[[], None] = lambda: None
    ) -> None:
        """Answer one sample, unless it is done.

        Args:
            index: Index of the sample in the data set.
            readings: Readings shared with other jobs.
            order: Position of this job among the jobs that answer this sample; kept in the row.
            read_next: Starts to read the next sample. Called after this one is read, if the job reads ahead.

        Raises:
            JobFailed: fail_fast is set, and the sample failed or its output is wrong.
            Exception: Any error that concerns every sample.
        """
        if index not in self.todo:
            return
        with threads(self.cfg.threads):
            found = self._sample(index, readings, read_next) | {"order": order}
        assert self.rows is not None
        self.rows.end(found)
        self.todo.remove(index)
        count = f"{len(self.shard_indices) - len(self.todo)}/{len(self.shard_indices)}"
        self.screen.sample(self.label, count, found, self.left())
        self.mirror.sample(found, self._rounds if found["status"] == "ok" else [])
        if self.cfg.fail_fast and self.code_of([found]):
            raise JobFailed(self.code_of([found]))

    def key(self, index: int) -> Hashable:
        """Cache key of a sample's reading: equal for jobs with the same data set, target and way to read it."""
        cfg, target = self.cfg, self.setup.target
        shown = (cfg.frames, cfg.fps, cfg.max_pixels, cfg.reader)
        return (registry.described(self.dataset), index, *shown, type(target), target.folder)

    def read(self, index: int) -> Read:
        """Return a function that reads the sample's video and makes the prompt."""
        return partial(read, self.setup, self.samples[index], self.held.videos)

    def close(self) -> int:
        """Write the totals and release the folder. Returns the worst exit code of this shard's rows, OK if none."""
        if self.rows is None:
            return ExitCode.OK
        self.rows.close()
        self.rows = None
        if self.folder is None:
            return ExitCode.OK
        totals = self._summarize(self.folder)
        self._note(too_many_ties(totals.get("ties")))
        mine = {self.samples[index].id for index in self.shard_indices}
        code = self.code_of([row for row in rows_of(self.folder) if row["sample"] in mine])
        self.mirror.finish(totals, worst([code, ExitCode.FAILED if self.failure else code]))
        return code

    def fail(self, error: BaseException) -> dict[str, Any]:
        """Abandon the job and return its summary. Writes it if the job has not started and its folder has no rows."""
        self.failure, self.todo = one_line(error), []
        found = {"status": "failed", "reason": self.failure, "dataset": self.cfg.dataset.name}
        if self.rows is None and self.folder and not is_job(self.folder):
            with suppress(OSError):
                write_yaml(self.folder / "config.yaml", plain(self.cfg))
                write_json(self.folder / "summary.json", found)
        return found

    @staticmethod
    def code_of(rows: Sequence[dict[str, Any]]) -> int:
        """Worst exit code over these rows."""

        def of(row: dict[str, Any]) -> int:
            if row["status"] == "failed":
                return ExitCode.FAILED
            wrong = any((row.get(key) or "").startswith("MISMATCH") for key in ("verdict", "hf_check"))
            return ExitCode.MISMATCH if wrong else ExitCode.OK

        return worst(map(of, rows))

    def _sample(self, index: int, readings: Readings, read_next: Callable[[], None]) -> dict[str, Any]:
        """Answer one sample and write its rounds. Returns its row, without `order`."""
        assert self.rows is not None
        sample, record = self.samples[index], RequestResult()
        self.rows.begin()
        request, status, reason = None, "failed", "another rank could not prepare it"
        try:
            with contained():
                reading = readings.get(self.key(index), self.read(index))
                if reads_ahead(self.cfg, self.setup.places):
                    read_next()
                request = self.held.plan(self.setup, reading)
        except MissingVideo as error:
            status, reason = "skipped", one_line(error)
        except Exception as error:
            reason = self._reason(error, sample)
        if not self._all(request is not None) or request is None:
            return self._row(index, status, reason)
        graph = self._graph(request, record)  # an error here concerns every sample
        try:
            with contained():
                figures = self._answer(index, request, graph, record)
        except CannotWrite:
            raise
        except Exception as error:
            if self.ranks.size > 1:
                raise  # the other ranks do not know of it, and would wait
            full = isinstance(error, RuntimeError) and memory_plan.ran_out(error)
            if full:
                error = ran_out(request, record)
            reason = self._reason(error, sample)
            self._recover(request, full)
            return self._row(index, "failed", reason) | {"out_of_memory": record.stage if full else None}
        return self._row(index, "ok", None) | figures

    def _all(self, mine: bool) -> bool:
        """Whether a condition holds on every rank."""
        device = self.setup.places.first
        return mine if self.ranks.size == 1 else not self.ranks.sum(torch.tensor([float(not mine)], device=device)).item()

    def _mirror(self) -> None:
        """Start the mirror and log the rows that are ok already. Skips a complete job: it was mirrored before."""
        if self.folder and self.todo:
            part = f"{self.label or self.dataset.name} {self.cfg.shard or ''}".strip()
            self.mirror.begin(part, self.group or self.above.name, self.above, plain(self.cfg))
            if self.mirror.run is None:
                return
            rounds, mine = steps_of(self.folder), {self.samples[index].id for index in self.shard_indices}
            for found in rows_of(self.folder):
                if found["sample"] in mine and found["status"] == "ok":
                    self.mirror.sample(found, rounds[found["sample"]])

    def _note(self, line: str) -> None:
        """Print a note, unless it is empty or this job has printed it before."""
        if line and line not in self._told:
            self._told.add(line)
            self.screen.note(line)

    def _graph(self, request: Prepared, record: RequestResult) -> DecodingGraph:
        """Load the models, build the graph of a request, and print the notes of target and engine."""
        graph = self.held.graph(request, self.ranks, self._own)
        self._note(not_applied(graph.target.ignored_settings))
        self._note(graph.target.left_full)
        self._note(graph.engine.note)
        record.captured_s = graph.engine.capture_s
        return graph

    def _answer(self, index: int, request: Prepared, graph: DecodingGraph, record: RequestResult) -> dict[str, Any]:
        """Decode a request. Returns the metrics of its row."""
        self._decode(index, request, graph, record)
        record.peak_bytes = max(map(memory_plan.peak_bytes, request.places.devices))
        summary, _ = summarize(request, graph, record)
        figures = {key: value for key, value in summary.items() if key not in metrics.OF_JOB}
        grids = [(grid.frames, grid.height, grid.width, grid.newline) for grid in request.prompt.grids]
        kept = next((step.keep.index.tolist() for step in reversed(record.steps) if step.keep is not None), None)
        figures |= self.scorer.row(self.samples[index], figures, request.target.tokenizer)
        return figures | {"kept": kept, "grids": grids, "baseline": record.baseline.key if record.baseline else None}

    def _decode(self, index: int, request: Prepared, graph: DecodingGraph, record: RequestResult) -> None:
        """Get the baseline, if wanted, before any strategy runs in this request; then decode with the drafter."""
        begin(request, graph, record)
        if self.cfg.baseline:
            record.baseline = self._baseline(request, graph, record)
        with self.held.guard(graph):
            self._warm_up("drafted", graph.decode(request.prompt), request, graph, record)
            self._stream(index, request, graph, record)

    def _stream(self, index: int, request: Prepared, graph: DecodingGraph, record: RequestResult) -> None:
        """Decode with the drafter and write each round."""
        assert self.rows is not None
        self._rounds = []
        for number, step in enumerate(speculate(request, graph, record)):
            self._rounds.append({"sample": self.samples[index].id} | row(number, step))
            self.rows.step(self._rounds[-1])
            if step.attention is not None and self.folder:
                with writable(self.folder):
                    write_attention(self.folder, index, step.attention)
            if step.keep is not None:
                self._note(step.keep.note)

    def _warm_up(self, way: str, steps: Iterator[Step], request: Prepared, graph: DecodingGraph, record: RequestResult) -> None:
        """Warm up with the first few of `steps`, unless an earlier warm-up is still valid. way: "drafted" or "alone".

        It is not if this request needs larger caches, or if another job or a comparison of outputs has replaced the
        caches that graphs were captured with. A warm-up by another job of this process counts if models, options and
        strategies are the same. All ranks warm up if one needs to, since rank 0 may be the only one with a draft.
        """
        most, _ = sizes_of(self.setup.drafter)
        slots = pooled(len(request.prompt) + self.cfg.max_new_tokens + most)
        what = (way, self.cfg.engine, torch.get_num_threads(), graph.target, *self._decoded_by(graph, way == "drafted"))
        warm, changes = self.held.warm.get(what, (0, 0))
        eager = graph.engine.runs(graph.target) == "eager"
        if not self._all(slots <= warm and (eager or graph.caches.changes == changes)):
            with self.screen.waiting("warming up"):
                warm_up(steps, record, graph)
            self.held.warm[what] = (slots, graph.caches.changes)

    def _decoded_by(self, graph: DecodingGraph, drafted: bool) -> tuple[Hashable, ...]:
        """Return what decodes, for a warm-up's key. A job with a plugin, which may read anything, shares no warm-up."""
        if not drafted:
            return repr(graph.sampling), graph.options.repetition_penalty
        strategies = (graph.pruner, graph.drafter, graph.verifier)
        own = tuple(map(registry.described, strategies)) if all(map(is_ours, strategies)) else self._own
        return graph.draft, own, replace(graph.options, max_new_tokens=1, seed=0)

    def _alone(self, request: Prepared, graph: DecodingGraph, record: RequestResult) -> list[Step]:
        """Warm up if needed and decode with the target alone."""
        self._warm_up("alone", alone(request, graph), request, graph, record)
        with self.screen.progress("the target on its own", self.cfg.max_new_tokens) as advance:
            return decode_alone(request, graph, record, advance)

    def _baseline(self, request: Prepared, graph: DecodingGraph, record: RequestResult) -> Baseline:
        """Read the baseline if an earlier one is kept, else decode it and keep it."""
        weights = self.held.weights[graph.target]
        with writable(self.baselines.folder):
            return self.baselines.get(request, graph, weights, lambda: self._alone(request, graph, record))

    def _row(self, index: int, status: str, reason: str | None) -> dict[str, Any]:
        """Build a row with all keys except `order`; metrics are None."""
        sample, dataset = self.samples[index], self.dataset
        asked = {"question": sample.question, "options": sample.options, "answer": sample.answer, "meta": writable_meta(sample)}
        with inside(dataset):
            of = {"dataset": dataset.name, "split": str(dataset.split), "version": str(dataset.version)}
        figures = dict.fromkeys([*(key for key in metrics.KEYS if key not in metrics.OF_JOB), "kept", "grids", "baseline"])
        return {"sample": sample.id, "index": index, **of, "status": status, "reason": reason, **asked, **figures}

    def _reason(self, error: BaseException, sample: Sample) -> str:
        """Return the reason of a failed sample for its row. Prints the traceback of a bug, once per reason."""
        reason = one_line(error)
        if not isinstance(error, UserError) and reason not in self._told:
            self._told.add(reason)
            print(line(f"specvlm: {sample.id} of {self.label or self.dataset.name} fails:"), file=sys.stderr)
            traceback.print_exception(error)
        return reason

    def _recover(self, request: Prepared, full: bool) -> None:
        """After a failed sample, free memory if it ran out (`full`). Raises the error of a GPU that no longer works."""
        if full:
            self.held.release_memory()
        for device in request.places.devices:
            if device.type == "cuda":
                torch.zeros(1, device=device).item()

    def _summarize(self, folder: Path) -> dict[str, Any]:
        """Write and return the totals. Repeats until no row is new, since several shards may end together."""
        seen, found = -1, dict[str, Any]()
        with writable(folder):
            while seen != len(rows := [row for row in rows_of(folder) if row["sample"] in self.ids]):
                seen = len(rows)
                found = metrics.totals(rows, len(self.samples)) | {"dataset": self.dataset.name, "metrics": self.scorer.sources}
                if self.failure:
                    found |= {"status": "failed", "reason": self.failure}
                parts = {kind: registry.described(getattr(self.setup, kind)) for kind in ("pruner", "drafter", "verifier")}
                write_json(folder / "summary.json", found | {"strategies": parts, "versions": metrics.versions()})
        return found
