"""Probes an endpoint for a monitor with the protocol's own handshake.

A bare connection would count as a refused peer on the monitor, and could not distinguish a monitor from another server.
The probe blocks: use it in command lines, not in training processes. It does not import torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from koopmon import __version__
from koopmon.errors import ProtocolError
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.endpoints import reached_beside
from koopmon.wire.headers import decode_header, encode_header
from koopmon.wire.messages import Probe, ProbeReply, Refused
from koopmon.wire.sockets import DataSender, Poller, ProbeClient
from koopmon.wire.transport import WireContext

NOBODY = "unknown"
"""Run name of a probe that concerns no run."""
MAX_ANSWER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Result of a probe. A `reply` means that a monitor is there and its answer is valid.

    `reached`: a process listens there. `shook_hands`: the transport's handshake succeeded, so the keys match. `failure`
    describes the failed step or the invalid answer. `reason` is the codec's reason for an answer that breaks the
    protocol.
    """

    reply: ProbeReply | None = None
    reached: bool = False
    shook_hands: bool = False
    failure: str = ""
    reason: str = ""
    refused: bool = False
    """True when the monitor is there but refused this agent; `failure` is its reason."""
    clock_offset_seconds: float = 0.0
    """Lead of the monitor's clock over the local clock, in seconds, accurate to half of `round_trip_seconds`."""
    round_trip_seconds: float = 0.0


def probe(endpoint: str, trust: AuthPolicy, *, run: str = NOBODY, timeout_seconds: float = 2.0) -> ProbeResult:
    """Probe the monitor at `endpoint` with the keys of `trust`. Raises EndpointError and KeysError."""
    deadline = time.monotonic() + timeout_seconds
    question = [encode_header(Probe(run=run, incarnation="0" * 8, koopmon_version=__version__))]
    with WireContext(trust) as context:
        control = ProbeClient(context, endpoint)
        poller = Poller(control)
        asked_at = asked_wall = 0.0
        while (left := deadline - time.monotonic()) > 0.0:
            if not asked_at and control.connected and control.send(question):
                asked_at, asked_wall = time.monotonic(), time.time()
            if control.failure or control.failed:
                break
            poller.wait(min(left, 0.25))
            answer = _answer(control, asked_at, asked_wall)
            if answer is not None:
                return answer
        return ProbeResult(reached=control.reached, shook_hands=control.connections > 0, failure=control.failure)


def reaches_data(endpoint: str, known: str, trust: AuthPolicy, *, timeout_seconds: float = 2.0) -> str:
    """Connect to the data endpoint that a monitor at `known` reported; return "" or the reason for the failure.

    Raises EndpointError and KeysError.
    """
    deadline = time.monotonic() + timeout_seconds
    with WireContext(trust) as context:
        data = DataSender(context, reached_beside(endpoint, known))
        poller = Poller(data)
        while not data.connected:
            left = deadline - time.monotonic()
            if data.failure or left <= 0.0:
                return data.failure or ("no answer" if data.reached else "no server there")
            poller.wait(min(left, 0.25))
    return ""


def _answer(control: ProbeClient, asked_at: float, asked_wall: float) -> ProbeResult | None:
    """Return the result of the monitor's answer; None while there is none. The times are those of the question."""
    answered = partial(ProbeResult, reached=True, shook_hands=True)
    try:
        frames = control.recv()
        if frames is None:
            return None
        if frames[0].nbytes > MAX_ANSWER_BYTES:
            raise ProtocolError("size", f"an answer of {frames[0].nbytes} bytes")
        message = decode_header(frames[0])
    except ProtocolError as error:
        return answered(failure=error.detail, reason=error.reason)
    if isinstance(message, Refused):
        return answered(failure=message.reason, refused=True)
    if not isinstance(message, ProbeReply):
        return answered(failure=f"it answers with a {type(message).__name__}", reason="direction")
    took = time.monotonic() - asked_at
    offset = message.time - (asked_wall + took / 2)
    return answered(reply=message, clock_offset_seconds=offset, round_trip_seconds=took)
