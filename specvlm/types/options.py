"""What a request asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specvlm.errors import UserError


@dataclass(frozen=True)
class GenerationOptions:
    """All that is a request's own, beside its prompt. Raises UserError for a value that is not allowed.

    Attributes:
        max_new_tokens: The answer ends here, or at a stop id.
        ratio: Share of the video tokens that the drafter does not see, 0..1; 1 leaves it the text alone.
        positions: The drafter's rotary positions, `original` (of the full prompt) or `reindexed` (contiguous, as the paper's
            code has them).
        seed: Of everything that is drawn for this request.
        repetition_penalty: None: as the target's checkpoint has it; 1 turns it off.
        stop_ids: None: those of the target's checkpoint.
        record: Hand out the target's attention to the video, too.
    """

    max_new_tokens: int = 256
    ratio: float = 0.9
    positions: str = "original"
    seed: int = 0
    repetition_penalty: float | None = None
    stop_ids: frozenset[int] | None = None
    record: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.ratio <= 1:
            raise UserError(f"ratio={self.ratio} is not between 0 and 1: it is the share of video tokens dropped")
        if self.positions not in ("original", "reindexed"):
            raise UserError(f"positions={self.positions!r} is none of original, reindexed")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty must be more than 0, got {self.repetition_penalty}")

    def asked(self, options: GenerationOptions | int | None) -> GenerationOptions:
        """What a caller asks for: other options, these with another number of tokens, or these."""
        if options is None:
            return self
        return replace(self, max_new_tokens=options) if isinstance(options, int) else options

    def stop_ids_or(self, own: frozenset[int]) -> frozenset[int]:
        """Those that end the answer. own: the target's."""
        return own if self.stop_ids is None else self.stop_ids
