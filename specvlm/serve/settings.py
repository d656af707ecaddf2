"""Keys of the server, besides those of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any, Self

from omegaconf import OmegaConf

from specvlm.app.explain import explained
from specvlm.errors import UserError
from specvlm.parsing.bounds import KEY, Within, check
from specvlm.parsing.files import read_bytes

KEY_VARIABLE = "SPECVLM_API_KEY"
LONGEST_KEYS = 2**20  # bytes of a file of keys
MIB = 2**20
HELP = {
    "host": "address to listen on (127.0.0.1: only this machine)",
    "port": "port to listen on (8000)",
    "name": "name of the model in requests (the target's)",
    "folders": "folders whose files requests may name as file://…, as [/videos,/images] ([]: none)",
    "fetch": "true: requests may name http(s) addresses, but only of public machines (false)",
    "fetch_hosts": "the only host names to fetch from, as [a.org,b.org] ([]: any)",
    "api_keys": f"file of API keys, one per line; the variable {KEY_VARIABLE} adds one (null: no key is asked for)",
    "running": "most requests that are read and decoded at once (16)",
    "queue": "most requests that wait; more get 429 (64)",
    "queue_timeout": "seconds after which a request that has not started gets 429 (60)",
    "body_timeout": "seconds in which a request's body must arrive (30)",
    "header_timeout": "seconds in which its headers must arrive (10)",
    "write_timeout": "seconds after which a client that reads nothing is dropped (30)",
    "shutdown_timeout": "seconds that running requests get after SIGTERM (30)",
    "max_body_mib": "most MiB of a body (64); of all bodies together 16 times as much",
    "max_media": "most videos and images of a request (8)",
    "max_frames": "most frames of a request (768)",
    "max_media_mpixels": "most million pixels of an image, and of a frame (36)",
    "max_clip_mib": "most MiB of all sampled frames and images of a request, before they are resized (1024)",
    "read_timeout": "seconds in which a video must be read, or fetched (60)",
    "max_prompt_tokens": "most tokens of a prompt (null: what the target's positions allow)",
    "max_answer_tokens": "most tokens of an answer, and of all `n` together (null: what the target's positions allow)",
    "metrics_prefix": "prefix of the names in /metrics: specvlm or vllm (specvlm)",
}


@dataclass(frozen=True)
class Settings:
    """The server's own keys; HELP explains them."""

    host: str = "127.0.0.1"
    port: Annotated[int, Within(0, 65_535)] = 8000
    name: str | None = None
    folders: list[str] = field(default_factory=list)
    fetch: bool = False
    fetch_hosts: list[str] = field(default_factory=list)
    api_keys: str | None = None
    running: Annotated[int, Within(1, 256)] = 16
    queue: Annotated[int, Within(0, 100_000)] = 64
    queue_timeout: Annotated[float, Within(0, 86_400, above=True)] = 60.0
    body_timeout: Annotated[float, Within(0, 86_400, above=True)] = 30.0
    header_timeout: Annotated[float, Within(0, 86_400, above=True)] = 10.0
    write_timeout: Annotated[float, Within(0, 86_400, above=True)] = 30.0
    shutdown_timeout: Annotated[float, Within(0, 86_400)] = 30.0
    max_body_mib: Annotated[int, Within(1, 4096)] = 64
    max_media: Annotated[int, Within(0, 256)] = 8
    max_frames: Annotated[int, Within(1, 16_384)] = 768
    max_media_mpixels: Annotated[int, Within(1, 500)] = 36
    max_clip_mib: Annotated[int, Within(1, 65_536)] = 1024
    read_timeout: Annotated[float, Within(0, 86_400, above=True)] = 60.0
    max_prompt_tokens: Annotated[int | None, Within(1, 2**31 - 1)] = None
    max_answer_tokens: Annotated[int | None, Within(1, 2**31 - 1)] = None
    metrics_prefix: str = "specvlm"

    @classmethod
    def of_words(cls, words: Sequence[str]) -> Self:
        """Parse and check overrides such as `port=8001`. Raises UserError for one that is wrong."""
        with explained():
            given = OmegaConf.from_dotlist(list(words))
            found = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(cls), given), resolve=False)
        assert isinstance(found, dict)
        settings = cls(**{str(key): value for key, value in found.items()})
        check(cls, vars(settings), KEY)
        if not re.fullmatch("specvlm|vllm", settings.metrics_prefix):
            raise UserError(f"metrics_prefix={settings.metrics_prefix}: expected specvlm or vllm")
        if settings.fetch_hosts and not settings.fetch:
            raise UserError("fetch_hosts=… names hosts to fetch from: give fetch=true, too")
        for folder in settings.folders:
            if not Path(folder).expanduser().is_dir():
                raise UserError(f"folders={folder}: no such folder")
        return settings

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders, resolved."""
        return tuple(Path(folder).expanduser().resolve() for folder in self.folders)

    @property
    def max_body(self) -> int:
        """Most bytes of a body."""
        return self.max_body_mib * MIB

    @property
    def max_size(self) -> int:
        """Most bytes of all frames and images of a request."""
        return self.max_clip_mib * MIB

    @property
    def max_side_pixels(self) -> int:
        """Most pixels of an image or a frame."""
        return self.max_media_mpixels * 1_000_000


NAMES = tuple(one.name for one in fields(Settings))
assert set(HELP) == set(NAMES)


class Keys:
    """The API keys, as hashes. If there are no keys, every request is allowed.

    Args:
        file: File of keys, one per line; None for no file.
        variables: Environment variables, of which `KEY_VARIABLE` adds a key.

    Raises:
        UserError: The file cannot be read, or has no key.
    """

    def __init__(self, file: str | None, variables: Mapping[str, str] = os.environ) -> None:
        keys = [variables[KEY_VARIABLE]] if variables.get(KEY_VARIABLE) else []
        if file is not None:
            text = read_bytes(Path(file).expanduser(), LONGEST_KEYS).decode(errors="replace")
            own = [word.strip() for word in text.splitlines() if word.strip()]
            if not own:
                raise UserError(f"api_keys={file}: has no key: write one per line")
            keys += own
        self._hashes = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allow(self, header: str | None) -> bool:
        """Whether a request with this Authorization header is allowed. Takes the same time for any key."""
        if not self._hashes:
            return True
        scheme, _, key = (header or "").partition(" ")
        given = sha256(key.strip().encode(errors="replace")).digest()
        fits = [compare_digest(given, known) for known in self._hashes]
        return scheme.lower() == "bearer" and any(fits)


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as plain values."""
    return dict(vars(settings))
