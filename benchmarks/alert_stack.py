"""Monitoring stack of real processes: monitors, Prometheus, Alertmanager, a webhook, and paced trainings.

`benchmarks.alert_lead` and the tests share it. A training takes one second per step, because alerting takes seconds.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import yaml

from benchmarks.paced_training import Paced
from benchmarks.training import Recipe
from koopmon.grafana.rules import prometheus_rules

ROOT = Path(__file__).resolve().parent.parent
CALIBRATOR = ROOT / "benchmarks" / "results" / "calibrator.json"
ALERTMANAGER = ROOT / "deploy" / "alertmanager.yml"
READY_SECONDS = 120.0
STOP_SECONDS = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One alert in one notification of the webhook; `at` is Unix time."""

    at: float
    status: str
    name: str
    run: str
    labels: dict[str, str]
    annotations: dict[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a training's log; `at` is Unix time."""

    step: int
    loss: float
    at: float


class Training:
    """A paced training in its own process."""

    def __init__(self, name: str, recipe: Recipe, endpoint: str, folder: Path) -> None:
        self.name = name
        self._log, self._stop = folder / f"{name}.jsonl", folder / f"{name}.stop"
        job = Paced(run=name, recipe=recipe, endpoint=endpoint, log=str(self._log), stop=str(self._stop))
        code = "from benchmarks.paced_training import main; main()"
        with (folder / f"{name}.output").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, msgspec.json.encode(job).decode()],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )

    def steps(self) -> list[Step]:
        """Return the lines so far."""
        text = self._log.read_text() if self._log.exists() else ""
        return [Step(**json.loads(line)) for line in text.split("\n")[:-1]]

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """End the training at its next step, with a goodbye."""
        self._stop.touch()

    def close(self) -> None:
        self.stop()
        _end(self._process)


class Stack:
    """Context of the stack; `policies` maps monitors to policies. Needs prometheus and prometheus-alertmanager."""

    def __init__(self, folder: Path, policies: Sequence[str]) -> None:
        self.folder = folder
        self.notices: list[Notice] = []
        """Notices in the order of arrival."""
        self._policies = policies
        self._endpoints: dict[str, str] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with self._exit as undo:
            webhook = undo.enter_context(_Webhook(self.notices))
            targets = [self._start_monitor(undo, policy) for policy in self._policies]
            alertmanager = self._start_alertmanager(undo, webhook.url)
            self.url = self._start_prometheus(undo, targets, alertmanager)
            until(lambda: self._healthy(len(targets)), READY_SECONDS, "Prometheus does not scrape the monitors")
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def store(self, policy: str) -> Path:
        """Return the history of the monitor with `policy`."""
        return self.folder / f"{policy}.sqlite3"

    def train(self, name: str, recipe: Recipe, policy: str) -> Training:
        """Start a training under the monitor with `policy`. It ends with the stack at the latest."""
        training = Training(name, recipe, self._endpoints[policy], self.folder)
        self._exit.callback(training.close)
        return training

    def ask(self, path: str, **parameters: str) -> Any:
        """Return `data` of a response of Prometheus' API. Raises OSError or ValueError."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30.0) as answer:  # noqa: S310
            return json.load(answer)["data"]

    def heard(self, run: str, name: str, status: str, *, after: float = 0.0) -> Notice | None:
        """Return the first notice of an alert about a run after `after`."""
        found = (n for n in list(self.notices) if (n.run, n.name, n.status) == (run, name, status) and n.at > after)
        return next(found, None)

    def _healthy(self, num_targets: int) -> bool:
        try:
            targets = self.ask("targets")["activeTargets"]
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return [target["health"] for target in targets] == ["up"] * num_targets

    def _start_monitor(self, undo: ExitStack, policy: str) -> str:
        config, ready = self.folder / f"{policy}.toml", self.folder / f"{policy}.ready"
        config.write_text(f'[policy]\nname = "{policy}"\n[monitor]\ncalibrator = "{CALIBRATOR}"\n')
        places = {"--bind": "tcp://127.0.0.1:0", "--http": "127.0.0.1:0", "--device": "cpu"}
        places |= {"--store": str(self.store(policy)), "--config": str(config), "--ready-file": str(ready)}
        words = [word for pair in places.items() for word in pair]
        self._start(undo, f"monitor-{policy}", [sys.executable, "-m", "koopmon", "monitor", *words])
        until(ready.exists, READY_SECONDS, f"the monitor of {policy} does not serve")
        told = json.loads(ready.read_text())
        self._endpoints[policy] = told["endpoint"]
        return str(told["http"])

    def _start_alertmanager(self, undo: ExitStack, webhook: str) -> str:
        """Start Alertmanager with the configuration of deploy/ and the webhook's address."""
        settings = yaml.safe_load(ALERTMANAGER.read_text())
        (receiver,) = settings["receivers"]
        receiver["webhook_configs"][0]["url"] = webhook
        path = self.folder / "alertmanager.yml"
        path.write_text(yaml.safe_dump(settings))
        address = f"127.0.0.1:{free_port()}"
        options = {"config.file": path, "storage.path": self.folder / "alertmanager", "web.listen-address": address}
        words = [f"--{name}={value}" for name, value in options.items()]
        self._start(undo, "alertmanager", ["prometheus-alertmanager", *words, "--cluster.listen-address="])
        return address

    def _start_prometheus(self, undo: ExitStack, targets: Sequence[str], alertmanager: str) -> str:
        rules, path = self.folder / "koopmon.rules.yml", self.folder / "prometheus.yml"
        rules.write_text(yaml.safe_dump(prometheus_rules()))
        settings = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
            "scrape_configs": [{"job_name": "koopmon", "static_configs": [{"targets": list(targets)}]}],
        }
        path.write_text(yaml.safe_dump(settings))
        address = f"127.0.0.1:{free_port()}"
        options = {"config.file": path, "storage.tsdb.path": self.folder / "tsdb", "web.listen-address": address}
        words = [f"--{name}={value}" for name, value in options.items()]
        self._start(undo, "prometheus", ["prometheus", *words])
        return f"http://{address}"

    def _start(self, undo: ExitStack, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        undo.callback(_end, process)


class _Webhook:
    """Webhook that appends the notifications of Alertmanager to `notices`."""

    def __init__(self, notices: list[Notice]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                at = time.time()
                for alert in told["alerts"]:
                    labels = alert["labels"]
                    notices.append(
                        Notice(
                            at=at,
                            status=alert["status"],
                            name=labels["alertname"],
                            run=labels.get("run", ""),
                            labels=labels,
                            annotations=alert["annotations"],
                        )
                    )
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/koopmon"
        self._thread = threading.Thread(target=self._server.serve_forever, name="webhook")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll `condition` twice per second. Raises RuntimeError with `what` after the time limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}, within {seconds:.0f} s")
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
