"""Speculative decoding inside Hugging Face's `generate`, as its `custom_generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_not
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from specvlm.errors import UserError
from specvlm.models.adopt import check_plain
from specvlm.session.call import begun
from specvlm.session.hf_config import Ending, check_config, check_positions, logits_rule, sampling_of, streamer_of_caller
from specvlm.session.inputs import Reading, processed
from specvlm.session.load import Side, paired
from specvlm.session.options import Options
from specvlm.session.result import statistics_of
from specvlm.session.session import Session
from specvlm.strategies.verifiers.coupled import own_rule
from specvlm.types import GenerationOptions, Step, VideoPrompt

OPTIONS = ("pruner", "drafter", "ratio", "positions")  # all other options come from the GenerationConfig


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """Output of `generate` with `return_dict_in_generate=True`.

    Attributes:
        statistics: Statistics of each sequence, as in `GenerationResult`.
    """

    statistics: list[dict[str, Any]] | None = None


def custom_generate(draft: Any = None, *, processor: str | Path | None = None, engine: str = "auto", **options: Any) -> Any:
    """Make a speculative decoding method for Hugging Face's `generate`: `target.generate(**inputs, custom_generate=…)`.

    The output is that of `generate` without it: greedy, or sampled from the same distribution. `GenerationConfig`,
    logits processors, stopping criteria and streamers apply as usual. Keep the method and use it for all calls: it
    holds the draft. Several threads may call `generate` with it at once, and then share passes.

    Args:
        draft: Folder, name on the hub, or a loaded Hugging Face model. None: only drafters without a draft model work.
        processor: Folder or name on the hub of the tokenizer, by default where the target was loaded from.
        engine: "auto", "eager" or "graphs".
        options: pruner, drafter, ratio and positions, see `Options`.

    Returns:
        The method.

    Raises:
        UserError: There is no such option. While generating: the prompt, the config or the models cannot be used.
    """
    if other := [name for name in options if name not in OPTIONS]:
        raise UserError(
            f"custom_generate has no option {', '.join(other)}: {', '.join(OPTIONS)} are its own, others go to generate"
        )
    return Speculation(draft, processor, engine, options)


class Speculation:
    """The decoding method that `custom_generate` makes. Keeps a session for each target that has called it."""

    def __init__(self, draft: Any, processor: str | Path | None, engine: str, options: dict[str, Any]) -> None:
        self._draft, self._processor, self._engine, self._options = draft, processor, engine, options
        # The target's tensors are kept beside the session, which shares them, to notice that they were replaced.
        self._sessions: WeakKeyDictionary[Any, tuple[Session, list[Tensor]]] = WeakKeyDictionary()
        self._loading = Lock()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        *,
        # `generate` passes on inputs that are named here. For others it would encode the pixels and drop them.
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Any = None,
        image_merge_sizes: Tensor | None = None,
        video_merge_sizes: Tensor | None = None,
        video_compression_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Decode; called by `generate`."""
        pixels = dict(
            pixel_values=pixel_values, image_grid_thw=image_grid_thw, image_sizes=image_sizes,
            batch_num_images=batch_num_images, pixel_values_videos=pixel_values_videos, video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts, image_merge_sizes=image_merge_sizes, video_merge_sizes=video_merge_sizes,
            video_compression_mask=video_compression_mask,
        )  # fmt: skip
        check_config(generation_config, others)
        count = int(generation_config.num_return_sequences or 1)
        streamer = streamer_of_caller()
        if len(input_ids) > count or (streamer is not None and count > 1):
            raise UserError("give one prompt at a time, and a streamer one answer; several calls run together")
        session = self._session(model)
        prompt = processed(session.target, {"input_ids": input_ids[:1]} | pixels)
        check_positions(others.get("position_ids"), session.target.positions(prompt))
        found = self._decoded(session, prompt, (logits_processor, stopping_criteria), generation_config, count, streamer)
        sequences = _sequences(input_ids, [[t for step in steps for t in step.tokens] for steps in found], generation_config)
        if not generation_config.return_dict_in_generate:
            return sequences
        return SpeculativeOutput(sequences=sequences, statistics=[statistics_of(Reading(prompt, None), s) for s in found])

    def _session(self, model: Any) -> Session:
        """Return the session of a target; a new one if its modules were replaced. The first call loads the draft."""
        check_plain(model)
        with self._loading:
            session, tensors = self._sessions.get(model, (None, []))
            now = [*model.parameters(), *model.buffers()]
            if session is None or len(now) != len(tensors) or any(map(is_not, now, tensors)):
                session = self._paired(model)
                self._draft = session.draft
                self._sessions[model] = session, now
            return session

    def _paired(self, model: Any) -> Session:
        """Make a session of a target. Does not read its generation config, since `generate` passes one."""
        sides = [Side("target", model, processor=self._processor)]
        if self._draft is not None:
            draft, device = self._draft, model.device if isinstance(self._draft, str | Path) else "auto"
            sides.append(Side("draft", draft, device=device, processor=None if device != "auto" else self._processor))
        drafter = {} if len(sides) > 1 else {"drafter": "prompt_lookup"}
        return paired(sides[0], sides[1] if sides[1:] else None, self._engine, Options().asked(drafter | self._options))

    def _decoded(
        self, session: Session, prompt: VideoPrompt, rules: tuple[Any, Any], config: Any, count: int, streamer: Any
    ) -> list[list[Step]]:
        """Decode `count` answers. Returns the steps of each, cut where the stopping criteria end it."""
        sampling, rest = sampling_of(rules[0], config)
        graph = session.graph(replace(session.options, verifier=own_rule(sampling)))
        seed = int(torch.randint(2**62, ())) if config.do_sample else 0  # so that torch.manual_seed fixes the answer
        most, defaults = int(config.max_length) - len(prompt), session.options
        made = GenerationOptions(
            most, defaults.ratio, defaults.positions, seed, stop_ids=frozenset(), **logits_rule(rest, prompt.tokens)
        )
        with begun(session.requests, graph, prompt, [replace(made, seed=seed + number) for number in range(count)]) as calls:
            return [_cut(call, Ending(rules[1], prompt.tokens, session.target.device), streamer) for call in calls]


def _cut(call: Any, ending: Ending, streamer: Any) -> list[Step]:
    """Read the steps of a request until its answer ends, and pass their tokens to the streamer."""
    steps = []
    for step in call:
        steps.append(replace(step, tokens=ending.take(step.tokens)))
        if streamer is not None and steps[-1].tokens:
            streamer.put(torch.tensor(steps[-1].tokens))
        if ending.done:
            break
    call.cancel()
    if streamer is not None:
        streamer.end()
    return steps


def _sequences(input_ids: Tensor, answers: Sequence[Sequence[int]], config: Any) -> Tensor:
    """Append the answers to the prompt, padded on the right to one length."""
    longest, pad = max(map(len, answers)), getattr(config, "_pad_token_tensor", None)
    fill = 0 if pad is None else int(pad)
    rows = [[*answer, *[fill] * (longest - len(answer))] for answer in answers]
    return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], 1)
