"""Fields of a chat completion's body, with their types and bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MOST_MESSAGES, MOST_PARTS, MOST_TEXT, MOST_ANSWERS = 256, 512, 1_000_000, 8
MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_BIASES, MOST_NAMES = 1024, 256
# Fields that OpenAI's clients send and that change nothing here.
HARMLESS = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("verbosity", "parallel_tool_calls", "request_id", "priority"),
    )
)
# Unsupported fields of OpenAI or vLLM that would change the answer, and their values that change nothing.
NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, "")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "function_call", "audio", "prediction", "web_search_options"), NOTHING),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), NOTHING),
    **dict.fromkeys(("min_p", "use_beam_search", "prompt_logprobs", "echo", "bad_words", "allowed_token_ids"), NOTHING),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "documents", "logits_processors", "vllm_xargs"), NOTHING),
    **dict.fromkeys(("truncate_prompt_tokens", "include_stop_str_in_output", "return_token_ids"), NOTHING),
    **dict.fromkeys(("add_special_tokens", "continue_final_message"), NOTHING),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "best_of": (None, 1),
    "length_penalty": (None, 1),
    "reasoning_effort": (None, "none"),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "add_generation_prompt": (None, True),
}


Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=MOST_TEXT)]


def few(most: int) -> BeforeValidator:
    """Limit the number of entries of an object. Checked first, so that a huge one does not give an error per entry."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > most:
            raise PydanticCustomError("too_many", "expected at most {most} entries", {"most": most})
        return given

    return BeforeValidator(check)


class Body(BaseModel):
    """Base class of the body and its parts. Types are strict: "3" and true are not numbers."""

    model_config = ConfigDict(strict=True, extra="allow")


class Address(Body):
    """Where a video or an image is."""

    url: str


class Part(Body):
    """A part of a message."""

    type: str
    text: Text | None = None
    video_url: Address | None = None
    image_url: Address | str | None = None


class Message(Body):
    """A message."""

    role: str
    content: Text | Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    tool_calls: Any = None
    function_call: Any = None


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None


class VideoRequest(Body):
    """How videos are sampled: vLLM's `media_io_kwargs.video`."""

    num_frames: Annotated[int, Field(ge=-1, le=16_384)] | None = None
    fps: Annotated[Finite, Field(le=1000)] | None = None


class MediaRequest(Body):
    """vLLM's `media_io_kwargs`."""

    video: VideoRequest | None = None


class ProcessorRequest(Body):
    """vLLM's `mm_processor_kwargs`."""

    fps: Annotated[Finite, Field(gt=0, le=1000)] | None = None
    do_sample_frames: bool | None = None
    max_pixels: Annotated[int, Field(ge=1, le=2**26)] | None = None


class OwnOptions(BaseModel):
    """Our own options, under the key `specvlm`. Unknown ones are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")

    speculate: bool | None = None
    pruner: str | dict[str, Any] | None = None
    drafter: str | dict[str, Any] | None = None
    ratio: Annotated[Finite, Field(ge=0, le=1)] | None = None
    positions: Literal["original", "reindexed"] | None = None
    explain: bool | None = None


class ChatBody(Body):
    """The body of a chat completion."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**24)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None, few(MOST_BIASES)] = None
    media_io_kwargs: MediaRequest | None = None
    mm_processor_kwargs: ProcessorRequest | None = None
    specvlm: Annotated[OwnOptions | None, few(MOST_NAMES)] = None
