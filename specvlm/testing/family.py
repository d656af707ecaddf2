"""Contract checks for model families: prompts, features and positions, and that decodes equal Hugging Face's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.models.load import check_pair, load
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.testing.contract import seeded
from specvlm.testing.sight import check_sight
from specvlm.types import Features, GenerationOptions, KeepSet, VideoPrompt, entering
from specvlm.video.video import Clip, VideoInfo, read_video

LIMIT = 16
CHAIN = "chain:3"
CLOSE = 1e-3  # largest difference of two logits in float32, in standard deviations of all logits


def check_family(target: str | Path, draft: str | Path) -> int:
    """Check that a model family keeps the contract of `Family`. Takes a minute with tiny models.

    The two checkpoints may have random weights. Both are loaded in float32 on the CPU, and the target a second time by
    transformers alone, with its own attention.

    Cases: prompts of text, an image, two images, a video, two videos, a video and an image, and a question before a
    video and an image; the drafters `tree` and `self`, ratios 0, 0.9 and 1, original and reindexed positions.

    Checks: features, embeddings and positions have the right shapes; the lengths from `runs` fill the grid; positions
    of the text after the last video or image count up by one, equally on all axes; a frame's features do not depend on
    other frames; the attention in a `VisionProbe` is finite, and its rows are in the order of the features; a prefill
    in pieces gives the same result; `sampling` chooses frames that can be read; a target that drafts for itself accepts
    its guesses; the logits of every row of the prompt are those of transformers' forward, within rounding; every answer
    is that of transformers' `generate`.

    Args:
        target: Folder of a checkpoint of the family.
        draft: Folder of another checkpoint, with the same tokenizer.

    Returns:
        The number of decodes that were compared.

    Raises:
        AssertionError: The family breaks the contract; the message names the rule and the case.
        UserError: The family's code fails or returns something invalid; the message names the method.
    """
    from transformers import AutoModelForImageTextToText

    lm, small = load(target, "float32"), load(draft, "float32")
    check_pair(lm, small)
    lm.check_settings()
    lm.check_template()
    hf: Any = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32, attn_implementation="sdpa").eval()
    done, prompts = 0, dict[str, VideoPrompt]()
    with torch.inference_mode():
        _check_sampling(lm)
        for case, prompt in _prompts(lm):
            what = f"{lm.family}, {case}"
            _check_prompt(lm, prompt, what)
            _check_features(lm, prompt, what)
            _check_prefill(lm, prompt, what)
            _check_logits(lm, hf, prompt, what)
            prompts[what] = prompt
        check_sight(lm, random_clip(6), f"{lm.family}, video")
        for what, prompt in prompts.items():
            done += _check_answers(lm, small, hf, prompt, what)
    return done


def _prompts(lm: VideoLM) -> Iterator[tuple[str, VideoPrompt]]:
    """Yield a prompt of each kind."""
    image = torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8, generator=seeded())
    cases: dict[str, tuple[list[Clip], list[Tensor]]] = {
        "text": ([], []),
        "image": ([], [image]),
        "images": ([], [image, image.flip(2)[:, :60]]),
        "video": ([random_clip(6)], []),
        "two videos": ([random_clip(6), random_clip(6, 1, still=True)], []),
        "video and image": ([random_clip(6)], [image]),
    }
    for case, (clips, images) in cases.items():
        yield case, lm.prompt("describe the video.", clips, images)
    parts = [
        {"type": "text", "text": "and now?"},
        {"type": "video", "video": random_clip(4)},
        {"type": "image", "image": image},
    ]
    yield "question first", lm.chat([{"role": "user", "content": parts}])


def random_clip(frames: int, seed: int = 0, still: bool = False) -> Clip:
    """Make a random clip of every fourth frame of a file with 8 frames per second.

    still: Keep all but a corner as in the first frame, since some families leave out patches that do not change.
    """
    pixels = torch.randint(0, 255, (frames, 3, 96, 128), dtype=torch.uint8, generator=seeded(seed))
    if still:
        pixels[:, :, 32:], pixels[:, :, :, 32:] = pixels[:1, :, 32:], pixels[:1, :, :, 32:]
    times, index = tuple(frame / 2 for frame in range(frames)), tuple(range(0, 4 * frames, 4))
    return Clip(pixels, times, 2.0, "random", 4 * frames, 8.0, index)


def _check_sampling(lm: VideoLM) -> None:
    """Check that `sampling` gives arguments that `read_video` takes, for long and short videos."""
    for total in (2, 40):
        clip = Clip(torch.zeros(total, 3, 28, 28, dtype=torch.uint8), tuple(n / 4 for n in range(total)), 4.0, "", total, 4.0)
        found = lm.sampling(VideoInfo(total, 4.0, 28, 28, total / 4))
        read = read_video(clip, **found)
        assert 1 <= len(read.frames) <= total, f"{lm.family}: sampling gives {found} for {total} frames"


def _check_prompt(lm: VideoLM, prompt: VideoPrompt, what: str) -> None:
    """Check the tokens in the slots, the lengths from `runs` and the counts from `frame_patches`, and the positions."""
    for grid, video in zip(prompt.grids, prompt.videos, strict=True):
        runs, (frames, patches) = lm.runs(grid, video), lm.frame_patches(video)
        assert sum(runs) == len(grid) and min(runs) > 0, f"{what}: runs {runs} do not fill a grid of {len(grid)} tokens"
        row = (grid.frames, grid.height) == (1, 1)  # of frames of unequal lengths
        assert row or frames == grid.frames, f"{what}: frame_patches gives {frames} frames, the grid has {grid.frames}"
        assert patches > 0, f"{what}: frame_patches gives {patches} patches per frame"
    slots = torch.cat([prompt.video_index, prompt.image_index])
    allowed = set(lm.slots(lm.hf.config))
    assert set(prompt.tokens[slots].tolist()) <= allowed, f"{what}: there are other tokens in the slots than {allowed}"
    positions_AS, behind = lm.positions(prompt), int(slots.max()) + 1 if len(slots) else 0
    assert positions_AS.shape == (lm.axes, len(prompt)), f"{what}: positions are {tuple(positions_AS.shape)}"
    tail_AT = positions_AS[:, behind:]
    assert bool((tail_AT == tail_AT[:1]).all()), f"{what}: text after the last slot has unequal positions on its axes"
    assert bool((tail_AT.diff() == 1).all()), f"{what}: positions of text after the last slot do not count up by one"


def _check_features(lm: VideoLM, prompt: VideoPrompt, what: str) -> None:
    """Check shapes, that frames are encoded separately, and the attention that a probe records."""
    total, width = len(prompt.video_index), int(lm.text.config.hidden_size)
    features = lm.features(prompt)
    embeds = lm.embed(prompt, features)
    for name, found, rows in (("features", features, total), ("embed", embeds, len(prompt))):
        shape = tuple(entering(found).shape)
        assert shape == (rows, width), f"{what}: {name} are {shape}, expected {(rows, width)}"
        added = tuple(found.added.shape) if isinstance(found, Features) else (rows, 0, width)
        assert added == (rows, lm.levels, width), f"{what}: {name} have added rows {added}, for {lm.levels} levels"
    if not total:
        return
    ends = torch.tensor([0, prompt.grids[0].per_frame - 1, total - 1 - prompt.grids[-1].newline]).unique()
    some = lm.features(prompt, KeepSet(ends, total))
    same = torch.allclose(entering(some)[ends], entering(features)[ends], atol=1e-4)
    assert same, f"{what}: a frame's features depend on which other frames are encoded"
    sight = VisionProbe()
    again = lm.features(prompt, sight=sight)
    assert sight.parts, f"{what}: encode_video is given `sight` and adds nothing to it: call sight.add"
    assert torch.equal(entering(again), entering(features)), f"{what}: recording attention changes the features"
    seen = (tuple(sight.attention().shape), len(sight.keys()))
    assert seen == ((total,), total), f"{what}: the probe has {seen[0]} attention and {seen[1]} keys of {total} tokens"


def _check_prefill(lm: VideoLM, prompt: VideoPrompt, what: str) -> None:
    """Check that a prefill in pieces of 7 rows gives the same final hidden state as one in a single piece."""
    embeds, positions = lm.embed(prompt, lm.features(prompt)), lm.positions(prompt)
    whole, pieces = (
        lm.prefill(embeds, positions, lm.new_cache(len(prompt)), prompt.cut, chunk=chunk) for chunk in (len(prompt), 7)
    )
    assert torch.allclose(whole, pieces, atol=1e-3), f"{what}: a prefill in pieces differs by {(whole - pieces).abs().max()}"


def _check_logits(lm: VideoLM, hf: Any, prompt: VideoPrompt, what: str) -> None:
    """Compare the logits of every row of the prompt with those of Hugging Face's model.

    A slot's own logits depend most on its own features, so this finds single wrong features, which answers may not
    show.
    """
    hidden_SD = lm.forward(lm.embed(prompt, lm.features(prompt)), lm.positions(prompt), lm.new_cache(len(prompt)), None)
    ours_SV, theirs_SV = lm.head(hidden_SD), hf(**lm.generate_inputs(prompt)).logits[0]
    apart_S = (ours_SV - theirs_SV).abs().amax(1)
    worst, limit = int(apart_S.argmax()), CLOSE * float(theirs_SV.std())
    apart, where = float(apart_S[worst]), f"row {worst} ({_kind(prompt, worst)})"
    told = f"{what}: the logits of {where} differ from those of transformers' forward by {apart:.2g}"
    assert apart < limit, f"{told}, and rounding explains {limit:.1g}"


def _kind(prompt: VideoPrompt, row: int) -> str:
    """Describe a row of a prompt."""
    for name, index in (("video", prompt.video_index), ("image", prompt.image_index)):
        if row in index.tolist():
            return f"{name} token {index.tolist().index(row)}"
    return "text"


def _check_answers(lm: VideoLM, draft: VideoLM, hf: Any, prompt: VideoPrompt, what: str) -> int:
    """Compare answers with those of Hugging Face's model. Returns the number of decodes."""
    greedy, inputs = GreedyVerifier(), lm.generate_inputs(prompt)
    stops = sorted(lm.stop_ids) or None
    out = hf.generate(**inputs, max_new_tokens=LIMIT, do_sample=False, eos_token_id=stops, pad_token_id=0)
    answer = out[0, len(prompt) :].tolist()
    _compare(tokens_of(list(autoregressive(lm, prompt, LIMIT, greedy))), answer, f"{what}: the target alone")
    asked = list(product((TreeDrafter(CHAIN), SelfDrafter(CHAIN)), (0.0, 0.9, 1.0), ("original", "reindexed")))
    for drafter, ratio, positions in asked:
        options = GenerationOptions(LIMIT, ratio, positions=positions)
        graph = DecodingGraph(lm, draft, TwoStagePruner(), drafter, greedy, options)
        where = f"{what}, drafter={drafter.name}, ratio {ratio}, {positions} positions"
        _compare(tokens_of(list(graph.decode(prompt))), answer, where)
    steps = list(DecodingGraph(lm, lm, NonePruner(), TreeDrafter(CHAIN), greedy).decode(prompt, LIMIT))
    _compare(tokens_of(steps), answer, f"{what}: the target drafting for itself")
    fell = [number for number, step in enumerate(steps[1:], start=1) if step.full and step.accepted != 3]
    assert not fell, f"{what}: the target does not accept its own guesses in rounds {fell}"
    return len(asked) + 2


def _compare(tokens: Sequence[int], answer: Sequence[int], where: str) -> None:
    """Compare an answer with that of transformers."""
    assert list(tokens) == list(answer), f"{where}: gives {list(tokens)}, and transformers' generate {list(answer)}"
