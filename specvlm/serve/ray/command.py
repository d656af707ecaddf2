"""Command line of the server with several replicas."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from specvlm.app.terminal import loading
from specvlm.serve.command import EXTRA, check, name_of, require, show, understood

if TYPE_CHECKING:
    from specvlm.serve.ray.settings import RaySettings

# Variables that Ray reads: report nothing, print only what replicas print, and run them with normal priority.
SET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
PAGE = """
`python -m specvlm.serve.ray`: answer OpenAI's chat completions with several replicas of a pair, on Ray Serve.

Takes the overrides of a run that load the pair and set defaults, such as pair=… ratio=… max_new_tokens=…, and the keys
below. Requests about one video go to one replica, which reuses what it has computed for it. Exit codes are those of a
run; 0 after SIGTERM.
"""


def show_help() -> None:
    """Print the help, as wide as the terminal."""
    require(EXTRA, "ray")
    from specvlm.serve.ray.settings import HELP_OF_REPLICAS

    show(PAGE, HELP_OF_REPLICAS)


def set_up(settings: RaySettings) -> None:
    """Set Ray's environment variables, which it reads when it is imported. Those that are set already stay.

    A cluster of our own takes commands only from processes that know its token: Ray runs any code that it is sent.
    Nothing is reported to Ray's makers.
    """
    for name, value in SET.items():
        os.environ.setdefault(name, value)
    if settings.address is None and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def command(words: Sequence[str]) -> int:
    """Start the replicas and serve; returns the exit code."""
    require((*EXTRA, "ray"), "ray")
    loading()
    from specvlm.serve.app import App
    from specvlm.serve.ray.settings import RaySettings
    from specvlm.serve.server import Server, bound
    from specvlm.serve.settings import Keys

    settings, cfg = understood(words, RaySettings)
    keys, model = Keys(settings.api_keys), settings.name or name_of(cfg)
    check(cfg)
    set_up(settings)
    from specvlm.serve.ray.cluster import cluster, deployed
    from specvlm.serve.ray.routed import RoutedChat

    with bound(settings) as taken, cluster(settings), deployed(cfg, settings, model, os.getcwd()) as replicas:
        server = Server(App(RoutedChat(replicas, settings, model), keys))
        server.run(sockets=[taken])
    return server.code
