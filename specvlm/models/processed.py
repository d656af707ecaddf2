"""Build a prompt from the inputs that a Hugging Face processor returns, in which placeholders are already expanded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.types import TokenGrid, VideoPrompt

TEXT = frozenset({"input_ids", "attention_mask", "mm_token_type_ids"})


def row_of(inputs: Mapping[str, Any], known: frozenset[str]) -> Tensor:
    """Return the (S,) token ids of a processor's inputs.

    Args:
        inputs: Inputs of one prompt, without padding.
        known: Names of the family's own inputs, besides those in TEXT.

    Raises:
        UserError: There are several prompts, padding, or inputs with unknown names.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    if other := sorted(given.keys() - TEXT - known):
        wanted = ", ".join(sorted(TEXT | known))
        raise UserError(f"inputs {', '.join(other)}: expected those of the model's own processor, {wanted}")
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise UserError("inputs need input_ids as a tensor (1, S): call the processor with return_tensors='pt'")
    if len(ids) != 1:
        raise UserError(f"inputs hold {len(ids)} prompts: give one at a time, several calls run together")
    mask = given.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise UserError("inputs have padding, which a single prompt does not need")
    return ids[0].to("cpu", torch.int64)


def assembled(
    tokens_S: Tensor,
    slots: tuple[int, int],
    grids: Sequence[TokenGrid],
    videos: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]] = (),
) -> VideoPrompt:
    """Build the prompt. slots: token ids of a video's and an image's slots, which differ.

    Raises UserError if the number of slots differs from that of features, or no text follows the video.
    """
    video_N, image_I = ((tokens_S == slot).nonzero().flatten() for slot in slots)
    return placed(tokens_S, (video_N, image_I), grids, videos, images)


def placed(
    tokens_S: Tensor,
    slots: tuple[Tensor, Tensor],
    grids: Sequence[TokenGrid],
    videos: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]] = (),
) -> VideoPrompt:
    """Build the prompt. slots: indices of the videos' and the images' slots. Raises UserError as `assembled` does."""
    video_N, image_I = slots
    wanted = sum(map(len, grids)), sum(int(image["tokens"]) for image in images)
    if (len(video_N), len(image_I)) != wanted:
        seen = f"{len(video_N)} slots of videos and {len(image_I)} of images"
        raise UserError(f"input_ids have {seen}, but the pixels fill {wanted[0]} and {wanted[1]}: do they belong together?")
    prompt = VideoPrompt(tokens_S, video_N, tuple(grids), tuple(videos), tuple(images), image_I)
    if prompt.cut == len(prompt):
        raise UserError("no text follows the video: put the question after it")
    return prompt
