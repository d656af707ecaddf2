"""The answer of a request as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from specvlm.decoding.text import AnswerText
from specvlm.models.video_lm import VideoLM
from specvlm.session.call import Call
from specvlm.session.inputs import Reading
from specvlm.session.result import GenerationResult, result_of
from specvlm.types import GenerationOptions, Step


class TextStream(Iterator[str]):
    """The text of an answer as it is decoded, in whole characters.

    Attributes:
        result: The `GenerationResult`, after the last piece. None before, and if the stream was closed.
    """

    def __init__(self, target: VideoLM, reading: Reading, options: GenerationOptions, call: Call) -> None:
        self.result: GenerationResult | None = None
        self._call = call
        self._pieces = self._decoded(target, reading, options)

    def __next__(self) -> str:
        return next(self._pieces)

    def _decoded(self, target: VideoLM, reading: Reading, options: GenerationOptions) -> Iterator[str]:
        """Yield the text of each round that completes a character."""
        text, steps = AnswerText(target.tokenizer, options.stop), list[Step]()
        for step in self._call:
            steps.append(step)
            if piece := "".join(text.put(token) for token in step.tokens):
                yield piece
        self.result = result_of(target, reading, options, steps)
        if piece := text.end():
            yield piece

    def cancel(self) -> None:
        """End the request. Any thread may call this, also while another one waits for a piece."""
        self._call.cancel()

    def close(self) -> None:
        """End the request and free its caches: now, or at the end of the round that is running."""
        self.cancel()
        self._pieces = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
