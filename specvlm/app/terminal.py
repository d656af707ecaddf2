"""The console that all commands print with. Imports no torch, so that output can start while torch is imported."""

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
    """A rich console that prints strings literally: no markup, no emoji codes, and without control characters.

    For text with colours, print what `styled` returns.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string as rich does, without control characters."""
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError as `print` does; rich would exit with 1."""
        raise BrokenPipeError


def styled(*parts: str | tuple[str, str]) -> Text:
    """Join strings and (string, style) pairs into one Text, without control characters."""
    return Text.assemble(*((visible(part[0]), part[1]) if isinstance(part, tuple) else visible(part) for part in parts))


class Stream:
    """Prints text that arrives in pieces. The last word is held back until it is complete.

    On a terminal, lines break between words, or between any two characters of Chinese, Japanese or Korean.
    """

    words = re.compile(r"\s+|[\u2e80-\ua4cf\uac00-\ud7af\uf900-\uffef]|[^\s\u2e80-\ua4cf\uac00-\ud7af\uf900-\uffef]+")

    def __init__(self, console: Console) -> None:
        self.console, self.column, self.held = console, 0, ""

    def add(self, text: str, last: bool = False) -> None:
        """Print the text held back and `text`, except for the last word. last: print that word too."""
        words = self.words.findall(self.held + visible(text))
        self.held = "" if last or not words else words.pop()
        self.console.print("".join(map(self._placed, words)), end="")
        self.console.file.flush()

    def _placed(self, word: str) -> str:
        """Return the word, preceded by a line break if the line on the terminal has no room for it."""
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
