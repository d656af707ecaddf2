"""A batched, compilable forward over the weights of the Hugging Face models, equal to theirs (`parity`).

Training a model of 4 M parameters through the stock forward is bound by launches and by per-video Python; here a block is one
compiled function of tensors, so all layers share one graph. Videos of a batch have one length; text follows the video.

Legend: B videos, F frames after temporal merging (one a second), N video tokens, P patches, D width, R text rows, A attention.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from experiments.embedded_pair.models import MEAN_STD, PATCH
from experiments.embedded_pair.tokenizer import ID, VIDEO, before_video
from specvlm.video.synthetic import NOISE, SIDE

GRID, CELLS = SIDE // PATCH, SIDE // PATCH // 2  # patches and merged cells along a side
TEXT_ROWS = 224  # text rows of a training row, all turns after the video


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (weight.float() * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), 1e-6).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def qwen_vision_block(x, cos, sin, heads, n1, qkv_w, qkv_b, o_w, o_b, n2, g_w, g_b, u_w, u_b, d_w, d_b):
    frames, rows, width = x.shape
    qkv = linear(rms_norm(x, n1), qkv_w, qkv_b).view(frames, rows, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + linear(out.transpose(1, 2).reshape(frames, rows, width), o_w, o_b)
    y = rms_norm(x, n2)
    return x + linear(F.silu(linear(y, g_w, g_b)) * linear(y, u_w, u_b), d_w, d_b)


def qwen_merge(x, norm, w1, b1, w2, b2):
    frames, rows, width = x.shape
    return linear(F.gelu(linear(rms_norm(x, norm).view(frames, rows // 4, 4 * width), w1, b1)), w2, b2)


def siglip_block(x, heads, n1, c1, q_w, q_b, k_w, k_b, v_w, v_b, o_w, o_b, n2, c2, u_w, u_b, d_w, d_b):
    frames, rows, width = x.shape
    y = layer_norm(x, n1, c1)
    split = lambda w, b: linear(y, w, b).view(frames, rows, heads, -1).transpose(1, 2)  # noqa: E731
    q, k, v = split(q_w, q_b), split(k_w, k_b), split(v_w, v_b)
    out = F.scaled_dot_product_attention(q, k, v)
    x = x + linear(out.transpose(1, 2).reshape(frames, rows, width), o_w, o_b)
    return x + linear(F.gelu(linear(layer_norm(x, n2, c2), u_w, u_b), approximate="tanh"), d_w, d_b)


def llava_project(x, w1, b1, w2, b2):
    """Projector, then the 2 x 2 bilinear pooling, which at factor 2 is the mean of four patches."""
    y = linear(F.gelu(linear(x, w1, b1)), w2, b2)
    return y.view(-1, CELLS, 2, CELLS, 2, y.shape[-1]).float().mean((2, 4)).flatten(1, 2).to(y.dtype)


def text_qkv(y, cos, sin, heads, q_w, q_b, k_w, k_b, v_w, v_b):
    batch, rows, _ = y.shape
    dim = q_w.shape[0] // heads
    q, k, v = (linear(y, w, b).view(batch, rows, -1, dim).transpose(1, 2) for w, b in ((q_w, q_b), (k_w, k_b), (v_w, v_b)))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def text_block(x, cos, sin, heads, dropout, n1, q_w, q_b, k_w, k_b, v_w, v_b, o_w, n2, g_w, u_w, d_w):
    batch, rows, _ = x.shape
    q, k, v = text_qkv(rms_norm(x, n1), cos, sin, heads, q_w, q_b, k_w, k_b, v_w, v_b)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, dropout_p=dropout)
    x = x + linear(out.transpose(1, 2).reshape(batch, rows, -1), o_w)
    y = rms_norm(x, n2)
    return x + linear(F.silu(linear(y, g_w)) * linear(y, u_w), d_w)


def patches(video: Tensor, family: str, dtype: torch.dtype, noise: float = NOISE) -> Tensor:
    """Frames (B * T, 3, H, W) in 0..255 to noisy, rounded, normalised patches (B * F, P, values) in the family's order."""
    x = (video.float() + noise * torch.randn_like(video, dtype=torch.float32)).clamp(0, 255).round()
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) * 255 for v in MEAN_STD[family])
    x = ((x - mean) / std).to(dtype)
    if family == "qwen2_5_vl":  # time pairs; patches of one merged cell are neighbours
        x = x.view(-1, 2, 3, CELLS, 2, PATCH, CELLS, 2, PATCH).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return x.reshape(-1, GRID * GRID, 6 * PATCH * PATCH)
    x = x.view(-1, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, GRID * GRID, 3 * PATCH * PATCH)


@cache
def maybe_compiled(function, compiled: bool):
    """One compiled object a function, shared by all models, so equal shapes compile once."""
    return torch.compile(function, dynamic=False) if compiled else function


class Forward:
    """The forward of one model. `compiled` is for training; a per-call `plain=True` runs the functions eagerly."""

    def __init__(self, model: PreTrainedModel, family: str, compiled: bool = False, dropout: float = 0.0):
        self.model, self.family, self.compiled, self.dropout = model, family, compiled, dropout
        self.language, self.device = model.model.language_model, model.lm_head.weight.device
        self.prefix = torch.tensor(before_video(family), device=self.device)
        config = model.config.text_config
        self.heads, self.dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.blocks = [_text_weights(layer) for layer in self.language.layers]
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        vision = model.model.visual if family == "qwen2_5_vl" else model.model.vision_tower
        self.vision_model = getattr(vision, "vision_model", vision)
        if family == "qwen2_5_vl":
            cells = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"))
            order_2P = cells.view(2, CELLS, 2, CELLS, 2).transpose(2, 3).reshape(2, -1).to(self.device)
            inv = self.vision_model.rotary_pos_emb.inv_freq.float().to(self.device)
            angle = torch.cat([order_2P[0][:, None] * inv, order_2P[1][:, None] * inv], -1).repeat(1, 2)
            self.vision_cos, self.vision_sin = angle.cos(), angle.sin()

    def video_tokens(self, seconds: int) -> int:
        return seconds * CELLS * CELLS + (self.family == "llava_onevision")

    def tables(self, seconds: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin of prefix, video and text, as `generate` of transformers 5.x places them."""
        if seconds not in self._tables:
            inv = self.language.rotary_emb.inv_freq.float().to(self.device)
            before, count = len(self.prefix), self.video_tokens(seconds)
            if self.family == "llava_onevision":
                angle = torch.arange(before + count + TEXT_ROWS, device=self.device)[:, None] * inv
            else:
                t, h, w = torch.meshgrid(torch.arange(seconds), torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
                video = torch.stack([t, h, w]).reshape(3, -1) + before
                text = torch.arange(TEXT_ROWS).expand(3, -1) + before + CELLS  # 5.x: + max(h, w); time is not counted
                place = torch.cat([torch.arange(before).expand(3, -1), video, text], 1).to(self.device)
                section = self.model.config.text_config.rope_parameters["mrope_section"]
                parts = (place[..., None] * inv).split(section, dim=-1)
                angle = torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)
            angle = angle.repeat(1, 2)
            self._tables[seconds] = angle.cos(), angle.sin()
        return self._tables[seconds]

    def vision(self, patch_FPV: Tensor, batch: int, plain: bool = False) -> Tensor:
        """Patches of all frames to video tokens (B, N, D)."""
        use = lambda f: maybe_compiled(f, self.compiled and not plain)  # noqa: E731
        tower = self.vision_model
        if self.family == "qwen2_5_vl":
            weight = tower.patch_embed.proj.weight
            x = linear(patch_FPV, weight.reshape(len(weight), -1))
            for block in tower.blocks:
                args = self.vision_cos, self.vision_sin, tower.config.num_heads, *_qwen_weights(block)
                x = use(qwen_vision_block)(x, *args)
            merger = tower.merger
            x = use(qwen_merge)(x, merger.ln_q.weight, *_wb(merger.mlp[0]), *_wb(merger.mlp[2]))
            return x.reshape(batch, -1, x.shape[-1])
        embed = tower.embeddings
        x = linear(patch_FPV, embed.patch_embedding.weight.flatten(1), embed.patch_embedding.bias)
        x = x + embed.position_embedding.weight.to(x.dtype)
        for layer in tower.encoder.layers:
            x = use(siglip_block)(x, tower.config.num_attention_heads, *_siglip_weights(layer))
        projector = self.model.model.multi_modal_projector
        x = use(llava_project)(x, *_wb(projector.linear_1), *_wb(projector.linear_2))
        x = x.reshape(batch, -1, x.shape[-1])
        newline = self.model.model.image_newline.to(x.dtype).expand(batch, 1, -1)
        return torch.cat([x, newline], 1)

    def text(self, video_BND, ids_BR, seconds, keep=None, taps=(), rows=None, plain=False):
        """Logits (B, R, vocabulary) of the text after the video, fp32.

        keep (B, K): the video tokens left in the context; they stay at their own positions.
        taps: layers whose output (B, sequence, D) is returned too.
        rows (B,): number of question rows; returns their mean attention on the video tokens, (B, N), over layers and heads.
        """
        batch, device = len(ids_BR), self.device
        before, count, total = len(self.prefix), video_BND.shape[1], self.video_tokens(seconds)
        cos, sin = self.tables(seconds)
        cos, sin = cos[: before + total + ids_BR.shape[1]], sin[: before + total + ids_BR.shape[1]]
        if keep is not None:
            count = keep.shape[1]
            video_BND = video_BND.gather(1, keep[..., None].expand(-1, -1, video_BND.shape[-1]))
            slots = torch.arange(len(cos), device=device).expand(batch, -1)
            slots = torch.cat([slots[:, :before], keep + before, slots[:, before + total :]], 1)
            cos, sin = cos[slots][:, None], sin[slots][:, None]
        embed = self.language.embed_tokens
        prefix = embed(self.prefix).to(video_BND.dtype).expand(batch, -1, -1)
        x = torch.cat([prefix, video_BND, embed(ids_BR).to(video_BND.dtype)], 1)
        block = maybe_compiled(text_block, self.compiled and not plain)
        tapped, attention = [], 0.0
        for i, weights in enumerate(self.blocks):
            if rows is not None:
                attention = attention + self._question_attention(x, cos, sin, weights, before, total, int(rows.max()), rows)
            x = block(x, cos, sin, self.heads, self.dropout, *weights)
            if i in taps:
                tapped.append(x)
        hidden = rms_norm(x[:, before + count :], self.language.norm.weight)
        logits = linear(hidden, self.model.lm_head.weight).float()
        if rows is not None:
            return logits, attention / len(self.blocks)
        return (logits, tapped) if taps else logits

    def _question_attention(self, x, cos, sin, weights, before, total, most, rows):
        first = before + total
        used = slice(0, first + most)
        q, k, _ = text_qkv(rms_norm(x[:, used], weights[0]), cos[..., used, :], sin[..., used, :], self.heads, *weights[1:7])
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = q[:, :, first:].float() @ k.float().transpose(-1, -2) * self.dim**-0.5
        row = torch.arange(most, device=x.device)
        later = torch.arange(first + most, device=x.device) > (row + first)[:, None]
        mass = score.masked_fill(later, -1e9).softmax(-1)[..., before:first].mean(1)  # (B, rows, N)
        valid = (row < rows[:, None]).float()
        return (mass * (valid / valid.sum(1, keepdim=True))[..., None]).sum(1)


def _wb(module):
    return module.weight, module.bias


def _qwen_weights(block):
    mlp, attention = block.mlp, block.attn
    return (block.norm1.weight, *_wb(attention.qkv), *_wb(attention.proj), block.norm2.weight,
            *_wb(mlp.gate_proj), *_wb(mlp.up_proj), *_wb(mlp.down_proj))  # fmt: skip


def _siglip_weights(layer):
    a = layer.self_attn
    return (*_wb(layer.layer_norm1), *_wb(a.q_proj), *_wb(a.k_proj), *_wb(a.v_proj), *_wb(a.out_proj),
            *_wb(layer.layer_norm2), *_wb(layer.mlp.fc1), *_wb(layer.mlp.fc2))  # fmt: skip


def _text_weights(layer):
    a, mlp = layer.self_attn, layer.mlp
    return (layer.input_layernorm.weight, *_wb(a.q_proj), *_wb(a.k_proj), *_wb(a.v_proj), a.o_proj.weight,
            layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)  # fmt: skip


@torch.no_grad()
def hf_inputs(family: str, patch_FPV: Tensor, seconds: int, ids_R: Tensor) -> dict[str, Tensor]:
    """The arguments of the stock forward for one video with the text `ids_R` behind it."""
    count = seconds * CELLS * CELLS + (family == "llava_onevision")
    video = ID[VIDEO[family]]
    ids = torch.tensor([before_video(family) + [video] * count + ids_R.tolist()], device=ids_R.device)
    common = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "qwen2_5_vl":
        return common | {
            "pixel_values_videos": patch_FPV.flatten(0, 1),
            "video_grid_thw": torch.tensor([[seconds, GRID, GRID]], device=ids.device),
            "second_per_grid_ts": torch.tensor([1.0], device=ids.device),
            "mm_token_type_ids": (ids == video).int() * 2,
        }
    pixels = patch_FPV.view(seconds, GRID, GRID, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return common | {"pixel_values_videos": pixels.reshape(1, seconds, 3, SIDE, SIDE)}


@torch.no_grad()
def parity(net: Forward, patch_FPV: Tensor, seconds: int, ids_R: Tensor) -> float:
    """Largest logit difference between this forward and the stock one on one video, relative to the largest logit."""
    stock = net.model(**hf_inputs(net.family, patch_FPV, seconds, ids_R)).logits[0, -len(ids_R) :]
    ours = net.text(net.vision(patch_FPV, 1, plain=True), ids_R[None], seconds, plain=True)[0]
    return ((stock - ours).abs().max() / stock.abs().max()).item()
