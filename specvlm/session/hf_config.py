"""Translate the arguments that Hugging Face's `generate` passes to a decoding method: config, processors, criteria.

Shape suffixes: S tokens of the prompt, T tokens so far, A axes of positions, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode
from transformers.generation.logits_process import (
    LogitNormalization,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specvlm.errors import UserError
from specvlm.strategies import Sampling

WARPERS = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p"}
OTHER_WARPERS = frozenset(
    f"{name}LogitsWarper" for name in ("MinP", "Typical", "Epsilon", "Eta", "TopH")
)  # sampling rules that the verifier "sampling" does not have
# Processors whose result depends on more than the token ids and the logits.
STATEFUL = frozenset({"UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"})
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Arguments of `generate` that follow from the prompt, or change no token.
UNUSED = frozenset(
    (
        *("use_cache", "attention_mask", "past_key_values", "cache_position", "logits_to_keep", "mm_token_type_ids"),
        *("position_ids", "rope_deltas", "mm_encoder_outputs", "output_attentions", "output_hidden_states", "return_dict"),
    )
)
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def check_config(config: Any, others: Mapping[str, Any]) -> None:
    """Raise UserError for unsupported settings. others: model inputs besides tokens and pixels."""
    mode = config.get_generation_mode()
    if mode not in MODES:
        raise UserError(f"generate is asked for {str(mode.value).replace('_', ' ')}, which cannot be speculative here")
    for name in OUTPUTS:
        if getattr(config, name, None) and config.return_dict_in_generate:
            raise UserError(f"{name}=True is not supported with custom_generate: leave it out")
    if others.get("attention_mask") is not None:  # dropped by `generate` if it is all ones
        raise UserError("the prompt has padding, which a single prompt does not need")
    cache = others.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise UserError("past_key_values are not supported with custom_generate: the prompt is read from its beginning")
    for name, value in others.items():
        if value is not None and name not in UNUSED:
            raise UserError(f"{name} is not supported with custom_generate: give only input_ids and pixels")


def check_positions(given: Tensor | None, own_AS: Tensor) -> None:
    """Raise UserError for positions other than the model's own, or 0 to S - 1 on all axes.

    Args:
        given: (A, 1, S), (A + 1, 1, S) with a text axis first, or (1, S); None for no positions.
        own_AS: The model's own.
    """
    if given is None:
        return
    theirs_AS = (given[-len(own_AS) :, 0] if given.ndim == 3 else given[:1]).cpu()
    counted_S = torch.arange(own_AS.shape[1])  # positions that `generate` makes if it does not tell videos from text
    if not torch.equal(theirs_AS, own_AS.cpu()) and not bool((theirs_AS == counted_S).all()):
        raise UserError("position_ids other than the model's own are not supported with custom_generate: leave them out")


def sampling_of(processors: Sequence[Any], config: Any) -> tuple[Sampling, list[Any]]:
    """Split processors into sampling settings and the processors before them, which change logits.

    Raises UserError for a processor that cannot be applied to guesses, or if settings are in another order than that
    in which `Sampling` applies them.
    """
    settings: dict[str, Any] = {}
    rest, order = [], list(WARPERS.values())
    for place, one in enumerate(processors):
        name = type(one).__name__
        if type(one) in WARPERS:
            field = WARPERS[type(one)]
            if any(order.index(field) <= order.index(before) for before in settings):
                raise UserError(f"{name} after {', '.join(settings)} is not supported with custom_generate: use each once")
            settings[field] = getattr(one, field)
        elif name in OTHER_WARPERS or name in STATEFUL:
            raise UserError(f"{name} is not supported with custom_generate")
        elif isinstance(one, LogitNormalization) and place == len(processors) - 1:
            pass  # a shift of all logits changes no choice
        elif settings:
            raise UserError(f"{name} after the rules of sampling is not supported with custom_generate")
        else:
            rest.append(one)
    return (Sampling(**{"temperature": 1.0} | settings) if config.do_sample else Sampling()), rest


def logits_rule(rest: Sequence[Any], prompt_S: Tensor) -> dict[str, Any]:
    """Make the options of a request that apply these processors: a repetition penalty, or a rule that applies all."""
    if not rest:
        return {"repetition_penalty": 1.0}
    (first, *more) = rest
    if type(first) is RepetitionPenaltyLogitsProcessor and not more:
        return {"repetition_penalty": float(first.penalty)}
    return {"repetition_penalty": 1.0, "adjust": Processors(rest, prompt_S)}


class Processors:
    """A rule that applies Hugging Face's processors, in float32 as `generate` does."""

    def __init__(self, processors: Sequence[Any], prompt_S: Tensor) -> None:
        self._processors, self._prompt = LogitsProcessorList(processors), prompt_S

    def __call__(self, answer: Sequence[int], logits_V: Tensor) -> Tensor:
        ids_T = torch.cat([self._prompt, torch.tensor(answer, dtype=self._prompt.dtype)])
        logits_1V = logits_V[None].to(copy=True, dtype=torch.float32)
        return self._processors(ids_T[None].to(logits_V.device), logits_1V)[0]


class Ending:
    """Cuts an answer where Hugging Face's stopping criteria end it. They are called after every token.

    Attributes:
        done: Whether the answer has ended.
    """

    def __init__(self, criteria: Any, prompt_S: Tensor, device: torch.device) -> None:
        self._criteria, self._ids_1T = criteria, prompt_S[None].to(device)
        self.done = False

    def take(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return those of a round's tokens that belong to the answer."""
        kept = []
        for token in () if self.done else tokens:
            kept.append(token)
            self._ids_1T = torch.cat([self._ids_1T, self._ids_1T.new_tensor([[token]])], 1)
            if bool(self._criteria(self._ids_1T, None).all()):
                self.done = True
                break
        return tuple(kept)


def streamer_of_caller() -> Any:
    """Return the streamer that was given to the running `generate`; None if there is none.

    transformers 5.17 to 5.23 do not pass it on to a callable: `_extract_generation_mode_kwargs` drops it. It is a local
    variable of `generate`, whose frame is looked for here. Without this, the streamer would never see the answer's end.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_locals.get("streamer")
        frame = frame.f_back  # type: ignore[assignment]
    return None
