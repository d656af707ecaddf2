"""Gather the signals that strategies need (`strategies.signals`) from the target's prefill and from the video file.

Every rank holds the same signals, except the means per KV head, of which each rank holds those of its own heads. Means
over all heads are averaged over ranks, norms are summed, and the rest is computed from replicated tensors.

Shape suffixes: T sampled frames of a clip, F frames of the grid, P tokens per frame, N video tokens, D hidden size.
"""

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from specvlm.errors import UserError
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import HiddenStateProbe, VisionProbe
from specvlm.strategies import CODEC_SIGNALS, STATE_SIGNALS, Pruner
from specvlm.strategies.signals import LAYERED
from specvlm.types import Features, TokenGrid, VideoPrompt, entering
from specvlm.video.codec import Stream, read_stream

KEPT_STATES = frozenset({"text_similarity", "hidden", "hidden_text", "final_norm"})  # signals of a `HiddenStateProbe`


def state_layer(pruner: Pruner, target: VideoLM) -> int:
    """Return the pruner's `state_layer`, counted from 1. Hidden states are read after the layer, keys inside it.

    Returns 0 if the pruner needs none of STATE_SIGNALS. Raises UserError if the target has no such layer.
    """
    if not pruner.needs & STATE_SIGNALS:
        return 0
    layer = pruner.state_layer(target.layers)
    if not 1 <= layer <= target.layers:
        raise UserError(f"pruner={pruner.name} reads states after {layer} layers, but the target has {target.layers}")
    return layer


def attention_layers(pruner: Pruner, target: VideoLM) -> int:
    """Return how many of the target's first layers the pruner reads attention of. Raises UserError for an invalid number."""
    if not pruner.needs & LAYERED:
        return 0
    layers = pruner.attention_layers(target.layers)
    if type(layers) is not int or not 1 <= layers <= target.layers:
        raise UserError(f"pruner={pruner.name} reads attention of {layers!r:.20} layers, but the target has {target.layers}")
    return layers


def layers_read(pruner: Pruner, target: VideoLM) -> int:
    """Return how many of the target's first layers must run before the pruner's signals are complete; 0 if none."""
    if "verifier_attention" in pruner.needs:  # a mean over all layers
        return target.layers
    return max(state_layer(pruner, target), attention_layers(pruner, target))


def signals_for(
    pruner: Pruner, target: VideoLM, prompt: VideoPrompt, collector: AttentionCollector | None, features: Tensor | Features
) -> dict[str, Tensor]:
    """Return the signals of the target and of the video file that a pruner needs, of the layers that it reads."""
    most = attention_layers(pruner, target)
    found = gathered(pruner.needs, prompt, collector, features)
    return {name: signal[:most] if name in LAYERED else signal for name, signal in found.items()}


def collector_for(
    pruner: Pruner | None, target: VideoLM, prompt: VideoPrompt, more: frozenset[str] = frozenset(), hidden: bool = False
) -> AttentionCollector | None:
    """Make the collector that reads signals from the target's prefill; None if nothing is read.

    Args:
        pruner: The pruner, or None if nothing is pruned.
        target: The target.
        prompt: The request's prompt, with at least one video token.
        more: Names of signals needed besides the pruner's.
        hidden: Whether the verifier reads the video tokens' last hidden states.

    Raises:
        UserError: The pruner reads a layer that the target does not have.
    """
    needs = more | (pruner.needs if pruner else frozenset())
    layer = state_layer(pruner, target) if pruner else 0
    heads = "verifier_attention_per_kv_head" in needs
    collector = AttentionCollector(
        prompt.video_index.to(target.device),
        rows=heads or bool(needs & {"verifier_attention", "verifier_attention_per_layer"}),
        heads=heads,
        hidden=hidden,
        last_row="verifier_attention_last_row" in needs,
        weigh=pruner.row_weights if pruner and "verifier_attention_weighted" in needs else None,
        keys=layer - 1 if needs & {"key_norm", "key_norm_text"} else None,
        states=HiddenStateProbe(prompt.video_index, prompt.cut, layer, target.text.norm.weight)
        if needs & KEPT_STATES
        else None,
        sight=VisionProbe() if needs & {"vision_attention", "vision_keys"} else None,
    )
    return collector if collector.reads else None


def gathered(
    needs: frozenset[str], prompt: VideoPrompt, collector: AttentionCollector | None, features: Tensor | Features
) -> dict[str, Tensor]:
    """Return the signals named in `needs` on the device of the features. Leaves out those that were not collected."""
    features_ND = entering(features)
    signals, device = {}, features_ND.device
    if "features" in needs:
        signals["features"] = features_ND.clone()  # strategies may write to their signals
    if needs & CODEC_SIGNALS:
        signals.update(zip(("motion", "packet_bytes", "intra"), codec(prompt).to(device), strict=True))
    if collector is None:
        return {name: signal for name, signal in signals.items() if name in needs}
    if collector.rows:
        signals["verifier_attention_per_layer"] = collector.per_layer()
        signals["verifier_attention"] = collector.per_layer().mean(0)
    if collector.heads:
        signals["verifier_attention_per_kv_head"] = collector.per_head()
    if collector.last_row:
        signals["verifier_attention_last_row"] = collector.last_rows()
    if collector.weigh is not None:
        signals["verifier_attention_weighted"] = collector.weighted()
    if collector.keys is not None:
        signals["key_norm"], signals["key_norm_text"] = collector.key_norms()
    if collector.sight is not None:
        signals["vision_attention"], signals["vision_keys"] = collector.sight.attention(), collector.sight.keys()
    if (states := collector.states) is not None:
        made = {"hidden_text": states.text, "final_norm": states.norm}
        made["text_similarity"] = partial(states.similarity, features_ND)
        made["hidden"] = states.video  # last: it hands out the probe's own tensor, which `similarity` reads
        signals |= {name: make() for name, make in made.items() if name in needs}
    return {name: signal.to(device) for name, signal in signals.items() if name in needs}


def draft_attention(
    model: VideoLM | None, prompt: VideoPrompt, features: Tensor | Features | None, pruner: Pruner, caches: CachePool
) -> Tensor:
    """Return the attention of the prompt's last row to the unpruned video in the first layers of the model that drafts.

    Args:
        model: The model that drafts.
        prompt: The prompt.
        features: The model's video features; computed here if None.
        pruner: Sets the number of layers L, `draft_layers`.
        caches: Source of a cache for the pass.

    Returns:
        Means over heads, (L, N).
    """
    assert model is not None
    features_ND = model.features(prompt) if features is None else features
    video_index = prompt.video_index.to(model.device)
    collector = AttentionCollector(video_index, rows=False, last_row=True, depth=pruner.draft_layers)
    with caches.lease() as lease:
        cache = lease.take("draft", model, len(prompt))
        model.prefill(model.embed(prompt, features_ND), model.positions(prompt), cache, collector=collector)
    return collector.last_rows()


def held_bytes(needs: frozenset[str], hidden: bool, target: VideoLM, tokens: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Estimate the bytes that one rank holds for two large kinds of signal: hidden states, and means per KV head.

    Includes the memory in which `drafter=sparse` sorts the means per KV head.

    Args:
        needs: Names of the request's signals.
        hidden: Whether the verifier reads the video tokens' last hidden states.
        target: The target, not yet split over ranks.
        tokens: Number of video tokens.
        dtype: Dtype of the target.
        ranks: Number of ranks.
    """
    width = int(target.hf.config.get_text_config().hidden_size)
    states = tokens * width * dtype.itemsize * (bool(needs & KEPT_STATES) + hidden)
    if "verifier_attention_per_kv_head" not in needs:
        return states
    score = torch.promote_types(dtype, torch.float32).itemsize
    return states + target.layers * target.kv_heads // ranks * tokens * (2 * score + torch.int64.itemsize)


def codec(prompt: VideoPrompt) -> Tensor:
    """Read the signals motion, packet_bytes and intra of each token from the prompt's video files. Returns (3, N).

    They are 0 for newline tokens, and for videos without a file or with one that cannot be read.
    """
    parts = []
    for grid, video in zip(prompt.grids, prompt.videos, strict=True):
        origin, per_token = video.get("origin"), torch.zeros(3, grid.cells)
        if origin is not None:
            with suppress(UserError):  # the pruner gets zeros, and reports them
                per_token = on_grid(read_stream(origin), grid)
        parts.append(pad(per_token, (0, grid.newline)))
    return torch.cat(parts, 1)


def on_grid(stream: Stream, grid: TokenGrid) -> Tensor:
    """Pool the signals of a clip's frames over a grid's tokens. Returns motion, packet_bytes and intra, (3, F * P).

    A token's motion is the mean over its area. If a frame of the grid covers several frames of the clip, their motion
    and intra are averaged, and their bytes are added.
    """
    group = -(-len(stream.size) // grid.frames)
    pooled_TP = adaptive_avg_pool2d(stream.motion[:, None], (grid.height, grid.width)).flatten(1)
    motion_FP = torch.stack([part.mean(0) for part in pooled_TP.split(group)])
    size_F = torch.stack([part.sum() for part in stream.size.split(group)])
    intra_F = torch.stack([part.mean() for part in stream.intra.split(group)])
    rows = (motion_FP, *(x_F[:, None].expand_as(motion_FP) for x_F in (size_F, intra_F)))
    return torch.stack([row.flatten() for row in rows])
