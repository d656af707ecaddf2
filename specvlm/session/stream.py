"""The answer of a request as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Self
from weakref import finalize

from specvlm.decoding.text import AnswerText
from specvlm.models.video_lm import VideoLM
from specvlm.session.call import Call
from specvlm.session.inputs import Reading
from specvlm.session.result import GenerationResult, result_of
from specvlm.types import GenerationOptions, Step


class TextStream(Iterator[str]):
    """The text of an answer as it is decoded, in whole characters.

    A stream that is no longer referenced is closed. If several threads read it, each piece goes to one of them.
    """

    def __init__(self, target: VideoLM, reading: Reading, options: GenerationOptions, call: Call) -> None:
        self._call, self._results, self._reading = call, list[GenerationResult](), Lock()
        # It does not refer to this object, which is therefore freed as soon as its last reader is gone.
        self._pieces = _decoded(target, reading, options, call, self._results)
        finalize(self, call.cancel).atexit = False

    @property
    def result(self) -> GenerationResult | None:
        """The result, available after the last piece. None before that, or if the stream was closed."""
        return self._results[0] if self._results else None

    def __next__(self) -> str:
        with self._reading:
            return next(self._pieces)

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


def _decoded(
    target: VideoLM, reading: Reading, options: GenerationOptions, call: Call, results: list[GenerationResult]
) -> Iterator[str]:
    """Yield the text of each round that completes a character; append the result before the last piece."""
    text, steps = AnswerText(target.tokenizer, options.stop), list[Step]()
    for step in call:
        steps.append(step)
        if piece := "".join(text.put(token) for token in step.tokens):
            yield piece
    if not call.cancelled:
        results.append(result_of(target, reading, options, steps))
        if piece := text.end():
            yield piece
