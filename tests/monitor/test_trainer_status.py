"""Reports to Kubeflow Trainer, received by a server with a certificate of its own, as in a cluster."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon.monitor import trainer_status
from koopmon.monitor.trainer_status import CA_CERT, MAX_METRICS, TOKEN, URL, TrainerStatus, metrics_of, open_status
from koopmon.telemetry.metrics import BY_NAME, Metrics
from tests.notify.servers import WebhookServer, make_certificate

Until = Callable[[Callable[[], Any]], Any]
STATUS_PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/training/trainjobs/train/status"
VARIABLES = {URL: f"https://127.0.0.1:1{STATUS_PATH}", TOKEN: "/token", CA_CERT: "/ca.crt"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(certificate: tuple[str, str]) -> Iterator[WebhookServer]:
    server = WebhookServer(certificate)
    yield server
    server.close()


@pytest.fixture
def pod(server: WebhookServer, certificate: tuple[str, str], tmp_path: Path) -> dict[str, str]:
    """The variables of a pod of a TrainJob."""
    (tmp_path / "token").write_text("t0ken\n")
    url = f"https://127.0.0.1:{server.port}{STATUS_PATH}"
    return {URL: url, TOKEN: str(tmp_path / "token"), CA_CERT: certificate[0]}


def reporting(metrics: Metrics, pod: dict[str, str], seconds: float = 0.05) -> TrainerStatus:
    return TrainerStatus(metrics, pod[URL], token=Path(pod[TOKEN]), ca_cert=Path(pod[CA_CERT]), seconds=seconds)


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(CollectorRegistry(), {})
    made.set_gauges("train", {"step": 1234567.0, "loss": 2.5, "risk": 0.25, "lr_scale": 0.5, "ranks": 8.0})
    return made


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_a_report_has_the_form_of_kubeflow(
    server: WebhookServer, pod: dict[str, str], metrics: Metrics, until: Until
) -> None:
    status = reporting(metrics, pod)
    until(lambda: server.requests)
    metrics.set("loss", 1.25, "train")
    Path(pod[TOKEN]).write_text("renewed")
    status.close()
    first, last = server.requests[0], server.requests[-1]
    assert first.path == STATUS_PATH
    assert (first.headers["authorization"], first.headers["content-type"]) == ("Bearer t0ken", "application/json")
    assert last.headers["authorization"] == "Bearer renewed", "the token is not kept"
    assert set(first.body) == {"trainerStatus"}
    told = first.body["trainerStatus"]
    assert set(told) == {"metrics", "lastUpdatedTime"}, "a percentage is not known"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["lastUpdatedTime"])
    assert told["metrics"] == [
        {"name": "step", "value": "1234567"},
        {"name": "loss", "value": "2.5"},
        {"name": "koopmon_risk", "value": "0.25"},
        {"name": "koopmon_lr_scale", "value": "0.5"},
    ]
    assert {"name": "loss", "value": "1.25"} in last.body["trainerStatus"]["metrics"]


def test_names_of_several_runs_and_a_bounded_number(metrics: Metrics) -> None:
    metrics.set("loss", 9.0, "train.Critic")
    names = [each["name"] for each in metrics_of(metrics.gauges(trainer_status.NAMES))]
    assert names[:2] == ["train/step", "train/loss"]
    assert names[-1] == "train.Critic/loss"
    many = metrics_of({f"run-{number}": {"loss": 1.0} for number in range(300)})
    assert len(many) == MAX_METRICS
    assert metrics_of({}) == []
    assert set(trainer_status.NAMES) <= {name for name, series in BY_NAME.items() if series.labels == ("run",)}


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_a_server_that_refuses_is_one_line_and_its_return_another(
    server: WebhookServer, pod: dict[str, str], metrics: Metrics, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults.extend([403, 302, 500, "close"])
    status = reporting(metrics, pod)
    until(lambda: "reported again" in caplog.text)
    status.close()
    first, second = caplog.messages
    assert "the server answers 403" in first
    assert first.isprintable()
    assert "reported again" in second
    assert all(request.path == STATUS_PATH for request in server.requests), "a redirect is not followed"
    assert "t0ken" not in caplog.text


@pytest.mark.process
@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (TOKEN, None, "No such file"),
        (TOKEN, "SECRET\nX-Header: 1", "holds no token"),
        (TOKEN, "", "holds no token"),
        (TOKEN, "\udcff", "codec can't decode"),
        (CA_CERT, None, "No such file"),
        (CA_CERT, "no certificate", "SSLError|ValueError|PEM"),
    ],
)
def test_a_wrong_file_is_one_line_without_its_content(
    pod: dict[str, str],
    metrics: Metrics,
    tmp_path: Path,
    until: Until,
    caplog: pytest.LogCaptureFixture,
    name: str,
    content: str | None,
    says: str,
) -> None:
    path = tmp_path / "wrong"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    status = reporting(metrics, pod | {name: str(path)})
    until(lambda: caplog.messages)
    status.close()
    (line,) = caplog.messages
    assert re.search(says, line)
    assert "SECRET" not in line


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_another_certificate_gets_no_token(
    server: WebhookServer, pod: dict[str, str], metrics: Metrics, tmp_path: Path, until: Until, caplog: Any
) -> None:
    other = make_certificate(tmp_path)[0]
    status = reporting(metrics, pod | {CA_CERT: other})
    until(lambda: caplog.messages)
    status.close()
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert server.requests == []


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({URL: ""}, f"{URL} is not set"),
        ({TOKEN: ""}, f"{TOKEN} is not set"),
        ({CA_CERT: ""}, f"{CA_CERT} is not set"),
        ({URL: "http://127.0.0.1:1/status"}, f"{URL} is no https address"),
        ({URL: "https:///status"}, f"{URL} is no https address"),
    ],
)
def test_elsewhere_one_line_has_the_reason(
    metrics: Metrics, environ: dict[str, str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert open_status(metrics, VARIABLES | environ) is None
    (line,) = caplog.messages
    assert says in line


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_a_monitor_reports_its_last_values_at_its_end(
    server: WebhookServer,
    pod: dict[str, str],
    start_monitor: Callable[..., Any],
    connect: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    served = start_monitor(monitor={"trainer_status": True})
    agent = connect(served.addresses.endpoint)
    agent.hello()
    agent.heartbeat(step=7)
    served.stop()
    (request,) = server.requests
    assert {"name": "step", "value": "7"} in request.body["trainerStatus"]["metrics"]


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_by_default_nothing_is_reported(
    server: WebhookServer, pod: dict[str, str], start_monitor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    served = start_monitor()
    assert not any(thread.name == "koopmon-kubeflow" for thread in threading.enumerate())
    served.stop()
    assert server.requests == []


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_a_server_that_hangs_does_not_delay_the_end(
    pod: dict[str, str], metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_status, "TIMEOUT_SECONDS", 60.0)
    monkeypatch.setattr(trainer_status, "CLOSE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"https://127.0.0.1:{hanging.getsockname()[1]}/"
        status = reporting(metrics, pod | {URL: url}, seconds=3600.0)
        status.close()
        assert status._thread.is_alive(), "it waits for no answer"
