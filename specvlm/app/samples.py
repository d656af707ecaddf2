"""Prepare the samples of a data set for results: unique ids, and metadata as plain JSON."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specvlm.errors import UserError, line
from specvlm.parsing.files import nested
from specvlm.strategies import Dataset, Sample
from specvlm.strategies.fence import inside
from specvlm.strategies.registry import described


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


def writable_meta(sample: Sample) -> dict[str, Any]:
    """Return a sample's metadata for JSON. If JSON cannot hold it or it is nested too deep, its values become texts.

    Long texts are then cut.
    """
    try:
        json.dumps(sample.meta)
        if not nested(sample.meta):
            return sample.meta
    except (TypeError, ValueError, RecursionError):
        pass
    return {str(key): line(described(value)) for key, value in sample.meta.items()}
