"""Pause Python's garbage collector at the start and end of a command, where it takes a second and frees little."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Pause garbage collection in this block. When Python exits, its last collection skips all objects."""
    enabled = gc.isenabled()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def paused_for_imports() -> Iterator[None]:
    """Pause collection while this block imports torch and transformers. Later collections skip their million objects.

    Does nothing if torch was imported before, as when another program calls `main`: its objects stay collectable.
    """
    if "torch" in sys.modules:
        yield
        return
    with paused():
        yield
        gc.freeze()
