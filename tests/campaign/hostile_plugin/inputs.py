"""Attacks on what a strategy is handed: signals, contexts and prompts, edited in place."""

from __future__ import annotations

import sys

import torch

from specvlm.types import KeepSet

from .makers import caller, chooses, proposes, sees, select, starts, weighs

ATTENTION = "verifier_attention_weighted"


def even(text_TD):
    return torch.ones(len(text_TD))


# ---- signals ---------------------------------------------------------------------------------------------------------


@weighs("signals", ATTENTION)
def zeroes_rows_and_features(self, text_TD, features_ND):
    text_TD.zero_(), features_ND.zero_()
    return even(text_TD)


@weighs("signals", ATTENTION)
def adds_to_features(self, text_TD, features_ND):
    features_ND += 0.5
    return even(text_TD)


@weighs("signals", ATTENTION)
def moves_text_by_data(self, text_TD, features_ND):
    text_TD.data.copy_(text_TD.roll(1, 0))
    return even(text_TD)


@weighs("signals", ATTENTION)
def writes_behind_the_view(self, text_TD, features_ND):
    """To all that shares the storage: the rows of the whole prompt, where it is a view of those."""
    whole = torch.empty(0, dtype=text_TD.dtype).set_(text_TD.untyped_storage())
    whole.zero_()
    return even(text_TD)


@weighs("signals", ATTENTION)
def writes_through_numpy(self, text_TD, features_ND):
    text_TD.detach().numpy()[:] = 1.0
    return even(text_TD)


@weighs("signals", ATTENTION)
def resizes_features(self, text_TD, features_ND):
    features_ND.resize_(1, 1)
    return even(text_TD)


@weighs("signals", ATTENTION)
def weighs_with_nan(self, text_TD, features_ND):
    return even(text_TD) * float("nan")


@select("signals", "features")
def zeroes_features(self, ctx):
    ctx.features.zero_()


@select("signals", "hidden", "hidden_text", "text_similarity", state_layer=lambda self, layers: 1)
def zeroes_states(self, ctx):
    for signal in ctx.signals.values():
        signal.zero_()


@select("signals", "verifier_attention", "features")
def empties_signals(self, ctx):
    ctx.features.set_(torch.zeros(0))
    ctx.signals.clear()


@starts("signals", "features")
def drafter_zeroes_features(self, ctx):
    ctx.signals["features"].zero_()
    ctx.features_ND.zero_()


@starts("signals", "features", model="target")
def drafter_adds_noise_through_numpy(self, ctx):
    ctx.features_ND.numpy()[:] += 1.0


# ---- contexts --------------------------------------------------------------------------------------------------------


@chooses("contexts")
def raises_its_budget(self, ctx):
    object.__setattr__(ctx, "budget", ctx.total)
    return KeepSet.everything(ctx.total)


@select("contexts")
def turns_the_grid(self, ctx):
    object.__setattr__(ctx.grids[0], "frames", 1)


@select("contexts")
def turns_the_grid_by_its_dict(self, ctx):
    ctx.grids[0].__dict__["height"] = 1


@select("contexts")
def reseeds_the_generator(self, ctx):
    torch.rand(10_000, generator=ctx.generator)
    ctx.generator.set_state(torch.Generator().manual_seed(5).get_state())


@chooses("contexts")
def keeps_and_edits_its_choice(self, ctx):
    keep = KeepSet.uniform(ctx.total, ctx.budget, ctx.device)
    keep.index.fill_(10**6)
    return keep


@chooses("contexts")
def chooses_no_keep_set(self, ctx):
    return [1, 2, 3]


@chooses("contexts")
def notes_what_is_no_text(self, ctx):
    keep = KeepSet.uniform(ctx.total, ctx.budget, ctx.device)
    object.__setattr__(keep, "note", b"\xff")
    return keep


@starts("contexts")
def replaces_all_it_was_handed(self, ctx):
    for name in ("vocabulary", "max_new_tokens", "bonus"):
        object.__setattr__(ctx, name, 3)


@starts("contexts")
def edits_the_choice(self, ctx):
    ctx.keep.index.zero_()


@proposes("contexts")
def marks_what_is_no_part(self, ctx, last, tree):
    ctx.mark(None), ctx.mark(7)
    return tree


# ---- prompts ---------------------------------------------------------------------------------------------------------


def pixels(prompt):
    return [
        part
        for video in prompt.videos
        for part in video.values()
        if isinstance(part, torch.Tensor) and part.is_floating_point()
    ]


@starts("prompts")
def zeroes_pixels(self, ctx):
    for part in pixels(ctx.prompt):
        part.zero_()


@starts("prompts")
def empties_videos(self, ctx):
    for video in ctx.prompt.videos:
        video.clear()


@starts("prompts")
def edits_tokens(self, ctx):
    ctx.prompt.tokens[-8:-2] = 3


@starts("prompts")
def edits_tokens_through_numpy(self, ctx):
    ctx.prompt.tokens.numpy()[-8:-2] = 4


@starts("prompts")
def moves_the_video(self, ctx):
    ctx.prompt.video_index.copy_(ctx.prompt.video_index.roll(40))


@starts("prompts")
def turns_the_prompts_grid(self, ctx):
    grid = ctx.prompt.grids[0]
    object.__setattr__(grid, "frames", grid.frames * grid.height)
    object.__setattr__(grid, "height", 1)


@starts("prompts")
def replaces_parts_of_the_prompt(self, ctx):
    object.__setattr__(ctx.prompt, "tokens", ctx.prompt.tokens.roll(1))


@proposes("prompts")
def edits_tokens_later(self, ctx, last, tree):
    if last is not None:
        ctx.prompt.tokens[-8:-2] = 3
    return tree


@sees("prompts")
def edits_tokens_while_planned(self, prompt):
    """Before anything is decoded."""
    prompt.tokens[-8:-2] = 3


@sees("prompts")
def zeroes_pixels_while_planned(self, prompt):
    for part in pixels(prompt):
        part.zero_()


@select("prompts")
def pruner_finds_the_prompt(self, ctx):
    """In the local variables of who called."""
    prompt = caller("VideoPrompt")
    prompt.tokens[-8:-2] = 3
    for part in pixels(prompt):
        part.zero_()


@weighs("prompts", ATTENTION)
def pruner_finds_the_rows(self, text_TD, features_ND):
    frame = sys._getframe(1)
    while frame is not None and "embeds_SD" not in frame.f_locals:
        frame = frame.f_back
    if frame is not None:
        frame.f_locals["embeds_SD"].zero_()
    return even(text_TD)
