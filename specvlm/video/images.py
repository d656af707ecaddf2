"""Preprocess still images with Hugging Face's PIL image processors, which need no torchvision.

With torchvision installed, Hugging Face uses other processors, which differ in 0.1 % of the values by up to 2/255.
Shapes: H height, W width, C = 3 colours, P tiles, S tile side; grid (t, h, w) counts patches.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specvlm.errors import UserError, explained
from specvlm.video.picture_files import IMAGES, read_picture


def read_image(path: Path) -> Tensor:
    """Read an image file as (3, H, W) uint8 RGB, oriented by its EXIF data. Raises UserError if it cannot be read."""
    hint = " (addresses are not fetched: download it first)" if ":/" in str(path) else ""
    try:
        return read_picture(path, IMAGES)
    except UserError as error:
        raise UserError(f"{path}: the image cannot be read{hint}: {error}") from None


def qwen_image(image: Tensor, folder: str | Path) -> tuple[Tensor, tuple[int, int, int]]:
    """Preprocess an image for Qwen2.5-VL.

    Args:
        image: (3, H, W) uint8.
        folder: The model folder.

    Returns:
        Patches (h*w, C*temporal*patch*patch) float32, and their grid (1, h, w).

    Raises:
        UserError: The folder has no usable image processor settings, or one side is more than 200 times the other.
        ValueError: `image` is not uint8 (3, H, W), or is empty.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    _check(image)
    processor = _load(Qwen2VLImageProcessorPil, folder)
    if max(image.shape[1:]) > 200 * min(image.shape[1:]):
        raise UserError(f"an image of {image.shape[2]}x{image.shape[1]}: no side may be more than 200 times the other")
    out = processor.preprocess(image.numpy(), input_data_format="channels_first", return_tensors="pt")
    t, h, w = out["image_grid_thw"][0].tolist()
    return out["pixel_values"], (t, h, w)


def llava_image(image: Tensor, folder: str | Path, alone: bool = True) -> tuple[Tensor, tuple[int, int], int]:
    """Preprocess an image for LLaVA-OneVision.

    The first tile is the whole image, shrunk to one tile. The others are parts of the image, enlarged or shrunk to the
    resolution that fits it best among those that the settings list.

    Args:
        image: (3, H, W) uint8.
        folder: The model folder.
        alone: False if the prompt has other images: the image is then one tile, padded to a square, and
            get_image_features needs ``batch_num_images``.

    Returns:
        Tiles (P, 3, S, S) float32, the image's (H, W), and the number of its tokens.

    Raises:
        UserError: The folder has no usable image processor settings, or their tile size differs from the model's.
        ValueError: `image` is not uint8 (3, H, W), or is empty.
    """
    from transformers import AutoConfig
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    _check(image)
    processor, config = _load(LlavaOnevisionImageProcessorPil, folder), AutoConfig.from_pretrained(folder)
    picture = image.numpy()
    # The second copy only tells the processor that the first is not alone.
    images = picture if alone else [[picture, picture]]
    tiles = processor.preprocess(images, input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]
    side = config.vision_config.image_size
    if tiles.shape[2:] != (side, side):
        raise UserError(f"{folder}: the image processor makes tiles of {tuple(tiles.shape[2:])}, the model takes {side}")
    size = (image.shape[1], image.shape[2])
    return tiles, size, llava_tokens(size, config) if alone else (side // config.vision_config.patch_size) ** 2 + 1


def llava_tokens(size: tuple[int, int], config: Any) -> int:
    """Count the tokens that LlavaOnevisionModel.pack_image_features makes of an image.

    First come the tokens of the whole image, then those of its parts, cropped to the image's shape. Each row of these
    ends with a newline token. The setting ``vision_aspect_ratio`` is ``anyres_max_n``: parts with over 1.1² times the
    tokens of n tiles are shrunk to about the tokens of n tiles.

    Args:
        size: (height, width) of the image in pixels.
        config: Configuration of the model.
    """
    from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

    side: int = config.vision_config.image_size
    cells: int = side // config.vision_config.patch_size
    tall, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    _, rows, columns = unpad_image(torch.empty(1, tall * cells, wide * cells, device="meta"), size).shape
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * cells**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return cells**2 + rows * (columns + 1)


def _check(image: Tensor) -> None:
    """Raise ValueError unless the image is uint8 (3, H, W) and not empty."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")


def _load(processor: Any, folder: str | Path) -> Any:
    """Load a Hugging Face processor from a folder on disk.

    Raises UserError if there is no such folder, or it has no usable settings.
    """
    if not Path(folder).is_dir():  # Hugging Face would look it up on its hub
        raise UserError(f"no such model folder: {folder}")
    wanted = "preprocessor_config.json, or processor_config.json with an image_processor in it"
    with explained(f"{folder} has no usable image processor settings: expected {wanted}"):
        return processor.from_pretrained(folder, local_files_only=True)
