"""JSON of the answers: chat completions, their chunks, logprobs, token counts and statistics."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specvlm.results.metrics import versions
from specvlm.serve.chat_request import ChatRequest
from specvlm.serve.generation import Ended, Round
from specvlm.session.session import Asked
from specvlm.types import Step, TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no infinity
DONE = b"data: [DONE]\n\n"


def new_id() -> str:
    """Make an id of a completion that cannot be guessed."""
    return f"chatcmpl-{secrets.token_hex(16)}"


def event(value: Any) -> bytes:
    """Encode one server-sent event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


@dataclass
class Completion:
    """Builds the JSON of a request's answers.

    Attributes:
        request: The request.
        model: Name of the model.
        asked: The request's options, graph and prompt.
        tokenizer: Tokenizer that decodes tokens.
        name: The completion's id.
        created: Unix time of the request, in seconds.
        ends: Answers that have ended, by number.
    """

    request: ChatRequest
    model: str
    asked: Asked
    tokenizer: Any
    name: str
    created: int = field(default_factory=lambda: int(time.time()))
    ends: dict[int, Ended] = field(default_factory=dict)

    def first(self, answer: int) -> dict[str, Any]:
        """The chunk that begins an answer."""
        return self._chunk(answer, {"role": "assistant", "content": ""})

    def round(self, one: Round) -> dict[str, Any] | None:
        """The chunk of a round; None if it has nothing new."""
        if one.marks is None:
            return self._chunk(one.answer, {"content": one.text}) if one.text else None
        view = {"view": f"/specvlm/views/{self.name}"} if one.step.keep is not None else {}
        return self._chunk(one.answer, {"content": one.text}) | {"specvlm": {"round": one.marks, **view}}

    def end(self, one: Ended) -> list[dict[str, Any]]:
        """The chunks that end an answer: the rest of its text, with all logprobs, then the reason."""
        self.ends[one.answer] = one
        last = self._chunk(one.answer, {}, one.result.finish_reason)
        rest = self._chunk(one.answer, {"content": one.text})
        if one.result.logprobs is not None:
            rest["choices"][0]["logprobs"] = self._logprobs(one.result.logprobs)
        return [rest, last] if one.text or one.result.logprobs is not None else [last]

    def summary(self) -> dict[str, Any]:
        """The last chunk of a stream, if the request asked for token counts."""
        return self._head("chat.completion.chunk") | {"choices": []} | self._numbers()

    def whole(self) -> dict[str, Any]:
        """The completion of a request that does not stream."""
        return (
            self._head("chat.completion")
            | {"choices": [self._choice(self.ends[at]) for at in sorted(self.ends)]}
            | self._numbers()
        )

    def _head(self, kind: str) -> dict[str, Any]:
        version = f"specvlm-{versions()['specvlm']}"
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": version}

    def _chunk(self, answer: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": answer, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _choice(self, one: Ended) -> dict[str, Any]:
        said = {"role": "assistant", "content": one.result.text, "refusal": None}
        logprobs = None if one.result.logprobs is None else self._logprobs(one.result.logprobs)
        return {"index": one.answer, "message": said, "logprobs": logprobs, "finish_reason": one.result.finish_reason}

    def _numbers(self) -> dict[str, Any]:
        """Token counts, statistics in vLLM's form, and the settings that were used (`_echo`)."""
        prompt = len(self.asked.reading.prompt)
        new = sum(len(one.result.token_ids) for one in self.ends.values())
        cached = {"cached_tokens": min((one.result.statistics["reused_tokens"] or 0 for one in self.ends.values()), default=0)}
        tokens = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        usage = tokens | {"prompt_tokens_details": cached}
        steps = [one.steps for one in self.ends.values()]
        return {"usage": usage, "metrics": {"speculative_decoding": speculation(steps)}, "specvlm": self._echo()}

    def _echo(self) -> dict[str, Any]:
        """Frames, tokens, strategies and times of the first answer."""
        options, graph, _ = self.asked
        found = self.ends[0].result.statistics if 0 in self.ends else {}
        echo = {key: found.get(key) for key in ("frames", "video_tokens", "kept_tokens", "rounds", "tokens_per_round")}
        times = {key: found.get(key) for key in ("time_to_first_token_s", "decode_s", "end_to_end_s", "tokens_per_second")}
        strategies = {kind: getattr(graph, kind).name for kind in ("pruner", "drafter", "verifier")}
        own = {"seed": graph.options.seed, "ratio": graph.options.ratio, "speculate": options.speculate}
        ignored = {"ignored": list(self.request.ignored)} if self.request.ignored else {}
        return echo | times | {"lossless": graph.lossless} | strategies | own | ignored

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            part = "\ufffd" in text  # of a character: the tokenizer does not give its bytes
            spelt = None if part else list(text.encode("utf-8", "replace"))
            return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": spelt}

        rows = [entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]} for one in found]
        return {"content": rows, "refusal": None}


def speculation(answers: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Statistics of speculation over all rounds of all answers, under vLLM's names."""
    rounds = [step for steps in answers for step in steps[1:] if step.tree is not None]
    drafted, accepted = sum(step.drafted for step in rounds), sum(step.accepted for step in rounds)
    deepest = max((step.depth for step in rounds), default=0)
    histogram = [sum(step.accepted == count for step in rounds) for count in range(deepest + 1)]
    return {
        "mean_acceptance_length": 1 + accepted / len(rounds) if rounds else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": histogram if rounds else [],
        "num_spec_steps": len(rounds),
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": deepest,
    }
