"""Where the tokens of a conversation about one video stand: the prompt layout and rotary positions of each family.

Training rows have the layout of the library's own `prompt()` and `positions()`, which tests/test_embedded_layout.py asserts.

Legend: S slots of the context (everything up to the last video token), N video tokens, R text rows, A rotary axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.embedded_pair.tokenizer import ID, VIDEO, after_frame, before_frame, before_video
from specvlm.video.synthetic import SIDE

PATCH = 14
GRID, CELLS = SIDE // PATCH, SIDE // PATCH // 2  # patches and merged cells along a side
TEXT_ROWS = 224  # text rows of a training row, all turns after the video


@dataclass(frozen=True)
class Layout:
    """A context and what may follow it.

    Attributes:
        tokens: (S,) ids; a video token's is the family's placeholder.
        slots: (N,) slots of the video tokens.
        texts: (S - N,) slots of all other tokens.
        order: (S,) for each slot, where its row is in [rows of the texts, rows of the video].
        places: (A, S + R) rotary positions, as `generate` of transformers 5.x has them.
    """

    tokens: Tensor
    slots: Tensor
    texts: Tensor
    order: Tensor
    places: Tensor

    def to(self, device: torch.device) -> "Layout":
        return Layout(*(tensor.to(device) for tensor in vars(self).values()))


def layout(family: str, seconds: int) -> Layout:
    """The context with a video of this length at 224 x 224."""
    before, frame = before_video(family), CELLS * CELLS
    pieces: list[list[int] | int] = [before]  # texts, and numbers of video tokens
    if family == "qwen3_vl":
        for second in range(seconds):
            pieces += [[*(after_frame() if second else []), *before_frame(second)], frame]
    else:
        pieces.append(frame * seconds + (family == "llava_onevision"))  # LLaVA's newline token comes last
    ids = [token for piece in pieces for token in (piece if isinstance(piece, list) else [ID[VIDEO[family]]] * piece)]
    tokens = torch.tensor(ids)
    is_video = tokens == ID[VIDEO[family]]
    slots, texts = is_video.nonzero()[:, 0], (~is_video).nonzero()[:, 0]
    return Layout(tokens, slots, texts, torch.cat([texts, slots]).argsort(), _places(family, pieces, seconds))


def _places(family: str, pieces: list[list[int] | int], seconds: int) -> Tensor:
    if family == "llava_onevision":
        return torch.arange(sum(piece if isinstance(piece, int) else len(piece) for piece in pieces) + TEXT_ROWS)[None]
    parts, at = [], 0
    for piece in [*pieces, [0] * TEXT_ROWS]:
        if isinstance(piece, list):
            parts.append(torch.arange(len(piece)).expand(3, -1) + at)
            at += len(piece)
        else:  # Qwen3-VL counts every frame as a video of its own
            frames = 1 if family == "qwen3_vl" else seconds
            t, h, w = torch.meshgrid(torch.arange(frames), torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
            parts.append(torch.stack([t, h, w]).reshape(3, -1) + at)
            at += CELLS  # 5.x: max(h, w); time is not counted
    return torch.cat(parts, 1)
