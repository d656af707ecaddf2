"""Python's garbage collector at the start and end of a command, where it takes a second and frees almost nothing."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Pause garbage collection in this block, and skip what is there then at exit."""
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
    """Pause it while this block imports torch and transformers; later collections skip what they made: a million objects.

    Does nothing if torch was imported before, as when another program calls `main`: its objects stay collectable.
    """
    if "torch" in sys.modules:
        yield
        return
    with paused():
        yield
        gc.freeze()
