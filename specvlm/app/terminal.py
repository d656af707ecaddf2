"""The terminal as all commands write to it. Imports no torch, so that something is on the screen while torch is imported."""

import re
import sys
from functools import cache
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from specvlm.errors import visible
from specvlm.parallel import torchrun


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


class Stream:
    """Text that comes in pieces; on a terminal it goes on in the next line where a word does not fit. The last word waits for
    its end. Scripts without spaces are broken anywhere.
    """

    words = re.compile(r"\s+|[\u2e80-\ua4cf\uac00-\ud7af\uf900-\uffef]|[^\s\u2e80-\ua4cf\uac00-\ud7af\uf900-\uffef]+")

    def __init__(self, console: Console) -> None:
        self.console, self.column, self.held = console, 0, ""

    def add(self, text: str, last: bool = False) -> None:
        words = self.words.findall(self.held + visible(text))
        self.held = "" if last or not words else words.pop()
        self.console.print("".join(map(self._placed, words)), end="")
        self.console.file.flush()

    def _placed(self, word: str) -> str:
        self.column += cell_len(word)
        if "\n" in word:
            self.column = cell_len(word.rpartition("\n")[2])
        elif self.console.is_terminal and self.column > self.console.width:
            self.column = cell_len(word)
            return "\n" + word.lstrip()
        return word


@cache
def loading() -> None:
    """Say on a terminal, once, what the next seconds go into."""
    if sys.stderr.isatty() and not torchrun.rank_here():
        print("specvlm: loading torch and transformers …", file=sys.stderr, flush=True)
