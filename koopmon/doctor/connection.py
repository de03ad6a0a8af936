"""Checks of the connection to the monitor: endpoint, keys, handshake, versions, data channel, clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from koopmon import __version__
from koopmon.doctor.findings import Finding, fail, ok, warn
from koopmon.errors import EndpointError, KeysError, KoopmonError
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.endpoints import is_loopback, reached_beside
from koopmon.wire.keys import MONITOR
from koopmon.wire.messages import PROTOCOL_VERSION, ProbeReply
from koopmon.wire.probe import NOBODY, ProbeResult, probe, reaches_data

DEFAULT = "tcp://127.0.0.1:9465"
"""Endpoint of `koopmon monitor` when neither an option nor the environment sets one."""
PROBE_SECONDS = 2.0
CLOCK_SECONDS = 5.0
"""Clock differences above this many seconds give a warning."""


def wanted_endpoint(option: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the endpoint that an agent would use, and the name of its source; the name is "" for the default."""
    if option is not None:
        return option, "--monitor"
    variable = "KOOPMON_ENDPOINT"
    return (environ[variable], variable) if environ.get(variable) else (DEFAULT, "")


@dataclass(slots=True)
class Connection:
    """Checks of one endpoint, in stages; `source` is its source as in `wanted_endpoint`.

    Each stage requires the one before it. `reply` is the monitor's reply, None before it arrives.
    """

    wanted: str
    source: str
    trust: AuthPolicy
    run: str | None
    reply: ProbeReply | None = None

    def findings(self) -> Iterator[Finding]:
        """Check endpoint, keys and monitor; if the monitor replies, check versions, data endpoint and clock."""
        try:
            endpoint = self.trust.check(self.wanted)
        except EndpointError as error:
            yield fail("endpoint", str(error), "set KOOPMON_ENDPOINT or --monitor to tcp://HOST:PORT or ipc:///PATH")
            return
        if self.source:
            yield ok("endpoint", f"{endpoint}, from {self.source}")
        else:
            yield warn(
                "endpoint",
                f"no endpoint is set; checked {endpoint}, the default of `koopmon monitor`",
                "export KOOPMON_ENDPOINT=ENDPOINT, or start the job with `koopmon run`, which starts its own monitor",
            )
        keys = self._keys(endpoint)
        yield keys
        if keys.level == "fail":
            return
        try:
            found = probe(endpoint, self.trust, run=self.run or NOBODY, timeout_seconds=PROBE_SECONDS)
        except KoopmonError as error:
            yield fail("monitor", str(error), "restrict the directory to its owner: chmod 700 DIRECTORY")
            return
        if found.reason == "version":
            yield fail("versions", found.failure, "pip install the same version of koopmon on both sides")
        elif found.refused:
            yield fail("monitor", f"it refuses this agent: {found.failure}", _fix_of(found.failure, self.trust))
        elif found.reply is None:
            yield self._absent(endpoint, found)
        else:
            self.reply = found.reply
            yield ok("monitor", f"answers at {endpoint} in {1000 * found.round_trip_seconds:.3g} ms")
            yield _versions(self.reply)
            yield self._data(endpoint, self.reply)
            yield _clock(found)

    def _keys(self, endpoint: str) -> Finding:
        trust = self.trust
        if not trust.uses_curve(endpoint):
            if is_loopback(endpoint):
                return ok("keys", "not needed: only this host reaches the endpoint")
            fix = "`koopmon keys make` on both sides, and no --insecure-plaintext-tcp"
            return warn("keys", "disabled: anyone who reaches the endpoint can read and control the training", fix)
        try:
            trust.check_agent_keys(endpoint)
        except KeysError as error:
            return fail("keys", str(error), "`koopmon keys make agent`, and copy monitor.key from the monitor's host")
        rotating = len(trust.monitor_key()) > 1
        also = "; a key rotation is in progress, and both keys of the monitor are valid" if rotating else ""
        return ok("keys", f"agent {trust.agent!r} has its secret key and the monitor's public key{also}")

    def _absent(self, endpoint: str, found: ProbeResult) -> Finding:
        if found.failure:
            return fail("monitor", f"the handshake failed: {found.failure}", _fix_of(found.failure, self.trust))
        if found.reason or found.shook_hands:
            said = f"the server at {endpoint} is not a koopmon monitor: no answer after the handshake"
            return fail("monitor", said, _START.format(endpoint))
        if found.reached:
            said = f"the server at {endpoint} does not use koopmon's protocol"
            return fail("monitor", said, f"check that the port is not that of the pages; {_START.format(endpoint)}")
        fix = (_START if is_loopback(endpoint) else _FAR).format(endpoint)
        return (fail if self.source else warn)("monitor", f"no server at {endpoint}", fix)

    def _data(self, endpoint: str, reply: ProbeReply) -> Finding:
        where = reached_beside(reply.data_endpoint, endpoint)
        fix = "open that port between the hosts; `koopmon monitor --bind-data ENDPOINT` chooses another"
        try:
            why = reaches_data(reply.data_endpoint, endpoint, self.trust, timeout_seconds=PROBE_SECONDS)
        except KoopmonError as error:
            why = str(error)
        if why:
            return fail("data endpoint", f"snapshots go to {where}: {why}", fix)
        return ok("data endpoint", f"{where} can be reached")


_START = "start one: koopmon monitor --bind {}"
_FAR = "check that `koopmon monitor --bind {}` runs on that host, and that the port is open between the hosts"


def _fix_of(failure: str, trust: AuthPolicy) -> str:
    name = f"{trust.agent}.key"
    if "does not know this agent's key" in failure or "no agent has the peer's key" in failure:
        return f"copy {trust.directory}/{name} to agents/{name} in the monitor's key directory"
    if "monitor.key" in failure:
        return f"copy monitor.key from the monitor's host to {trust.directory}/{MONITOR}.key"
    if "demands keys" in failure:
        return 'set [security] loopback = "curve" on this side too, or check that a koopmon monitor listens there'
    return "see the monitor's log"


def _versions(reply: ProbeReply) -> Finding:
    said = f"protocol {PROTOCOL_VERSION} on both sides; koopmon {__version__} here, {reply.koopmon_version} there"
    if __version__ != reply.koopmon_version:
        return warn("versions", said, f"pip install koopmon=={reply.koopmon_version}, or upgrade the monitor")
    return ok("versions", said)


def _clock(found: ProbeResult) -> Finding:
    offset = found.clock_offset_seconds
    way = "ahead of" if offset > 0 else "behind"
    said = f"the monitor's clock is {abs(offset):.3g} s {way} the local clock"
    if abs(offset) > CLOCK_SECONDS + found.round_trip_seconds:
        fix = (
            "synchronise both by NTP (timedatectl set-ntp true): alerts on stale snapshots and the rotation of keys use"
            " the clocks; commands expire by optimizer steps"
        )
        return warn("clock", said, fix)
    return ok("clock", said)
