"""Reports the runs to Kubeflow Trainer, which shows them as `status.trainerStatus` of the TrainJob.

Kubeflow Trainer 2.2 and later, with the feature gate TrainJobStatus, gives each pod of a TrainJob an address, a token
and a certificate (KEP-2779). One report replaces the one before. A thread of its own sends them: a slow or
broken cluster does not delay the monitor.
"""

from __future__ import annotations

import http.client
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from koopmon.errors import describe_error, one_line
from koopmon.http_client import exchange
from koopmon.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

URL, TOKEN, CA_CERT = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "TOKEN", "CA_CERT"))
INTERVAL_SECONDS = 15.0
"""Kubeflow asks for at least five seconds."""
TIMEOUT_SECONDS = 5.0
CLOSE_SECONDS = 6.0
"""Maximum time for the last report at the end: a little more than one attempt."""
MAX_METRICS = 256
"""The limit of Kubeflow's schema."""
MAX_FILE_BYTES = 1 << 16
NAMES = {
    "step": "step",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "gradient_norm": "gradient_norm",
    "risk": "koopmon_risk",
    "forecast": "koopmon_forecast",
    "lr_scale": "koopmon_lr_scale",
}
"""Names in the report by metric."""


def open_status(metrics: Metrics, environ: Mapping[str, str]) -> TrainerStatus | None:
    """Start to report if this is a pod of a TrainJob. One line gives the reason if it is not."""
    missing = [name for name in (URL, TOKEN, CA_CERT) if not environ.get(name)]
    why = ""
    if missing:
        why = f"{missing[0]} is not set, so this is no pod of a TrainJob with the feature gate TrainJobStatus"
    elif urlsplit(environ[URL]).scheme != "https" or not urlsplit(environ[URL]).hostname:
        why = f"{URL} is no https address"
    if why:
        logger.warning("kubeflow: [monitor] trainer_status is on, but nothing is reported: %s", why)
        return None
    return TrainerStatus(metrics, environ[URL], token=Path(environ[TOKEN]), ca_cert=Path(environ[CA_CERT]))


class TrainerStatus:
    """The thread that reports, from its creation until `close`."""

    def __init__(
        self, metrics: Metrics, url: str, *, token: Path, ca_cert: Path, seconds: float = INTERVAL_SECONDS
    ) -> None:
        self._metrics = metrics
        self._url, self._token, self._ca_cert = url, token, ca_cert
        self._seconds = seconds
        self._closing = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="koopmon-kubeflow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Report the last values, unless the last report failed, for at most CLOSE_SECONDS, and stop the thread."""
        self._closing.set()
        if not self._failing:
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._report()
        if not self._failing:
            self._report()

    def _report(self) -> None:
        try:
            if not (found := metrics_of(self._metrics.gauges(NAMES))):
                return
            self._post(found)
        except Exception as error:  # no certificate, no answer, another status: the training goes on in any case
            why = describe_error(error)
        else:
            why = ""
        if bool(why) is not self._failing:
            self._failing = bool(why)
            if why:
                words = "kubeflow: the status was not reported: %s; further failures are not logged"
                logger.warning(words, one_line(why))
            else:
                logger.warning("kubeflow: the status is reported again")

    def _post(self, found: list[dict[str, str]]) -> None:
        """Send one report. Raises an error unless the server accepts it."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        # The monitor does not know the number of steps, so the report has no progressPercentage.
        body = json.dumps({"trainerStatus": {"metrics": found, "lastUpdatedTime": moment}})
        # Kubernetes replaces both files from time to time.
        token = _text(self._token).strip()
        if not token.isprintable() or not token or " " in token:
            raise ValueError(f"{self._token} holds no token")  # http.client would repeat its content
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        context = ssl.create_default_context(cadata=_text(self._ca_cert))
        answer = exchange(
            "POST", self._url, body=body.encode(), headers=headers, seconds=TIMEOUT_SECONDS, context=context
        )
        if answer.status != 200:
            raise http.client.HTTPException(f"the server answers {answer.status} {answer.reason}")


def metrics_of(runs: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """Return the metrics of a report from the gauges of each run. A name has its run if there are several."""
    prefix: Callable[[str], str] = (lambda run: f"{run}/") if len(runs) > 1 else (lambda run: "")
    found = [
        {"name": f"{prefix(run)}{NAMES[name]}", "value": f"{value:.10g}"}
        for run, gauges in sorted(runs.items())
        for name, value in gauges.items()
    ]
    return found[:MAX_METRICS]


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES).decode("ascii")
