"""Merge the metrics of all replicas, each with the replica's name as a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

LABEL = "replica"


class _Numbers:
    """Collector of metrics that are given to it."""

    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        yield from self._families.values()

    def describe(self) -> list[Metric]:
        return []


def merged(texts: Mapping[str, bytes]) -> bytes:
    """Merge metrics of several replicas, and label each sample with its replica.

    Args:
        texts: Metrics of each replica, by its name, in Prometheus' text format.

    Returns:
        All metrics in the same format.
    """
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, sample.labels | {LABEL: replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Numbers(families))
    return generate_latest(registry)
