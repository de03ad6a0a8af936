"""Secrets are in their files only: the tests search logs, arguments, the history, pages and the environment of jobs."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from zmq.utils import z85

import koopmon
from tests.agent.models import build, train_step
from tests.keyring import Keyring

pytestmark = pytest.mark.process

httpx = pytest.importorskip("httpx")

TOKEN, PASSWORD = "tok-5e19c0de-of-the-pages", "pass-77aa41-of-the-pages"


def told(process: subprocess.Popen[bytes], path: Path) -> Any:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return json.loads(path.read_text())


def test_no_secret_is_anywhere_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ring = Keyring(tmp_path / "keys")
    secrets = [ring.monitor.secret, ring.agent().secret]
    needles = [TOKEN.encode(), PASSWORD.encode(), base64.b64encode(f"eve:{PASSWORD}".encode())]
    needles += [secret.encode() for secret in secrets] + [z85.decode(secret.encode()) for secret in secrets]
    table = "".join(f'{key} = "{value}"\n' for key, value in ring.security().items())
    config = tmp_path / "koopmon.toml"
    config.write_text(f'[security]\n{table}[http]\nuser = "eve"\n')
    log, store = tmp_path / "log", tmp_path / "history.sqlite3"
    words = [
        "monitor",
        "--bind",
        "tcp://127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--device",
        "cpu",
        "--store",
        str(store),
    ]
    words += ["--config", str(config), "--ready-file", str(tmp_path / "ready")]
    environ = {**os.environ, "KOOPMON_HTTP_TOKEN": TOKEN, "KOOPMON_HTTP_PASSWORD": PASSWORD, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "koopmon", *words], stdout=output, stderr=output, env=environ)
    try:
        addresses = told(process, tmp_path / "ready")
        url = f"http://{addresses['http']}/metrics"
        assert httpx.get(url, timeout=30.0).status_code == 401
        assert httpx.get(url, auth=("eve", "wrong"), timeout=30.0).status_code == 401
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with koopmon.attach(model, optimizer, endpoint=addresses["endpoint"], run="job", config=str(config)) as agent:
            step, deadline = 0, time.monotonic() + 90
            while agent.status()["sent"] < 3:
                train_step(model, optimizer, step)
                step += 1
                assert time.monotonic() < deadline, agent.status()
            status = json.dumps(agent.status())
        page = httpx.get(url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=30.0)
        assert page.status_code == 200
        assert httpx.get(url, auth=("eve", PASSWORD), timeout=30.0).status_code == 200
        arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path("/proc/self/cmdline").read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    history = b"".join(path.read_bytes() for path in tmp_path.glob("history.sqlite3*"))
    places = {
        "log": log.read_bytes(),
        "agent's log": caplog.text.encode(),
        "arguments": arguments,
        "history": history,
        "pages": page.content,
        "status": status.encode(),
        "ready file": json.dumps(addresses).encode(),
    }
    assert b"job" in places["history"], "there is something to search"
    assert b"monitor: control" in places["log"]
    found = [(place, needle) for place, text in places.items() for needle in needles if needle in text]
    assert not found
    assert [path.name for path in (tmp_path / "keys").rglob("*") if needles[3] in _bytes(path)] == ["monitor.secret"]


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_a_job_does_not_inherit_what_opens_the_pages(tmp_path: Path) -> None:
    secrets = {"KOOPMON_HTTP_TOKEN": TOKEN, "KOOPMON_HTTP_PASSWORD": PASSWORD}
    body = "import os; print(sorted(name for name in os.environ if name.startswith('KOOPMON_')))"
    words = ["run", "--monitor", f"ipc://{tmp_path}/m/control", "--", sys.executable, "-S", "-c", body]
    done = subprocess.run(
        [sys.executable, "-m", "koopmon", *words], env={**os.environ, **secrets}, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert "KOOPMON_ENDPOINT" in done.stdout
    assert "KOOPMON_HTTP" not in done.stdout
