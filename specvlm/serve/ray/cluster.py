"""A Ray cluster, joined or started, and the replicas that Ray Serve runs in it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from specvlm.config import RunConfig
from specvlm.errors import UserError, first_line
from specvlm.serve.ray.replica import Replica
from specvlm.serve.ray.routed import SOON_S, Lost
from specvlm.serve.ray.settings import RaySettings

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
CONNECT_S = 10.0  # seconds that the cluster's first node may take to answer
HEALTH_S = 1.0  # seconds between two health checks of a replica
LOGGED = {"log_level": "ERROR", "enable_access_log": False}  # how Ray Serve itself logs
KNOWN_S = 1.0  # seconds for which a number of replicas is used before Ray is asked again


@contextmanager
def cluster(settings: RaySettings) -> Iterator[None]:
    """Join the cluster that the settings name. If they name none, run one on this machine within the block.

    Raises:
        UserError: The cluster cannot be reached, or cannot be started.
    """
    given: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.ERROR, "namespace": settings.app}
    if settings.address is None:
        cpus = max(os.cpu_count() or 1, math.ceil(settings.replica_cpus * settings.most_replicas))
        given |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    else:
        given |= {"address": settings.address}
        _check_there(settings.address)
    try:
        ray.init(**given)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        where = "here" if settings.address is None else f"at address={settings.address}"
        raise UserError(f"no Ray cluster {where} ({first_line(error)})") from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(proxy_location="Disabled", logging_config=LOGGED)  # our own server limits clients
        yield
    finally:
        ray.shutdown()


def _check_there(address: str) -> None:
    """Raise UserError if nothing listens at HOST:PORT. Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # auto, or an address that Ray itself refuses immediately
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at address={address} ({first_line(error)})") from None


@contextmanager
def deployed(cfg: RunConfig, settings: RaySettings, model: str, folder: str) -> Iterator[RayReplicas]:
    """Run the replicas within the block.

    Args:
        cfg: The pair and its defaults.
        settings: Number and resources of the replicas, and limits of requests.
        model: Name of the model in requests.
        folder: Folder that relative paths start from.

    Yields:
        The running replicas.

    Raises:
        UserError: The cluster runs another application of this name, has no room, or the pair cannot be loaded.
    """
    if settings.app in serve.status().applications:
        raise UserError(f"app={settings.app} runs in this cluster already: choose another name with app=…")
    options = deployment_options(settings, gpus_of(cfg, settings))
    check_room(settings, options)
    bound = serve.deployment(Replica, **options).bind(cfg, settings, model, folder)
    try:
        yield RayReplicas(_run(bound, settings.app), settings.app)
    finally:
        if settings.address is not None:  # our own cluster ends as a whole
            with suppress(RayError, TimeoutError):
                serve.delete(settings.app)


def _run(bound: serve.Application, app: str) -> DeploymentHandle[Any]:
    """Start the replicas and wait until they run. Raises UserError if one refuses its configuration."""
    try:
        return serve.run(bound, name=app, route_prefix=None)
    except RuntimeError:
        deployments = serve.status().applications[app].deployments.values()
        told = [text for one in deployments for text in re.findall(r"^specvlm\.errors\.UserError: (.+)$", one.message, re.M)]
        if not told:
            raise
        raise UserError(told[-1]) from None


def gpus_of(cfg: RunConfig, settings: RaySettings) -> float:
    """Return GPUs per replica: `replica_gpus` if set, else 1 if the cluster has any and device is not cpu, else 0."""
    if settings.replica_gpus is not None:
        return settings.replica_gpus
    return 1.0 if cfg.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0.0


def deployment_options(settings: RaySettings, gpus: float) -> dict[str, Any]:
    """Return the options of Ray Serve's deployment. gpus: GPUs per replica.

    A request goes to the replica that its key is hashed to. If that replica is full, the next one on the hash ring is
    tried, and so on.
    """
    router = {"num_fallback_replicas": settings.most_replicas}
    scaled: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaled = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_requests or max(1.0, settings.running / 2),
                "downscale_delay_s": settings.downscale_delay,
                "upscale_delay_s": 5.0,
            }
        }
    return scaled | {
        "name": "Replica",
        "max_ongoing_requests": settings.running,
        "ray_actor_options": {"num_cpus": settings.replica_cpus, "num_gpus": gpus},
        "request_router_config": RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs=router),
        "health_check_period_s": HEALTH_S,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": settings.shutdown_timeout,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": 1,
        "logging_config": LOGGED,
    }


def check_room(settings: RaySettings, options: dict[str, Any]) -> None:
    """Raise UserError if the cluster has too few CPUs or GPUs for the replicas. Ray Serve would wait for them."""
    there = ray.cluster_resources()
    for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        needed = settings.replicas * options["ray_actor_options"][key]
        if needed > there.get(name, 0):
            told = f"{settings.replicas} replicas need {needed:g} {name}s, and the cluster has {there.get(name, 0):g}"
            raise UserError(f"{told}: set replicas or replica_{name.lower()}s")


class RayReplicas:
    """Replicas that are called through a handle of Ray Serve; see `Replicas`.

    Args:
        handle: Handle of the replicas' deployment.
        app: Name of the application.
    """

    def __init__(self, handle: DeploymentHandle[Any], app: str) -> None:
        self._handle, self._app, self._known = handle, app, (-KNOWN_S, 0)
        self._answer = handle.options(method_name="answer", stream=True)

    async def answer(self, raw: bytes, key: str | None, waited_s: float) -> AsyncGenerator[Any, None]:
        """Send a request to a replica, see `Replicas.answer`."""
        handle = self._answer if key is None else self._answer.options(session_id=key)
        response, ended = handle.remote(raw, waited_s), False
        try:
            with _losing():
                async for one in response:
                    yield one
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def defaults(self) -> dict[str, Any]:
        """Return the default options of requests."""
        with _losing():
            return dict(await self._handle.options(method_name="defaults").remote())

    async def view(self, name: str, key: str | None) -> dict[str, Any] | None:
        """Return what the drafter saw for an answer; see `Replicas.view`."""
        handle = self._handle.options(method_name="view")
        with _losing():
            found = await (handle if key is None else handle.options(session_id=key)).remote(name)
            return None if found is None else dict(found)

    async def numbers(self) -> dict[str, bytes]:
        """Return the metrics of each replica; see `Replicas.numbers`."""
        response = self._handle.broadcast("numbers")
        with _losing():
            return dict(await asyncio.to_thread(partial(response.results, timeout_s=SOON_S)))

    async def running(self) -> int:
        """Return the number of running replicas. Asks Ray at most once in `KNOWN_S` seconds."""
        if monotonic() - self._known[0] > KNOWN_S:
            with _losing():
                self._known = monotonic(), await asyncio.to_thread(self._count)
        return self._known[1]

    def _count(self) -> int:
        app = serve.status().applications.get(self._app)
        states = [] if app is None else [one.replica_states for one in app.deployments.values()]
        return sum(count for one in states for state, count in one.items() if str(getattr(state, "value", state)) == "RUNNING")


@contextmanager
def _losing() -> Iterator[None]:
    """Raise Lost for errors of Ray that mean that a replica has ended. Other errors are raised unchanged."""
    try:
        yield
    except RayTaskError:
        raise
    except (RayError, RayServeException, DeploymentUnavailableError) as error:
        raise Lost from error
