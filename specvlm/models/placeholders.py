"""Expand the placeholders of a chat prompt: the one token of a video or image becomes one per feature."""

from collections.abc import Sequence
from typing import Any

import torch

from specvlm.errors import UserError
from specvlm.types import TokenGrid, VideoPrompt


def expanded(
    ids: Sequence[int],
    placeholders: tuple[int, int],
    vocabulary: int,
    grids: Sequence[TokenGrid],
    videos: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]],
) -> VideoPrompt:
    """Implement `VideoLM.expand`. placeholders: token ids of a video and of an image."""
    video_token, image_token = placeholders
    for token, wanted, what in ((video_token, len(grids), "videos"), (image_token, len(images), "images")):
        if (found := list(ids).count(token)) != wanted:
            raise UserError(
                f"{found} placeholders for {wanted} {what} in the prompt: the chat template places them otherwise, or "
                "config.json gives them another token"
            )
    if (largest := max(ids, default=0)) >= vocabulary:
        raise UserError(f"the tokenizer gives token id {largest}, but the model has {vocabulary}: they do not match")
    lengths = {video_token: iter(map(len, grids)), image_token: iter(int(image["tokens"]) for image in images)}
    tokens = [t for token in ids for t in [token] * (next(lengths[token]) if token in lengths else 1)]
    tokens_S = torch.tensor(tokens)
    video_index = (tokens_S == video_token).nonzero().flatten()
    prompt = VideoPrompt(tokens_S, video_index, tuple(grids), tuple(videos), tuple(images))
    if prompt.cut == len(prompt):
        raise UserError(
            "no text follows the video: put the question after it, since its attention is what scores the video tokens"
        )
    return prompt
