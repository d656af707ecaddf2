"""Decide where an answer ends."""


class Output:
    """Ends an answer after the first stop id (which is kept), or at the token limit if that comes first."""

    def __init__(self, limit: int, stop_ids: frozenset[int]) -> None:
        self.room, self.stop_ids = limit, stop_ids

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self.room == 0

    def take(self, tokens: list[int]) -> tuple[int, ...]:
        """Return those of a round's tokens that belong to the answer, and count them towards the limit."""
        tokens = tokens[: self.room]
        stop = next((i for i, token in enumerate(tokens, start=1) if token in self.stop_ids), None)
        self.room = 0 if stop else self.room - len(tokens)
        return tuple(tokens[:stop])
