"""Keep skeletons (models without weights) from one job to the next.

The tokenizer and the modules of a large model take seconds to make, and a sweep has many jobs.
"""

from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from threading import Lock

from specvlm.models import families
from specvlm.models.load import skeleton
from specvlm.models.video_lm import VideoLM

MOST = 4  # skeletons to keep: two pairs

_LOCK = Lock()
_MADE: OrderedDict[Hashable, VideoLM] = OrderedDict()


def skeleton_of(folder: Path, mrope: str, shared: bool) -> VideoLM:
    """Return the skeleton of a checkpoint folder. Returns an earlier job's if no file has changed since.

    shared: Whether other jobs may get the same one. False makes a new one, for code that may change it.

    Raises UserError as `skeleton` does.
    """
    if not shared or not (folder / "config.json").is_file():
        return skeleton(folder, mrope)
    key = (folder, folder.resolve(), mrope, _files(folder), tuple(families.sources().items()))
    with _LOCK:
        if key not in _MADE:
            _MADE[key] = skeleton(folder, mrope)
        _MADE.move_to_end(key)
        while len(_MADE) > MOST:
            _MADE.popitem(last=False)
        return _MADE[key]


def _files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of all files in a folder, and of chat templates in folders below it."""
    found = ((str(path), path.stat()) for glob in ("*", "*/*.jinja") for path in sorted(folder.glob(glob)) if path.is_file())
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found)
