"""What a model must offer to be a target or a draft, over the unforked Hugging Face classes.

Shape suffixes: S prompt tokens, N video tokens, Q rows of one pass, V vocabulary, D width, A rotary axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.attention import AttentionCollector, StopForward
from specvlm.models.chat import PLAIN, prompt_ids
from specvlm.models.checkpoint import method_of
from specvlm.models.generation import not_applied, penalty_of, stop_ids
from specvlm.models.kv_cache import KVCache
from specvlm.models.partition import Stage, stages_of, through
from specvlm.models.vision_probe import HiddenStateProbe, VisionProbe
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard
from specvlm.types import KeepSet, TokenGrid, VideoPrompt
from specvlm.video.video import Clip, VideoInfo

CHUNK = 24_576  # rows of one pass of a prefill: what lives during it grows with them (5.6 GB at a 32B model's widths)
PATCHES = 16_384  # of one pass through a vision tower, or one frame's where that has more


class VideoLM(ABC):
    """One checkpoint. Stateless: what a request needs comes in as arguments and lives in its cache.

    hf: the Hugging Face model, in eval mode, its attention set to `attention.IMPLEMENTATIONS`. folder: where
    preprocessing settings are read from. mrope: "hf" for the positions the installed transformers' `generate` uses,
    "reference" for those of Qwen's own code (text follows the largest of t, h, w); only Qwen2.5-VL has a difference.
    stages: how its layers are split over devices, by default as its weights lie. ranks: the processes that share every layer.
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
        self.kv_heads = int(config.num_key_value_heads) // ranks.size  # of this rank
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.vocabulary = int(self.text.embed_tokens.num_embeddings)
        self.video_token = int(hf.config.video_token_id)
        self.image_token = int(hf.config.image_token_id)
        self.repetition_penalty = penalty_of(hf.generation_config)
        self.ignored_settings = tuple(not_applied(hf.generation_config))
        self.stop_ids = stop_ids(hf.generation_config)
        self.left_full = ""  # what quantising it left as it was, in a sentence
        self.quantised = method_of(hf.config)  # in its files, by a library of others

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder})"

    @property
    def dtype(self) -> torch.dtype:
        return self.text.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where tokens and features enter."""
        return self.text.embed_tokens.weight.device

    @property
    def head_device(self) -> torch.device:
        """Where logits come out: another one than `device` when the layers are split."""
        return self.stages[-1].device

    def bytes_on(self, device: torch.device) -> int:
        """Of the weights; what several parts share counts once."""
        tensors = [local_shard(tensor) for tensor in (*self.hf.parameters(), *self.hf.buffers()) if tensor.device == device]
        return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def new_cache(self, capacity: int) -> KVCache:
        places = [(stage.layers, stage.device) for stage in self.stages]
        return KVCache(self.layers, self.kv_heads, capacity, self.head_dim, self.dtype, places)

    def prompt(
        self, question: str, clips: Sequence[Clip] = (), images: Sequence[Tensor] = (), max_pixels: int | None = None
    ) -> VideoPrompt:
        """A chat turn: the images, then the videos, then the question, through the checkpoint's own chat template.

        images: uint8 (3, H, W). max_pixels: of one frame, instead of the checkpoint's own limit. Raises UserError when
        the template fails or leaves no text after the video, and for control tokens in the question.
        """
        content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(clips)
        ids = prompt_ids(self.tokenizer, content, question)
        videos = [self.process_video(clip, max_pixels) for clip in clips]
        pictures = [self.process_image(image, alone=len(images) == 1) for image in images]
        pixels = [v | {"origin": clip.origin} for (_, v), clip in zip(videos, clips, strict=True)]
        return self.expand(ids, [grid for grid, _ in videos], pixels, pictures)

    def check_template(self) -> None:
        """Raise UserError where the chat template cannot make a prompt of a video and a question, before any video is read."""
        prompt_ids(self.tokenizer, [{"type": "video"}], PLAIN)

    def expand(
        self,
        ids: Sequence[int],
        grids: Sequence[TokenGrid],
        videos: Sequence[dict[str, Any]],
        images: Sequence[dict[str, Any]] = (),
    ) -> VideoPrompt:
        """Token ids with a placeholder for each video and image to one a token. images carry their "tokens" count.

        Raises UserError for other placeholders than that, for tokens that the model lacks, and for no text after the video.
        """
        for token, wanted, what in ((self.video_token, len(grids), "videos"), (self.image_token, len(images), "images")):
            if (found := list(ids).count(token)) != wanted:
                raise UserError(
                    f"{found} placeholders for {wanted} {what} in the prompt: the chat template places them otherwise, or "
                    "config.json gives them another token"
                )
        if (largest := max(ids, default=0)) >= self.vocabulary:
            raise UserError(
                f"the tokenizer makes token {largest}, and the model has {self.vocabulary}: they do not go together"
            )
        lengths = {self.video_token: iter(map(len, grids)), self.image_token: iter(int(image["tokens"]) for image in images)}
        tokens = [t for token in ids for t in [token] * (next(lengths[token]) if token in lengths else 1)]
        tokens_S = torch.tensor(tokens)
        prompt = VideoPrompt(
            tokens_S, (tokens_S == self.video_token).nonzero().flatten(), tuple(grids), tuple(videos), tuple(images)
        )
        if prompt.cut == len(prompt):
            raise UserError(
                "no text follows the video: put the question behind it, since its attention is what scores the video tokens"
            )
        return prompt

    @abstractmethod
    def check_settings(self) -> None:
        """Raise UserError where the video processor's settings do not fit the model."""

    def try_out(self) -> None:
        """Pass one small frame and some text through all of it, as Hugging Face does. What a config.json has wrong that no size
        of a weight shows, such as a number of heads, fails here, and not in a request. Some libraries unpack quantised weights
        in the first such pass.
        """
        clip = Clip(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), (0.0,), 1.0, "", 1, 1.0)
        grid, video = self.process_video(clip)
        self.hf(**self.generate_inputs(self.expand([0, self.video_token, 0], [grid], [video])), logits_to_keep=1)

    @abstractmethod
    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """The family's own way to sample frames of such a video, as arguments of `read_video`."""

    @abstractmethod
    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        """Pixels as the vision tower wants them, equal to the Hugging Face video processor's."""

    @abstractmethod
    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        """alone: no other image shares the prompt, so that LLaVA-OneVision may cut it into tiles."""

    @abstractmethod
    def generate_inputs(self, prompt: VideoPrompt) -> dict[str, Any]:
        """The same request as keyword arguments of Hugging Face's `generate`."""

    @abstractmethod
    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        """(len(grid), D) features; with `frames` only those frames are encoded and the others' rows are zero.

        sight: is told what attention each of the tokens received, where all frames are encoded.
        """

    @abstractmethod
    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        """The video's frames as the vision tower knows them (Qwen2.5-VL's are two of the clip's), and patches of each."""

    def vision_rows(self, video: dict[str, Any]) -> int:
        """Patches that go through the vision tower at once."""
        frames, patches = self.frame_patches(video)
        return min(frames, max(1, PATCHES // patches)) * patches

    def _encode_frames(
        self, pixels: Tensor, grid: TokenGrid, patches: int, frames: Tensor | None, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(cells, D): some frames after the other through `encode`, which turns their pixels (F, ...) into (F * P, D)."""
        chosen = torch.arange(grid.frames) if frames is None else frames
        features_FPD = torch.zeros(
            grid.frames, grid.per_frame, self.text.config.hidden_size, dtype=self.dtype, device=self.device
        )
        for part in chosen.split(max(1, PATCHES // patches)) if len(chosen) else ():
            first, end = int(part[0]), int(part[-1]) + 1
            some = pixels[first:end] if end - first == len(part) else pixels[part]  # neighbours need no copy
            features_FPD[part.to(self.device)] = encode(some).unflatten(0, (len(part), -1)).to(self.dtype)
        return features_FPD.flatten(0, 1)

    @abstractmethod
    def encode_image(self, image: dict[str, Any]) -> Tensor: ...

    @abstractmethod
    def positions(self, prompt: VideoPrompt) -> Tensor:
        """(A, S) rotary positions of the whole prompt. The text that follows goes on at the last one plus one."""

    def features(self, prompt: VideoPrompt, keep: KeepSet | None = None, sight: VisionProbe | None = None) -> Tensor:
        """(N, D) video features. Frames none of whose tokens are kept are skipped: no frame attends to another in the tower."""
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
        """(S, D). A target of larger padded vocabulary may utter ids unknown to its draft, which then sees its last one."""
        return self.text.embed_tokens(tokens_S.to(self.device).clamp(0, self.vocabulary - 1))

    def embed(self, prompt: VideoPrompt, features_ND: Tensor, keep: KeepSet | None = None) -> Tensor:
        """(S, D) rows that enter the language model; with `keep`, those of the kept slots only."""
        embeds_SD = self.embed_tokens(prompt.tokens)
        if prompt.images:
            at = (prompt.tokens == self.image_token).to(self.device)
            embeds_SD[at] = torch.cat([self.encode_image(image) for image in prompt.images]).to(embeds_SD.dtype)
        index = prompt.video_index.to(self.device)
        if keep is None:
            embeds_SD[index] = features_ND
            return embeds_SD
        kept = keep.index.to(self.device)
        # A merger's row k stands where token index[k] stood.
        embeds_SD[index[kept]] = features_ND[kept] if keep.pool is None else (keep.pool.to(features_ND) @ features_ND)
        return embeds_SD[prompt.kept_slots(keep.index).to(self.device)]

    def pruned(self, prompt: VideoPrompt, features_ND: Tensor, keep: KeepSet, positions: str) -> tuple[Tensor, Tensor]:
        """The kept slots alone as a drafter's prefill takes them: (K, D) rows, and (A, K) rotary positions, `original` (those
        of the whole prompt) or `reindexed` (contiguous).
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
        """One pass over rows, appended to the cache; hidden states (Q, D). mask None: causal, behind all that is there."""
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
        """(Q, V) logits."""
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
        """Fill an empty cache, in passes of at most `chunk` rows, one of which begins at `cut`. Returns the last row (D,).

        Guidance watches the last pass, and if it reads rows, that is all of them from `cut` on, however many.
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
            except StopForward:  # the guidance was all that was wanted
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
        """(Q, D) last hidden states of text rows behind the cache: a token, a tree, a level of a tree.

        depths: of each row, added to `position` (default: that of the next slot). seen_QT: which of the last T slots,
        these rows included, each row may attend to; everything before is seen. None: one row, sees all.
        """
        positions = torch.as_tensor(depths) + (cache.position if position is None else position)
        embeds_QD, mask = self.embed_tokens(tokens_Q), None
        if seen_QT is not None:
            rows, device = tokens_Q.numel(), embeds_QD.device
            prefix = torch.ones(rows, cache.length + rows - seen_QT.shape[1], dtype=torch.bool, device=device)
            mask = torch.cat([prefix, seen_QT.to(device, torch.bool)], 1)
        return self.forward(embeds_QD, positions.expand(self.axes, -1), cache, mask)


def _starts(start: int, end: int, most: int) -> list[int]:
    """Where pieces of about one length begin, none longer than `most`."""
    count = -(-(end - start) // most)
    return [start + (end - start) * piece // count for piece in range(count)]
