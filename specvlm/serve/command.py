"""The command line of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from specvlm.app.terminal import Terminal, loading
from specvlm.config import EMBEDDED, RunConfig, model_folder
from specvlm.errors import UserError

if TYPE_CHECKING:
    from specvlm.serve.chat import Chat
    from specvlm.serve.settings import Settings

S = TypeVar("S", bound="Settings")

PAGE = """
`python -m specvlm.serve`: answer OpenAI's chat completions with a pair.

Takes the overrides of a run that load the pair and set defaults, such as pair=… ratio=… max_new_tokens=…, and the keys
below. Exit codes are those of a run; 0 after SIGTERM.
"""
EXTRA = ("starlette", "uvicorn", "prometheus_client", "httpcore")
OF_SAMPLES = ("dataset", "metric", "tracker", "image", "baselines", "shard", "check")  # not used by a server


def show_help() -> None:
    """Print the help, as wide as the terminal."""
    from specvlm.serve.settings import HELP

    show(PAGE, HELP)


def show(page: str, keys: Mapping[str, str]) -> None:
    """Print a help page, then keys with their meanings."""
    from rich.table import Column, Table

    own = Table(Column(no_wrap=True), Column(), show_header=False, box=None, padding=(0, 0, 0, 2))
    for key, meaning in keys.items():
        own.add_row(f"{key}=…", meaning)
    Terminal().print(page.strip(), "", own, sep="\n")


def require(modules: Sequence[str], extra: str) -> None:
    """Raise UserError if a module is not installed. extra: the optional dependency group that installs them."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'specvlm[{extra}]'")


def command(words: Sequence[str]) -> int:
    """Load the pair and serve it; returns the exit code."""
    require(EXTRA, "serve")
    loading()
    from specvlm.app.request import threads
    from specvlm.serve.app import App
    from specvlm.serve.reading import SERVER
    from specvlm.serve.server import Server, bound
    from specvlm.serve.settings import Keys, Settings

    settings, cfg = understood(words, Settings)
    keys = Keys(settings.api_keys)
    check(cfg)
    with bound(settings) as taken, threads(cfg.threads):
        server = Server(App(endpoint(cfg, settings, settings.name or name_of(cfg)), keys))
        try:
            server.run(sockets=[taken])
        finally:
            SERVER.stop()
    return server.code


def understood(words: Sequence[str], kind: type[S]) -> tuple[S, RunConfig]:
    """Split a command line into the server's settings and the configuration of a run, and check both.

    Args:
        words: The command line.
        kind: Class of the settings. The names of its fields are the keys that belong to the server.

    Raises:
        UserError: A key or a value is wrong.
    """
    from specvlm.app import compose
    from specvlm.app.quoting import quoted

    if options := [word for word in words if word.startswith("-")]:
        raise UserError(f"{options[0]}: the server has no options but --help, which lists its keys")
    names = [one.name for one in fields(kind)]
    own = [word for word in words if word.partition("=")[0] in names]
    settings = kind.of_words(own)
    return settings, compose.jobs(quoted([word for word in words if word not in own], sweep=False), sweep=False)[0].cfg


def endpoint(cfg: RunConfig, settings: Settings, model: str) -> Chat:
    """Load a pair, and make the endpoint that answers with it."""
    from specvlm.serve.chat import Chat
    from specvlm.serve.reading import SERVER

    if SERVER.works_here:
        SERVER.start()
    return Chat(session_of(cfg), settings, model)


def check(cfg: RunConfig) -> None:
    """Raise UserError for keys of a run that a server does not support."""
    for key in OF_SAMPLES:
        if getattr(cfg, key) is not None:
            raise UserError(f"{key}={getattr(cfg, key)}: a server gets its videos and questions from requests: leave it out")
    if cfg.target.parallel:
        raise UserError(f"target.parallel={cfg.target.parallel} is not served yet: leave it out")


def name_of(cfg: RunConfig) -> str:
    """Name of the model in requests: its hub name, the last part of a folder, or the name of an embedded pair."""
    path = cfg.target.path
    if path.startswith(EMBEDDED):
        return path.removesuffix("/target")
    folder = model_folder(path)
    return folder.resolve().name if folder.is_dir() else path


def session_of(cfg: RunConfig) -> Any:
    """Load the pair of a configuration, with its keys as defaults of requests."""
    from specvlm.session.load import load_pair
    from specvlm.strategies import registry

    pruner, drafter, verifier = (registry.build(kind, getattr(cfg, kind)) for kind in ("pruner", "drafter", "verifier"))
    drafts = drafter.model == "draft"
    draft: dict[str, Any] = {"draft": cfg.draft.path} if drafts else {}
    if drafts and cfg.draft.device:
        draft["draft_device"] = cfg.draft.device
    if drafts and cfg.draft.weights:
        draft["draft_weights"] = cfg.draft.weights.name
    return load_pair(
        cfg.target.path,
        **draft,
        dtype=cfg.dtype.name,
        device=cfg.device,
        weights=cfg.target.weights.name if cfg.target.weights else None,
        engine=cfg.engine.name,
        mrope=cfg.mrope.name,
        pruner=pruner,
        drafter=drafter,
        verifier=verifier,
        ratio=float(cfg.ratio),
        positions=cfg.positions.name,
        max_new_tokens=cfg.max_new_tokens,
        repetition_penalty=cfg.repetition_penalty,
        seed=cfg.seed,
        frames=cfg.frames,
        fps=cfg.fps,
        max_pixels=cfg.max_pixels,
        reader=cfg.reader.name,
    )
