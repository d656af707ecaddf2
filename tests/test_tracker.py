"""W&B as a mirror: offline it holds what the disk holds, and its failures never cost a result."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from sweeping import ASK, jobs, untimed
from wandb.proto import wandb_internal_pb2

from specvlm.__main__ import main
from specvlm.results.mirror import CELL, kept_picture
from specvlm.results.rows import rows_of, steps_of, summary_of
from specvlm.strategies.trackers import wandb as tracker

FEW = [*ASK, "dataset.scenes=2", "max_new_tokens=6"]

pytestmark = pytest.mark.slow  # it runs the command line


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    torch.set_num_threads(1)


def records(file: Path):
    """Read a .wandb file: a LevelDB log, in blocks of 32 KiB, of records that are split at block ends."""
    data, at, whole = file.read_bytes(), 7, b""  # behind the file's own header
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def offline(folder: Path) -> dict[str, dict]:
    """Return the contents of each offline run below a folder, by name."""
    wandb.teardown()  # its own process writes behind ours
    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        told = {"history": [], "summary": {}, "config": {}, "files": {}, "folder": file.parent}
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                told |= {"group": record.run.run_group, "kind": record.run.job_type}
                told["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                name = record.run.display_name
            elif record.WhichOneof("record_type") == "history":
                told["history"].append({_key(item): json.loads(item.value_json) for item in record.history.item})
            elif record.WhichOneof("record_type") == "summary":
                told["summary"] |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            elif record.WhichOneof("record_type") == "artifact":
                told["files"] |= {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            elif record.WhichOneof("record_type") == "exit":
                told["code"] = record.exit.exit_code
        assert "kind" in told, (file, file.stat().st_size, file.read_bytes()[:200])
        found[name] = told
    return found


def _key(item) -> str:
    return item.key or "/".join(item.nested_key)


def mirrored(told: dict, job: Path) -> None:
    """Check that the figures of a run are those of a job's folder."""
    rows, steps = rows_of(job), steps_of(job)
    lines = [line for row in rows for line in steps[row["sample"]]]
    rounds = [line for line in told["history"] if "round/index" in line]
    assert [line["round/index"] for line in rounds] == list(range(len(lines)))
    for seen, line in zip(rounds, lines, strict=True):
        assert seen["round/tokens"] == len(line["tokens"]) and seen["round/accepted"] == line["accepted"]
        assert all(seen[f"round/{part}_s"] == seconds for part, seconds in line["times_s"].items())
    samples = [line for line in told["history"] if "sample/index" in line]
    for seen, row in zip(samples, rows, strict=True):
        keys = {key.partition("/")[2] for key in seen if key.startswith("sample/")} - {"index"}
        assert keys >= {"speedup_decode", "kept_tokens"}
        assert all(seen[f"sample/{key}"] == row[key] for key in keys)
    assert all(Path.cwd() in path.parents for path in told["files"].values()), "nothing lies in the user's home"
    table = json.loads(told["files"]["samples.table.json"].read_text())
    for line, row in zip(table["data"], rows, strict=True):
        cells = dict(zip(table["columns"], line, strict=True))
        assert all(cells[key] == row[key] for key in ("sample", "text", "verdict", "answer", "decode_s", "speedup_end_to_end"))
        shown = np.asarray(Image.open(told["files"][cells["kept"]["path"]]))[CELL // 2 :: CELL, CELL // 2 :: CELL]
        assert (shown > 200).sum() == len(row["kept"])
    for key, value in summary_of(job).items():
        if isinstance(value, int | float | str):
            assert told["summary"][key] == value, key


def test_offline_files_hold_the_figures_of_the_disk(capsys):
    words = ["-m", *FEW, "pruner=uniform,random", "ratio=0.5,0.9", "tracker=wandb", "tracker.mode=offline"]
    assert main([*words, "hydra.sweep.dir=sweep"]) == 0
    found = offline(Path("sweep"))
    assert len(found) == 5 and {told["group"] for told in found.values()} == {"sweep"}
    for name, job in jobs(Path("sweep")).items():
        label = " ".join(word for word in name.split(",") if word.partition("=")[0] in ("pruner", "ratio"))
        mirrored(found[label], job)
        assert found[label]["code"] == 0 and found[label]["kind"] == "job"
        assert found[label]["config"]["ratio"] == float(name.rpartition("=")[2])
    everything = found["sweep: all jobs"]
    (table,) = everything["folder"].glob("files/media/table/jobs*.json")
    assert len(json.loads(table.read_text())["data"]) == 4 and everything["kind"] == "sweep"
    logged = {key.partition("/")[0] for line in everything["history"] for key in line}
    assert logged >= {f"{key}_by_ratio_table" for key in tracker.PLOTTED}
    shown = capsys.readouterr().out
    assert f"wandb sync {Path.cwd()}/sweep/wandb/offline-run-*" in shown.replace("\n", "")


def test_a_resumed_job_mirrors_all_of_it_and_a_failure_has_its_code(monkeypatch):
    words = [*FEW, "hydra.run.dir=out", "tracker=wandb", "tracker.mode=offline"]
    assert main([*words]) == 0
    before = untimed(rows_of(Path("out")))
    lines = Path("out/samples.jsonl").read_text().splitlines(keepends=True)
    Path("out/samples.jsonl").write_text(lines[0])
    Path("out/wandb").rename("first")
    from specvlm.decoding.loop import Output

    take = Output.take
    monkeypatch.setattr(Output, "take", lambda self, tokens: take(self, [5 if len(tokens) > 1 else token for token in tokens]))
    assert main([*words, "resume=true"]) == 1
    (told,) = offline(Path("out")).values()
    mirrored(told, Path("out"))
    assert told["code"] == 1 and untimed(rows_of(Path("out")))[0] == before[0]


class Nonsense(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(params=["refused", "silent", "nonsense"])
def server(request, monkeypatch):
    """Stand in for W&B's server: absent, accepting calls without ever answering, or answering nonsense."""
    silent = socket.create_server(("127.0.0.1", 0))
    address = silent.getsockname()
    if request.param == "refused":
        silent.close()
    if request.param == "nonsense":
        silent.close()
        web = HTTPServer(("127.0.0.1", 0), Nonsense)
        address = web.server_address
        threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{address[0]}:{address[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield request.param
    silent.close()


def test_without_a_server_an_online_run_is_offline_within_five_seconds_and_says_so(server, monkeypatch, capsys):
    took, begin = [], tracker.WandbTracker._begin

    def timed(self, *args):
        start = time.monotonic()
        run = begin(self, *args)
        took.append(time.monotonic() - start)
        return run

    wandb.init(mode="offline", dir=".").finish()  # its own start, which costs seconds on a busy machine
    monkeypatch.setattr(tracker.WandbTracker, "_begin", timed)
    assert main([*FEW, "hydra.run.dir=out", "tracker=wandb"]) == 0
    assert tracker.PATIENCE_S + tracker.BEGIN_S <= 5  # seconds of waiting; what else it does takes a busy machine longer
    assert len(took) == 1 and took[0] < 60, took  # W&B's own patience is 90 s and more
    shown = capsys.readouterr().out
    assert shown.count("W&B is written offline") == 1 and "wandb sync" in shown
    (told,) = offline(Path("out")).values()
    mirrored(told, Path("out"))


@pytest.mark.parametrize("method", ["define_metric", "log", "finish"])
def test_what_breaks_in_it_costs_no_result(method, monkeypatch, capsys):
    from wandb.sdk.wandb_run import Run

    def broken(*_, **__):
        raise RuntimeError("out of order")

    monkeypatch.setattr(Run, method, broken)
    assert main([*FEW, "hydra.run.dir=out", "tracker=wandb", "tracker.mode=offline"]) == 0
    assert [row["status"] for row in rows_of(Path("out"))] == ["ok", "ok"] and summary_of(Path("out"))["status"] == "complete"
    told = capsys.readouterr().out.replace("\n", "")
    assert told.count("tracker=wandb is off for this job (RuntimeError: out of order)") == 1


def test_disabled_writes_nothing_and_a_wrong_word_is_one_line(capsys):
    assert main([*FEW, "hydra.run.dir=out", "tracker=wandb", "tracker.mode=disabled"]) == 0
    assert not Path("out/wandb").exists()
    for words, why in (
        ([*FEW, "tracker=wandb", "tracker.mode=ofline"], 'expected one of online, offline, disabled. Did you mean "offline"?'),
        (["tracker=wandb"], "give dataset="),
        ([*FEW, "tracker=wand"], 'Did you mean "wandb"?'),
    ):
        capsys.readouterr()
        assert main(words) == 2 and why in capsys.readouterr().err


def test_the_picture_shows_every_frame_and_leaves_the_newline_out():
    row = {"kept": [0, 5, 12], "grids": [[3, 2, 2, 1]], "video_tokens": 13}
    picture = np.asarray(kept_picture(row))[CELL // 2 :: CELL, CELL // 2 :: CELL]
    assert (picture > 200).sum() == 2 and (picture < 50).sum() == 10
    assert kept_picture(row | {"kept": None}) is None
