"""Write the synthetic sample clips with their gold answers: `python -m experiments.embedded_pair.clips`."""

import json
from pathlib import Path

import av

from specvlm.video.synthetic import FPS, SIDE, caption, questions, render, sample_scene

CLIPS = Path(__file__).resolve().parents[2] / "specvlm" / "assets" / "clips"
SEEDS = (101, 103, 107, 109)  # held out


def write_mp4(path: Path, frames, crf: int = 21) -> None:
    """uint8 (T, H, W, 3) at 2 frames a second as h264; the noise of the world makes up most of the bytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "slow"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    CLIPS.mkdir(parents=True, exist_ok=True)
    facts = {}
    for i, seed in enumerate(SEEDS, 1):
        scene = sample_scene(seed, min_objects=2)
        name = f"synthetic_{i}.mp4"
        write_mp4(CLIPS / name, render(scene, seed))
        asked = [{"question": q, "answer": a} for q, a in questions(scene, seed)]
        facts[name] = {"seed": seed, "caption": caption(scene), "questions": asked}
    (CLIPS / "synthetic.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
