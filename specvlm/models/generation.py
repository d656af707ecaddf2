"""Read a checkpoint's generation config, and list its settings that change greedy output but are not applied here."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specvlm.errors import UserError, explained
from specvlm.video.settings import read_json

FILE = "generation_config.json"
APPLIED = ("eos_token_id", "repetition_penalty")
# Fields of transformers' GenerationConfig that do not change the greedy answer, or that our own keys override. Any
# other field that a checkpoint sets is reported, so that no field of a new release is ignored silently.
HARMLESS = frozenset(
    (
        *("max_length", "max_new_tokens"),  # overridden by our max_new_tokens
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("early_stopping", "length_penalty", "num_return_sequences"),  # only for beams and several returned sequences
        *("use_cache", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile", "low_memory"),
        *("renormalize_logits", "remove_invalid_values"),  # keep the argmax
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("pad_token_id", "bos_token_id", "decoder_start_token_id"),  # for padded batches and encoder-decoder models
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "speculation_type", "use_mtp"),  # Hugging Face's own lossless speculation
        *("continuous_batching_config", "transformers_version"),
    )
)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that change nothing, besides those that mean "not set"
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha"), (0,)),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window", "paged"),
}


def generation_of(folder: Path) -> Any:
    """Load the folder's GenerationConfig; None if it has none.

    Raises:
        UserError: The file is invalid, which Hugging Face would ignore silently.
    """
    from transformers import GenerationConfig

    if not (folder / FILE).is_file():
        return None
    read_json(folder / FILE)
    with explained(f"{folder}: the {FILE} cannot be used"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def stop_ids(config: Any) -> frozenset[int]:
    """Return the token ids that end an answer. Raises UserError if eos_token_id is no token id and no list of them."""
    found = config.eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in ids):
        raise UserError(f"eos_token_id={found!r} of the generation config: expected a token id, or a list of them")
    return frozenset(ids)


def penalty_of(config: Any) -> float:
    """Return the repetition penalty of a generation config, 1 if it has none. Raises UserError unless it is above 0."""
    found = config.repetition_penalty
    if found is None:
        return 1.0
    if not isinstance(found, int | float) or not 0 < found < math.inf:
        raise UserError(f"repetition_penalty={found!r} of the generation config: expected a number more than 0")
    return float(found)


def not_applied(config: Any) -> Iterator[str]:
    """Yield the names of settings that change greedy output and are not applied here."""
    from transformers import GenerationConfig

    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        unset = value is None or value is False or (isinstance(value, list | dict | str) and not value)
        if not (name.startswith("_") or name in HARMLESS or name in APPLIED or unset or value in NEUTRAL.get(name, ())):
            yield name
