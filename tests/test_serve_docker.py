"""The files for Docker name what exists: copied paths, keys of the server, metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families as parsed

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


def lines_of():
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_dockerfile_copies_what_exists_and_what_is_not_ignored():
    known = {
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "SHELL",
        "RUN",
        "ENV",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {word for word, _ in lines_of()} <= known
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [rest.split()[:-1] for word, rest in lines_of() if word == "COPY" and not rest.startswith("--from")]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists() and name in kept
    assert lines_of()[-1][0] == "CMD" and any(line == ["USER", "10001"] for line in lines_of())


def test_its_command_line_is_one_that_the_server_takes():
    from specvlm.app import compose
    from specvlm.serve.settings import NAMES

    entry, rest = (json.loads(value) for word, value in lines_of() if word in ("ENTRYPOINT", "CMD") and value.startswith("["))
    assert entry[:3] == ["python", "-m", "specvlm.serve"]
    assert {word.partition("=")[0] for word in entry[3:]} <= set(NAMES)
    assert compose.compose(rest).target.path.startswith("embedded:")


def test_compose_and_provisioning_fit_together():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {"specvlm", "prometheus", "grafana"}
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists()
    scraped = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == ["specvlm:8000"]
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    dashboard = json.loads((DOCKER / "grafana/dashboard.json").read_text())
    assert all(panel["datasource"]["uid"] == source["uid"] for panel in dashboard["panels"])


def test_the_dashboard_asks_for_metrics_that_there_are():
    from session_pairs import session

    from specvlm.serve.admission import Admission
    from specvlm.serve.metrics import Metrics

    text = Metrics(session(), Admission(1, 1, 1), "m", "specvlm").text().decode()
    there = {family.name + end for family in parsed(text) for end in ("", "_total", "_bucket", "_sum", "_count")}
    dashboard = json.loads((DOCKER / "grafana/dashboard.json").read_text())
    asked = re.findall(r"specvlm:\w+", " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]))
    assert len(set(asked)) > 10 and set(asked) <= there
