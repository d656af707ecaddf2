"""Base class of target and draft models, which wraps the unmodified Hugging Face classes.

Shape suffixes: S prompt tokens, N video tokens, K kept slots, Q rows of one pass, V vocabulary, D hidden size, A rotary
axes, F frames, P tokens per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from specvlm.models.chat import PLAIN, Message, Part, bare, chat_ids, checked, prompt_ids
from specvlm.models.checkpoint import method_of
from specvlm.models.fused import HUGGING_FACE, forms_of
from specvlm.models.generation import not_applied, penalty_of, stop_ids
from specvlm.models.kv_cache import KVCache
from specvlm.models.layer_kinds import language_model
from specvlm.models.partition import Stage, stages_of
from specvlm.models.pauses import Pause, Pauses
from specvlm.models.placeholders import Spelling, expanded
from specvlm.models.text_passes import TextPasses
from specvlm.models.vision_probe import VisionProbe
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard
from specvlm.types import Features, KeepSet, TokenGrid, VideoPrompt, joined, merged
from specvlm.types.pixels import LateVideo, PixelDigest
from specvlm.video.video import Clip, Processed

FeaturesT = TypeVar("FeaturesT", Tensor, Features)
PATCHES = 16_384  # most patches in a pass of the vision tower, unless a single frame has more


class VideoLM(TextPasses):
    """A loaded checkpoint of a family. It has no state: a request's data are in arguments and in its KV cache.

    Args:
        hf: The Hugging Face model, in eval mode, its attention set to `attention.IMPLEMENTATIONS`.
        tokenizer: The checkpoint's tokenizer, with its chat template (`chat.tokenizer_of`).
        folder: The checkpoint's folder, from which preprocessing settings are read.
        mrope: "hf" for the positions of the installed transformers' `generate`, "reference" for those of Qwen's own
            code (text follows the largest of t, h, w). They differ for Qwen2.5-VL only.
        stages: Layers on each device; by default found from the devices of the weights.
        ranks: Processes that share every layer (tensor parallelism).
    """

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
        self.text = language_model(hf)
        config = hf.config.get_text_config()
        self.layers = int(config.num_hidden_layers)
        self.stages = stages_of(self.text) if stages is None else tuple(stages)
        self.ranks = ranks
        self.kv_heads = int(config.num_key_value_heads) // ranks.size  # on this rank
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.vocabulary = int(self.text.embed_tokens.num_embeddings)
        self.video_token, self.image_token = self.slots(hf.config)
        self.repetition_penalty = penalty_of(hf.generation_config)
        self.ignored_settings = tuple(not_applied(hf.generation_config))
        self.stop_ids = stop_ids(hf.generation_config)
        # With several ranks, modules keep Hugging Face's form: a rank alone must not decide for another.
        self.forms = forms_of(hf, self.axes, self.dtype, self.device) if ranks.size == 1 else HUGGING_FACE
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
        self,
        question: str,
        clips: Sequence[Clip | Processed] = (),
        images: Sequence[Tensor] = (),
        max_pixels: int | None = None,
    ) -> VideoPrompt:
        """Build the prompt of one chat turn with the checkpoint's own chat template: images, videos, then the question.

        Args:
            clips: Videos from `read_video`, or `processed` ones.
            images: (3, H, W) uint8 each.
            max_pixels: Most pixels of a frame, instead of the checkpoint's own limit.

        Raises:
            UserError: The template fails or leaves no text after the video, or the question contains control tokens.
        """
        content: list[Part] = [{"type": "image", "image": image} for image in images]
        content += [{"type": "video", "video": clip} for clip in clips]
        return self.chat([{"role": "user", "content": [*content, {"type": "text", "text": question}]}], max_pixels)

    def chat(self, messages: Sequence[Message], max_pixels: int | None = None) -> VideoPrompt:
        """Build the prompt of a chat, whose turns may have texts, videos and images in any order.

        A pruner's signals are read from the rows after the last video. If the question comes before it, these rows hold
        only text of the template.

        Args:
            messages: Each with a "role" and a "content", which is a text or a list of parts: {"type": "text",
                "text": …}, {"type": "video", "video": clip} and {"type": "image", "image": (3, H, W) uint8}.
            max_pixels: Most pixels of a frame, instead of the checkpoint's own limit.

        Raises:
            UserError: As in `prompt`, or a message is invalid.
        """
        parts = checked(messages)
        clips, images = ([part[kind] for part in parts if part["type"] == kind] for kind in ("video", "image"))
        videos = [clip if isinstance(clip, Processed) else self.processed(clip, max_pixels) for clip in clips]
        pictures = [self.process_image(image, alone=len(images) == 1) for image in images]
        spelt = [self.spell_video(*video[:2]) for video in videos], [self.spell_image(picture) for picture in pictures]
        ids = chat_ids(self.tokenizer, bare(messages), Spelling(self.marks, *spelt), self.template(bool(clips)))
        order = [part["type"] for part in parts if part["type"] != "text"]
        return self.expand(ids, [video.grid for video in videos], [video.video for video in videos], pictures, order)

    def processed(self, clip: Clip, max_pixels: int | None = None) -> Processed:
        """Preprocess a video for a prompt. max_pixels: as in `prompt`. Raises UserError if that is not possible."""
        grid, video = self.process_video(clip, max_pixels)
        more = {"origin": clip.origin, "digest": PixelDigest()}
        return Processed(grid, video | more, len(clip.frames), clip.source, clip.reader, clip.frames.nbytes)

    def check_template(self) -> None:
        """Raise UserError if the chat template cannot render a video and a question. Reads no video."""
        prompt_ids(self.tokenizer, [{"type": "video"}], PLAIN, self.template(videos=True))

    def expand(
        self,
        ids: Sequence[int],
        grids: Sequence[TokenGrid],
        videos: Sequence[dict[str, Any]],
        images: Sequence[dict[str, Any]] = (),
        order: Sequence[str] = (),
    ) -> VideoPrompt:
        """Build the prompt: repeat each slot token in `ids` as often as its run (`runs`, `image_runs`) has slots.

        Args:
            ids: Token ids of the prompt, with one slot token per run.
            grids: Token grid of each video.
            videos: Each video's dict from `process_video`.
            images: Each image's dict from `process_image`.
            order: "video" or "image" for each item, if both share a slot token; by default images come first.

        Raises:
            UserError: Wrong number of placeholders, a token outside the vocabulary, or no text after the video.
        """
        runs = {
            "video": [self.runs(*pair) for pair in zip(grids, videos, strict=True)],
            "image": [self.image_runs(image) for image in images],
        }
        slots = (self.video_token, self.image_token)
        return expanded(ids, slots, self.vocabulary, grids, runs, videos, images, order)

    def generate_inputs(self, prompt: VideoPrompt) -> dict[str, Any]:
        """Convert a prompt to keyword arguments of Hugging Face's `generate`."""
        made = self.hf_inputs(self.hf.config, prompt)
        return {name: x.to(self.device, self.dtype if name.startswith("pixel") else x.dtype) for name, x in made.items()}

    def vision_rows(self, video: dict[str, Any]) -> int:
        """Return the number of patches in the largest pass of the vision tower over a video."""
        if isinstance(video, LateVideo):
            return video.vision_rows
        frames, patches = self.frame_patches(video)
        return min(frames, max(1, PATCHES // patches)) * patches

    def blank(self, count: int) -> Tensor | Features:
        """Return features of `count` tokens, all zero."""
        width = int(self.text.config.hidden_size)
        rows_ND = torch.zeros(count, width, dtype=self.dtype, device=self.device)
        return Features(rows_ND, rows_ND.new_zeros(count, self.levels, width)) if self.levels else rows_ND

    def encode_frames(
        self,
        pixels: Tensor,
        grid: TokenGrid,
        patches: int,
        frames: Tensor | None,
        encode: Callable[[Tensor], FeaturesT],
    ) -> FeaturesT:
        """Encode a video, at most PATCHES patches at a time unless a frame has more. Returns (grid.cells, D) features.

        Args:
            pixels: Input of the vision tower, (grid.frames, ...).
            grid: Token grid of the video.
            patches: Patches per frame.
            frames: Indices of the frames to encode, ascending; rows of the other frames are 0. None: all frames.
            encode: Maps pixels (F, ...) to features (F * P, D).
        """
        chosen = torch.arange(grid.frames) if frames is None else frames
        found: Any = self.blank(grid.cells)
        slots_FP = torch.arange(grid.cells, device=self.device).unflatten(0, (grid.frames, grid.per_frame))
        for part in chosen.split(max(1, PATCHES // patches)) if len(chosen) else ():
            first, end = int(part[0]), int(part[-1]) + 1
            # A slice needs no copy, nor an index for whose copy the host would wait until the pass before has ended.
            together = end - first == len(part)
            slots = slots_FP[first:end] if together else slots_FP[part.to(self.device)]
            rows = encode(self._entering(pixels[first:end] if together else pixels[part])).to(self.dtype)
            if len(rows) != slots.numel():
                raise ValueError(f"encode gives {len(rows)} rows for {len(part)} frames of {grid.per_frame} tokens")
            found[slots.flatten()] = rows
        return found

    def _entering(self, pixels: Tensor) -> Tensor:
        """Copy pixels to a GPU from pinned memory: the host casts those of the next pass while the device works."""
        if self.device.type != "cuda" or pixels.device.type != "cpu":
            return pixels
        return pixels.to(self.dtype).pin_memory().to(self.device, non_blocking=True)

    def features(self, prompt: VideoPrompt, keep: KeepSet | None = None, sight: VisionProbe | None = None) -> Tensor | Features:
        """Compute the features of all videos, (N, D).

        Args:
            prompt: The prompt.
            keep: Tokens that are kept. Frames without any are not encoded, and their rows are 0, unless `keep` merges
                tokens. None: all frames are encoded.
            sight: As in `encode_video`.
        """
        parts, start = [self.blank(0)], 0
        for grid, video in zip(prompt.grids, prompt.videos, strict=True):
            frames = None
            if keep is not None and keep.pool is None:
                inside = keep.index[(keep.index >= start) & (keep.index < start + grid.cells)] - start
                frames = (inside // grid.per_frame).unique().cpu()
            frames = None if frames is None or len(frames) == grid.frames else frames
            with self.forms.of(self.hf.model):
                parts.append(self.encode_video(grid, video, frames, sight))
            start += len(grid)
        return joined(parts)

    def encoding(self, prompt: VideoPrompt, number: int, sight: VisionProbe | None = None) -> Pauses[Tensor | Features]:
        """Compute the features of one video, with a pause after each pass of the vision tower.

        With `sight`, which needs all frames in one call, there is a single pause, at the end.

        number: Index of the video in the prompt.
        """
        grid, video = prompt.grids[number], prompt.videos[number]
        at_once = max(1, PATCHES // self.frame_patches(video)[1])
        pieces = (None,) if sight is not None or grid.frames <= at_once else torch.arange(grid.frames).split(at_once)
        found: Any = None
        for frames in pieces:
            with self.forms.of(self.hf.model):
                some: Any = self.encode_video(grid, video, frames, sight)
            if found is None or frames is None:
                found = some
            else:
                slots = slice(int(frames[0]) * grid.per_frame, (int(frames[-1]) + 1) * grid.per_frame)
                found[slots] = some[slots]
            yield Pause(self.device)
        return found

    def embed_text(self, tokens_Q: Tensor) -> Tensor | Features:
        """Return the input embeddings (Q, D) of text, as a `Features` if `levels` is not 0."""
        rows_QD = self.embed_tokens(tokens_Q)
        if not self.levels:
            return rows_QD
        return Features(rows_QD, rows_QD.new_zeros(len(rows_QD), self.levels, rows_QD.shape[1]))

    def embed(self, prompt: VideoPrompt, features_ND: Tensor | Features, keep: KeepSet | None = None) -> Tensor | Features:
        """Return the input embeddings of all slots of the prompt, (S, D); with `keep`, of the kept slots only, (K, D).

        If `keep` has a pool, its rows merge the video features.
        """
        embeds_SD: Any = self.embed_text(prompt.tokens)
        if prompt.images:
            with self.forms.of(self.hf.model):
                images_ND = joined([self.encode_image(image) for image in prompt.images])
            embeds_SD[prompt.image_index.to(self.device)] = images_ND.to(self.dtype)
        index = prompt.video_index.to(self.device)
        if keep is None:
            embeds_SD[index] = features_ND
            return embeds_SD
        kept = keep.index.to(self.device)
        # Row k of a merge takes the place of token index[k].
        embeds_SD[index[kept]] = features_ND[kept] if keep.pool is None else merged(keep.pool, features_ND)
        return embeds_SD[prompt.kept_slots(keep.index).to(self.device)]

    def pruned(
        self, prompt: VideoPrompt, features_ND: Tensor | Features, keep: KeepSet, positions: str
    ) -> tuple[Tensor | Features, Tensor]:
        """Return a drafter's prefill input: (K, D) embeddings of the kept slots, and (A, K) rotary positions.

        positions: "original" (those of the whole prompt) or "reindexed" (contiguous).
        """
        embeds_KD = self.embed(prompt, features_ND, keep)
        if positions == "original":
            return embeds_KD, self.positions(prompt)[:, prompt.kept_slots(keep.index)]
        return embeds_KD, torch.arange(len(embeds_KD)).expand(self.axes, -1)
