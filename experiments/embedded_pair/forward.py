"""A batched, compilable forward over the weights of the Hugging Face models, equal to theirs (`parity`).

Training a model of 4 M parameters through the stock forward is bound by launches and by per-video Python; here a block is one
compiled function of tensors, so all layers share one graph. Videos of a batch have one length; text follows the video.

Rows of a video token are (B, N, W): what enters the text model, D wide, and behind it D for each level of DeepStack.

Legend: B videos, F frames after temporal merging (one a second), N video tokens, P patches, D width, R text rows, S slots of
the context.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from experiments.embedded_pair.layout import CELLS, GRID, PATCH, Layout, layout
from experiments.embedded_pair.models import MEAN_STD
from experiments.embedded_pair.tokenizer import ID, QWEN, VIDEO
from specvlm.video.synthetic import NOISE, SIDE


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


def qwen3_vision_block(x, cos, sin, heads, n1, c1, qkv_w, qkv_b, o_w, o_b, n2, c2, u_w, u_b, d_w, d_b):
    frames, rows, width = x.shape
    qkv = linear(layer_norm(x, n1, c1), qkv_w, qkv_b).view(frames, rows, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + linear(out.transpose(1, 2).reshape(frames, rows, width), o_w, o_b)
    return x + linear(F.gelu(linear(layer_norm(x, n2, c2), u_w, u_b), approximate="tanh"), d_w, d_b)


def qwen3_merge(x, joined, norm, bias, w1, b1, w2, b2):
    """joined: the norm is over the four patches of a cell, as in DeepStack's mergers."""
    frames, rows, width = x.shape
    cell = (frames, rows // 4, 4 * width)
    x = layer_norm(x.view(cell), norm, bias) if joined else layer_norm(x, norm, bias).view(cell)
    return linear(F.gelu(linear(x, w1, b1)), w2, b2)


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


def text_qkv(y, cos, sin, heads, q_w, q_b, q_n, k_w, k_b, k_n, v_w, v_b):
    """q_n, k_n: weights of Qwen3's norms of queries and keys, else None."""
    batch, rows, _ = y.shape
    dim = q_w.shape[0] // heads
    q, k, v = (linear(y, w, b).view(batch, rows, -1, dim).transpose(1, 2) for w, b in ((q_w, q_b), (k_w, k_b), (v_w, v_b)))
    if q_n is not None:
        q, k = rms_norm(q, q_n), rms_norm(k, k_n)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def text_block(x, cos, sin, heads, dropout, n1, q_w, q_b, q_n, k_w, k_b, k_n, v_w, v_b, o_w, n2, g_w, u_w, d_w):
    batch, rows, _ = x.shape
    q, k, v = text_qkv(rms_norm(x, n1), cos, sin, heads, q_w, q_b, q_n, k_w, k_b, k_n, v_w, v_b)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, dropout_p=dropout)
    x = x + linear(out.transpose(1, 2).reshape(batch, rows, -1), o_w)
    y = rms_norm(x, n2)
    return x + linear(F.silu(linear(y, g_w)) * linear(y, u_w), d_w)


def patches(video: Tensor, family: str, dtype: torch.dtype, noise: float = NOISE) -> Tensor:
    """Frames (B * T, 3, H, W) in 0..255 to noisy, rounded, normalised patches (B * F, P, values) in the family's order."""
    x = (video.float() + noise * torch.randn_like(video, dtype=torch.float32)).clamp(0, 255).round()
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) * 255 for v in MEAN_STD[family])
    x = ((x - mean) / std).to(dtype)
    if family in QWEN:  # time pairs; patches of one merged cell are neighbours
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
        config = model.config.text_config
        self.width, self.heads = config.hidden_size, config.num_attention_heads
        self.blocks = [_text_weights(layer) for layer in self.language.layers]
        self._tables: dict[int, tuple[Layout, Tensor, Tensor]] = {}
        vision = model.model.visual if family in QWEN else model.model.vision_tower
        self.vision_model = getattr(vision, "vision_model", vision)
        if family in QWEN:
            cells = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"))
            order_2P = cells.view(2, CELLS, 2, CELLS, 2).transpose(2, 3).reshape(2, -1).to(self.device)
            self.place_P = order_2P[0] * GRID + order_2P[1]  # of a patch in the learned table
            inv = self.vision_model.rotary_pos_emb.inv_freq.float().to(self.device)
            angle = torch.cat([order_2P[0][:, None] * inv, order_2P[1][:, None] * inv], -1).repeat(1, 2)
            self.vision_cos, self.vision_sin = angle.cos(), angle.sin()

    def video_slots(self, seconds: int) -> Tensor:
        """Slots of the context (N,) that hold the video's tokens."""
        return self.tables(seconds)[0].slots

    def tables(self, seconds: int) -> tuple[Layout, Tensor, Tensor]:
        """The layout, and rotary cos and sin of the context and the text after it."""
        if seconds not in self._tables:
            where = layout(self.family, seconds).to(self.device)
            inv = self.language.rotary_emb.inv_freq.float().to(self.device)
            angle = self._mixed(where.places[..., None] * inv).repeat(1, 2)
            self._tables[seconds] = where, angle.cos(), angle.sin()
        return self._tables[seconds]

    def _mixed(self, angle_ASH: Tensor) -> Tensor:
        """Angles (S, H) of half a head, of which every frequency belongs to one axis."""
        if len(angle_ASH) == 1:
            return angle_ASH[0]
        section = self.model.config.text_config.rope_parameters["mrope_section"]
        if self.family == "qwen3_vl":  # interleaved: every third is of the rows, every third of the columns
            axis = torch.zeros(angle_ASH.shape[-1], dtype=torch.long, device=self.device)
            axis[1 : 3 * section[1] : 3], axis[2 : 3 * section[2] : 3] = 1, 2
        else:
            axis = torch.arange(3, device=self.device).repeat_interleave(torch.tensor(section, device=self.device))
        return angle_ASH.gather(0, axis.expand(1, angle_ASH.shape[1], -1))[0]

    def vision(self, patch_FPV: Tensor, batch: int, plain: bool = False) -> Tensor:
        """Patches of all frames to rows of the video tokens (B, N, W)."""
        use = lambda f: maybe_compiled(f, self.compiled and not plain)  # noqa: E731
        tower = self.vision_model
        if self.family == "qwen3_vl":
            return self._qwen3_vision(patch_FPV, use).reshape(batch, -1, self.width * (1 + len(tower.deepstack_merger_list)))
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

    def _qwen3_vision(self, patch_FPV: Tensor, use) -> Tensor:
        tower = self.vision_model
        levels = list(tower.deepstack_visual_indexes)
        embed = tower.patch_embed.proj
        x = linear(patch_FPV, embed.weight.flatten(1), embed.bias) + tower.pos_embed.weight[self.place_P].to(patch_FPV.dtype)
        added = []
        for i, block in enumerate(tower.blocks):
            x = use(qwen3_vision_block)(x, self.vision_cos, self.vision_sin, tower.config.num_heads, *_qwen3_weights(block))
            if i in levels:
                added.append(use(qwen3_merge)(x, True, *_merger_weights(tower.deepstack_merger_list[levels.index(i)])))
        return torch.cat([use(qwen3_merge)(x, False, *_merger_weights(tower.merger)), *added], -1)

    def text(self, video_BNW, ids_BR, seconds, keep=None, taps=(), rows=None, plain=False):
        """Logits (B, R, vocabulary) of the text after the video, fp32.

        keep (B, K): the video tokens left in the context; they stay at their own positions, and so do all texts.
        taps: layers whose output (B, sequence, D) is returned too.
        rows (B,): number of question rows; returns their mean attention on the video tokens, (B, N), over layers and heads.
        """
        where, cos, sin = self.tables(seconds)
        total, text_rows = len(where.tokens), ids_BR.shape[1]
        cos, sin = cos[: total + text_rows], sin[: total + text_rows]
        features, *added = video_BNW.split(self.width, -1)
        embed = lambda ids: self.language.embed_tokens(ids).to(features.dtype)  # noqa: E731
        texts = embed(where.tokens[where.texts]).expand(len(ids_BR), -1, -1)
        x = torch.cat([torch.cat([texts, features], 1).index_select(1, where.order), embed(ids_BR)], 1)
        slots = where.slots
        if keep is not None:
            stay, slots = _left(where, keep, text_rows)
            x, cos, sin = x.gather(1, _wide(stay, self.width)), cos[stay][:, None], sin[stay][:, None]
            added = [level.gather(1, _wide(keep, self.width)) for level in added]
        block = maybe_compiled(text_block, self.compiled and not plain)
        tapped, attention = [], 0.0
        for i, weights in enumerate(self.blocks):
            if rows is not None:
                attention = attention + self._question_attention(x, cos, sin, weights, total, slots, rows)
            x = block(x, cos, sin, self.heads, self.dropout, *weights)
            if i < len(added):
                x = x.index_add(1, slots, added[i]) if keep is None else x.scatter_add(1, _wide(slots, self.width), added[i])
            if i in taps:
                tapped.append(x)
        hidden = rms_norm(x[:, -text_rows:], self.language.norm.weight)
        logits = linear(hidden, self.model.lm_head.weight).float()
        if rows is not None:
            return logits, attention / len(self.blocks)
        return (logits, tapped) if taps else logits

    def _question_attention(self, x, cos, sin, weights, first, slots, rows):
        """Mean attention (B, N) of the question's rows, which begin at slot `first`, in one layer."""
        most = int(rows.max())
        used = slice(0, first + most)
        q, k, _ = text_qkv(rms_norm(x[:, used], weights[0]), cos[..., used, :], sin[..., used, :], self.heads, *weights[1:9])
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = q[:, :, first:].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        row = torch.arange(most, device=x.device)
        later = torch.arange(first + most, device=x.device) > (row + first)[:, None]
        mass = score.masked_fill(later, -1e9).softmax(-1)[..., slots].mean(1)  # (B, rows, N)
        valid = (row < rows[:, None]).float()
        return (mass * (valid / valid.sum(1, keepdim=True))[..., None]).sum(1)


def _wide(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)


def _left(where: Layout, keep_BK: Tensor, text_rows: int) -> tuple[Tensor, Tensor]:
    """The slots that stay (B, S'), ascending, and the places of the kept video tokens among them (B, K)."""
    total = len(where.tokens)
    texts = torch.cat([where.texts, torch.arange(total, total + text_rows, device=keep_BK.device)])
    kept = where.slots[keep_BK]
    stay = torch.cat([texts.expand(len(kept), -1), kept], 1).sort(1).values
    return stay, torch.searchsorted(stay, kept)


def _wb(module):
    return module.weight, module.bias


def _qwen_weights(block):
    mlp, attention = block.mlp, block.attn
    return (block.norm1.weight, *_wb(attention.qkv), *_wb(attention.proj), block.norm2.weight,
            *_wb(mlp.gate_proj), *_wb(mlp.up_proj), *_wb(mlp.down_proj))  # fmt: skip


def _qwen3_weights(block):
    mlp, attention = block.mlp, block.attn
    return (*_wb(block.norm1), *_wb(attention.qkv), *_wb(attention.proj), *_wb(block.norm2),
            *_wb(mlp.linear_fc1), *_wb(mlp.linear_fc2))  # fmt: skip


def _merger_weights(merger):
    return *_wb(merger.norm), *_wb(merger.linear_fc1), *_wb(merger.linear_fc2)


def _siglip_weights(layer):
    a = layer.self_attn
    return (*_wb(layer.layer_norm1), *_wb(a.q_proj), *_wb(a.k_proj), *_wb(a.v_proj), *_wb(a.out_proj),
            *_wb(layer.layer_norm2), *_wb(layer.mlp.fc1), *_wb(layer.mlp.fc2))  # fmt: skip


def _text_weights(layer):
    a, mlp = layer.self_attn, layer.mlp
    norms = (a.q_norm.weight, a.k_norm.weight) if hasattr(a, "q_norm") else (None, None)
    return (layer.input_layernorm.weight, *_wb(a.q_proj), norms[0], *_wb(a.k_proj), norms[1], *_wb(a.v_proj), a.o_proj.weight,
            layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)  # fmt: skip


@torch.no_grad()
def hf_inputs(family: str, patch_FPV: Tensor, seconds: int, ids_R: Tensor) -> dict[str, Tensor]:
    """The arguments of the stock forward for one video with the text `ids_R` behind it."""
    ids = torch.cat([layout(family, seconds).tokens.to(ids_R.device), ids_R])[None]
    common = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in QWEN:
        timing = {"second_per_grid_ts": torch.tensor([1.0], device=ids.device)} if family == "qwen2_5_vl" else {}
        return common | timing | {
            "pixel_values_videos": patch_FPV.flatten(0, 1),
            "video_grid_thw": torch.tensor([[seconds, GRID, GRID]], device=ids.device),
            "mm_token_type_ids": (ids == ID[VIDEO[family]]).int() * 2,
        }  # fmt: skip
    pixels = patch_FPV.view(seconds, GRID, GRID, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return common | {"pixel_values_videos": pixels.reshape(1, seconds, 3, SIDE, SIDE)}


@torch.no_grad()
def parity(net: Forward, patch_FPV: Tensor, seconds: int, ids_R: Tensor) -> float:
    """Largest logit difference between this forward and the stock one on one video, relative to the largest logit."""
    stock = net.model(**hf_inputs(net.family, patch_FPV, seconds, ids_R)).logits[0, -len(ids_R) :]
    ours = net.text(net.vision(patch_FPV, 1, plain=True), ids_R[None], seconds, plain=True)[0]
    return ((stock - ours).abs().max() / stock.abs().max()).item()
