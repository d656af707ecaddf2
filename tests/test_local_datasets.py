"""Data sets on disk, each as a small folder in exactly the published layout, with really encoded clips.

Frames encode their number, so tests see whether the right part of a video is read.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_video import draw, numbers

from specvlm.__main__ import main
from specvlm.app.compose import compose
from specvlm.app.placement import places_of
from specvlm.app.prepare import read, set_up
from specvlm.errors import MissingVideo, UserError
from specvlm.results.rows import rows_of
from specvlm.strategies import Sample, registry
from specvlm.strategies.datasets.folder import FolderDataset
from specvlm.strategies.datasets.local import CAPTION
from specvlm.strategies.datasets.long_video_bench import LongVideoBenchDataset
from specvlm.strategies.datasets.mlvu import DEV, MLVUDataset
from specvlm.strategies.datasets.mvbench import FOLDERS, PARTS, MVBenchDataset
from specvlm.strategies.datasets.video_detail_caption import VideoDetailCaptionDataset
from specvlm.strategies.datasets.video_mme import VideoMMEDataset
from specvlm.video.clips import find_clip
from specvlm.video.frames import read_frames
from specvlm.video.video import Clip, probe, read_video

LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """Encode 90 frames at 25 per second."""
    return draw(tmp_path_factory.mktemp("clip") / "clip.mp4")


def put(video: Path, *places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, place)


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="two data sets are lists in Parquet")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def shown(sample: Sample, **sampling) -> list[int]:
    """Return the numbers of the frames that a job would read."""
    source = sample.video() if callable(sample.video) else sample.video
    return numbers(read_video(source, start=sample.start, end=sample.end, **sampling).frames)


def frame_folder(video: Path, folder: Path, every: int, count: int) -> Path:
    """Write every n-th frame of a video as 00001.jpg, 00002.jpg …, like TVQA's."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(read_video(video).frames[::every][:count], start=1):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"{number:05d}.jpg", quality=95)
    return folder


# VideoDetailCaption


def detail_rows(*names: str) -> list[dict]:
    return [{"video_name": name, "question": CAPTION, "answer": f"About {name}."} for name in names]


def test_video_detail_caption(tmp_path, video):
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", detail_rows("v_a", "v_b", "v_gone"))
    put(video, tmp_path / "Test_Videos" / "v_a.mp4", tmp_path / "Test_Videos" / "v_b.mkv")
    data = VideoDetailCaptionDataset(str(tmp_path))
    one, two, gone = data.samples()
    assert (one.id, one.question, one.answer, one.options) == ("v_a", CAPTION, "About v_a.", ())
    assert one.video == tmp_path / "Test_Videos" / "v_a.mp4" and two.video == tmp_path / "Test_Videos" / "v_b.mkv"
    assert shown(one, frames=3) == [0, 30, 60]
    with pytest.raises(MissingVideo, match="no such file: .*Test_Videos/v_gone.mp4"):
        shown(gone)
    assert data.split == "test" and data.version.startswith("sha256:")


def test_the_order_of_the_papers_samples_is_that_of_hugging_faces_shuffle(tmp_path):
    """Their code shuffles 499 rows with seed 42 and takes 100. The order was compared with datasets 5.2.0."""
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", detail_rows(*(f"v{number}" for number in range(499))))
    (tmp_path / "Test_Videos").mkdir()
    samples = VideoDetailCaptionDataset(str(tmp_path), shuffle=42, limit=100).samples()
    assert [sample.id for sample in samples[:8]] == ["v473", "v132", "v472", "v46", "v40", "v232", "v45", "v428"]
    assert len({sample.id for sample in samples}) == 100


# Video-MME


def mme_row(number: int, video_id: str, duration: str) -> dict:
    return {
        "video_id": f"{number:03d}",
        "duration": duration,
        "domain": "Knowledge",
        "sub_category": "Geography",
        "url": f"https://www.youtube.com/watch?v={video_id}",
        "videoID": video_id,
        "question_id": f"{number:03d}-1",
        "task_type": "Counting Problem",
        "question": "How many are there?",
        "options": ["A. One.", "B. B. B. King.", "C. Three.", "D. Four."],
        "answer": "B",
    }


def test_video_mme(tmp_path, video):
    parquet(
        tmp_path / "videomme" / "test-00000-of-00001.parquet", [mme_row(1, "aaaaaaaaaaa", "short"), mme_row(2, "-bb", "long")]
    )
    put(video, tmp_path / "data" / "aaaaaaaaaaa.mp4", tmp_path / "data" / "-bb.MP4")
    short, long = VideoMMEDataset(str(tmp_path)).samples()
    assert short.question == f"How many are there?\nA. One.\nB. B. B. King.\nC. Three.\nD. Four.\n{LETTER}"
    assert (short.id, short.answer, short.options) == ("001-1", "B. B. King.", ("One.", "B. B. King.", "Three.", "Four."))
    assert short.meta == {
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Geography",
        "task_type": "Counting Problem",
    }
    assert long.video == tmp_path / "data" / "-bb.MP4" and shown(long, frames=2) == [0, 45]
    assert [s.id for s in VideoMMEDataset(str(tmp_path), durations=("long",)).samples()] == ["002-1"]
    with pytest.raises(UserError, match="has no sample for this choice: .*durations=..medium"):
        VideoMMEDataset(str(tmp_path), durations=("medium",)).samples()
    with pytest.raises(UserError, match='durations must be short or medium or long, got .shorts.*Did you mean "short"'):
        VideoMMEDataset(str(tmp_path), durations=("shorts",))


# LongVideoBench


def bench_entry(video_id: str, group: int, **more) -> dict:
    return {
        "video_id": video_id,
        "question": "What does the man do?",
        "question_wo_referring_query": "What does he do?",
        "candidates": ["He sits", "He runs", "He sleeps", "He waves", "He talks"],
        "position": [305],
        "topic_category": "KG-Knowledge-Geography",
        "question_category": "O2E",
        "level": "L1-Perception",
        "id": f"{video_id}_0",
        "video_path": f"{video_id}.mp4",
        "subtitle_path": f"{video_id}_en.json",
        "duration_group": group,
        "starting_timestamp_for_subtitles": 0,
        "duration": 2.4,
        "view_count": 7,
    } | more


def test_long_video_bench(tmp_path, video):
    write(tmp_path / "lvb_val.json", [bench_entry("86Cx", 15, correct_choice=1), bench_entry("@user-1", 600, correct_choice=4)])
    write(tmp_path / "lvb_test_wo_gt.json", [bench_entry("x1", 3600)])
    put(video, tmp_path / "videos" / "86Cx.mp4")
    one, gone = LongVideoBenchDataset(str(tmp_path)).samples()
    assert (one.id, one.answer, one.options[0], one.meta["duration_group"]) == ("86Cx_0", "He runs", "He sits", 15)
    assert one.question.splitlines()[0] == "What does the man do?" and one.question.splitlines()[5:] == ["E. He talks", LETTER]
    assert shown(one) == list(range(60))  # the first 2.4 s, as its publishers' loader has it
    with pytest.raises(MissingVideo, match="videos/@user-1.mp4"):
        shown(gone)
    (hidden,) = LongVideoBenchDataset(str(tmp_path), split="test").samples()
    assert hidden.answer is None and len(hidden.options) == 5
    assert [s.id for s in LongVideoBenchDataset(str(tmp_path), durations=(600,)).samples()] == ["@user-1_0"]
    with pytest.raises(UserError, match="split must be val or test, got 'dev'"):
        LongVideoBenchDataset(str(tmp_path), split="dev")
    with pytest.raises(UserError, match="durations must be 15 or 60 or 600 or 3600, got '30'"):
        LongVideoBenchDataset(str(tmp_path), durations=(30,))


# MLVU


def mlvu_entry(video: str, task: str, **more) -> dict:
    return {"video": video, "duration": 480.0, "question": f"What of {video}?", "question_type": task} | more


def test_mlvu_dev_has_multiple_choice_and_free_answers(tmp_path, video):
    four = {"candidates": ["Yellow", "Red", "Green", "Blue"], "answer": "Red"}
    for task, stem in DEV.items():
        kind = {"needle": "findNeedle", "sub_scene": "subPlot"}.get(task, task)
        free = {"answer": "A man goes home."} | ({"scoring_points": ["a man"]} if task == "sub_scene" else {})
        entry = mlvu_entry(f"{task}_1.mp4", kind, **(free if task in ("sub_scene", "summary") else four))
        write(tmp_path / "MLVU" / "json" / f"{stem}.json", [entry])
        put(video, tmp_path / "MLVU" / "video" / stem / f"{task}_1.mp4")
    samples = MLVUDataset(str(tmp_path)).samples()
    assert [sample.meta["task"] for sample in samples] == list(DEV) and samples[0].id == "plotQA-0000"
    assert samples[1].question == f"What of needle_1.mp4?\nA. Yellow\nB. Red\nC. Green\nD. Blue\n{LETTER}"
    assert all(shown(sample, frames=2) == [0, 45] for sample in samples)
    (scene,) = MLVUDataset(str(tmp_path), tasks=("sub_scene",)).samples()
    assert (scene.question, scene.answer, scene.options) == ("What of sub_scene_1.mp4?", "A man goes home.", ())
    inner = MLVUDataset(str(tmp_path / "MLVU"))
    assert [s.video for s in inner.samples()] == [s.video for s in samples] and inner.version == MLVUDataset(
        str(tmp_path)
    ).version
    with pytest.raises(UserError, match="tasks must be plotQA or needle .*, got 'plotqa'.*Did you mean \"plotQA\""):
        MLVUDataset(str(tmp_path), tasks=("plotqa",))


def test_mlvu_test_takes_answers_where_they_are_given(tmp_path, video):
    six = {"candidates": ["Fighting", "Arrest", "Normal", "Arson", "Abuse", "Assault"]}
    questions = [
        mlvu_entry("test_surveil_27.mp4", "anomaly_reco", question_id="AR_0", **six),
        mlvu_entry("test_sports_7.mp4", "sportsQA", question_id="SQA_1", **six),
    ]
    write(tmp_path / "test_multi_choice_tasks.json", questions)
    write(tmp_path / "test_generation_tasks.json", [mlvu_entry("test_sum_1.mp4", "summary")])
    put(video, tmp_path / "MLVU_Test" / "video" / "test_surveil_27.mp4")
    without = MLVUDataset(str(tmp_path), split="test").samples()
    assert [(s.id, s.answer) for s in without] == [("AR_0", None), ("SQA_1", None), ("summary-0002", None)]
    write(tmp_path / "test-ground-truth" / "test_mcq_gt.json", [entry | {"answer": "Arrest"} for entry in questions])
    write(
        tmp_path / "test-ground-truth" / "test_vs_gt.json", [mlvu_entry("test_sum_1.mp4", "summary", answer="A man goes home.")]
    )
    anomaly, sports, summary = MLVUDataset(str(tmp_path), split="test").samples()
    assert (anomaly.answer, sports.answer, summary.answer) == ("Arrest", "Arrest", "A man goes home.")
    assert "\nF. Assault\n" in anomaly.question and shown(anomaly, frames=2) == [0, 45]
    assert [s.id for s in MLVUDataset(str(tmp_path), split="test", tasks=("sportsQA",)).samples()] == ["SQA_1"]
    with pytest.raises(UserError, match="tasks must be anomaly_reco or sportsQA or summary, got 'count'"):
        MLVUDataset(str(tmp_path), split="test", tasks=("count",)).samples()


# MVBench


def mvbench(root: Path, video: Path) -> None:
    """Write one question per task, with the clip where its archive puts it, except for NTU's, which no archive has."""
    for task, folder in FOLDERS.items():
        suffix = {"ssv2_video": ".webm", "nturgbd": ".avi", "tvqa/frames_fps3_hq": ""}.get(folder, ".mp4")
        name = f"stop/{task}.mp4" if task == "egocentric_navigation" else f"{task}{suffix}"
        entry = {"video": name, "question": "What now?", "candidates": ["Left", "Right"], "answer": "Right"}
        if task in PARTS:
            entry |= {"start": 1.0, "end": 2.0}
        if task == "episodic_reasoning":
            entry |= {"fps": 3}
            frame_folder(video, root / "video" / folder / name, every=8, count=9)
        elif task == "object_existence":  # one of the videos that were replaced
            put(video, root / "video" / "data0613" / folder / name)
        elif task == "action_antonym":
            draw(root / "video" / folder / name, encoder="libvpx")
        elif task != "fine_grained_pose":
            put(video, root / "video" / folder / name)
        write(root / "json" / f"{task}.json", [entry])


@pytest.mark.slow
def test_mvbench_reads_every_task_where_its_archive_puts_it(tmp_path, video):
    (tmp_path / "video" / "ssv2_video").mkdir(parents=True)
    mvbench(tmp_path, video)
    samples = {sample.meta["task"]: sample for sample in MVBenchDataset(str(tmp_path)).samples()}
    assert list(samples) == list(FOLDERS) and samples["scene_transition"].id == "scene_transition-000"
    assert samples["scene_transition"].question == f"What now?\nA. Left\nB. Right\n{LETTER}"
    with pytest.raises(MissingVideo, match="video/nturgbd/fine_grained_pose.avi"):
        shown(samples.pop("fine_grained_pose"))
    for task, sample in samples.items():
        source = sample.video() if callable(sample.video) else sample.video
        wanted = {3.0: 9, 25.0: 90}[probe(source).fps]
        assert probe(source).frames == wanted, task
        assert len(shown(sample)) == ({9: 3, 90: 25}[wanted] if task in PARTS else wanted), task
    assert samples["object_existence"].video.is_relative_to(tmp_path / "video" / "data0613")


@pytest.mark.slow
def test_parts_start_and_end_at_their_seconds_whatever_they_are_cut_from(tmp_path, video):
    mvbench_task = {
        "action_sequence": list(range(25, 50)),
        # Frames 8 apart, 3 a second: those at 1, 1.33 and 1.67 s.
        "episodic_reasoning": [24, 32, 40],
    }
    (tmp_path / "video" / "ssv2_video").mkdir(parents=True)
    mvbench(tmp_path, video)
    for task, frames in mvbench_task.items():
        (sample,) = MVBenchDataset(str(tmp_path), tasks=(task,)).samples()
        assert (sample.start, sample.end) == (1.0, 2.0) and shown(sample) == frames
        source = sample.video() if callable(sample.video) else sample.video
        assert probe(source, start=sample.start, end=sample.end).frames == len(frames)
        assert shown(pickle.loads(pickle.dumps(sample)), frames=1) == frames[:1]


def test_mvbenchs_branch_of_cut_videos_is_read_whole(tmp_path, video):
    for task, folder in (
        ("action_sequence", "star/Charades_segment"),
        ("episodic_reasoning", "tvqa/video_fps3_hq_segment"),
        ("action_antonym", "ssv2_video_mp4"),
        ("fine_grained_pose", "nturgbd_convert"),
        ("scene_transition", "scene_qa/video"),
    ):
        entry = {"video": "a.mp4", "question": "What now?", "candidates": ["Left", "Right"], "answer": "Left"}
        write(tmp_path / "json" / f"{task}.json", [entry])
        put(video, tmp_path / folder / "a.mp4")
        (sample,) = MVBenchDataset(str(tmp_path), tasks=(task,)).samples()
        assert sample.video == tmp_path / folder / "a.mp4" and shown(sample) == list(range(90))


# A folder of one's own


def test_folder_takes_questions_options_parts_and_frames(tmp_path, video):
    put(video, tmp_path / "talk.mp4", tmp_path / "more" / "walk.mp4")
    frame_folder(video, tmp_path / "frames", every=5, count=8)
    lines = [
        {"video": "talk.mp4", "question": "What is shown?", "answer": "A talk.", "speaker": "Ann"},
        {"video": "talk.mp4", "question": "Which?", "options": ["One", "Two"], "answer": "Two", "start": 1, "end": 1.2},
        {"id": "w", "video": "more/walk.mp4"},
        {"video": "frames", "question": "And here?", "fps": 5, "start": 1},
        {"video": "gone.mp4", "question": "Who?"},
    ]
    write(tmp_path / "questions.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    talk, part, walk, frames, gone = FolderDataset(str(tmp_path)).samples()
    assert [s.id for s in (talk, part, walk, frames)] == ["talk.mp4", "talk.mp4#2", "w", "frames"]
    assert (talk.question, talk.answer, talk.meta) == ("What is shown?", "A talk.", {"speaker": "Ann"})
    assert part.question == f"Which?\nA. One\nB. Two\n{LETTER}" and part.options == ("One", "Two")
    assert shown(part) == [25, 26, 27, 28, 29] and shown(frames) == [25, 30, 35]
    assert walk.question == CAPTION and shown(walk, frames=1) == [0]
    with pytest.raises(MissingVideo, match="gone.mp4"):
        shown(gone)


def test_folder_reads_a_table_as_it_reads_lines(tmp_path, video):
    put(video, tmp_path / "talk.mp4")
    write(
        tmp_path / "ask.csv",
        "video,question,options,answer,start,end,kind\r\n"
        'talk.mp4,"Which, and\nwhy?",One|Two,Two,1,1.2,x\r\n'
        "talk.mp4,What?,,,,,\r\n",
    )
    which, what = FolderDataset(str(tmp_path), questions="ask.csv").samples()
    assert (which.question.splitlines()[:2], which.options) == (["Which, and", "why?"], ("One", "Two"))
    assert (which.start, which.end, which.meta, shown(which)) == (1.0, 1.2, {"kind": "x"}, [25, 26, 27, 28, 29])
    assert (what.question, what.answer, what.options, what.end) == ("What?", None, (), None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{video: talk}", "questions.jsonl, line 2 is not JSON"),
        ('["talk.mp4"]', "line 2: expected an object like"),
        ('{"question": "What?"}', "line 2: video=None: expected a path below"),
        ('{"video": "a.mp4", "options": "One"}', "line 2: options='One': expected a list of texts"),
        ('{"video": "a.mp4", "start": "soon"}', "line 2: start='soon': expected a number from 0"),
        ('{"video": "a.mp4", "start": 3, "end": 2}', "line 2: end=2.0: expected seconds after start=3.0"),
        ('{"video": "pictures"}', "line 2: pictures is a folder of frames: add the frames per second"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "pictures").mkdir()
    write(tmp_path / "questions.jsonl", '{"video": "a.mp4"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        FolderDataset(str(tmp_path)).samples()
    assert "\n" not in str(caught.value)


def test_a_familys_own_sampling_fits_the_part_that_is_asked_about(tmp_path, video, monkeypatch):
    """LLaVA-OneVision samples 32 frames, or all if there are fewer."""
    put(video, tmp_path / "talk.mp4")
    write(tmp_path / "questions.jsonl", '{"video": "talk.mp4", "question": "What is shown?", "start": 1, "end": 1.2}')
    cfg = compose(["pair=embedded_llava_onevision", "dataset=folder", f"dataset.root={tmp_path}"])
    (sample,) = registry.build("dataset", cfg.dataset).samples()
    setup = set_up(cfg, places_of(cfg))
    monkeypatch.setattr(setup.target, "sampling", lambda info: {"frames": min(32, info.frames)})
    assert read(setup, sample).prompt.grids[0].frames == 5


@pytest.mark.slow
def test_the_command_line_answers_a_folder_and_counts_what_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put(find_clip("synthetic_1"), Path("mine") / "talk.mp4")
    frame_folder(find_clip("synthetic_1"), Path("mine") / "frames", every=1, count=99)
    lines = [
        {"video": "talk.mp4", "question": "describe the video.", "answer": "Objects.", "kind": "whole"},
        {"video": "talk.mp4", "question": "describe the video.", "start": 1, "end": 3},
        {"video": "gone.mp4", "question": "describe the video."},
        {"video": "frames", "question": "describe the video.", "fps": probe("mine/talk.mp4").fps},
    ]
    write(Path("mine") / "questions.jsonl", "\n".join(map(json.dumps, lines)))
    words = ["dataset=folder", "dataset.root=mine", "fps=2", "max_new_tokens=8", "threads=1", "hydra.run.dir=run"]
    assert main(words) == 0
    whole, part, gone, frames = rows_of(Path("run"))
    assert [row["sample"] for row in (whole, part, gone, frames)] == ["talk.mp4", "talk.mp4#2", "gone.mp4", "frames"]
    assert all(row["verdict"] == "identical" and row["new_tokens"] == 8 for row in (whole, part, frames))
    assert whole["video_tokens"] == frames["video_tokens"] == 8 * part["video_tokens"]  # 16 s and 2 s
    assert (gone["status"], gone["reason"]) == ("skipped", "no such file: mine/gone.mp4")
    version = FolderDataset("mine").version
    assert all((row["dataset"], row["split"], row["version"]) == ("folder", "", version) for row in (whole, gone))
    assert (whole["answer"], whole["meta"]) == ("Objects.", {"kind": "whole"})
    out = capsys.readouterr().out
    assert "3/4 gone.mp4 skipped no such file: mine/gone.mp4" in out and "skipped" in out.split("verdicts")[1].splitlines()[0]


# What they share


def test_the_papers_prompt_limit_and_order_are_fields_of_all(tmp_path):
    lines = [json.dumps({"video": f"{n}.mp4", "question": "Which?", "options": ["a", "b"], "answer": "a"}) for n in range(9)]
    write(tmp_path / "questions.jsonl", "\n".join(lines))
    root = str(tmp_path)
    own = FolderDataset(root).samples()
    asked = FolderDataset(root, prompt="caption", limit=4).samples()
    assert [s.id for s in asked] == [s.id for s in own[:4]]
    assert all((s.question, s.answer, s.options) == (CAPTION, None, ()) for s in asked)
    mixed = [s.id for s in FolderDataset(root, shuffle=1).samples()]
    assert sorted(mixed) == [s.id for s in own] != mixed and mixed == [s.id for s in FolderDataset(root, shuffle=1).samples()]
    assert [s.id for s in FolderDataset(root, shuffle=1, limit=3).samples()] == mixed[:3]
    for bad, message in (({"prompt": "captoin"}, 'Did you mean "caption"'), ({"limit": 0}, "limit must be at least 1")):
        with pytest.raises(UserError, match=message):
            FolderDataset(root, **bad)


def test_ids_are_the_samples_own_whatever_the_list_says(tmp_path):
    write(tmp_path / "questions.jsonl", "\n".join(json.dumps({"video": "a.mp4", "id": key}) for key in ("a#2", "a", "a", "a")))
    assert [s.id for s in FolderDataset(str(tmp_path)).samples()] == ["a#2", "a", "a#3", "a#4"]


def test_the_version_is_that_of_the_questions(tmp_path):
    write(tmp_path / "questions.jsonl", '{"video": "a.mp4"}')
    first = FolderDataset(str(tmp_path)).version
    assert first == FolderDataset(str(tmp_path), limit=1).version
    write(tmp_path / "questions.jsonl", '{"video": "b.mp4"}')
    assert FolderDataset(str(tmp_path)).version != first


LOCAL = {
    "folder": "questions.jsonl: no such file",
    "video_detail_caption": "data/test-00000-of-00001.parquet: no such file",
    "mvbench": "no folder .*/video",
    "mlvu": "no folder .*/MLVU/video",
    "long_video_bench": "no folder .*/videos",
    "video_mme": "no folder .*/data",
}


@pytest.mark.parametrize("name", LOCAL)
def test_an_empty_folder_ends_with_one_line_that_says_what_belongs_there(tmp_path, name):
    with pytest.raises(UserError, match="dataset.root has no value"):
        compose([f"dataset={name}"])
    (tmp_path / "Test_Videos").mkdir()
    data = registry.build("dataset", compose([f"dataset={name}", f"dataset.root={tmp_path}"]).dataset)
    with pytest.raises(UserError, match=LOCAL[name]) as caught:
        data.samples()
    assert "\n" not in str(caught.value) and data.layout in str(caught.value) and "docs/guides/datasets.md" in str(caught.value)


def test_lists_that_are_none_and_entries_that_lack_a_key_are_named(tmp_path):
    (tmp_path / "videos").mkdir()
    path = write(tmp_path / "lvb_val.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    data = LongVideoBenchDataset(str(tmp_path))
    with pytest.raises(UserError, match="lvb_val.json is not JSON .*LFS, download it again"):
        data.samples()
    write(path, {"a": 1})
    with pytest.raises(UserError, match="lvb_val.json: expected a list of objects"):
        data.samples()
    write(path, [{"id": "x"}])
    with pytest.raises(UserError, match="an entry of lvb_val.json has no 'candidates': expected lvb_val.json, "):
        data.samples()


def test_parquet_that_is_none_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="two data sets are lists in Parquet")
    (tmp_path / "data").mkdir()
    write(tmp_path / "videomme" / "test-00000-of-00001.parquet", "version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="is not Parquet .*LFS, download it again"):
        VideoMMEDataset(str(tmp_path)).samples()


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "videomme" / "test-00000-of-00001.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"takes PyArrow: pip install 'specvlm\[datasets\]'"):
        VideoMMEDataset(str(tmp_path)).samples()


# Frames


def test_frames_follow_the_numbers_in_their_names(tmp_path):
    for number in (1, 2, 10, 11):
        Image.new("RGB", (16, 8), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    write(tmp_path / "notes.txt", "no picture")
    write(tmp_path / "._frame1.png", "what macOS leaves behind")
    clip = read_frames(tmp_path, 2.0)
    assert clip.frames[:, 0, 0, 0].tolist() == [1, 2, 10, 11] and clip.times == (0.0, 0.5, 1.0, 1.5)
    assert isinstance(clip, Clip) and (probe(clip).fps, probe(clip).duration, tuple(clip.frames.shape)) == (
        2.0,
        2.0,
        (4, 3, 8, 16),
    )


def test_bad_folders_of_frames_end_with_one_line(tmp_path):
    folder = tmp_path / "frames"
    with pytest.raises(MissingVideo, match="no such folder of frames"):
        read_frames(folder, 3)
    folder.mkdir()
    with pytest.raises(UserError, match="holds no frames"):
        read_frames(folder, 3)
    Image.new("RGB", (16, 8)).save(folder / "1.png")
    with pytest.raises(UserError, match="expected frames per second above 0, got fps=0"):
        read_frames(folder, 0)
    with pytest.raises(UserError, match="is a file, not a folder of frames"):
        read_frames(folder / "1.png", 3)
    Image.new("RGB", (8, 8)).save(folder / "2.png")
    with pytest.raises(UserError, match="differ in size, 16x8 and 8x8 in 2.png"):
        read_frames(folder, 3)
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:40])
    with pytest.raises(UserError, match="2.png is damaged or not a picture"):
        read_frames(folder, 3)


@pytest.mark.parametrize("name", ["mlvu", "mvbench", "long_video_bench", "video_mme", "video_detail_caption"])
def test_a_root_longer_than_a_name_may_be_is_no_folder(name):
    with pytest.raises(UserError, match="no folder|File name too long"):
        registry.build("dataset", {"name": name, "root": "x" * 5000}).samples()
