"""The command line of the server."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from specvlm.app.terminal import Terminal, loading
from specvlm.config import EMBEDDED, RunConfig, model_folder
from specvlm.errors import ExitCode, UserError

PAGE = """
`python -m specvlm.serve`: answer OpenAI's chat completions with a pair.

Takes the overrides of a run that load the pair and set defaults, such as pair=… ratio=… max_new_tokens=…, and the keys
below. Exit codes are those of a run; 0 after SIGTERM.
"""
EXTRA = ("starlette", "uvicorn", "prometheus_client", "httpcore")
OF_SAMPLES = ("dataset", "metric", "tracker", "image", "baselines", "shard", "check")  # not used by a server


def show_help() -> None:
    """Print the help, as wide as the terminal."""
    from rich.table import Column, Table

    from specvlm.serve.settings import HELP

    own = Table(Column(no_wrap=True), Column(), show_header=False, box=None, padding=(0, 0, 0, 2))
    for key, meaning in HELP.items():
        own.add_row(f"{key}=…", meaning)
    Terminal().print(PAGE.strip(), "", own, sep="\n")


def command(words: Sequence[str]) -> int:
    """Split `words` into the server's and the run's, check both, load the pair and serve; returns the exit code."""
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'specvlm[serve]'")
    loading()
    from specvlm.app import compose
    from specvlm.app.quoting import quoted
    from specvlm.app.request import threads
    from specvlm.serve.app import App
    from specvlm.serve.chat import Chat
    from specvlm.serve.reading import SERVER
    from specvlm.serve.server import Server, bound
    from specvlm.serve.settings import NAMES, Keys, Settings

    if options := [word for word in words if word.startswith("-")]:
        raise UserError(f"{options[0]}: the server has no options but --help, which lists its keys")
    own = [word for word in words if word.partition("=")[0] in NAMES]
    settings = Settings.of_words(own)
    keys = Keys(settings.api_keys)
    cfg = compose.jobs(quoted([word for word in words if word not in own], sweep=False), sweep=False)[0].cfg
    check(cfg)
    with bound(settings) as taken, threads(cfg.threads):
        if SERVER.works_here:
            SERVER.start()
        session = session_of(cfg)
        server = Server(App(Chat(session, settings, settings.name or name_of(cfg)), keys))
        try:
            server.run(sockets=[taken])
        finally:
            SERVER.stop()
    return ExitCode.INTERRUPTED if signal.SIGINT in server.heard else ExitCode.OK


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
