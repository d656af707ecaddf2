"""Qwen2-VL for specvlm: Qwen2.5-VL without windows in its vision tower and without seconds in its positions."""

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens

from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.vision_probe import VisionProbe
from specvlm.strategies.plugins import hookimpl
from specvlm.types import VideoPrompt


class Qwen2VL(Qwen2_5_VL):
    """Qwen2-VL. Videos are {"pixels": (t*h*w, patch values), "thw": patch grid, "seconds": per temporal patch}."""

    family = "qwen2_vl"

    @property
    def vision_values(self) -> int:
        vision = self.hf.config.vision_config
        return int((3 * vision.mlp_ratio + 8) * vision.embed_dim)  # includes the rotary embedding in float32

    def _tower(self, pixels: Tensor, thw: tuple[int, int, int], sight: VisionProbe | None = None) -> Tensor:
        visual, grid = self.hf.model.visual, torch.tensor([thw])
        extra = {} if sight is None else {"sight": sight.of(visual.blocks[-1].attn)}
        cu_seqlens = get_vision_cu_seqlens(grid)
        out = visual(pixels.to(self.device, visual.dtype), grid_thw=grid.to(self.device), cu_seqlens=cu_seqlens, **extra)
        if sight is not None:  # patches of one token are adjacent
            sight.add(sight.take().unflatten(0, (-1, self._merge**2)).mean(1))
        return out.pooler_output

    def _grids(self, prompt: VideoPrompt) -> dict[str, Tensor | None]:
        return {name: grid for name, grid in super()._grids(prompt).items() if name != "second_per_grid_ts"}

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        made = Qwen2_5_VL.hf_inputs(config, prompt)
        return {name: value for name, value in made.items() if name != "second_per_grid_ts"}


@hookimpl
def specvlm_families() -> dict[str, str]:
    return {"qwen2_vl": "specvlm_qwen2_vl:Qwen2VL"}
