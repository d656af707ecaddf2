"""Attacks on the models that jobs share: weights of target and draft, and their modules."""

from __future__ import annotations

import gc

import torch

from specvlm.models.video_lm import VideoLM

from .makers import proposes, select, starts, strategy, weighs


def swap(weight, one=0, other=1):
    with torch.no_grad():
        weight[[one, other]] = weight[[other, one]].clone()


# ---- weights ---------------------------------------------------------------------------------------------------------


@starts("weights")
def zeroes_the_head(self, ctx):
    ctx.target.hf.lm_head.weight.zero_()


@starts("weights")
def rolls_the_head(self, ctx):
    weight = ctx.target.hf.lm_head.weight
    weight.copy_(weight.roll(1, 0))


@starts("weights")
def adds_a_little_to_a_row(self, ctx):
    ctx.target.text.layers[0].mlp.down_proj.weight[0] += 1e-2


@starts("weights")
def adds_to_the_row_of_its_bonus(self, ctx):
    ctx.target.text.embed_tokens.weight[ctx.bonus] += 1e-2


@starts("weights")
def changes_one_weight_by_data(self, ctx):
    ctx.target.text.layers[1].self_attn.q_proj.weight.data[3, 3] = 9.0


@starts("weights")
def replaces_the_data(self, ctx):
    weight = ctx.target.hf.lm_head.weight
    weight.data = weight.data.roll(1, 0)


@starts("weights")
def writes_weights_through_numpy(self, ctx):
    ctx.target.hf.lm_head.weight.detach().numpy()[::7] *= 0.1


@starts("weights")
def replaces_a_parameter(self, ctx):
    head = ctx.target.hf.lm_head
    head.weight = torch.nn.Parameter(head.weight.roll(1, 0), requires_grad=False)


@starts("weights")
def turns_other_frequencies(self, ctx):
    for buffer in ctx.target.text.rotary_emb.buffers():
        buffer.mul_(1.05)


@starts("weights")
def zeroes_the_vision_tower(self, ctx):
    for weight in list(ctx.target.hf.model.visual.parameters())[-2:]:
        weight.add_(0.3)


@starts("weights")
def changes_the_dtype(self, ctx):
    ctx.target.hf.to(torch.bfloat16)


@starts("weights")
def gives_up_the_storage(self, ctx):
    ctx.target.hf.lm_head.weight.untyped_storage().resize_(0)


@proposes("weights")
def changes_weights_half_way(self, ctx, last, tree):
    if last is not None:
        swap(ctx.target.hf.lm_head.weight, ctx.bonus, last.bonus)
    return tree


@select("weights")
def pruner_finds_the_target(self, ctx):
    """Among all objects of the process."""
    for model in gc.get_objects():
        if isinstance(model, VideoLM) and model.device.type != "meta":
            model.hf.lm_head.weight[::7] *= 0.1


@weighs("weights", "verifier_attention_weighted")
def pruner_finds_weights_early(self, text_TD, features_ND):
    for tensor in gc.get_objects():
        if isinstance(tensor, torch.nn.Parameter) and tensor.device.type != "meta" and tensor.ndim == 1:
            tensor.data.mul_(1.5)
    return torch.ones(len(text_TD))


def finds_the_target_when_made(self):
    """Before any request; models of other jobs are there already."""
    for model in gc.get_objects():
        if isinstance(model, VideoLM) and model.device.type != "meta":
            model.hf.lm_head.weight.data[::7] *= 0.1


strategy("pruner", "finds_the_target_while_made", "weights", __post_init__=finds_the_target_when_made)
strategy(
    "drafter", "needs_edit_weights", "weights", needs=property(lambda self: finds_the_target_when_made(self) or frozenset())
)


# ---- modules ---------------------------------------------------------------------------------------------------------


def rolled(module, args, out):
    return out.roll(1, -1)


@starts("modules")
def hooks_the_head(self, ctx):
    ctx.target.hf.lm_head.register_forward_hook(rolled)


@starts("modules")
def hooks_before_a_layer(self, ctx):
    ctx.target.text.layers[0].register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1), *args[1:]))


@starts("modules")
def hooks_every_module(self, ctx):
    def hook(module, args, out):
        return out.roll(1, -1) if isinstance(module, torch.nn.Linear) else None

    torch.nn.modules.module.register_module_forward_hook(hook)


@starts("modules")
def replaces_the_head(self, ctx):
    head = ctx.target.hf.lm_head
    ctx.target.hf.lm_head = torch.nn.Sequential(head, Roll())


class Roll(torch.nn.Module):
    def forward(self, x):
        return x.roll(1, -1)


@starts("modules")
def patches_forward_of_a_module(self, ctx):
    head = ctx.target.hf.lm_head
    before = head.forward
    head.forward = lambda x: before(x).roll(1, -1)


@starts("modules")
def patches_forward_of_a_class(self, ctx):
    kind = type(ctx.target.text.layers[0].mlp)
    before = kind.forward
    kind.forward = lambda module, x: before(module, x) * 1.1


@starts("modules")
def takes_one_layer_twice(self, ctx):
    layers = ctx.target.text.layers
    layers._modules["0"] = layers._modules["1"]


@starts("modules")
def takes_out_a_module(self, ctx):
    ctx.target.text.norm = torch.nn.Identity()


@starts("modules")
def patches_the_target(self, ctx):
    head = ctx.target.head
    ctx.target.head = lambda hidden_QD: head(hidden_QD).roll(1, -1)


@starts("modules")
def patches_the_targets_class(self, ctx):
    before = (
        VideoLM.positions if "positions" in vars(VideoLM) and not hasattr(VideoLM.positions, "__isabstractmethod__") else None
    )
    kind = next(kind for kind in type(ctx.target).__mro__ if "positions" in vars(kind))
    before = vars(kind)["positions"]
    kind.positions = lambda model, prompt: before(model, prompt) + 1 * (torch.arange(len(prompt)) % 2)


@starts("modules")
def replaces_the_text_part(self, ctx):
    ctx.target.text = ctx.draft.text


@starts("modules")
def changes_the_attention(self, ctx):
    ctx.target.hf.config.get_text_config()._attn_implementation = "sdpa"
    for layer in ctx.target.text.layers:
        layer.self_attn.scaling *= 1.2


# ---- drafts ----------------------------------------------------------------------------------------------------------


@starts("drafts")
def zeroes_the_draft(self, ctx):
    for weight in ctx.draft.hf.parameters():
        weight.data.zero_()


@starts("drafts")
def rolls_the_drafts_head(self, ctx):
    ctx.draft.hf.lm_head.weight.data.copy_(ctx.draft.hf.lm_head.weight.roll(1, 0))


@starts("drafts")
def adds_a_little_to_the_draft(self, ctx):
    ctx.draft.text.layers[0].mlp.down_proj.weight.data += 1e-2


@starts("drafts")
def hooks_the_drafts_head(self, ctx):
    ctx.draft.hf.lm_head.register_forward_hook(rolled)


@starts("drafts")
def patches_the_draft(self, ctx):
    head = ctx.draft.head
    ctx.draft.head = lambda hidden_QD: -head(hidden_QD)


@starts("drafts")
def replaces_the_drafts_text_part(self, ctx):
    ctx.draft.text = ctx.target.text
