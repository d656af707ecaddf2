"""Pixels equal Hugging Face's: digests frozen from its processors, and a direct comparison where torchvision works.

``python tests/test_preprocess.py``, in an environment with torchvision, rewrites ``tests/data/pixels.json``.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specvlm.errors import UserError
from specvlm.video.images import llava_image, qwen_image
from specvlm.video.preprocess import LlavaVideoConfig, QwenVideoConfig, llava_video, qwen_video

FROZEN = Path(__file__).parent / "data" / "pixels.json"
SIZES = [(1, 90, 160), (2, 28, 28), (3, 182, 322), (5, 117, 231), (17, 64, 300), (9, 252, 448), (2, 20, 2000), (2, 336, 364)]
CAPPED = QwenVideoConfig(min_pixels=3136, cap_pixels_per_frame=True, max_video_tokens=300)
QWEN = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}  # as in released Qwen2.5-VL checkpoints
LLAVA = {
    "do_pad": True,
    "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384], [768, 768]],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "processor_class": "LlavaOnevisionProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}  # as in released LLaVA-OneVision checkpoints
NESTED = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": 3136, "longest_edge": 90000}}
FOLDERS = {  # model type, files, and what the video settings are then
    "qwen_released": ("qwen2_5_vl", {"preprocessor_config.json": QWEN}, QwenVideoConfig(min_pixels=3136, max_pixels=12845056)),
    "qwen_video_file_wins": (
        "qwen2_5_vl",
        {"preprocessor_config.json": QWEN, "video_preprocessor_config.json": NESTED},
        QwenVideoConfig(min_pixels=3136, max_pixels=90000),
    ),
    "qwen_nested_wins": (
        "qwen2_5_vl",
        {
            "preprocessor_config.json": QWEN,
            "video_preprocessor_config.json": {**NESTED, "patch_size": 16},
            "processor_config.json": {"video_processor": {**NESTED, "cap_pixels_per_frame": True, "max_video_tokens": 4000}},
        },
        QwenVideoConfig(min_pixels=3136, max_pixels=90000, cap_pixels_per_frame=True, max_video_tokens=4000),
    ),
    "llava_released": (
        "llava_onevision",
        {"preprocessor_config.json": LLAVA, "processor_config.json": {"num_image_tokens": 729}},
        LlavaVideoConfig(mean=(0.5,) * 3, std=(0.5,) * 3, rescale=0.00392156862745098),
    ),
}


def picture(frames: int, height: int, width: int) -> torch.Tensor:
    """Make frames that are the same on every machine: a moving gradient with integer noise."""
    place = torch.arange(frames * 3 * height * width).view(frames, 3, height, width)
    noise = (place * 1103515245 + 12345 >> 16) % 64
    ramp = (torch.arange(height)[:, None] * 2 + torch.arange(width) + 9 * torch.arange(frames)[:, None, None]) % 192
    return (ramp[:, None] + noise).to(torch.uint8)


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]


def write_folder(folder: Path, model_type: str, files: dict[str, dict]) -> Path:
    folder.mkdir(parents=True)
    for name, content in {"config.json": {"model_type": model_type}, **files}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def frozen_pixels() -> dict[str, str]:
    """Compute digests of the output of Hugging Face's processors for each size. Needs torchvision."""
    from transformers import LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor

    qwen, llava, digests = Qwen2VLVideoProcessor(cap_pixels_per_frame=False), LlavaOnevisionVideoProcessor(), {}
    bounds = {"shortest_edge": CAPPED.min_pixels, "longest_edge": CAPPED.max_pixels}
    capping = Qwen2VLVideoProcessor(cap_pixels_per_frame=True, size=bounds, max_video_tokens=CAPPED.max_video_tokens)
    for size in SIZES:
        frames, name = picture(*size), "x".join(map(str, size))
        out = qwen(frames, return_tensors="pt")
        grid = "x".join(map(str, out["video_grid_thw"][0].tolist()))
        digests[f"qwen {name}"] = f"{grid} {digest(out['pixel_values_videos'])}"
        digests[f"capped {name}"] = digest(capping(frames, return_tensors="pt")["pixel_values_videos"])
        digests[f"llava {name}"] = digest(llava(frames, return_tensors="pt")["pixel_values_videos"][0])
    return digests


def our_pixels() -> dict[str, str]:
    digests = {}
    for size in SIZES:
        frames, name = picture(*size), "x".join(map(str, size))
        pixels, grid = qwen_video(frames, QwenVideoConfig())
        assert grid == QwenVideoConfig().grid(*size)
        digests[f"qwen {name}"] = f"{'x'.join(map(str, grid))} {digest(pixels)}"
        digests[f"capped {name}"] = digest(qwen_video(frames, CAPPED)[0])
        digests[f"llava {name}"] = digest(llava_video(frames, LlavaVideoConfig()))
    return digests


def allow_torchvision_without_its_operators() -> None:
    """Make torchvision's CUDA build importable with a CPU torch, by declaring operators that it cannot load."""
    global _library
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


if importlib.util.find_spec("torchvision"):
    allow_torchvision_without_its_operators()


@pytest.mark.slow
def test_pixels_equal_those_frozen_from_hugging_face():
    assert our_pixels() == json.loads(FROZEN.read_text())


needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="Hugging Face's video processors need torchvision: pip install --no-deps torchvision==0.28.0",
)


@needs_torchvision
def test_pixels_and_settings_equal_hugging_faces_own(tmp_path):
    """In a process of its own: torchvision must be made importable before transformers looks for it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, "compare", str(tmp_path)], check=True, timeout=300, env=env)


def compare_with_hugging_face(scratch: Path) -> None:
    assert our_pixels() == frozen_pixels()
    from transformers import AutoVideoProcessor

    frames = picture(3, 90, 150)
    for name, (model_type, files, _) in FOLDERS.items():
        folder = write_folder(scratch / name, model_type, files)
        theirs = AutoVideoProcessor.from_pretrained(str(folder))(frames, return_tensors="pt")["pixel_values_videos"]
        if model_type == "qwen2_5_vl":
            assert torch.equal(qwen_video(frames, QwenVideoConfig.from_folder(folder))[0], theirs), name
        else:
            assert torch.equal(llava_video(frames, LlavaVideoConfig.from_folder(folder)), theirs[0]), name


@pytest.mark.parametrize("name", FOLDERS)
def test_settings_are_read_where_auto_video_processor_reads_them(tmp_path, name):
    model_type, files, expected = FOLDERS[name]
    assert type(expected).from_folder(write_folder(tmp_path / name, model_type, files)) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no video processor settings"),
        ({"processor_config.json": {"num_image_tokens": 729}}, "has no video processor settings"),
        ({"preprocessor_config.json": LLAVA}, "is set up for LlavaOnevisionImageProcessor; expected one of Qwen2VL"),
        ({"preprocessor_config.json": {**QWEN, "do_normalize": False}}, "do_normalize=false.*not supported"),
        ({"preprocessor_config.json": {**QWEN, "resample": 2}}, "resample=2"),
        ({"video_preprocessor_config.json": {"size": {"height": 384, "width": 384}}}, "lacks shortest_edge"),
    ],
)
def test_unusable_settings_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        QwenVideoConfig.from_folder(write_folder(tmp_path / "model", "qwen2_5_vl", files))


def test_a_missing_folder_and_broken_json_are_named(tmp_path):
    for read in (QwenVideoConfig.from_folder, LlavaVideoConfig.from_folder):
        with pytest.raises(UserError, match="no such model folder"):
            read(tmp_path / "nowhere")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*preprocessor_config.json"):
        LlavaVideoConfig.from_folder(tmp_path)


def test_llava_sizes_that_keep_the_shape_are_refused(tmp_path):
    files = {"preprocessor_config.json": {**LLAVA, "size": {"shortest_edge": 384}}}
    with pytest.raises(UserError, match="only height and width"):
        LlavaVideoConfig.from_folder(write_folder(tmp_path / "model", "llava_onevision", files))


def test_frames_that_cannot_be_processed_are_refused():
    with pytest.raises(UserError, match="the clip is empty: 0 frames"):
        llava_video(picture(1, 8, 8)[:0], LlavaVideoConfig())
    with pytest.raises(UserError, match="201x1: no side"):
        qwen_video(picture(1, 1, 201), QwenVideoConfig())
    with pytest.raises(ValueError, match="expected uint8"):
        qwen_video(picture(1, 8, 8).float(), QwenVideoConfig())


def test_seconds_per_grid_is_the_time_between_temporal_patches():
    assert QwenVideoConfig().seconds_per_grid(fps=4.0) == 0.5


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory):
    from transformers import LlavaOnevisionConfig, LlavaOnevisionModel

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    pinpoints = [[28 * tall, 28 * wide] for tall in range(1, 7) for wide in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, **tiny},
        text_config={"model_type": "qwen2", "vocab_size": 32, "num_key_value_heads": 1, **tiny},
        image_grid_pinpoints=pinpoints,
    )
    settings = {**LLAVA, "size": {"height": 28, "width": 28}, "image_grid_pinpoints": pinpoints}
    folder = write_folder(tmp_path_factory.mktemp("llava") / "model", "", {"preprocessor_config.json": settings})
    config.save_pretrained(folder)
    return LlavaOnevisionModel(config).eval(), folder


def test_llava_image_counts_the_rows_that_the_model_makes(tiny_llava):
    model, folder = tiny_llava
    sizes = [(28, 28), (30, 100), (57, 33), (500, 31), (31, 500), (168, 168), (1080, 1920), (7, 91), (1, 1), (97, 113)]
    for height, width in sizes:
        pixels, size, tokens = llava_image(picture(1, height, width)[0], folder)
        assert (size, pixels.dtype, pixels.shape[1:]) == ((height, width), torch.float32, (3, 28, 28))
        with torch.no_grad():
            features = model.get_image_features(pixels[None], torch.tensor([size])).pooler_output[0]
        assert len(features) == tokens, (height, width)


def test_llava_image_among_others_is_one_tile(tiny_llava):
    model, folder = tiny_llava
    pixels, size, tokens = llava_image(picture(1, 40, 90)[0], folder, alone=False)
    with torch.no_grad():
        out = model.get_image_features(
            torch.stack([pixels, pixels]), torch.tensor([size, size]), batch_num_images=torch.tensor([2])
        )
    assert (len(pixels), [len(features) for features in out.pooler_output]) == (1, [tokens, tokens])


def test_qwen_image_gives_patches_of_one_moment(tmp_path):
    folder = write_folder(tmp_path / "model", "qwen2_5_vl", {"preprocessor_config.json": QWEN})
    pixels, grid = qwen_image(picture(1, 90, 150)[0], folder)
    assert (grid, tuple(pixels.shape), pixels.dtype) == ((1, 6, 10), (60, 3 * 2 * 14 * 14), torch.float32)


def test_images_without_settings_are_refused(tmp_path):
    for read in (qwen_image, llava_image):
        with pytest.raises(UserError, match="no such model folder"):
            read(picture(1, 8, 8)[0], tmp_path / "nowhere")
        with pytest.raises(UserError, match="no usable image processor settings"):
            read(picture(1, 8, 8)[0], tmp_path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        compare_with_hugging_face(Path(sys.argv[2]))
    else:
        FROZEN.parent.mkdir(exist_ok=True)
        FROZEN.write_text(json.dumps(frozen_pixels(), indent=1) + "\n")
