"""Decisions as annotations in a Grafana that responds, refuses, hangs or is missing. The monitor is unaffected."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.grafana import annotations
from koopmon.grafana.access import GrafanaAccess
from koopmon.grafana.annotations import Annotations
from koopmon.wire.messages import Applied
from tests.fake_grafana import TOKEN, FakeGrafana

Start = Callable[..., Any]
Until = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def grafana() -> Iterator[FakeGrafana]:
    fake = FakeGrafana(prefix="/grafana")
    yield fake
    fake.close()


def access(url: str, timeout_seconds: float = 5.0, token: str = TOKEN) -> GrafanaAccess:
    return GrafanaAccess(url, token, timeout_seconds)


def texts(grafana: FakeGrafana) -> list[str]:
    return [each["text"] for each in grafana.state.annotations]


def unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_what_is_told_arrives_in_order_and_as_text(grafana: FakeGrafana) -> None:
    told = Annotations(access(grafana.url), 10)
    told.add(1700000000.25, ("job", "set_lr_scale"), "a <b>peer</b>\nsays & more")
    for number in range(3):
        told.add(1.0, ("job",), str(number))
    told.close()
    assert grafana.state.annotations[0] == {
        "time": 1700000000250,
        "tags": ["koopmon", "job", "set_lr_scale"],
        "text": "a &lt;b&gt;peer&lt;/b&gt;?says &amp; more",
    }
    assert texts(grafana)[1:] == ["0", "1", "2"]
    assert {(request.method, request.path) for request in grafana.requests} == {("POST", "/grafana/api/annotations")}


def test_a_grafana_that_comes_back_gets_the_newest(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """While it is missing, the oldest ones are dropped. One line reports the failure, another the recovery and the
    losses.
    """
    monkeypatch.setattr(annotations, "FIRST_PAUSE_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    port = unused_port()
    told = Annotations(access(f"http://127.0.0.1:{port}/"), 4)
    for number in range(10):
        told.add(1.0, (), str(number))
    until(lambda: "not posted: Connection refused" in caplog.text)
    grafana = FakeGrafana(port=port)
    try:
        until(lambda: len(grafana.state.annotations) == 4)
        until(lambda: "posted again; 6 were lost" in caplog.text)
        told.add(1.0, (), "later")
        told.close()
        assert texts(grafana) == ["6", "7", "8", "9", "later"]
    finally:
        grafana.close()
    assert len(caplog.records) == 2
    assert TOKEN not in caplog.text


def test_an_outage_is_waited_for_and_a_refusal_is_not(
    grafana: FakeGrafana, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(annotations, "FIRST_PAUSE_SECONDS", 0.05)
    told = Annotations(access(grafana.url), 10)
    with grafana.failing(503, times=2):
        told.add(1.0, (), "waits")
        until(lambda: texts(grafana) == ["waits"])
    told.close()
    assert caplog.text.count("annotations are not posted: it answers 503") == 1
    refused = Annotations(access(grafana.url, token="glsa_another"), 10)
    for number in range(3):
        refused.add(1.0, (), str(number))
    refused.close()
    assert caplog.text.count("it answers 401: Invalid API key") == 1
    assert "3 annotations were not posted" in caplog.text


@pytest.mark.parametrize("fault", ["hang", "close", "html", "redirect"])
def test_no_grafana_holds_anybody_up(
    grafana: FakeGrafana, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The end waits only for a moment, also without a response."""
    monkeypatch.setattr(annotations, "CLOSE_SECONDS", 0.3)
    with grafana.failing(fault):
        told = Annotations(access(grafana.url, timeout_seconds=20.0), 2)
        before = time.monotonic()
        for number in range(1000):
            told.add(1.0, (), str(number))
        told.close()
        assert time.monotonic() - before < 10.0, "an answer would have been waited for 20 s"
    assert "annotations were not posted" in caplog.text or fault == "html"
    assert grafana.state.annotations == []


def backed_off(agent: Any, step: int) -> Any:
    """Send a step that is not finite from the run of `agent`; return the command that follows."""
    agent.snapshot(step, torch.full((4, 96, 12), math.nan).bfloat16())
    return agent.expect_command("set_lr_scale")


def test_every_decision_and_its_outcome_is_annotated(
    start_monitor: Start, connect: Start, grafana: FakeGrafana, tmp_path: Path, until: Until
) -> None:
    file = tmp_path / "grafana.token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    monitor = start_monitor(grafana={"url": grafana.url, "token_file": str(file)})
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    command = backed_off(agent, 3)
    agent.acknowledge(command, "applied", Applied(lr_scale=command.lr_scale), step=4)
    until(lambda: any("applied" in each["tags"] for each in grafana.state.annotations))
    with monitor.history() as history:
        decisions = list(history.decisions("job"))
    decided = [each for each in grafana.state.annotations if "applied" not in each["tags"]]
    assert len(decided) == len(decisions)
    assert all(row.reason in each["text"] for row, each in zip(decisions, decided, strict=True))
    (acted,) = [each for each in decided if "set_lr_scale" in each["tags"]]
    assert acted["tags"][:3] == ["koopmon", "job", "acting"]
    assert "job step 3: " in acted["text"]
    assert abs(acted["time"] / 1000 - time.time()) < 120.0
    (outcome,) = [each for each in grafana.state.annotations if "applied" in each["tags"]]
    assert outcome["tags"] == ["koopmon", "job", "set_lr_scale", "applied"]
    assert outcome["text"] == "job step 4: set_lr_scale applied"


@pytest.mark.process
@pytest.mark.parametrize("fault", ["gone", "hang"])
def test_a_monitor_whose_grafana_is_dead_guards_all_the_same(
    start_process: Start, connect: Start, grafana: FakeGrafana, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("KOOPMON_GRAFANA_TOKEN", TOKEN)
    url = f"http://127.0.0.1:{unused_port()}/" if fault == "gone" else grafana.url
    with grafana.failing("hang"):
        monitor = start_process(grafana={"url": url, "timeout_seconds": 60.0})
        agent = connect(monitor.addresses.endpoint)
        agent.hello()
        agent.heartbeat(2, dropped={"not_finite": 1})  # the first of two in a row
        command = backed_off(agent, 3)
        held = Applied(lr_scale=command.lr_scale)
        agent.acknowledge(command, "applied", held, step=4)
        agent.heartbeat(19, dropped={"not_finite": 2}, applied=held)
        assert backed_off(agent, 20).lr_scale < command.lr_scale
        assert monitor.end(signal.SIGTERM) == 0
    log = monitor.log.read_text()
    assert "annotations were not posted" in log
    assert log.count("annotations are not posted: ") == (fault == "gone")
    assert TOKEN not in log
    assert "Traceback" not in log


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "koopmon", "monitor", "--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", *words]


@pytest.mark.process
def test_the_command_line_names_grafana_and_the_file_of_its_token(
    connect: Start, grafana: FakeGrafana, tmp_path: Path, until: Until
) -> None:
    file, ready = tmp_path / "grafana.token", tmp_path / "ready.json"
    file.write_text(TOKEN)
    file.chmod(0o600)
    words = ("--grafana-url", grafana.url.rstrip("/"), "--grafana-token-file", str(file), "--ready-file", str(ready))
    store = str(tmp_path / "history.sqlite3")
    with subprocess.Popen(command(*words, "--store", store, "--device", "cpu"), stderr=subprocess.PIPE) as process:
        try:
            until(lambda: ready.exists() or process.poll() is not None)
            agent = connect(json.loads(ready.read_text())["endpoint"])
            agent.hello()
            agent.heartbeat(2, dropped={"not_finite": 1})  # the first of two in a row
            backed_off(agent, 3)
            until(lambda: any("set_lr_scale" in each["tags"] for each in grafana.state.annotations))
        finally:
            process.terminate()
        assert process.stderr is not None
        log = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert TOKEN not in log


@pytest.mark.process
def test_a_monitor_without_a_token_does_not_begin(tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KOOPMON_")}
    words = ("--grafana-url", "http://grafana.example.org/", "--store", str(tmp_path / "history.sqlite3"))
    done = subprocess.run(command(*words), env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "a service account's token is needed, in a file of mode 0600 or in KOOPMON_GRAFANA_TOKEN" in done.stderr
