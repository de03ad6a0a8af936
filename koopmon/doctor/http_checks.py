"""Checks of the monitor's HTTP pages and of one run's metrics."""

from __future__ import annotations

import http.client
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from koopmon.doctor.findings import Finding, fail, ok, warn
from koopmon.errors import ConfigError, one_line
from koopmon.http_client import exchange
from koopmon.wire.messages import ProbeReply

DEFAULT = "http://127.0.0.1:9464"
HTTP_SECONDS = 2.0
MAX_PAGE_BYTES = 64 << 20
STALE_SECONDS = 120.0
"""Age in seconds above which the last snapshot of a running job is reported as stale."""
_SAMPLE = re.compile(r"koopmon_(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
STATES = ("ended", "running", "vanished")


@dataclass(slots=True)
class Pages:
    """The pages of one monitor.

    `runs` maps each run to its samples by name; samples with a reason or a state have the key `name:reason`. With
    `optional`, the
    address is the default and the pages may be elsewhere.

    Raises ConfigError for a malformed URL.
    """

    url: str
    token: str = ""
    optional: bool = False
    runs: dict[str, dict[str, float]] = field(default_factory=dict)
    read: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"--http {self.url!r}: expected http://HOST:PORT or https://HOST:PORT")

    def findings(self) -> Iterator[Finding]:
        """Check health, readiness and metrics."""
        try:
            alive, _ = self._get("healthz")
            ready, _ = self._get("readyz")
            status, text = self._get("metrics")
        except (OSError, http.client.HTTPException) as error:
            said = f"no answer at {self.url}: {one_line(error) or type(error).__name__}"
            fix = "give their address with --http; the monitor logs it at its start"
            yield warn("pages", said, fix) if self.optional else fail("pages", said, fix)
            return
        if "koopmon_" not in text and status == 200:
            yield fail("pages", f"{self.url} is not a koopmon monitor's", "give the address of its pages with --http")
            return
        if alive != 200:
            said = f"/healthz returns {alive}: the monitor hangs"
            yield fail("pages", said, "restart it; the recorded history is kept")
        elif ready != 200:
            yield warn("pages", f"/readyz returns {ready}: the monitor is not ready yet", "wait, or read its log")
        if status == 401:
            yield warn("pages", "/metrics needs a login", "export KOOPMON_HTTP_TOKEN with the monitor's token")
            return
        if status != 200:
            yield fail("pages", f"/metrics returns {status}", "read the monitor's log")
            return
        self.runs, self.read = _samples(text), True
        if alive == ready == 200:
            known = ", ".join(f"{run} {_state(samples)}" for run, samples in list(self.runs.items())[-5:])
            yield ok("pages", f"{self.url} is healthy; runs: {known or 'none at present'}")

    def _get(self, page: str) -> tuple[int, str]:
        url = f"{self.url.partition('?')[0].partition('#')[0].rstrip('/')}/{page}"
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            answer = exchange("GET", url, headers=headers, seconds=HTTP_SECONDS, max_bytes=MAX_PAGE_BYTES)
        except ssl.SSLError as error:
            raise OSError(f"TLS: {error.reason}") from error
        if not answer.complete:
            raise TimeoutError(f"/{page} did not end within {HTTP_SECONDS:g} s")
        return answer.status, answer.body.decode("utf-8", "replace")


def _samples(text: str) -> dict[str, dict[str, float]]:
    runs: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is None:
            continue
        labels = dict(_LABEL.findall(match["labels"] or ""))
        if "run" not in labels or "layer" in labels:
            continue
        part = labels.get("reason") or labels.get("state")
        name = match["name"] + (f":{part}" if part else "")
        try:
            runs.setdefault(labels["run"], {})[name] = float(match["value"])
        except ValueError:
            continue
    return runs


def _state(samples: Mapping[str, float]) -> str:
    return next((state for state in STATES if samples.get(f"run_state:{state}")), "unknown")


def of_run(run: str, reply: ProbeReply | None, pages: Pages | None) -> Iterator[Finding]:
    """Check one run: unknown, refused, silent, without snapshots, stale, or healthy."""
    samples = {} if pages is None else pages.runs.get(run, {})
    state = (reply.run_state if reply is not None else None) or (_state(samples) if samples else "unknown")
    if reply is not None and reply.refused:
        yield fail("run", f"{run}: hello is refused: {reply.refused}", fix_of_refusal(reply.refused))
        return
    if state == "unknown":
        if reply is None and not (pages is not None and pages.read):
            yield warn("run", f"{run}: unknown, because no monitor answered", "see the check `monitor`")
            return
        fix = (
            "check KOOPMON_ENDPOINT and KOOPMON_RUN of the job, which `koopmon run -- CMD` sets, and read its first"
            " lines: they give the reason if it is not attached"
        )
        yield fail("run", f"{run}: the monitor does not know it", fix)
        return
    step = samples.get("step", -1.0 if reply is None or reply.step is None else float(reply.step))
    at = f", last step {step:.0f}" if step >= 0 else ""
    if state != "running":
        said = f"{run}: {state}{at}"
        yield ok("run", said) if state == "ended" else fail("run", said, "check that the job and its network are alive")
        return
    yield ok("run", f"{run}: running{at}")
    if samples:
        yield from _snapshots(samples)


def _snapshots(samples: Mapping[str, float]) -> Iterator[Finding]:
    received = samples.get("snapshots_received_total", 0.0)
    drops = ((name, count) for name, count in samples.items() if "snapshots_dropped_total:" in name and count)
    dropped = {name.partition(":")[2]: count for name, count in drops}
    lost = ", ".join(f"{count:.0f} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))
    if not received:
        worst = max(dropped, key=lambda reason: dropped[reason], default="")
        fix = "check that the model is in training mode, and that attach() ran before the first forward"
        fix = _FIX_OF_DROP.get(worst, fix)
        yield fail("snapshots", f"none received{f'; dropped: {lost}' if lost else ''}", fix)
    else:
        age = time.time() - samples.get("last_snapshot_timestamp_seconds", time.time())
        said = f"{received:.0f} received, the last {max(age, 0.0):.0f} s ago{f'; dropped: {lost}' if lost else ''}"
        fix = "check that the job still steps; snapshots are rare when their budget is spent ([cadence] budget_ratio)"
        yield warn("snapshots", said, fix) if age > STALE_SECONDS else ok("snapshots", said)
    if missing := samples.get("taps_missing_total", 0.0):
        fix = "attach before the first forward pass of a compiled model; blocks that are skipped have no taps"
        yield warn("taps", f"in {missing:.0f} snapshots a tap did not fire", fix)


_FIX_OF_DROP = {
    "monitor_away": "the ranks do not reach the data endpoint: check `data endpoint` on their host",
    "queue_full": "the network is slower than the snapshots: lower [sampling] num_samples or [cadence] dense_every",
    "no_buffer": "the agent sends too slowly: lower [sampling] num_samples, or raise [cadence] dense_every",
    "budget": "snapshots cost more than they may: raise [cadence] budget_ratio, or lower [sampling] num_samples",
    "not_finite": "the states are not finite: the training has diverged",
    "incomplete": "the chain of blocks is incomplete: `koopmon doctor FACTORY` shows the tapped points",
    "engine_failed": "the monitor could not profile them: read its log",
}


def fix_of_refusal(reason: str) -> str:
    """Return the fix for a hello that was refused with `reason`."""
    if "may not" in reason:
        return "add the run to `runs` in the agent's file in agents/ on the monitor's host, or set another KOOPMON_RUN"
    if "KOOPMON_RUN" in reason:
        return "export KOOPMON_RUN=NAME with a different name for each job"
    if "max_runs" in reason or "max_peers" in reason:
        return "raise it in the monitor's configuration, and restart it"
    return "read the monitor's log"
