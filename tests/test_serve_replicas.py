"""Two replicas on a Ray cluster of this machine, one of which is killed under load. Needs the extra `ray`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx2
import psutil
import pytest
from serving import PATH, body, events_of, text_of, until
from session_pairs import session

serve = pytest.importorskip("ray.serve", reason="needs pip install 'specvlm[ray]'")

from specvlm.errors import UserError  # noqa: E402
from specvlm.serve.ray.cluster import cluster as joined  # noqa: E402
from specvlm.serve.ray.cluster import deployment_options  # noqa: E402
from specvlm.serve.ray.replica import Replica  # noqa: E402
from specvlm.serve.ray.settings import RaySettings  # noqa: E402

pytestmark = pytest.mark.slow

VIDEOS = ("synthetic_1", "synthetic_2", "synthetic_3", "synthetic_4")
QUESTIONS = ("describe the video.", "how many objects appear?")
KEYS = ("replicas=2", "replica_cpus=0.5", "prefixes=0.1", "name=embedded:qwen2_5_vl", "shutdown_timeout=5", "port=0")
TOKENS = 24


class Cluster:
    """The front and its cluster, in a session of processes of their own."""

    def __init__(self) -> None:
        words = ("pair=embedded_qwen2_5_vl", "device=cpu", "drafter.shape=chain:5", "pruner.mass=0.2", *KEYS)
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        given = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, "-m", "specvlm.serve.ray", *words], **given)
        assert self.process.stdout is not None
        line = next((one for one in self.process.stdout if one.startswith("specvlm: ")), "")
        self.client = httpx2.Client(base_url=line.strip().rpartition(" ")[2] or "http://none", timeout=120)

    def ask(self, video, question, **options):
        return self.client.post(PATH, json=body(question, f"embedded:{video}", max_tokens=TOKENS, **options))

    @property
    def processes(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self):
        return [one for one in self.processes if is_alive(one, "ray::ServeRepli")]

    def number(self, name):
        """Sum of a number of `/metrics` over the replicas."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"specvlm:{name}{{"))

    def stop(self):
        """End it as an operator does. Returns the exit code, and processes that are left."""
        others = self.processes
        self.client.close()
        self.process.terminate()
        code = self.process.wait(60)
        _, left = psutil.wait_procs(others, 10)
        return code, [one for one in left if is_alive(one)]

    def kill(self):
        """End what is left of the session that was started here."""
        with_session = [one for one in psutil.process_iter() if _session_of(one) == self.process.pid]
        for one in with_session:
            one.kill()
        self.process.kill()
        self.process.wait()


def is_alive(process, name=""):
    """Whether a process with a name that begins like this runs. It may end at any moment."""
    try:
        return process.status() != "zombie" and process.name().startswith(name)
    except psutil.NoSuchProcess:
        return False


def _session_of(process):
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


@pytest.fixture(scope="module")
def cluster():
    found = Cluster()
    try:
        yield found
        code, left = found.stop()
        assert (code, left) == (0, [])
    finally:
        found.kill()


@pytest.fixture(scope="module")
def want():
    """What the pair answers alone."""
    given = {"frames": 4, "max_new_tokens": TOKENS}
    return {(v, q): session().generate(q, videos=v, **given).text for v in VIDEOS for q in QUESTIONS}


@pytest.mark.parametrize(
    ("words", "count", "scaled"),
    [
        (["replicas=3", "running=8"], 3, None),
        (["replicas=1", "max_replicas=4", "running=8", "downscale_delay=60"], None, (1, 4, 4.0, 60.0)),
        (["replicas=2", "max_replicas=2", "target_requests=6"], None, (2, 2, 6.0, 600.0)),
    ],
)
def test_ray_is_told_how_many_replicas_there_are_and_how_requests_go_to_them(words, count, scaled):
    settings = RaySettings.of_words(words)
    made = serve.deployment(Replica, **deployment_options(settings, 0.5))
    config = made._deployment_config
    assert config.max_ongoing_requests == settings.running and made.ray_actor_options["num_gpus"] == 0.5
    router = config.request_router_config
    assert router.get_request_router_class().__name__ == "ConsistentHashRouter"
    assert router.request_router_kwargs == {"num_fallback_replicas": settings.most_replicas}
    if scaled is None:
        assert config.num_replicas == count and config.autoscaling_config is None
    else:
        found = config.autoscaling_config
        keys = ("min_replicas", "max_replicas", "target_ongoing_requests", "downscale_delay_s")
        assert tuple(getattr(found, key) for key in keys) == scaled


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999999"])
def test_a_cluster_that_is_not_there_is_told_at_once(address):
    with pytest.raises(UserError, match=f"no Ray cluster at address={address}"), joined(RaySettings(address=address)):
        pass


def words_of(answer):
    return answer.json()["choices"][0]["message"]["content"]


def test_answers_are_the_pairs_own_and_a_video_stays_with_its_replica(cluster, want):
    assert cluster.client.get("/health").json() == {"status": "ok"}
    assert cluster.client.get("/specvlm/info").json()["defaults"]["pruner"] == "two_stage"
    by_video, hits = {}, 0
    for video in VIDEOS:
        for question in QUESTIONS:
            whole = cluster.ask(video, question)
            assert words_of(whole) == want[video, question]
            by_video.setdefault(video, set()).add(whole.headers["x-specvlm-replica"])
            hits += whole.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        stream = cluster.ask(video, question, stream=True, stream_options={"include_usage": True})
        events = events_of(stream.text)
        assert text_of(events) == want[video, question] and events[-1] == "[DONE]" and len(events) > 4
        by_video[video].add(stream.headers["x-specvlm-replica"])
        hits += events[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert all(len(found) == 1 for found in by_video.values())
    assert hits == 2 * len(VIDEOS)  # all but the first request about each


def test_errors_of_a_replica_come_as_they_are(cluster):
    wrong = cluster.ask("synthetic_9", "what?")
    assert wrong.status_code == 400 and wrong.json()["error"]["code"] == "no_such_file"
    assert cluster.ask("synthetic_1", "what?", tools=[{}]).json()["error"]["param"] == "tools"
    assert cluster.client.post(PATH, json={"model": "m", "messages": []}).status_code == 400
    assert cluster.client.post(PATH, content=b"{", headers={"content-type": "application/json"}).status_code == 400


def test_the_view_of_an_answer_is_found(cluster):
    events = events_of(cluster.ask("synthetic_1", "what?", stream=True, specvlm={"explain": True}).text)
    path = next(one["specvlm"]["view"] for one in events[:-1] if "view" in one.get("specvlm", {}))
    assert cluster.client.get(path).json()["kept"]
    assert cluster.client.get("/specvlm/views/chatcmpl-none").status_code == 404


def test_a_client_that_goes_frees_its_region(cluster):
    long = body(QUESTIONS[0], "embedded:synthetic_1", max_tokens=3000, ignore_eos=True, stream=True)
    with cluster.client.stream("POST", PATH, json=long) as answer:
        pieces = answer.iter_text()  # it is kept, since it closes the connection when it is dropped
        assert next(pieces).startswith("data: ")
        assert cluster.number("num_requests_running") == 1 and cluster.number("leased_cache_bytes") > 0
    assert until(lambda: cluster.number("leased_cache_bytes") == cluster.number("num_requests_running") == 0, 30)


def test_a_replica_that_is_killed_under_load_makes_no_answer_wrong_and_comes_back(cluster, want):
    before, stop = {one.pid for one in cluster.replicas()}, Event()
    assert len(before) == 2

    def client(at):
        found = []
        while not stop.is_set():
            video, question, stream = VIDEOS[at % 4], QUESTIONS[at // 4 % 2], at % 3 == 0
            answer, at = cluster.ask(video, question, stream=stream), at + 1
            found.append((answer, video, question, stream))
        return found

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, at) for at in range(4)]
        try:
            assert until(lambda: cluster.number("num_requests_running") >= 2)
            os.kill(min(before), signal.SIGKILL)
            names = {one.headers.get("x-specvlm-replica") for one in (cluster.ask(v, QUESTIONS[0]) for v in VIDEOS)}
            back = until(lambda: len({one.pid for one in cluster.replicas()} - before) == 1, 120)
            fresh = until(lambda: new_replica(cluster, names), 120)
        finally:
            stop.set()
        answers = [one for found in clients for one in found.result(120)]
    assert back and fresh and len(answers) > 4
    right = [one for one in answers if is_right(*one, want)]
    for answer, *_ in (one for one in answers if one not in right):
        last = answer.json() if answer.status_code != 200 else json.loads(answer.text.split("\n\n")[-2].removeprefix("data: "))
        assert set(last["error"]) == {"message", "type", "param", "code"} and last["error"]["code"] == "replica_lost"
    assert len(right) >= len(answers) - 4  # at most one of each client was in its stream


def new_replica(cluster, names):
    """Whether a replica answers that was not there before. Any image may be hashed to it."""
    number = int.from_bytes(os.urandom(4), "big")
    answer = cluster.client.post(PATH, json=body(f"{number}", None, max_tokens=1))
    return answer.status_code == 200 and answer.headers["x-specvlm-replica"] not in names


def is_right(answer, video, question, stream, want):
    """Whether an answer is complete and the pair's own. Raises AssertionError if it is complete and another one."""
    if answer.status_code != 200:
        return False
    events = events_of(answer.text) if stream else []
    if stream and events[-1] != "[DONE]":
        assert want[video, question].startswith(text_of(events[:-1]))
        return False
    assert (text_of(events) if stream else words_of(answer)) == want[video, question]
    return True
