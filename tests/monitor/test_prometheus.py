"""A real Prometheus scrapes a real monitor."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

httpx = pytest.importorskip("httpx")

CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: koopmon
    static_configs: [{{targets: ["{target}"]}}]
"""


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Start Prometheus on a target; return its URL."""
    started: list[subprocess.Popen[bytes]] = []

    def start(target: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / "prometheus.yml").write_text(CONFIG.format(target=target))
        with (tmp_path / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={tmp_path}/prometheus.yml",
                    f"--storage.tsdb.path={tmp_path}/tsdb",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )
        started.append(process)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(60)


@pytest.mark.needs("prometheus")
def test_prometheus_scrapes_every_series(
    prometheus: Callable[[str], str],
    start_monitor: Callable[..., Any],
    connect: Callable[..., Any],
    until: Callable[[Callable[[], Any]], Any],
) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    for step in (1, 3):
        agent.snapshot(step)
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 2)
    url = prometheus(monitor.addresses.http)

    def ask(path: str, **params: str) -> Any:
        try:
            answer = httpx.get(f"{url}/api/v1/{path}", params=params, timeout=10.0)
        except httpx.TransportError:
            return None
        return answer.json().get("data") if answer.status_code == 200 else None

    def target_health() -> str | None:
        targets = (ask("targets") or {}).get("activeTargets", [])
        return targets[0]["health"] if targets and targets[0]["health"] != "unknown" else None

    assert until(target_health) == "up", json.dumps(ask("targets"))
    layers = until(lambda: (ask("query", query="koopmon_spectral_radius") or {}).get("result"))
    assert {row["metric"]["layer"] for row in layers} == {"0", "1", "2"}
    for query in (
        "koopmon_risk",
        'koopmon_run_state{state="running"} == 1',
        "koopmon_snapshots_received_total == 2",
        "koopmon_build_info",
    ):
        assert ask("query", query=query)["result"], query
    kinds = ask("metadata")
    # In OpenMetrics, which Prometheus requests, the name of a counter's family has no suffix.
    assert kinds["koopmon_snapshots_received"][0]["type"] == "counter"
    assert kinds["koopmon_dmd_duration_seconds"][0]["type"] == "histogram"
