"""Terminal output of all commands. Imports no torch, so that output can start while torch is imported."""

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
    """A console that prints text literally, without markup or emoji codes, and removes control characters.

    Only `styled` adds colour.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError as `print` does; rich would exit with 1."""
        raise BrokenPipeError


def styled(*parts: str | tuple[str, str]) -> Text:
    """Join plain texts and (text, style) pairs."""
    return Text.assemble(*((visible(part[0]), part[1]) if isinstance(part, tuple) else visible(part) for part in parts))


class Stream:
    """Prints text that arrives in pieces. On a terminal it wraps at words, or anywhere in scripts without spaces.

    The last word is held back until it is complete.
    """

    words = re.compile(r"\s+|[\u2e80-\ua4cf\uac00-\ud7af\uf900-\uffef]|[^\s\u2e80-\ua4cf\uac00-\ud7af\uf900-\uffef]+")

    def __init__(self, console: Console) -> None:
        self.console, self.column, self.held = console, 0, ""

    def add(self, text: str, last: bool = False) -> None:
        """Print `text` up to its last word. last: print that too."""
        words = self.words.findall(self.held + visible(text))
        self.held = "" if last or not words else words.pop()
        self.console.print("".join(map(self._placed, words)), end="")
        self.console.file.flush()

    def _placed(self, word: str) -> str:
        """Return the word, on a new line if the terminal's line has no room for it."""
        self.column += cell_len(word)
        if "\n" in word:
            self.column = cell_len(word.rpartition("\n")[2])
        elif self.console.is_terminal and self.column > self.console.width:
            self.column = cell_len(word)
            return "\n" + word.lstrip()
        return word


@cache
def loading() -> None:
    """Say once, on a terminal, that torch is being loaded."""
    if sys.stderr.isatty() and not torchrun.rank_here():
        print("specvlm: loading torch and transformers …", file=sys.stderr, flush=True)
