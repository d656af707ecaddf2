"""The terminal as all commands write to it. Imports no torch, so that something is on the screen while torch is imported."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from specvlm import torchrun
from specvlm.errors import visible


class Terminal(Console):
    """A console to which text is text: no markup, no emoji codes, no control characters. Colour comes by `styled` alone."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Leave as any other output does that nobody reads: rich would exit with 1."""
        raise BrokenPipeError


def styled(*parts: str | tuple[str, str]) -> Text:
    """Texts, and texts with their style."""
    return Text.assemble(*((visible(part[0]), part[1]) if isinstance(part, tuple) else visible(part) for part in parts))


def loading() -> None:
    """Say to who sits before the screen what the next seconds go into."""
    if sys.stderr.isatty() and not torchrun.rank_here():
        print("specvlm: loading torch and transformers …", file=sys.stderr, flush=True)
