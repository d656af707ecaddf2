"""What may be read of the target, the drafter and the video's file: what a strategy `needs` is named here."""

from torch import Tensor

SIGNALS: dict[str, str] = {
    "verifier_attention": "(N,) the target's attention from the text after the video, mean over layers, heads and rows",
    "verifier_attention_per_layer": "(L, N) the same, mean over heads and rows",
    "verifier_attention_per_kv_head": "(L, J, N) the same for each KV head of this process, mean over its query heads and rows",
    "verifier_attention_last_row": "(L, N) the target's attention of the last prompt row, mean over heads",
    "draft_attention_last_row": "(L, N) the drafter's own, over the unpruned video, of its first `draft_layers` layers",
    "features": "(N, D) the target's video features as they enter its language model",
    "verifier_attention_weighted": "(L, N) as per layer, with the rows weighted by the pruner's `row_weights`",
    "vision_attention": "(N,) attention received in the last layer of the target's vision tower, inside frame or window",
    "vision_keys": "(N, D) the keys of that layer, after rotation where it has one, mean over heads; 0 for a newline token",
    "text_similarity": "(2, N) mean cosine to the text after the video, of states entering layer 0 and behind `state_layer`",
    "hidden": "(N, D) the target's hidden states of the video tokens behind `state_layer` layers",
    "hidden_text": "(T, D) the same of the text after the video",
    "final_norm": "(D,) weight of the norm behind the target's last layer: behind it, cosines are those of states times weight",
    "key_norm": "(N,) L1 norm of the video tokens' keys in the last of these layers, all KV heads together",
    "key_norm_text": "(T,) the same of the text after the video",
    "motion": "(N,) pixels that a cell moved since the frame before, against the whole frame, by the file's vectors",
    "packet_bytes": "(N,) compressed bytes of the frames that the token's frame stands for",
    "intra": "(N,) share of these frames that refer to no other; 0 where the file tells nothing",
}
STATE_SIGNALS = frozenset({"text_similarity", "hidden", "hidden_text", "final_norm", "key_norm", "key_norm_text"})
CODEC_SIGNALS = frozenset({"motion", "packet_bytes", "intra"})


def token_signals() -> list[str]:
    """Signals of one number a video token, (N,): what a pruner may take as saliency, whatever its `state_layer`."""
    return [name for name in SIGNALS if axes_of(name) == ["N"] and name not in STATE_SIGNALS]


def axes_of(name: str) -> list[str]:
    """The letters of a signal's shape, from its line in SIGNALS."""
    return [axis.strip() for axis in SIGNALS[name].partition("(")[2].partition(")")[0].split(",") if axis.strip()]


def signal_of(signals: dict[str, Tensor], name: str, whose: str) -> Tensor:
    if name not in signals:
        there = ", ".join(sorted(signals)) or "none"
        raise ValueError(f'the signal "{name}" is not there (there is {there}): name it in the `needs` of the {whose}')
    return signals[name]
