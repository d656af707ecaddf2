"""The event files hold what the disk holds, and a full disk is noticed at once."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import specvlm_tensorboard as package
from PIL import Image
from specvlm_tensorboard import TensorboardTracker, folder_name

from specvlm import TrackContext
from specvlm.testing import check_tracker

CONFIG = {"pruner": {"name": "uniform"}, "ratio": 0.5, "video": ["a.mp4", "b.mp4"], "check": None, "baseline": True}


@pytest.fixture
def installed():
    pytest.importorskip("tensorboardX")


def events(folder: Path) -> list:
    """Read all event files of a run, in the order of their names."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = BytesIO(file.read_bytes())
        while head := data.read(12):  # the length, and its checksum
            found.append(Event.FromString(data.read(int.from_bytes(head[:8], "little"))))
            data.read(4)  # the checksum of the record
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Points by tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def text(folder: Path, tag: str) -> str:
    (value,) = (value for event in events(folder) for value in event.summary.value if value.tag == f"{tag}/text_summary")
    return value.tensor.string_val[0].decode()


@pytest.fixture
def ctx(tmp_path):
    return TrackContext("pruner=uniform ratio=0.5", "sweep", tmp_path, CONFIG)


@pytest.mark.parametrize("pictures", [True, False])
def test_it_keeps_the_contract(installed, pictures):
    check_tracker(TensorboardTracker, pictures=pictures)


def test_every_point_is_there_with_its_place(installed, ctx, tmp_path):
    run = TensorboardTracker().start(ctx)
    run.log("round", 3, {"accepted": 2, "verify_s": 0.25})
    run.log("sample", 1, {"speedup_decode": 1.5})
    run.log("sample", 0, {"speedup_decode": 2.5})
    folder = tmp_path / "tensorboard" / "pruner=uniform_ratio=0.5"
    assert scalars(folder)["sample/speedup_decode"] == [(1, 1.5), (0, 2.5)]  # before the end, since a job may be killed
    run.summary({"decode_s": 1.5, "verdicts": {"identical": 2}, "status": "complete", "low": None})
    run.finish(5)
    found = scalars(folder)
    assert found["round/accepted"] == [(3, 2.0)] and found["round/verify_s"] == [(3, 0.25)]
    assert {tag: points for tag, points in found.items() if tag.startswith("total/")} == {
        "total/decode_s": [(0, 1.5)],
        "total/verdicts.identical": [(0, 2.0)],
        "total/exit_code": [(0, 5.0)],
    }


def test_the_configuration_is_among_the_hparams(installed, ctx, tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    run = TensorboardTracker().start(ctx)
    run.summary({"decode_s": 1.5})
    run.finish(0)
    values = [value for event in events(*(tmp_path / "tensorboard").iterdir()) for value in event.summary.value]
    (content,) = (v.metadata.plugin_data.content for v in values if v.tag == "_hparams_/session_start_info")
    kept = HParamsPluginData.FromString(content).session_start_info.hparams
    told = {key: value.string_value or value.number_value or value.bool_value for key, value in kept.items()}
    assert told == {"pruner.name": "uniform", "ratio": 0.5, "video": "['a.mp4', 'b.mp4']", "baseline": True}


def test_a_table_is_markdown_with_pictures_beside_it(installed, ctx, tmp_path):
    run, picture = TensorboardTracker().start(ctx), Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    rows = [["s0", picture, "a | b\nc", 1.23456789, None], ["s1", None, "\ud800 " + "long " * 400, None, None]]
    run.table("samples", ["sample", "kept", "text", "decode_s", "reason"], rows)
    run.finish(0)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    lines = text(folder, "samples").split("\n")
    assert lines[:3] == ["sample|text|decode_s", "---|---|---", "s0|a b c|1.23457"]
    assert lines[3].startswith("s1|? long long") and len(lines) == 4 and len(lines[3]) < 420
    values = [(event.step, value) for event in events(folder) for value in event.summary.value if value.HasField("image")]
    ((step, value),) = values
    seen = np.asarray(Image.open(BytesIO(value.image.encoded_image_string)).convert("L"))
    assert (step, value.tag) == (0, "samples/kept") and (seen == np.asarray(picture)).all()


def test_a_job_that_goes_on_hides_what_it_wrote_before(installed, ctx, tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    for _ in range(2):
        TensorboardTracker().start(ctx).log("sample", 0, {"decode_s": 1})
    starts = [event for event in events(*(tmp_path / "tensorboard").iterdir()) if event.session_log.status]
    assert starts and {(event.step, event.session_log.status) for event in starts} == {(0, SessionLog.START)}


def test_a_full_disk_is_an_error_of_the_call(installed, ctx, monkeypatch):
    run = TensorboardTracker().start(ctx)
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        monkeypatch.setattr(run.writer._py_recordio_writer, "_writer", full)
        run.log("sample", 0, {"decode_s": 1})


def test_jobs_that_differ_have_folders_that_differ():
    names = ["a b", "a/b", "a\\b", "a:b", "..", ".", "", "x" * 200, "x" * 201, "青い", "\ud800", "pruner=uniform ratio=0.5"]
    made = [folder_name(name) for name in names]
    assert len(set(made)) == len(names) and all(Path(name).name == name and len(name) < 100 for name in made)
    assert made[-1] == "pruner=uniform_ratio=0.5" and made[0] == "a_b"


def test_the_next_step_is_a_command(tmp_path):
    assert TensorboardTracker().next_step(tmp_path) == ""
    folder = tmp_path / "my results" / package.FOLDER
    folder.mkdir(parents=True)
    assert TensorboardTracker().next_step(folder.parent) == f"tensorboard --logdir '{folder}'"


def test_the_library_is_imported_when_a_run_starts(monkeypatch, ctx):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)  # as if it were not there
    tracker = replace(TensorboardTracker(), pictures=False)
    with pytest.raises(ImportError):
        tracker.start(ctx)
