"""Fetch videos and images over http(s): only from public addresses, within bounds of size and time.

A name is resolved once, all its addresses are checked, and the connection goes to one that was checked. Host header,
TLS name and certificate check use the name. Every redirect is checked like a new address.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import monotonic
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from specvlm.errors import line
from specvlm.serve.errors import ApiError, bad

REDIRECTS = 5  # most redirects that are followed
PATIENCE = 10.0  # most seconds to wait for a connection, and for a part of the answer
LONGEST_URL = 8192
NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.ASCII | re.IGNORECASE)
RESOLVERS = ThreadPoolExecutor(16, "specvlm-resolve")  # resolve names side by side: each may take long
HEADERS = [("User-Agent", "specvlm"), ("Accept", "*/*"), ("Accept-Encoding", "identity")]
Address = IPv4Address | IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address, and an IPv4 address embedded in it, belongs to the public internet."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None or address.is_site_local:
            return False
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None and not is_public(inner):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast and not address.is_reserved


def fetched(url: str, most: int, seconds: float, hosts: Sequence[str] = ()) -> bytes:
    """Fetch the content of a URL.

    Args:
        url: The URL.
        most: Most bytes.
        seconds: Most seconds, redirects included.
        hosts: The only host names allowed; empty allows any.

    Raises:
        ApiError: The URL is not allowed, or its content is too large, too slow, or cannot be fetched.
    """
    end = monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        check_url(url, hosts)
        try:
            found = _get(url, most, end)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError, ValueError) as error:
            raise bad(f"the address cannot be fetched ({type(error).__name__})", code="fetch_failed") from None
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise bad(f"more than {REDIRECTS} redirects", code="fetch_failed")


def check_url(url: str, hosts: Iterable[str]) -> None:
    """Raise ApiError unless this is a plain http(s) URL of an allowed host. The IP address is checked on connecting."""
    refused = bad(f"{line(url)[:80]}: this address is not fetched", code="address_refused")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise refused from None
    plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url and len(url) <= LONGEST_URL
    if parts.scheme not in ("http", "https") or not plain or "@" in parts.netloc or port == 0:
        raise refused
    if not NAME.fullmatch(host):
        try:
            IPv6Address(host)
        except ValueError:
            raise refused from None
    if (hosts := list(hosts)) and host.rstrip(".") not in [one.lower() for one in hosts]:
        raise bad(f"{line(host)[:80]}: this server fetches only from {', '.join(hosts)}", code="address_refused")


def _left(end: float, most: float | None = PATIENCE) -> float:
    """Seconds to wait for the next bytes. Raises ApiError if the time is over."""
    if (seconds := end - monotonic()) <= 0:
        raise bad("the address is too slow", code="fetch_failed")
    return min(seconds, PATIENCE if most is None else most)


class TimedStream(httpcore.NetworkStream):
    """A connection with a deadline for the whole exchange, however slowly headers, bodies or redirects arrive."""

    def __init__(self, inner: httpcore.NetworkStream, end: float) -> None:
        self._inner, self._end = inner, end

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read the available bytes."""
        return self._inner.read(max_bytes, _left(self._end, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all bytes."""
        self._inner.write(buffer, _left(self._end, timeout))

    def close(self) -> None:
        """Close the connection."""
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Switch to TLS."""
        return TimedStream(self._inner.start_tls(ssl_context, server_hostname, _left(self._end, timeout)), self._end)

    def get_extra_info(self, info: str) -> Any:
        """Information on the connection, as httpcore asks for it."""
        return self._inner.get_extra_info(info)


class CheckedBackend(httpcore.SyncBackend):
    """Connects only to public addresses, until a deadline."""

    def __init__(self, end: float) -> None:
        self._end = end

    def connect_tcp(self, host: str, port: int, **options: Any) -> Any:  # type: ignore[override]
        """Resolve a name, check every address, and connect to the first. Raises ApiError if one is not public."""
        places = _resolved(host.strip("[]"), port, _left(self._end))
        if not places or not all(is_public(ip_address(place)) for place in places):
            raise bad(f"{line(host)[:80]} is not a public address", code="address_refused")
        options["timeout"] = _left(self._end, options.get("timeout"))
        return TimedStream(super().connect_tcp(places[0], port, **options), self._end)


def _resolved(host: str, port: int, seconds: float) -> list[str]:
    """Resolve a name, in a thread, since the system's call has no bound on its time. Raises ApiError if it is too slow."""
    asked = RESOLVERS.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        return [str(place[4][0]) for place in asked.result(seconds)]
    except TimeoutError:
        asked.cancel()
        raise bad(f"{line(host)[:80]} is not resolved in time", code="fetch_failed") from None


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _get(url: str, most: int, end: float) -> bytes | str:
    """Return the content of an address, or the address that it redirects to."""
    extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), _left(end))}
    with (
        httpcore.ConnectionPool(_tls(), network_backend=CheckedBackend(end)) as pool,
        pool.stream("GET", url, headers=HEADERS, extensions=extensions) as answer,
    ):
        headers = {name.lower(): value for name, value in answer.headers}
        if answer.status in (301, 302, 303, 307, 308) and b"location" in headers:
            return headers[b"location"].decode("latin-1")
        if answer.status != 200:
            raise bad(f"the address answers with status {answer.status}", code="fetch_failed")
        parts, size = [], 0
        for part in answer.iter_stream():
            size += len(part)
            if size > most:
                raise ApiError(400, f"the address has more than {most:,} bytes", code="media_too_large")
            parts.append(part)
    return b"".join(parts)
