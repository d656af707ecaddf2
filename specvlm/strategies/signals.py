"""Signals of the target, the drafter and the video file that strategies can ask for in `needs`."""

from torch import Tensor

SIGNALS: dict[str, str] = {
    "verifier_attention": "(N,) the target's attention from the text after the video, mean over layers, heads and rows",
    "verifier_attention_per_layer": "(L, N) the same, mean over heads and rows",
    "verifier_attention_per_kv_head": "(L, J, N) the same for each KV head of this process, mean over its query heads and rows",
    "verifier_attention_last_row": "(L, N) the target's attention of the last prompt row, mean over heads",
    "draft_attention_last_row": "(L, N) the same of the drafter, in its first `draft_layers` layers over the unpruned video",
    "features": "(N, D) the target's video features as they enter its language model",
    "verifier_attention_weighted": "(L, N) the target's attention per layer, rows weighted by the pruner's `row_weights`",
    "vision_attention": "(N,) attention received in the last layer of the target's vision tower, within frame or window",
    "vision_keys": "(N, D) the keys of that layer, after any rotary embedding, mean over heads; 0 for a newline token",
    "text_similarity": "(2, N) mean cosine similarity to the text after the video: at the input and after `state_layer`",
    "hidden": "(N, D) the target's hidden states of the video tokens after layer `state_layer`",
    "hidden_text": "(T, D) the same of the text after the video",
    "final_norm": "(D,) weight of the target's final norm; scale hidden states by it to get cosines as after the norm",
    "key_norm": "(N,) L1 norm of the video tokens' keys in layer `state_layer`, over all KV heads",
    "key_norm_text": "(T,) the same of the text after the video",
    "motion": "(N,) pixels that a cell moved since the previous frame, less the camera's motion, by the file's vectors",
    "packet_bytes": "(N,) compressed bytes of the frames that the token's frame stands for",
    "intra": "(N,) share of these frames that are coded without reference to others; 0 if the file does not say",
}
STATE_SIGNALS = frozenset({"text_similarity", "hidden", "hidden_text", "final_norm", "key_norm", "key_norm_text"})
CODEC_SIGNALS = frozenset({"motion", "packet_bytes", "intra"})
# Signals of the target's attention that have a row for each layer.
LAYERED = frozenset(f"verifier_attention_{part}" for part in ("per_layer", "per_kv_head", "last_row", "weighted"))
# Signals that are the same for every question about a video.
VIDEO_SIGNALS = CODEC_SIGNALS | {"features", "vision_attention", "vision_keys", "hidden", "final_norm", "key_norm"}


def token_signals() -> list[str]:
    """List the signals of shape (N,) that need no `state_layer`. Some pruners let users rank tokens by any of these."""
    return [name for name in SIGNALS if axes_of(name) == ["N"] and name not in STATE_SIGNALS]


def axes_of(name: str) -> list[str]:
    """Parse the axes of a signal from its line in SIGNALS: ["L", "N"] for "(L, N) …"."""
    return [axis.strip() for axis in SIGNALS[name].partition("(")[2].partition(")")[0].split(",") if axis.strip()]


def signal_of(signals: dict[str, Tensor], name: str, whose: str) -> Tensor:
    """Look up a signal. Raises ValueError if it is missing.

    whose: The kind of strategy, such as "pruner", for the message.
    """
    if name not in signals:
        there = ", ".join(sorted(signals)) or "none"
        raise ValueError(f'signal "{name}" is not available (available: {there}): add it to the `needs` of the {whose}')
    return signals[name]
