"""Base class of target and draft models, which wraps the unmodified Hugging Face classes.

Shape suffixes: S prompt tokens, N video tokens, K kept slots, Q rows of one pass, V vocabulary, D hidden size, A rotary
axes, F frames, P tokens per frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specvlm.models.attention import AttentionCollector, StopForward
from specvlm.models.chat import PLAIN, prompt_ids
from specvlm.models.checkpoint import method_of
from specvlm.models.generation import not_applied, penalty_of, stop_ids
from specvlm.models.kv_cache import KVCache
from specvlm.models.partition import Stage, stages_of, through
from specvlm.models.placeholders import expanded
from specvlm.models.vision_probe import HiddenStateProbe, VisionProbe
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard
from specvlm.types import KeepSet, TokenGrid, VideoPrompt
from specvlm.video.video import Clip, VideoInfo

CHUNK = 24_576  # most rows of a prefill pass; activation memory grows with them (5.6 GB at a 32B model's widths)
PATCHES = 16_384  # most patches in a pass of the vision tower, unless a single frame has more


class VideoLM(ABC):
    """A loaded checkpoint. It has no state: a request's data are arguments, or lie in its KV cache.

    Args:
        hf: The Hugging Face model, in eval mode, its attention set to `attention.IMPLEMENTATIONS`.
        tokenizer: The checkpoint's tokenizer, with its chat template (`chat.tokenizer_of`).
        folder: The checkpoint's folder, from which preprocessing settings are read.
        mrope: "hf" for the positions of the installed transformers' `generate`, "reference" for those of Qwen's own
            code (text follows the largest of t, h, w). They differ for Qwen2.5-VL only.
        stages: Layers on each device; by default found from the devices of the weights.
        ranks: Processes that share every layer (tensor parallelism).
    """

    family: ClassVar[str]
    axes: ClassVar[int]

    def __init__(
        self,
        hf: Any,
        tokenizer: Any = None,
        folder: str | Path = "",
        mrope: str = "hf",
        stages: Sequence[Stage] | None = None,
        ranks: ProcessGroup = SINGLE,
    ) -> None:
        self.hf, self.tokenizer, self.mrope = hf, tokenizer, mrope
        self.folder = Path(folder)
        self.text = hf.model.language_model
        config = hf.config.get_text_config()
        self.layers = int(config.num_hidden_layers)
        self.stages = stages_of(self.text) if stages is None else tuple(stages)
        self.ranks = ranks
        self.kv_heads = int(config.num_key_value_heads) // ranks.size  # on this rank
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.vocabulary = int(self.text.embed_tokens.num_embeddings)
        self.video_token = int(hf.config.video_token_id)
        self.image_token = int(hf.config.image_token_id)
        self.repetition_penalty = penalty_of(hf.generation_config)
        self.ignored_settings = tuple(not_applied(hf.generation_config))
        self.stop_ids = stop_ids(hf.generation_config)
        self.left_full = ""  # describes weights that `quantize_text` left unquantised, if any
        self.quantised = method_of(hf.config)  # quantisation method of the checkpoint's own files

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder})"

    @property
    def dtype(self) -> torch.dtype:
        return self.text.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where tokens and features enter."""
        return self.text.embed_tokens.weight.device

    @property
    def head_device(self) -> torch.device:
        """Device of the logits; differs from `device` when the layers are split over devices."""
        return self.stages[-1].device

    def bytes_on(self, device: torch.device) -> int:
        """Return the bytes of the weights on a device. Shared (tied) weights count once."""
        tensors = [local_shard(tensor) for tensor in (*self.hf.parameters(), *self.hf.buffers()) if tensor.device == device]
        return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def new_cache(self, capacity: int) -> KVCache:
        """Allocate an empty KV cache of `capacity` slots on the devices of the layers."""
        places = [(stage.layers, stage.device) for stage in self.stages]
        return KVCache(self.layers, self.kv_heads, capacity, self.head_dim, self.dtype, places)

    def prompt(
        self, question: str, clips: Sequence[Clip] = (), images: Sequence[Tensor] = (), max_pixels: int | None = None
    ) -> VideoPrompt:
        """Build the prompt of one chat turn with the checkpoint's own chat template: images, videos, then the question.

        Args:
            clips: Videos from `read_video`.
            images: (3, H, W) uint8 each.
            max_pixels: Most pixels of a frame, instead of the checkpoint's own limit.

        Raises:
            UserError: The template fails or leaves no text after the video, or the question contains control tokens.
        """
        content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(clips)
        ids = prompt_ids(self.tokenizer, content, question)
        videos = [self.process_video(clip, max_pixels) for clip in clips]
        pictures = [self.process_image(image, alone=len(images) == 1) for image in images]
        pixels = [v | {"origin": clip.origin} for (_, v), clip in zip(videos, clips, strict=True)]
        return self.expand(ids, [grid for grid, _ in videos], pixels, pictures)

    def check_template(self) -> None:
        """Raise UserError if the chat template cannot render a video and a question. Reads no video."""
        prompt_ids(self.tokenizer, [{"type": "video"}], PLAIN)

    def expand(
        self,
        ids: Sequence[int],
        grids: Sequence[TokenGrid],
        videos: Sequence[dict[str, Any]],
        images: Sequence[dict[str, Any]] = (),
    ) -> VideoPrompt:
        """Expand each placeholder in `ids` to one token per feature of its video or image (from `process_*`).

        Raises:
            UserError: Wrong number of placeholders, a token outside the vocabulary, or no text after the video.
        """
        return expanded(ids, (self.video_token, self.image_token), self.vocabulary, grids, videos, images)

    @abstractmethod
    def check_settings(self) -> None:
        """Raise UserError if the video processor's settings do not fit the model."""

    @abstractmethod
    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Return the family's own way to sample frames of this video, as keyword arguments of `read_video`."""

    @abstractmethod
    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        """Preprocess a clip for the vision tower, exactly as the Hugging Face video processor does.

        Returns its token grid and a dict of tensors for `encode_video`. max_pixels: as in `prompt`.
        """

    @abstractmethod
    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        """Preprocess an image, uint8 (3, H, W), into a dict for `encode_image`, with its token count under "tokens".

        alone: Whether it is the prompt's only image, so that LLaVA-OneVision may cut it into tiles.
        """

    @abstractmethod
    def generate_inputs(self, prompt: VideoPrompt) -> dict[str, Any]:
        """Convert a prompt to keyword arguments of Hugging Face's `generate`."""

    @abstractmethod
    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        """Run the vision tower on one video; returns (len(grid), D) features.

        frames: Frames to encode; the rows of all others are zero. None encodes all.
        sight: Records the attention that each token receives. It needs all frames to be encoded.
        """

    @abstractmethod
    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        """Return the number of frames that the tower sees (Qwen2.5-VL joins two of the clip), and patches per frame."""

    def vision_rows(self, video: dict[str, Any]) -> int:
        """Return the number of patches in the largest pass of the vision tower."""
        frames, patches = self.frame_patches(video)
        return min(frames, max(1, PATCHES // patches)) * patches

    def _encode_frames(
        self, pixels: Tensor, grid: TokenGrid, patches: int, frames: Tensor | None, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(cells, D) features, encoded a few frames at a time. encode: maps pixels (F, ...) to features (F * P, D)."""
        chosen = torch.arange(grid.frames) if frames is None else frames
        features_FPD = torch.zeros(
            grid.frames, grid.per_frame, self.text.config.hidden_size, dtype=self.dtype, device=self.device
        )
        for part in chosen.split(max(1, PATCHES // patches)) if len(chosen) else ():
            first, end = int(part[0]), int(part[-1]) + 1
            some = pixels[first:end] if end - first == len(part) else pixels[part]  # a slice needs no copy
            features_FPD[part.to(self.device)] = encode(some).unflatten(0, (len(part), -1)).to(self.dtype)
        return features_FPD.flatten(0, 1)

    @abstractmethod
    def encode_image(self, image: dict[str, Any]) -> Tensor:
        """Run the vision tower on one image from `process_image`; returns one (D,) row per token."""

    @abstractmethod
    def positions(self, prompt: VideoPrompt) -> Tensor:
        """(A, S) rotary positions of the whole prompt. Generated text continues at the last one plus one."""

    def features(self, prompt: VideoPrompt, keep: KeepSet | None = None, sight: VisionProbe | None = None) -> Tensor:
        """(N, D) features of all videos. keep: unless it merges tokens, frames without kept ones are not encoded."""
        parts, start = [torch.empty(0, self.text.config.hidden_size, dtype=self.dtype, device=self.device)], 0
        for grid, video in zip(prompt.grids, prompt.videos, strict=True):
            frames = None
            if keep is not None and keep.pool is None:
                inside = keep.index[(keep.index >= start) & (keep.index < start + grid.cells)] - start
                frames = (inside // grid.per_frame).unique().cpu()
            frames = None if frames is None or len(frames) == grid.frames else frames
            parts.append(self.encode_video(grid, video, frames, sight))
            start += len(grid)
        return torch.cat(parts)

    def embed_tokens(self, tokens_S: Tensor) -> Tensor:
        """(S, D) embeddings. Ids beyond the vocabulary, from a target with a larger one, become the last id."""
        return self.text.embed_tokens(tokens_S.to(self.device).clamp(0, self.vocabulary - 1))

    def embed(self, prompt: VideoPrompt, features_ND: Tensor, keep: KeepSet | None = None) -> Tensor:
        """(S, D) input embeddings of the prompt, or (K, D) of the kept slots with `keep`, merged if it has a pool."""
        embeds_SD = self.embed_tokens(prompt.tokens)
        if prompt.images:
            at = (prompt.tokens == self.image_token).to(self.device)
            embeds_SD[at] = torch.cat([self.encode_image(image) for image in prompt.images]).to(embeds_SD.dtype)
        index = prompt.video_index.to(self.device)
        if keep is None:
            embeds_SD[index] = features_ND
            return embeds_SD
        kept = keep.index.to(self.device)
        # Row k of a merge takes the place of token index[k].
        embeds_SD[index[kept]] = features_ND[kept] if keep.pool is None else (keep.pool.to(features_ND) @ features_ND)
        return embeds_SD[prompt.kept_slots(keep.index).to(self.device)]

    def pruned(self, prompt: VideoPrompt, features_ND: Tensor, keep: KeepSet, positions: str) -> tuple[Tensor, Tensor]:
        """Return a drafter's prefill input: (K, D) embeddings of the kept slots, and (A, K) rotary positions.

        positions: "original" (those of the whole prompt) or "reindexed" (contiguous).
        """
        embeds_KD = self.embed(prompt, features_ND, keep)
        if positions == "original":
            return embeds_KD, self.positions(prompt)[:, prompt.kept_slots(keep.index)]
        return embeds_KD, torch.arange(len(embeds_KD)).expand(self.axes, -1)

    def forward(
        self,
        embeds_QD: Tensor,
        positions_AQ: Tensor,
        cache: KVCache,
        mask_QK: Tensor | None,
        collector: AttentionCollector | None = None,
        states: HiddenStateProbe | None = None,
    ) -> Tensor:
        """Run one pass and append its rows to the cache. Returns the last hidden states, (Q, D).

        mask_QK: True where a row attends to a key. None: causal; every row also attends to everything in the cache.
        """
        device = embeds_QD.device
        mask = None if mask_QK is None else mask_QK[None, None].to(device)
        position_ids = positions_AQ.to(device)[:, None]
        position_ids = position_ids if self.axes > 1 else position_ids[0]
        extra = {} if collector is None else {"collector": collector}
        if len(self.stages) > 1 or states is not None:
            hidden_QD = through(self.stages, self.text, embeds_QD, position_ids, cache, mask, extra, states)
        else:
            out = self.text(
                inputs_embeds=embeds_QD[None],
                position_ids=position_ids,
                attention_mask={"full_attention": mask, "sliding_attention": mask},
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
            hidden_QD = out.last_hidden_state[0]
        cache.advance(len(embeds_QD))
        return hidden_QD

    def head(self, hidden_QD: Tensor) -> Tensor:
        """(Q, V) logits of hidden states."""
        return self.hf.lm_head(hidden_QD)

    def prefill(
        self,
        embeds_SD: Tensor,
        positions_AS: Tensor,
        cache: KVCache,
        cut: int = 0,
        collector: AttentionCollector | None = None,
        chunk: int = CHUNK,
    ) -> Tensor:
        """Fill an empty cache with a prompt, in passes of at most `chunk` rows. Returns the last hidden state (D,).

        Args:
            cut: Slot at which a new pass begins (`VideoPrompt.cut`).
            collector: Reads attention in the last pass, which has all rows from `cut` on if `collector.whole`. If it
                stops the passes early, the returned state is empty.
        """
        total = len(embeds_SD)
        cache.offset = int(positions_AS[:, -1].max()) + 1 - total
        whole = collector is not None and collector.whole
        states = None if collector is None else collector.states
        starts = [*_starts(0, cut, chunk), *_starts(cut, total, total if whole else chunk)]
        ahead = None if collector is None else collector.ahead()
        for start, end in pairwise([*starts, total]):
            watch = collector if end == total else ahead
            try:
                hidden_QD = self.forward(embeds_SD[start:end], positions_AS[:, start:end], cache, None, watch, states)
            except StopForward:  # the collector needs no deeper layer
                cache.advance(end - start)
                hidden_QD = embeds_SD.new_empty(1, 0)
            if collector is not None:
                collector.see(start, hidden_QD)
        if collector is not None:
            collector.gather(self.ranks)
        return hidden_QD[-1]

    def append_hidden(
        self,
        tokens_Q: Tensor,
        depths: Sequence[int] | Tensor,
        seen_QT: Tensor | None,
        cache: KVCache,
        position: int | None = None,
    ) -> Tensor:
        """Append text rows to the cache: a token, a tree, or one level of a tree. Returns hidden states (Q, D).

        Args:
            depths: Depth of each row, added to `position` to give its rotary position.
            seen_QT: Which of the last T slots (these rows included) each row sees; it sees all before. None: causal.
            position: Rotary position of depth 0; by default that of the next slot.
        """
        positions = torch.as_tensor(depths) + (cache.position if position is None else position)
        embeds_QD, mask = self.embed_tokens(tokens_Q), None
        if seen_QT is not None:
            rows, device = tokens_Q.numel(), embeds_QD.device
            prefix = torch.ones(rows, cache.length + rows - seen_QT.shape[1], dtype=torch.bool, device=device)
            mask = torch.cat([prefix, seen_QT.to(device, torch.bool)], 1)
        return self.forward(embeds_QD, positions.expand(self.axes, -1), cache, mask)


def _starts(start: int, end: int, most: int) -> list[int]:
    """Return the starts of chunks of nearly equal length, none longer than `most`."""
    count = -(-(end - start) // most)
    return [start + (end - start) * piece // count for piece in range(count)]
