"""Several videos and images in one prompt, on the command line and in a data set."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from specvlm.__main__ import main
from specvlm.app import compose
from specvlm.app.prepare import own_sample
from specvlm.app.quoting import quoted
from specvlm.errors import UserError
from specvlm.results.rows import rows_of, summary_of
from specvlm.strategies import registry
from specvlm.video.clips import find_clip
from specvlm.video.images import read_image
from specvlm.video.memory import picture
from specvlm.video.picture_files import read_picture

SHORT = ["max_new_tokens=8", "frames=4", "pruner=uniform", "ratio=0.5"]
BOTH = "video=[synthetic_1,synthetic_2]"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = torch.randint(0, 255, (60, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(picture.numpy()).save("a picture.png")
    torch.set_num_threads(1)


def test_paths_of_a_list_need_no_quotes():
    words = quoted([BOTH, "image=[a picture.png,b's,c.png]"], sweep=False)
    cfg = compose.compose(words)
    assert cfg.video == ["synthetic_1", "synthetic_2"] and cfg.image == ["a picture.png", "b's", "c.png"]
    swept = compose.jobs(quoted(["video=[a b.mp4,c.mp4],[d.mp4]"], sweep=True), sweep=True)
    assert [job.cfg.video for job in swept] == [["a b.mp4", "c.mp4"], ["d.mp4"]]


@pytest.mark.parametrize("word", ["video=[]", "video=3", "image=[]", "image=[3,4]", "video=null"])
def test_what_is_no_file_is_refused(word):
    with pytest.raises(UserError, match=f"^{word[:5]}=.*: expected a"):
        compose.compose([word])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_vl"])
def test_a_run_takes_several_videos_and_images_and_its_answer_is_hugging_faces(family, capsys):
    words = [BOTH, "image=a picture.png", f"pair=embedded_{family}", "check=generate", "hydra.run.dir=out", *SHORT]
    assert main(words) == 0
    said, found = capsys.readouterr(), summary_of(Path("out"))
    assert "a picture.png, synthetic_1.mp4, synthetic_2.mp4" in said.out + said.err
    assert found["verdict"] == "identical" and found["hf_check"] == "identical" and found["video_tokens"] > 0
    one = own_sample(compose.compose(["video=synthetic_1"]))
    assert (one.video, one.more, one.images) == (find_clip("synthetic_1"), (), ())


@pytest.mark.slow
def test_a_data_set_lists_several(tmp_path):
    for name in ("synthetic_1", "synthetic_2"):
        (tmp_path / f"{name}.mp4").symlink_to(find_clip(name))
    lines = [
        {"id": "both", "video": ["synthetic_1.mp4", "synthetic_2.mp4"], "image": "a picture.png", "question": "how many ?"},
        {"video": "synthetic_1.mp4", "question": "how many ?"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = registry.build("dataset", {"name": "folder", "root": str(tmp_path)}).samples()
    assert [len(sample.more) for sample in found] == [1, 0] and found[0].images[0].name == "a picture.png"
    assert main(["dataset=folder", f"dataset.root={tmp_path}", "hydra.run.dir=job", *SHORT]) == 0
    rows = rows_of(Path("job"))
    assert [row["sample"] for row in rows] == ["both", "synthetic_1.mp4"] and rows[0]["video_tokens"] > rows[1]["video_tokens"]
    (tmp_path / "questions.jsonl").write_text(json.dumps(lines[0] | {"image": ["../x.png"]}))
    with pytest.raises(UserError, match=r"line 1: .*x\.png"):
        registry.build("dataset", {"name": "folder", "root": str(tmp_path)}).samples()


def test_an_image_is_read_upright_and_faults_are_explained(tmp_path):
    upright = Image.open("a picture.png")
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save("turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png"), read_image(tmp_path / "a picture.png"))
    assert read_image(tmp_path / "a picture.png").shape == (3, 60, 90)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    for name in ("broken.png", "missing.png"):
        with pytest.raises(UserError, match=f"{name}: the image cannot be read"):
            read_image(tmp_path / name)


def test_an_image_that_would_block_or_fill_the_memory_is_refused(tmp_path):
    os.mkfifo("pipe.png")
    Image.new("1", (9000, 9000)).save("large.png")
    (tmp_path / "folder.png").mkdir()
    for name, told in (
        ("pipe.png", "is not a file"),
        ("folder.png", "is not a file"),
        ("large.png", "more than 67108864 pixels"),
    ):
        with pytest.raises(UserError, match=f"{name}: the image cannot be read: .*{told}"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="an image given as bytes is 9000x9000, more than 67108864 pixels"):
        picture((tmp_path / "large.png").read_bytes())


def test_of_16_bit_grey_the_upper_bits_are_read_in_each_way(tmp_path):
    grey = (np.arange(60 * 90).reshape(60, 90) * 12).astype(np.uint16)
    Image.fromarray(grey).save("deep.png")
    content = (tmp_path / "deep.png").read_bytes()
    found = [read_image(tmp_path / "deep.png"), picture(content), picture(Image.open("deep.png")), picture("deep.png")]
    assert all(torch.equal(one, torch.from_numpy((grey >> 8).astype(np.uint8)).expand(3, 60, 90)) for one in found)


def test_an_image_may_be_a_tiff_but_a_frame_of_a_folder_may_not(tmp_path):
    Image.open("a picture.png").save("picture.png", format="TIFF")
    assert torch.equal(read_image(tmp_path / "picture.png"), read_image(tmp_path / "a picture.png"))
    with pytest.raises(UserError, match="damaged or not a picture: expected JPEG, PNG, WEBP, GIF, BMP$"):
        read_picture(tmp_path / "picture.png")
