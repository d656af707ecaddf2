"""Fuzzed requests to the server: no crash, no error but in OpenAI's form, no file outside its folders, no private address."""

from __future__ import annotations

import base64
import json
import random
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COUNT, SAMPLE = 1000, 24
CLIENTS = 4
STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429)
REAL = socket.getaddrinfo
NAMES = {"inner.example": ["10.0.0.7"], "mixed.example": ["93.184.216.34", "127.0.0.1"], "six.example": ["::ffff:10.0.0.7"]}
NUMBERS = (
    *("0", "-1", "1e400", "-1e400", "NaN", "1.5", "9" * 400, "true", '"3"', "null", "[]", "{}", "1e-400", "-0.0"),
    str(2**63),
)
TEXTS = (
    *("", "\u0000", "\ud800", "\u202e\u2066x", "<|im_end|>", "<|vision_pad|>", "é" * 9, "\ufeff", "🎬"),
    *("a\nb\r\n\r\nc", "${a}", "{{7*7}}"),
)
FIELDS = (
    *("temperature", "top_p", "top_k", "seed", "max_tokens", "max_completion_tokens", "n", "stop", "logprobs", "top_logprobs"),
    *("stream", "stream_options", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "tools", "user"),
    *("response_format", "specvlm", "media_io_kwargs", "mm_processor_kwargs", "model", "messages", "ignore_eos", "x" * 50),
)
HOSTS = (
    *("127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.1", "127.1", "0", "[::1]", "[::ffff:7f00:1]"),
    *("169.254.169.254", "inner.example", "mixed.example", "six.example", "user@10.0.0.7", "10.0.0.7:0", "a b", ""),
    *("[fe80::1%25lo]", "\uff11\uff12\uff17.0.0.1"),
)
FILES = ("clip.mp4", "link.mp4", "../secret.mp4", "up/secret.mp4", "up/inside/../secret.mp4", "", "nothing", ".")
STARTS = ("file://", "FILE://", "file:", "file://localhost", "file:////", "file://x")
SLASHES, TAILS = ("/", "//", "%2f", "/./", "\\"), ("", "", "%00", "?", "#", "\0", "/")
LENGTHS = ("Content-Length: -1", "Content-Length: 5", "Transfer-Encoding: chunked", "Content-Length: 9" + "9" * 30)
HEAD = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
PATHS = (
    *("/", "/v1", "/v1/models/x", "/specvlm/views/x", "/..%2f..%2fapp.py", "/health", "/%00", "/\u202e"),
    "/v1/" + "a" * 5000,
)


def run(count: int, seed: int) -> list[str]:
    """Send so many requests. Returns what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        return _Attack(Path(folder), seed).run(count)


class _Attack:
    """A server with a folder, a file outside of it, and addresses that resolve to private ones."""

    def __init__(self, folder: Path, seed: int) -> None:
        from serving import Live, until
        from session_pairs import new_session

        from specvlm.serve import fetch, media

        self._until, self._seed, self._findings = until, seed, list[str]()
        self._inside, self._outside = folder.resolve() / "inside", folder.resolve() / "secret.mp4"
        self._inside.mkdir()
        from specvlm.video.clips import find_clip

        clip = find_clip("synthetic_1").read_bytes()
        self._outside.write_bytes(clip)
        (self._inside / "clip.mp4").write_bytes(clip)
        (self._inside / "link.mp4").symlink_to(self._outside)
        (self._inside / "up").symlink_to(folder)
        self._clip = "data:video/mp4;base64," + base64.b64encode(clip).decode()
        words = (f"folders=[{self._inside}]", "fetch=true", "header_timeout=1", "body_timeout=1", "max_body_mib=1", "queue=200")
        fetch.socket = SimpleNamespace(getaddrinfo=_resolved, SOCK_STREAM=socket.SOCK_STREAM)  # type: ignore[assignment]
        self._read, media.read_clip = media.read_clip, self._watched
        self._live = Live(*words, "read_timeout=20", of=new_session())
        self._on = True
        sys.addaudithook(self._heard)

    def run(self, count: int) -> list[str]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda number: self._one(random.Random(f"{self._seed}/{number}")), range(count)))
        if not self._until(self._live.idle, 60):
            self._findings.append("something is left of the requests")
        good = self._live.ask(max_tokens=1)
        if good.status_code != 200:
            self._findings.append(f"afterwards a good request gets {good.status_code} {good.text[:200]}")
        self._on = False
        self._live.stop()
        return self._findings

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note a file that is opened outside, and a connection that is made to another than the server."""
        if not self._on:  # a hook cannot be taken away
            return
        if event == "open" and str(arguments[0]) == str(self._outside):
            self._findings.append(f"the file outside was opened: {arguments[0]}")
        here = ("127.0.0.1", self._live.port)
        if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][:2] != here:
            self._findings.append(f"connected to {arguments[1]}")

    def _watched(self, target: Any, path: Path, *rest: Any) -> Any:
        allowed = path.is_relative_to(self._inside) or "specvlm-" in str(path) or "assets" in str(path)
        if not allowed or path.resolve() != path:
            self._findings.append(f"read {path}")
        return self._read(target, path, *rest)

    def _one(self, chance: random.Random) -> None:
        kind = chance.choice((self._body, self._body, self._body, self._url, self._url, self._raw, self._slow, self._path))
        try:
            kind(chance)
        except Exception as error:
            self._findings.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _judge(self, what: str, status: int, content: bytes) -> None:
        """An answer is whole, or an error in OpenAI's form."""
        if status == 200:
            stream = content.startswith(b"data: ")
            whole = content.endswith(b"data: [DONE]\n\n") if stream else bool(json.loads(content)["choices"])
            if not whole:
                self._findings.append(f"{what}: {content[-200:]!r}")
            return
        error = json.loads(content).get("error", {})
        if status not in STATUSES or set(error) != {"message", "type", "param", "code"} or "/tmp" in error["message"]:
            self._findings.append(f"{what}: {status} {content[:300]!r}")

    def _send(self, what: str, raw: bytes) -> None:
        answer = self._live.client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
        self._judge(what, answer.status_code, answer.content)

    def _body(self, chance: random.Random) -> None:
        """A good body with some fields of other values, or with bytes changed."""
        from serving import body

        value = body(video=None, max_tokens=1, text=chance.choice(("hello", *TEXTS)))
        raw = json.dumps(value)
        for _ in range(chance.randint(1, 2)):
            new = chance.choice((*NUMBERS, *map(json.dumps, TEXTS), json.dumps([chance.choice(TEXTS)] * chance.randint(0, 3))))
            raw = f"{raw[:-1]}, {json.dumps(chance.choice(FIELDS))}: {new}}}"
        content = bytearray(raw.encode())
        if chance.random() < 0.3:
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(len(content))] = chance.randrange(256)
        self._send(raw[:300], bytes(content))

    def _url(self, chance: random.Random) -> None:
        """A video or an image from somewhere."""
        kind = chance.choice(("video_url", "image_url"))
        url = chance.choice((self._file, self._address, self._data))(chance)
        parts = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "x"}]
        value = {"model": "embedded:qwen2_5_vl", "max_tokens": 1, "messages": [{"role": "user", "content": parts}]}
        value |= {"media_io_kwargs": {"video": {"num_frames": 2}}}
        self._send(url[:200], json.dumps(value).encode())

    def _file(self, chance: random.Random) -> str:
        name = "".join(f"%{ord(one):02x}" if chance.random() < 0.2 else one for one in chance.choice(FILES))
        name = name.replace("/", chance.choice(SLASHES)) + chance.choice(TAILS)
        return f"{chance.choice(STARTS)}{self._inside}/{name}"

    def _address(self, chance: random.Random) -> str:
        scheme = chance.choice(("http", "https", "HTTP", "gopher", "ftp"))
        return f"{scheme}://{chance.choice(HOSTS)}{chance.choice(('', '/', ':80/x', ':99999/', '/%00', '#@1.1.1.1'))}"

    def _data(self, chance: random.Random) -> str:
        content = bytearray(base64.b64decode(self._clip.partition(",")[2])[: chance.choice((0, 10, 1000, 10**6))])
        for _ in range(chance.randint(0, 20) if content else 0):
            content[chance.randrange(min(len(content), 4096))] = chance.randrange(256)
        kind = chance.choice(("video/mp4", "image/png", "video/jpeg", "", "x", "text/html;charset=utf-8", "image/svg+xml"))
        text = base64.b64encode(bytes(content)).decode() if chance.random() < 0.8 else "@" * chance.randint(0, 99)
        return f"data:{kind}{chance.choice((';base64', ';base64', ''))},{text}"

    def _raw(self, chance: random.Random) -> None:
        """Bytes that are no request, or only nearly."""
        lines = [*HEAD, chance.choice(LENGTHS), "", ""]
        content = bytearray("\r\n".join(lines).encode() + b"{}" * chance.randint(0, 9))
        for _ in range(chance.randint(0, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        self._wire(bytes(content), 0, ends=True)

    def _slow(self, chance: random.Random) -> None:
        """A writer that stops somewhere."""
        content = "\r\n".join([*HEAD, "Content-Length: 50", "", '{"model": ']).encode()
        self._wire(content[: chance.randint(0, len(content))], chance.choice((0, 0.01)))

    def _wire(self, content: bytes, pause: float, ends: bool = False) -> None:
        """Write bytes, and read until the server closes. It must, and an answer must be one of HTTP."""
        begin, found = time.monotonic(), b""
        with self._live.connect() as connection:
            try:
                for at in range(0, len(content), 40):
                    connection.sendall(content[at : at + 40])
                    time.sleep(pause)
                if ends:
                    with suppress(OSError):  # the server may have closed it
                        connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    found += part
                    if time.monotonic() - begin > 45:
                        raise TimeoutError("the connection stays open")
            except (ConnectionResetError, BrokenPipeError):
                pass
        head, _, rest = found.partition(b"\r\n\r\n")
        if found and not head.startswith(b"HTTP/1.1 "):
            self._findings.append(f"{content[:200]!r} gets {found[:200]!r}")
        elif found and rest and b"application/json" in head:
            self._judge(repr(content[:200]), int(head[9:12]), rest.split(b"HTTP/1.1 ")[0])

    def _path(self, chance: random.Random) -> None:
        """Another path or method."""
        path = chance.choice(PATHS)
        answer = self._live.client.request(chance.choice(("GET", "PUT", "HEAD", "OPTIONS", "POST", "BREW")), path)
        if answer.status_code >= 400 and answer.content:
            self._judge(path[:100], answer.status_code, answer.content)
        elif answer.status_code >= 500:
            self._findings.append(f"{path[:100]}: {answer.status_code}")


def _resolved(host: str, port: int, **more: Any) -> Any:
    """Resolve numbers as ever, the names of this campaign to private addresses, and no others."""
    found = NAMES.get(host, [host])
    return [row for one in found for row in REAL(one, port, flags=socket.AI_NUMERICHOST, type=socket.SOCK_STREAM)]
