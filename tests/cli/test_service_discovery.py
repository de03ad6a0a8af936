"""`koopmon run` and `koopmon monitor` announce themselves to Prometheus, which finds a short job by itself."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.conftest import ScriptedAgent, wait_until

pytestmark = pytest.mark.process

httpx = pytest.importorskip("httpx")

PYTHON = sys.executable
# A job that prints its endpoint, and ends when its standard input does.
JOB = "import os, sys; print(os.environ['KOOPMON_ENDPOINT'], flush=True); sys.stdin.read()"
# A job that waits for a change of a directory, and prints the names in it.
SHOW = """
import pathlib, sys, time
def names(): return [path.name for path in pathlib.Path(sys.argv[1]).glob("*.json")]
end = time.monotonic() + 60
while names() == ["koopmon-node-1.json"] and time.monotonic() < end:
    time.sleep(0.05)
while len(names()) != 1 and time.monotonic() < end:
    time.sleep(0.05)
print(*names())
"""
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: short-jobs
    file_sd_configs:
      - {{files: ["{directory}/*.json"], refresh_interval: 5s}}
    relabel_configs:
      - {{source_labels: [__meta_koopmon_run], target_label: launched_as}}
"""


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*")) if directory.is_dir() else []


def announcement(directory: Path) -> Any:
    (file,) = wait_until(lambda: sorted(directory.glob("*.json")))  # not the file that becomes one
    (group,) = json.loads(file.read_text())
    return group


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[Path], Callable[..., Any]]]:
    """Start Prometheus on a directory; return a function that asks its API."""
    started: list[subprocess.Popen[bytes]] = []

    def start(directory: Path) -> Callable[..., Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        (tmp_path / "prometheus.yml").write_text(CONFIG.format(directory=directory))
        words = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
        with (tmp_path / "prometheus.log").open("wb") as log:
            started.append(subprocess.Popen([*words, f"--web.listen-address={address}"], stdout=log, stderr=log))

        def ask(path: str, **params: str) -> Any:
            try:
                answer = httpx.get(f"http://{address}/api/v1/{path}", params=params, timeout=10.0)
            except httpx.TransportError:
                return {}
            return answer.json().get("data", {}) if answer.status_code == 200 else {}

        wait_until(lambda: ask("status/runtimeinfo"))
        return ask

    yield start
    for process in started:
        process.terminate()
        process.wait(60)


@pytest.mark.needs("prometheus")
def test_prometheus_finds_a_short_job_by_itself(
    koopmon: Any, tmp_path: Path, prometheus: Callable[[Path], Callable[..., Any]]
) -> None:
    directory = tmp_path / "targets"
    directory.mkdir()
    ask = prometheus(directory)
    assert ask("targets")["activeTargets"] == []
    job = koopmon.start("run", "--run", "short", "--sd-directory", str(directory), "--", PYTHON, "-S", "-c", JOB)
    agent = ScriptedAgent(job.stdout.readline().decode().strip(), run="short")
    try:
        agent.hello()
        served = time.monotonic()
        for step in (1, 2, 3):
            agent.snapshot(step, loss=2.5)
        agent.heartbeat(3, loss=2.5)

        def scraped(name: str) -> Any:
            return ask("query", query=f'{name}{{run="short",job="koopmon"}}').get("result")

        (risk,) = wait_until(lambda: scraped("koopmon_risk"))
        (loss,) = wait_until(lambda: scraped("koopmon_loss"))
        print(f"loss and risk were scraped {time.monotonic() - served:.1f} s after the hello")
        assert loss["value"][1] == "2.5"
        assert risk["metric"]["launched_as"] == "short"
        assert "exported_run" not in risk["metric"], "a label of the target would rename that of the series"
    finally:
        agent.close()
    job.stdin.close()
    assert job.wait(60) == 0
    assert files(directory) == []
    wait_until(lambda: ask("targets")["activeTargets"] == [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_file_of_a_job_goes_with_it(koopmon: Any, tmp_path: Path, number: signal.Signals) -> None:
    job = koopmon.start("run", "--run", "short", "--", PYTHON, "-S", "-c", JOB)
    directory = tmp_path / "state" / "koopmon" / "targets"
    told = announcement(directory)
    assert told["labels"]["__meta_koopmon_run"] == "short"
    assert httpx.get(f"http://{told['targets'][0]}/readyz", timeout=30).status_code == 200
    job.send_signal(number)
    job.wait(60)
    assert files(directory) == []


def test_a_job_removes_the_file_of_one_that_was_killed(koopmon: Any, tmp_path: Path) -> None:
    directory = tmp_path / "state" / "koopmon" / "targets"
    directory.mkdir(parents=True)
    (directory / "koopmon-node-1.json").write_text("[]")
    done = koopmon("run", "--", PYTHON, "-S", "-c", SHOW, str(directory))
    assert done.returncode == 0
    (name,) = done.stdout.decode().split()
    assert name.startswith(f"koopmon-{socket.gethostname()}-")
    assert files(directory) == []


def test_a_monitor_for_many_jobs_announces_itself(koopmon: Any, tmp_path: Path) -> None:
    place = ["--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--store", "m.sqlite3", "--device", "cpu"]
    monitor = koopmon.start("monitor", *place, "--sd-directory", str(tmp_path / "targets"))
    told = announcement(tmp_path / "targets")
    assert (told["labels"]["job"], told["labels"]["__meta_koopmon_run"]) == ("koopmon", "")
    monitor.send_signal(signal.SIGTERM)
    assert monitor.wait(60) == 0
    assert files(tmp_path / "targets") == []


def test_with_a_shared_monitor_there_is_nothing_to_announce(koopmon: Any, one_line: Any) -> None:
    done = koopmon("run", "--monitor", "tcp://127.0.0.1:1", "--sd-directory", "x", "--", PYTHON, "-c", "pass")
    one_line(done, "--sd-directory belongs to the monitor")
