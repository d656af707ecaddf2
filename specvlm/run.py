"""One run: read the video, plan the memory, load the pair, decode, prove, report, write."""

from __future__ import annotations

import json
from pathlib import Path

from specvlm import memory, metrics
from specvlm.answer import Record, alone, begin, decode_alone, drafted, ran_out, row, speculate, summarize, threads, warm_up
from specvlm.baselines import Baseline
from specvlm.config import RunConfig
from specvlm.errors import ExitCode
from specvlm.fence import contained
from specvlm.folder import check_there, files_of, steps_file, write_attention, write_config, write_json
from specvlm.graph import DecodingGraph
from specvlm.held import HELD, Held
from specvlm.places import Places, places_of
from specvlm.prepare import Prepared, own_sample, read, set_up
from specvlm.pristine import check_run
from specvlm.ranks import ALONE, Ranks, joined
from specvlm.rows import writable
from specvlm.show import Screen, not_applied


def run(cfg: RunConfig, folder: Path) -> int:
    """Decode one video as `cfg` says and write the run's folder. Returns 1 on MISMATCH, else 0.

    Raises UserError before anything is written when the input cannot be used. Under torchrun every rank does all of it, and
    the first one alone is heard and writes.
    """
    places, record = places_of(cfg), Record()
    if places.ranks == 1:
        with contained():
            return _run(cfg, folder, places, ALONE, HELD, record)
    with joined(places.first, lambda: record.save()) as ranks:
        return _run(cfg, folder if ranks.rank == 0 else None, places, ranks, Held(), record)


def _run(cfg: RunConfig, folder: Path | None, places: Places, ranks: Ranks, held: Held, record: Record) -> int:
    """folder: None for a rank that writes nothing."""
    screen, done = Screen(), ""
    with threads(cfg.threads):
        setup = set_up(cfg, places)
        request = held.plan(setup, read(setup, own_sample(cfg)))
        screen.plan(request)
        try:
            graph = held.graph(request, ranks)
            screen.note(not_applied(graph.target.ignored_settings))
            screen.note(graph.target.left_full)
            screen.note(graph.engine.note)
            record.captured_s = graph.engine.capture_s
            with files_of(folder):
                record.save = lambda: save(cfg, request, graph, folder, record)
                try:
                    decode(request, graph, folder, screen, record, held)
                    summary, verdict = summarize(request, graph, record)
                except RuntimeError as error:
                    done = record.save() if memory.ran_out(error) else ""
                    raise
                if folder:
                    write_json(folder / "summary.json", summary)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            raise ran_out(request, record, done) from error
    if folder:
        screen.summary(summary, folder)
        if summary["hf_check"] is None:
            record.save = str
            del graph  # the pair makes room
            with screen.waiting(f"check={cfg.check}"):
                summary |= check_run(held, request, summary["token_ids"])
            with writable(folder):
                write_json(folder / "summary.json", summary)
            screen.checked(summary)
    wrong = verdict == "mismatch" or (summary["hf_check"] or "").startswith("MISMATCH")
    return ExitCode.MISMATCH if wrong else ExitCode.OK


def decode(request: Prepared, graph: DecodingGraph, folder: Path | None, screen: Screen, record: Record, held: Held) -> None:
    """The baseline's steps, before any strategy has run; then the speculative ones, streamed and logged as they come. Both
    behind a warm-up of each.
    """
    begin(request, graph, record)
    if request.cfg.baseline:
        with screen.waiting("warming up"):
            warm_up(alone(request, graph), record)
        with screen.progress("the target on its own", request.cfg.max_new_tokens) as advance:
            record.baseline = Baseline.of(decode_alone(request, graph, record, advance))
    with held.guard(graph):
        with screen.waiting("warming up"):
            warm_up(drafted(request, graph), record)
        write_config(request.cfg, folder)  # now: what cannot run has failed, and left nothing
        stream(request, graph, folder, screen, record)
    screen.note(next((step.keep.note for step in record.steps if step.keep is not None), ""))


def stream(request: Prepared, graph: DecodingGraph, folder: Path | None, screen: Screen, record: Record) -> None:
    with steps_file(folder) as log, screen.answer(request.target.tokenizer) as show:
        for number, step in enumerate(speculate(request, graph, record)):
            log.write(json.dumps(row(number, step)) + "\n")
            log.flush()
            check_there(log)
            if step.attention is not None:
                write_attention(folder, 0, step.attention)
            show(step)


def save(cfg: RunConfig, request: Prepared, graph: DecodingGraph, folder: Path | None, record: Record) -> str:
    """Write what was done before memory ran out, here or on another rank; returns where it is. Computes nothing on a GPU."""
    if folder is None:
        return ""
    record.out_of_memory = record.stage
    write_config(cfg, folder)
    write_json(folder / "summary.json", summarize(request, graph, record)[0])
    return f"; {len(metrics.tokens_of(record.steps))} tokens are in {folder}"
