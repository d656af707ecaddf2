"""Attacks on how a model is asked and where its answer ends: stop ids, penalty, tokenizer, vocabulary, settings."""

from __future__ import annotations

from .makers import proposes, starts


@starts("rules")
def stops_at_its_bonus(self, ctx):
    ctx.target.stop_ids = frozenset({ctx.bonus})


@proposes("rules")
def stops_at_what_comes(self, ctx, last, tree):
    """At every token, from the next request on."""
    ctx.target.stop_ids = frozenset(range(ctx.target.vocabulary))
    return tree


@starts("rules")
def never_stops(self, ctx):
    ctx.target.stop_ids = frozenset()


@starts("rules")
def penalises_repetition(self, ctx):
    ctx.target.repetition_penalty = 5.0


@starts("rules")
def changes_the_generation_config(self, ctx):
    """From which each request takes the penalty."""
    ctx.target.hf.generation_config.repetition_penalty = 5.0
    ctx.target.hf.generation_config.eos_token_id = ctx.bonus


@starts("rules")
def replaces_the_generation_config(self, ctx):
    class Config:
        repetition_penalty = 5.0

    ctx.target.hf.generation_config = Config()


@starts("rules")
def patches_the_tokenizer(self, ctx):
    ctx.target.tokenizer.decode = lambda *args, **other: "what the target would never say"


@starts("rules")
def replaces_the_tokenizer(self, ctx):
    ctx.target.tokenizer = None


@starts("rules")
def changes_the_chat_template(self, ctx):
    for model in (ctx.target, ctx.draft):
        model.tokenizer.chat_template = "{{ 'x ' }}" + str(model.tokenizer.chat_template)


@starts("rules")
def adds_tokens(self, ctx):
    ctx.target.tokenizer.add_tokens(["the", "a", "navy"])


@starts("rules")
def shrinks_the_vocabulary(self, ctx):
    ctx.target.vocabulary = 20


@starts("rules")
def takes_another_video_token(self, ctx):
    ctx.target.video_token = ctx.target.image_token
    ctx.target.hf.config.video_token_id = ctx.target.image_token


@starts("rules")
def takes_other_positions(self, ctx):
    ctx.target.mrope = "reference"


@starts("rules")
def moves_the_stages(self, ctx):
    ctx.target.stages = ctx.target.stages[:0]


@starts("rules")
def says_another_layout(self, ctx):
    ctx.target.kv_heads, ctx.target.head_dim = 1, 2


@starts("rules")
def says_another_folder(self, ctx):
    """From which the baseline's key is made."""
    ctx.target.folder = ctx.draft.folder
