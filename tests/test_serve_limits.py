"""What clients may not do to the server: too much, too slowly, too many, without a key, or from files and addresses."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from threading import Event

import pytest
from serving import PATH, Live, Process, body, data_url, live, served, until
from session_pairs import QUESTION, clip, leased, session
from test_serve import alone, error_of

from specvlm.errors import UserError
from specvlm.serve import fetch
from specvlm.serve.errors import ApiError
from specvlm.serve.fetch import is_public
from specvlm.serve.settings import Keys
from specvlm.video.clips import find_clip

pytestmark = pytest.mark.slow
LONG = {"ignore_eos": True, "max_tokens": 150, "video": None}


def raw_answer(connection, seconds=20):
    """All that a connection gives until it is closed."""
    connection.settimeout(seconds)
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def post(content, *headers):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def runs(process):
    """Number of requests that a server in a process runs."""
    text = process.client.get("/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith("specvlm:num_requests_running")).rpartition(" ")[2])


# Sizes and times


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_while_it_is_read(chunked):
    with served("max_body_mib=1") as one:
        with one.connect() as connection:
            sent = 0
            head = post(b"", "Transfer-Encoding: chunked") if chunked else post(b"", f"Content-Length: {2**40}")
            connection.sendall(head)
            block = b" " * 65536
            try:
                while chunked and sent < 64 * 2**20:
                    connection.sendall(b"10000\r\n" + block + b"\r\n")
                    sent += len(block)
            except OSError:
                pass
            found = raw_answer(connection)
        assert sent < 32 * 2**20 and (b" 413 " in found.split(b"\r\n")[0] or (chunked and not found))
        assert one.ask(body() | {"user": "x" * 2**20}).status_code == 413
        error_of(one.ask(body() | {"user": "x" * 2**20}), 413)
        assert until(one.idle) and one.ask(max_tokens=1).status_code == 200


def test_headers_and_bodies_that_come_too_slowly_end():
    with served("header_timeout=0.5", "body_timeout=0.5") as one:
        for start in (b"", b"POST ", post(b"")[:-4]):
            with one.connect() as connection:
                connection.sendall(start)
                begin = time.monotonic()
                assert raw_answer(connection) == b"" and time.monotonic() - begin < 10
        with one.connect() as connection:
            connection.sendall(post(b"{", "Content-Length: 100"))
            assert b"408" in raw_answer(connection).split(b"\r\n")[0]
        with one.connect() as connection:  # a second request whose headers do not end
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            found = b""
            while not found.endswith(b"}"):
                found += connection.recv(65536)
            connection.sendall(b"GET /he")
            begin = time.monotonic()
            assert raw_answer(connection) == b"" and time.monotonic() - begin < 10
        assert until(one.idle)


def test_what_is_no_http_gets_an_error_in_openais_form():
    with live().connect() as connection:
        connection.sendall(b"\x16\x03\x01 this is no request\r\n\r\n")
        head, _, content = raw_answer(connection).partition(b"\r\n\r\n")
    assert b" 400 " in head and json.loads(content)["error"]["type"] == "invalid_request_error"
    with live().connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
        assert b" 200 " not in raw_answer(connection).split(b"\r\n")[0]


def test_many_bodies_together_are_bounded():
    from specvlm.serve import chat

    with served("max_body_mib=1", "queue=100") as one:
        assert chat.BODIES == 16
        waiting = [one.connect() for _ in range(17)]
        for connection in waiting:
            connection.sendall(post(b" " * 1_000_000, "Content-Length: 1048576"))
        assert until(lambda: one.chat.admission.held_bytes > 15 * 2**20)
        assert error_of(one.ask(body() | {"user": "x" * 900_000}), 429)["code"] == "busy"
        for connection in waiting:
            connection.close()
        assert until(one.idle)


# Load


def test_a_full_queue_says_when_to_come_again_and_a_request_that_does_not_start_in_time_too():
    go = Event()
    with served("running=1", "queue=1", "queue_timeout=1") as one, ThreadPoolExecutor() as pool:
        first = pool.submit(one.ask, **LONG)
        assert until(lambda: leased(one.session))
        pool.submit(one.session.scheduler.between, partial(go.wait, 60))  # the first request cannot end before the others come
        assert until(lambda: one.chat.admission.running == 1)
        second = pool.submit(one.ask, max_tokens=1)
        assert until(lambda: one.chat.admission.waiting == 1)
        third = one.ask(max_tokens=1)
        assert error_of(third, 429)["type"] == "rate_limit_error" and int(third.headers["retry-after"]) >= 1
        assert error_of(second.result(), 429)["code"] == "busy"
        go.set()
        assert first.result().json()["usage"]["completion_tokens"] == 150
        assert until(one.idle) and one.ask(max_tokens=1, video=None).status_code == 200


def test_requests_run_in_the_order_in_which_they_came_and_share_passes():
    with served("running=4", "queue=20") as one, ThreadPoolExecutor(12) as pool:
        before = one.session.scheduler.asked, one.session.scheduler.run
        answers = list(pool.map(lambda _: one.ask(max_tokens=16), range(12)))
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {alone(max_new_tokens=16).text}
        asked, run = one.session.scheduler.asked - before[0], one.session.scheduler.run - before[1]
        assert run < asked
        assert until(one.idle)


@pytest.mark.parametrize("stream", [True, False])
def test_the_region_of_a_client_that_goes_is_free_within_a_round(stream):
    with served("running=2") as one:
        content = json.dumps(body(**LONG, stream=stream)).encode()
        with one.connect() as connection:
            connection.sendall(post(content, f"Content-Length: {len(content)}"))
            assert until(lambda: leased(one.session))
            received = b"" if stream else b"data: "
            while b"data: " not in received:  # the headers may come alone
                received += (part := connection.recv(65536))
                assert part
        assert until(lambda: not leased(one.session), 10) and until(one.idle, 10)
        assert b"requests_cancelled" in one.client.get("/metrics").content


def test_a_client_that_goes_while_it_waits_leaves_the_queue():
    with served("running=1", "queue=4") as one, ThreadPoolExecutor() as pool:
        first = pool.submit(one.ask, **LONG)
        assert until(lambda: one.chat.admission.running == 1)
        content = json.dumps(body()).encode()
        with one.connect() as connection:
            connection.sendall(post(content, f"Content-Length: {len(content)}"))
            assert until(lambda: one.chat.admission.waiting == 1)
        assert until(lambda: one.chat.admission.waiting == 0)
        first.result()


def test_a_slow_reader_holds_no_region_and_is_dropped():
    with served("write_timeout=1", "running=2") as one:
        given = LONG | {"max_tokens": 400, "stream": True, "specvlm": {"explain": True}}
        content = json.dumps(body(**given)).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", one.port))
            connection.sendall(post(content, f"Content-Length: {len(content)}"))
            assert until(lambda: leased(one.session))
            assert until(one.idle, 120)
            assert not leased(one.session)
        assert one.ask(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("times", "last"), [(400, b"\r\n"), (3, b"\r\n"), (3, b"Connection: close\r\n\r\n")], ids=["many", "kept", "closed"]
)
def test_a_client_that_reads_nothing_of_complete_answers_is_dropped(times, last):
    """Answers that wait in the server's buffer: too many, few of a connection that is kept, and few of one that ends."""
    with served("write_timeout=1") as one:
        one.server.config.timeout_keep_alive = 1
        one.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", one.port))
            get = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall((get + b"\r\n") * times + get + last)
            state = one.server.server_state
            assert until(lambda: state.total_requests >= min(times, 4)) and state.connections
            assert until(lambda: not state.connections, 10)
        assert one.client.get("/health").status_code == 200


@pytest.mark.parametrize("more", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3])
def test_bytes_behind_a_request_do_not_hide_that_its_client_goes(more):
    with served() as one:
        content = json.dumps(body(**LONG | {"max_tokens": 1000})).encode()
        for late in (False, True):
            with one.connect() as connection:
                head = post(content, f"Content-Length: {len(content)}")
                connection.sendall(head if late else head + more)
                assert until(lambda: leased(one.session))
                connection.sendall(more if late else b"")
            assert until(one.idle, 10)


def test_too_many_bytes_behind_a_request_end_it():
    with served() as one:
        content = json.dumps(body(**LONG | {"max_tokens": 1000})).encode()
        with one.connect() as connection:
            connection.sendall(post(content, f"Content-Length: {len(content)}"))
            assert until(lambda: leased(one.session))
            with pytest.raises(OSError):
                for _ in range(1000):
                    connection.sendall(bytes(65536))
            assert until(one.idle, 10)


def test_one_connection_too_many_is_told_so_in_openais_form(monkeypatch):
    monkeypatch.setattr("specvlm.serve.server.MORE_CONNECTIONS", 2)
    with served("running=1", "queue=0") as one:
        held = [one.connect() for _ in range(3)]
        assert until(lambda: len(one.server.server_state.connections) == 3)
        found = one.client.get("/health")
        assert error_of(found, 503)["type"] == "service_unavailable_error" and found.headers["retry-after"] == "5"
        for connection in held:
            connection.close()
        assert until(lambda: not one.server.server_state.connections)
        assert one.client.get("/health").status_code == 200


# Ending


def test_sigterm_lets_answers_end_refuses_new_ones_and_is_no_error():
    with Process("shutdown_timeout=60") as one, ThreadPoolExecutor() as pool:
        running = pool.submit(one.client.post, PATH, json=body(**LONG))
        assert until(lambda: runs(one) == 1)
        one.process.terminate()
        assert until(lambda: one.client.get("/health").status_code == 503)
        found = one.client.post(PATH, json=body())
        assert error_of(found, 503)["code"] == "shutting_down" and found.headers["retry-after"]
        assert running.result().json()["usage"]["completion_tokens"] == 150
        _, errors = one.process.communicate(timeout=180)
        assert one.process.returncode == 0 and errors == ""


def test_sigterm_ends_what_does_not_end_within_the_bound():
    with Process("shutdown_timeout=0.5") as one, ThreadPoolExecutor() as pool:
        given = LONG | {"max_tokens": 2000}
        running = [pool.submit(one.client.post, PATH, json=body(**given, stream=stream)) for stream in (False, True)]
        assert until(lambda: runs(one) == 2)
        until(lambda: False, 1)
        code, errors = one.end()
        assert code == 0 and errors == ""
        assert error_of(running[0].result(), 503)["code"] == "shutting_down"
        assert '"error"' in running[1].result().text or running[1].result().status_code == 503


def test_mistakes_on_the_command_line_are_one_line(capsys):
    from specvlm.serve.__main__ import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, told in [
            ([f"port={port}"], f"port={port} is taken by another program"),
            (["port=99999"], "port=99999: expected"),
            (["folders=[/nowhere]"], "no such folder"),
            (["dataset=synthetic"], "dataset="),
            (["queue_timout=3"], "queue_timout"),
            (["fetch_hosts=[a.org]"], "fetch=true"),
            (["metrics_prefix=x"], "specvlm or vllm"),
            (["running=many"], "running=many: expected"),
            (["port=0", "host=192.0.2.1"], "cannot be listened on"),
            (["--reload"], "--help"),
            (["target.parallel=layers"], "target.parallel=layers"),
        ]:
            assert main(words) == 2, words
            errors = capsys.readouterr().err
            assert errors.count("\n") == 1 and told in errors, errors


def test_a_missing_extra_is_named(monkeypatch, capsys):
    from specvlm.serve import __main__ as start
    from specvlm.serve import command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert start.main([]) == 2 and "pip install 'specvlm[serve]'" in capsys.readouterr().err
    assert start.main(["--help"]) == 0 and "queue_timeout=…" in capsys.readouterr().out


# Keys and names


def test_keys_guard_what_decodes(tmp_path):
    file = tmp_path / "keys"
    file.write_text("first\n second \n")
    with served(f"api_keys={file}", variables={"SPECVLM_API_KEY": "third"}) as one:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}, {"authorization": "Basic first"}):
            answer = one.client.post(PATH, json=body(), headers=header)
            assert error_of(answer, 401)["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/specvlm/info", "/v1/x"):
            error_of(one.client.get(path), 401)
        for key in ("first", "second", "third"):
            assert one.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert one.client.get("/health").status_code == one.client.get("/").status_code == 200
    file.write_text("\n")
    with pytest.raises(UserError, match="has no key"):
        Keys(str(file), {})
    assert Keys(None, {}).allow(None) and not Keys(None, {})


def test_a_server_for_this_machine_answers_no_other_name():
    assert error_of(live().client.get("/health", headers={"host": "evil.example"}), 403)["code"] == "host_refused"
    error_of(live().client.get("/health", headers={"host": "testserver"}), 403)
    assert live().client.get("/health", headers={"host": "localhost:1234"}).status_code == 200


# Files


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "videos"
    (root / "deep").mkdir(parents=True)
    clip = find_clip("synthetic_1").read_bytes()
    for place in (root / "a b.mp4", root / "deep" / "c.mp4", tmp_path / "secret.mp4"):
        place.write_bytes(clip)
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "inner.mp4").symlink_to(root / "deep" / "c.mp4")
    (root / "out").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.mp4")
    return root


def test_files_below_the_folders_are_read_and_no_others(folder):
    with served(f"folders=[{folder}]") as one:
        for name in ("a%20b.mp4", "deep/c.mp4", "deep/../deep/c.mp4", "inner.mp4", "deep/%63.mp4"):
            for head in ("file://", "file://localhost", "FILE://"):
                found = one.ask(video=f"{head}{folder}/{name}", max_tokens=1)
                assert found.status_code == 200, name
        told = set()
        for name in (
            *("../secret.mp4", "%2e%2e/secret.mp4", "..%2fsecret.mp4", "deep/../../secret.mp4", "link.mp4", "out/secret.mp4"),
            *(
                "pipe.mp4",
                "missing.mp4",
                "",
                "deep",
                "a b.mp4%00",
                "%00",
                "deep/c.mp4?x",
                "deep/c.mp4#x",
                "%252e%252e/secret.mp4",
            ),
            *("out/videos/../secret.mp4", "./.././secret.mp4"),
        ):
            told.add(error_of(one.ask(video=f"file://{folder}/{name}"))["message"])
        for url in (
            *("file:///etc/passwd", "file:///dev/zero", "file:///proc/self/environ", "file://evil.example/x.mp4", "file:x.mp4"),
            *(
                f"file:////{folder}/../secret.mp4",
                f"file://{folder.parent}/videos_other/x",
                f"file:\\\\{folder}\\x",
                "file://[bad",
            ),
        ):
            told.add(error_of(one.ask(video=url))["message"])
        assert len(told) == 1 and str(folder) not in told.pop()
    error_of(live().ask(video=f"file://{folder}/deep/c.mp4"))
    for url in (
        str(folder / "deep" / "c.mp4"),
        "synthetic_1",
        "embedded:../../assets",
        "ftp://x/y",
        "",
        "data",
        "blob:x",
        "javascript:1",
    ):
        error_of(live().ask(video=url))


def png(width, height):
    """A PNG that claims a size: one row of zeros, packed."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    packed = zlib.compress(bytes(1 + 3 * width) * min(height, 64))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def image_part(content, kind="image/png"):
    url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]}]


def test_an_image_is_measured_before_it_is_decoded():
    found = error_of(live().ask(body() | {"messages": image_part(png(30_000, 30_000))}))
    assert found["code"] == "image_too_large" and found["param"] == "messages.0.content.0"
    for content in (
        b"",
        b"no image",
        png(64, 64)[:40],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"GIF89a" + bytes(20),
    ):
        error_of(live().ask(body() | {"messages": image_part(content)}))
    for url in ("data:image/png;base64,@@@", "data:;base64,", "data:image/png,abc", "data:image/png;base64"):
        error_of(live().ask(body() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}))


def test_a_video_is_measured_before_it_is_decoded_and_its_reader_may_crash_or_hang(monkeypatch):
    with served("max_media_mpixels=1", "max_clip_mib=1", "read_timeout=30") as one:
        assert "MiB" in error_of(one.ask(**{"media_io_kwargs": {"video": {"num_frames": 32}}}))["message"]
        for content in (b"", b"no video at all", find_clip("synthetic_1").read_bytes()[:5000]):
            url = "data:video/mp4;base64," + base64.b64encode(content).decode()
            assert "the video" in error_of(one.ask(video=url))["message"] and "/tmp" not in one.ask(video=url).text
    from specvlm.serve import read_process, reading

    limits = read_process.Limits(8, 1000, 2**30, 30)
    with pytest.raises(UserError, match="at most 1,000 pixels"):
        reading.read_clip(session().target, find_clip("synthetic_1"), session().options, limits)
    reading.SERVER.stop()  # it is started again
    limits = read_process.Limits(8, 10**6, 2**30, 30)
    found = reading.read_clip(session().target, find_clip("synthetic_1"), session().options.asked({"frames": 8}), limits)
    assert (found.frames == clip().frames).all() and found.times == clip().times and found.source == "the video"
    with pytest.raises(UserError, match="did not end within"):
        reading.read_clip(
            session().target, find_clip("synthetic_1"), session().options, read_process.Limits(64, 10**6, 2**30, 0.01)
        )


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
        *("255.255.255.255", "240.0.0.1", "192.0.0.1", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "fec0::1"),
        *("::127.0.0.1", "fe80::1%eth0", "2001:db8::1", "2001:0:7f00:1::"),
    ],
)
def test_no_address_of_a_private_net_is_public(address):
    assert not is_public(ip_address(address))


def test_public_addresses_are_public():
    assert all(is_public(ip_address(one)) for one in ("1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1"))


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/x", "http://localhost/x", "http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://0/"),
        *("http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[fe80::1%25eth0]/", "http://user@1.1.1.1/", "http://:80/"),
        *("https://169.254.169.254/latest/meta-data", "http://1.1.1.1:0/", "http://1.1.1.1:99999/", "http://a b/", "http://"),
        *("http://exa\nmple.org/", "http://ex\\ample.org", "http://-x.org/", "http://[::1", "http://\u0661.1.1.1/"),
    ],
)
def test_an_address_that_is_not_allowed_is_not_fetched(url):
    with pytest.raises(ApiError) as found:
        fetch.fetched(url, 1000, 5)
    assert found.value.code in ("address_refused", "fetch_failed")


class Site(BaseHTTPRequestHandler):
    """Gives a clip, redirects, too much, or nothing."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/clip":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(find_clip("synthetic_1").read_bytes())
        elif self.path in ("/headers", "/continue"):  # one header that never ends; answers that announce another
            for _ in range(1000):
                try:
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" if self.path == "/continue" else b"H")
                except OSError:
                    return
                time.sleep(0.05)
        elif self.path in ("/much", "/slow"):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(1000):
                    self.wfile.write(bytes(65536 if self.path == "/much" else 1))
                    time.sleep(0 if self.path == "/much" else 0.2)
            except OSError:
                pass
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """A site on this machine whose address counts as public, while all others here do not."""
    server = HTTPServer(("127.0.0.1", 0), Site)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names, real = {"clips.example": "127.0.0.1", "inner.example": "127.0.0.2"}, socket.getaddrinfo
    resolved = []

    def resolve(host, *rest, **more):
        resolved.append(host)
        return real(names.get(host, host), *rest, **more)

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda one: str(one) == "127.0.0.1" or is_public(one))
    server.resolved, server.url = resolved, f"http://clips.example:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_an_address_is_fetched_if_that_is_on_and_every_redirect_is_checked(site):
    with served("fetch=true", "max_body_mib=1", "read_timeout=20") as one:
        assert one.ask(video=f"{site.url}/clip").json()["choices"][0]["message"]["content"] == alone().text
        assert site.asked[0] == ("/clip", f"clips.example:{site.server_port}")
        assert site.resolved.count("clips.example") == 1  # the connection goes to the address that was checked
        assert one.ask(video=f"{site.url}/to//clip", max_tokens=1).status_code == 200
        for path, code in [
            ("/to/http://inner.example/x", "address_refused"),
            ("/to/http://127.0.0.2/x", "address_refused"),
            ("/to/file:///etc/passwd", "address_refused"),
            ("/loop", "fetch_failed"),
            ("/nothing", "fetch_failed"),
            ("/much", "media_too_large"),
        ]:
            assert error_of(one.ask(video=f"{site.url}{path}"))["code"] == code, path
        assert not any("inner" in str(host) for _, host in site.asked)
    with served("fetch=true", "read_timeout=1") as one:
        for path in ("/slow", "/headers", "/continue"):
            begin = time.monotonic()
            assert error_of(one.ask(video=f"{site.url}{path}"))["code"] == "fetch_failed"
            assert time.monotonic() - begin < 20
    with served("fetch=true", "fetch_hosts=[other.example]") as one:
        assert error_of(one.ask(video=f"{site.url}/clip"))["code"] == "address_refused"
    before = len(site.asked)
    assert error_of(live().ask(video=f"{site.url}/clip"))["code"] == "fetch_is_off" and len(site.asked) == before


def test_a_name_that_takes_long_to_resolve_ends_its_request_in_time(monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: stop.wait(60) and [])
    try:
        with pytest.raises(ApiError, match="is not resolved in time") as found:
            fetch.fetched("http://clips.example/a", 100, 0.2)
        assert found.value.code == "fetch_failed" and not stop.is_set()
    finally:
        stop.set()


def test_data_urls_of_videos_are_bounded_like_bodies():
    with served("max_body_mib=1") as one:
        assert one.ask(video=data_url(), max_tokens=1).status_code == 200
        assert isinstance(one, Live) and QUESTION
