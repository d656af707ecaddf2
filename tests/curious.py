"""A pruner that reads every signal of the target, and the signals of a request, for test_signals.py and its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.decoding.collect import collector_for, gathered
from specvlm.decoding.prefill import prefill
from specvlm.decoding.timing import Clock
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import STATE_SIGNALS, PruneContext, Pruner
from specvlm.types import KeepSet, VideoPrompt

ALL = STATE_SIGNALS | {"vision_attention", "vision_keys", "verifier_attention", "verifier_attention_weighted", "features"}


@dataclass(frozen=True)
class Curious(Pruner):
    """Pruner that reads every signal and keeps the first tokens."""

    name = "curious"
    needs = ALL
    layer: int = 2

    def state_layer(self, layers: int) -> int:
        return self.layer

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        return torch.arange(1.0, len(text_TD) + 1) * (features_ND.abs().sum() > 0)

    def select(self, ctx: PruneContext) -> KeepSet:
        for name in self.needs:
            ctx.signal(name)
        return KeepSet(torch.arange(ctx.budget), ctx.total)


@torch.inference_mode()
def signals_of(lm: VideoLM, request: VideoPrompt, pruner: Pruner | None = None) -> tuple[dict[str, Tensor], Tensor]:
    pruner = pruner or Curious()
    collector = collector_for(pruner, lm, request)
    features, logits = prefill(lm, request, lm.new_cache(len(request)), Clock(lm.device), collector)
    return gathered(pruner.needs, request, collector, features), logits
