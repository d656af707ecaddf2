"""Keys of the server with replicas, in addition to those of a server without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from specvlm.errors import UserError
from specvlm.parsing.bounds import Within
from specvlm.serve.settings import HELP, Settings

OWN = {
    "replicas": "replicas of the pair that run; the fewest, if max_replicas is set (2)",
    "max_replicas": "most replicas: their number follows the requests that run or wait (null: it is fixed)",
    "target_requests": "requests of a replica, running or waiting, above which another one starts (half of running)",
    "downscale_delay": "seconds of less load after which a replica ends (600)",
    "replica_cpus": "CPU cores that a replica takes of its machine (1)",
    "replica_gpus": "GPUs that a replica takes (null: one if the cluster has any, unless device=cpu)",
    "retries": "times that a request is sent again, if its replica ended before the first word (2)",
    "address": "Ray cluster to join, as 10.0.0.1:6379, or auto for that of this machine (null: start one here)",
    "app": "name of the application in the cluster (specvlm)",
}
HELP_OF_REPLICAS = HELP | OWN | {"running": "most requests that a replica reads and decodes at once (16)"}


@dataclass(frozen=True)
class RaySettings(Settings):
    """All keys of the server with replicas; HELP_OF_REPLICAS explains them."""

    replicas: Annotated[int, Within(1, 1024)] = 2
    max_replicas: Annotated[int | None, Within(1, 1024)] = None
    target_requests: Annotated[float | None, Within(0, 1024, above=True)] = None
    downscale_delay: Annotated[float, Within(0, 86_400)] = 600.0
    replica_cpus: Annotated[float, Within(0, 1024)] = 1.0
    replica_gpus: Annotated[float | None, Within(0, 64)] = None
    retries: Annotated[int, Within(0, 16)] = 2
    address: str | None = None
    app: str = "specvlm"

    @classmethod
    def of_words(cls, words: Sequence[str]) -> Self:
        """Parse and check overrides. Raises UserError for one that is wrong."""
        settings = super().of_words(words)
        if settings.most_replicas < settings.replicas:
            raise UserError(f"max_replicas={settings.max_replicas} is less than replicas={settings.replicas}")
        gpus = settings.replica_gpus or 0
        if gpus > 1 and gpus != math.floor(gpus):
            raise UserError(f"replica_gpus={gpus:g}: Ray gives a whole number of GPUs, or a part of one")
        if not settings.app.isidentifier():
            raise UserError(f"app={settings.app}: expected letters, digits and underscores")
        return settings

    @property
    def most_replicas(self) -> int:
        """Most replicas that may run."""
        return self.max_replicas or self.replicas

    @property
    def most_requests(self) -> int:
        """Most requests that are admitted: those that all replicas can run, and the queue."""
        return self.running * self.most_replicas + self.queue
