"""Prepare the samples of a data set for results: unique ids, and metadata as plain JSON."""

import json
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from specvlm.errors import UserError, line
from specvlm.parsing.files import nested
from specvlm.strategies import Dataset, Sample
from specvlm.strategies.fence import inside
from specvlm.strategies.registry import described

QUESTIONS = 8  # up to this many questions about one video are answered in a row, even if a job's turn is shorter


def unique(dataset: Dataset) -> Sequence[Sample]:
    """Read the samples of a data set.

    Raises UserError if two ids are equal, an id is not a str, or there are no samples, and what `samples()` raises.
    """
    with inside(dataset):
        # Convert ids to plain str: a plugin's subclass would run its own code in every comparison.
        samples = [replace(s, id=str.__str__(s.id)) if isinstance(s.id, str) else s for s in dataset.samples()]
    seen = set[str]()
    for sample in samples:
        if not isinstance(sample.id, str):
            raise UserError(f"dataset={dataset.name} has a sample with the id {line(repr(sample.id))}: an id must be a string")
        if sample.id in seen:
            raise UserError(f'dataset={dataset.name} has two samples called "{sample.id}": ids must be unique')
        seen.add(sample.id)
    if not samples:
        raise UserError(f"dataset={dataset.name}: it has no samples")
    return samples


def windows(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Order the samples of a data set so that those of one video follow each other, and cut the order into windows.

    The order and the windows depend only on the data set, so they are the same in every job, interrupted or not.

    Args:
        samples: The samples.
        size: Minimum number of samples in a window, except in the last one. A window ends with the last question about
            a video, unless the video has many.

    Returns:
        Indices of the samples of each window.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, sample in enumerate(samples):
        video = (sample.video, *sample.more, *sample.images, sample.start, sample.end)
        groups.setdefault(video, []).append(index)
    found = [list[int]()]
    for group in groups.values():
        for at in range(0, len(group), max(size, QUESTIONS)):
            if len(found[-1]) >= size:
                found.append([])
            found[-1] += group[at : at + max(size, QUESTIONS)]
    return found


def writable_meta(sample: Sample) -> dict[str, Any]:
    """Return a sample's metadata for JSON. If JSON cannot hold them or they are nested too deeply, they become texts.

    Long texts are then cut.
    """
    try:
        json.dumps(sample.meta)
        if not nested(sample.meta):
            return sample.meta
    except (TypeError, ValueError, RecursionError):
        pass
    return {str(key): line(described(value)) for key, value in sample.meta.items()}
