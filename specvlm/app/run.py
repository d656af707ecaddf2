"""Run one sample and show its answer as it is decoded."""

import json
from pathlib import Path
from typing import Any

from specvlm.app.baselines import Baseline
from specvlm.app.hf_check import check_run
from specvlm.app.job import Job
from specvlm.app.model_cache import MODEL_CACHE, ModelCache
from specvlm.app.placement import places_of
from specvlm.app.prepare import Prepared, own_sample, read, set_up
from specvlm.app.request import RequestResult, ran_out, row, speculate, summarize, threads
from specvlm.config import RunConfig, plain
from specvlm.decoding.loop import DecodingGraph
from specvlm.models import memory_plan
from specvlm.parallel.ranks import joined
from specvlm.results import metrics
from specvlm.results.folder import check_there, files_of, steps_file, write_attention, write_json, write_yaml
from specvlm.results.rows import writable
from specvlm.strategies.fence import contained


def run(cfg: RunConfig, folder: Path) -> int:
    """Answer one question about one video and write the run's folder.

    Under torchrun every rank runs this; only rank 0 prints and writes.

    Args:
        cfg: The checked configuration.
        folder: Folder of the run.

    Returns:
        The exit code: 1 on MISMATCH, else 0.

    Raises:
        UserError: The configuration or the input cannot be used, or the folder cannot be written.
        StrategyError: A strategy broke a rule.
        OutOfMemory: Memory ran out. If that was after loading, the tokens decoded until then are written.
    """
    places, record = places_of(cfg), RequestResult()
    if places.ranks == 1:
        with contained():
            return Run(cfg, folder, folder, MODEL_CACHE).answer(record)
    with joined(places.first, lambda: record.save()) as ranks:
        return Run(cfg, folder if ranks.rank == 0 else None, folder, ModelCache(), ranks).answer(record)


class Run(Job):
    """A job of one sample, whose video and question the configuration gives.

    Raises the errors that a job over samples would note in a row.
    """

    quiet = False

    def answer(self, record: RequestResult) -> int:
        """Read the video, decode, write the files and print the answer; returns the exit code."""
        with threads(self.cfg.threads):
            self.setup = set_up(self.cfg, places_of(self.cfg))
            request = self.held.plan(self.setup, read(self.setup, own_sample(self.cfg)))
            self.screen.plan(request)
            summary = self._written(request, record)
        if self.folder:
            self.screen.summary(summary, self.folder)
            if summary["hf_check"] is None:
                self._check(request, summary, self.folder)
        return self.code_of([{"status": "ok"} | summary])

    def _written(self, request: Prepared, record: RequestResult) -> dict[str, Any]:
        """Load the models, decode and write summary.json; returns the summary.

        If memory runs out, saves the tokens decoded until then, if there are any, and raises OutOfMemory.
        """
        done = ""
        try:
            graph = self._graph(request, record)
            with files_of(self.folder):
                record.save = lambda: self._save(request, graph, record)
                try:
                    self._decode(0, request, graph, record)
                    self._note(next((step.keep.note for step in record.steps if step.keep is not None), ""))
                    summary = summarize(request, graph, record)[0]
                except RuntimeError as error:
                    done = record.save() if memory_plan.ran_out(error) else ""
                    raise
                if self.folder:
                    write_json(self.folder / "summary.json", summary)
        except RuntimeError as error:
            if not memory_plan.ran_out(error):
                raise
            raise ran_out(request, record, done) from error
        record.save = str
        return summary

    def _check(self, request: Prepared, summary: dict[str, Any], folder: Path) -> None:
        """Check the answer with Hugging Face's own model and add the verdict to summary.json.

        Drops the loaded models first, to make room.
        """
        with self.screen.waiting(f"check={self.cfg.check}"):
            summary |= check_run(self.held, request, summary["token_ids"])
        with writable(folder):
            write_json(folder / "summary.json", summary)
        self.screen.checked(summary)

    def _stream(self, index: int, request: Prepared, graph: DecodingGraph, record: RequestResult) -> None:
        """Decode with the drafter; write and print each step."""
        if self.folder:  # not earlier: a run that cannot start must leave nothing behind
            write_yaml(self.folder / "config.yaml", plain(self.cfg))
        with steps_file(self.folder) as log, self.screen.answer(request.target.tokenizer) as show:
            for number, step in enumerate(speculate(request, graph, record)):
                log.write(json.dumps(row(number, step)) + "\n")
                log.flush()
                check_there(log)
                if step.attention is not None:
                    write_attention(self.folder, index, step.attention)
                show(step)

    def _baseline(self, request: Prepared, graph: DecodingGraph, record: RequestResult) -> Baseline:
        """Decode the baseline. A run of one video neither reads nor keeps baselines."""
        return Baseline.of(self._alone(request, graph, record))

    def _save(self, request: Prepared, graph: DecodingGraph, record: RequestResult) -> str:
        """Save what was decoded before memory ran out, here or on another rank. Computes nothing on a GPU.

        Returns a note to add to the error; empty on a rank without a folder.
        """
        if self.folder is None:
            return ""
        record.out_of_memory = record.stage
        write_yaml(self.folder / "config.yaml", plain(self.cfg))
        write_json(self.folder / "summary.json", summarize(request, graph, record)[0])
        return f"; {len(metrics.tokens_of(record.steps))} tokens are in {self.folder}"
