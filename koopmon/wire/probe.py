"""Asks whether a monitor is at an endpoint, by the protocol's own handshake: a bare connection would count there as one
that was refused, and would not tell a monitor from anything else that listens.

Waits, and is for command lines and not for training processes; needs no torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from koopmon import __version__
from koopmon.errors import ProtocolError
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.endpoints import reached_beside
from koopmon.wire.headers import decode_header, encode_header
from koopmon.wire.messages import Probe, ProbeReply, Refused
from koopmon.wire.sockets import DataSender, Poller, ProbeClient, WireContext

NOBODY = "unknown"
"""The run that is asked about when none is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What came of a probe. With a `reply` a monitor is there, and all the rest is as it should be.

    `reached`: somebody listens there. `shook_hands`: it speaks the transport, and the keys are right. `failure` says in
    words why not, or what is wrong with the answer; `reason` is the codec's for an answer that breaks the protocol.
    """

    reply: ProbeReply | None = None
    reached: bool = False
    shook_hands: bool = False
    failure: str = ""
    reason: str = ""
    refused: bool = False
    """The monitor is there and would not serve this agent; `failure` is its reason."""
    clock_offset_seconds: float = 0.0
    """By how much the monitor's clock is ahead of ours, to within half of `round_trip_seconds`."""
    round_trip_seconds: float = 0.0


def probe(endpoint: str, trust: AuthPolicy, *, run: str = NOBODY, timeout_seconds: float = 2.0) -> ProbeResult:
    """Ask the monitor at `endpoint`, by the keys of `trust`. Raises EndpointError and KeysError."""
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
            frames = _received(control)
            if isinstance(frames, ProbeResult):
                return frames
            if frames is not None:
                return _answer(frames, time.monotonic() - asked_at, asked_wall)
        return ProbeResult(reached=control.reached, shook_hands=control.connections > 0, failure=control.failure)


def reaches_data(endpoint: str, known: str, trust: AuthPolicy, *, timeout_seconds: float = 2.0) -> str:
    """Whether the data endpoint that a monitor at `known` has named can be reached: "" or why not, in words.

    Raises EndpointError and KeysError.
    """
    deadline = time.monotonic() + timeout_seconds
    with WireContext(trust) as context:
        data = DataSender(context, reached_beside(endpoint, known))
        poller = Poller(data)
        while not data.connected:
            left = deadline - time.monotonic()
            if data.failure or left <= 0.0:
                return data.failure or ("it does not answer" if data.reached else "nobody listens there")
            poller.wait(min(left, 0.25))
    return ""


def _received(control: ProbeClient) -> list[memoryview] | ProbeResult | None:
    try:
        return control.recv()
    except ProtocolError as error:
        return ProbeResult(reached=True, shook_hands=True, failure=error.detail, reason=error.reason)


def _answer(frames: list[memoryview], took: float, asked: float) -> ProbeResult:
    try:
        if len(frames) != 1 or frames[0].nbytes > 1 << 16:
            raise ProtocolError("size", f"an answer of {len(frames)} frames, {frames[0].nbytes} bytes")
        message = decode_header(frames[0])
    except ProtocolError as error:
        return ProbeResult(reached=True, shook_hands=True, failure=error.detail, reason=error.reason)
    if isinstance(message, Refused):
        return ProbeResult(reached=True, shook_hands=True, failure=message.reason, refused=True)
    if not isinstance(message, ProbeReply):
        kind = type(message).__name__
        return ProbeResult(reached=True, shook_hands=True, failure=f"it answers with a {kind}", reason="direction")
    offset = message.time - (asked + took / 2)
    return ProbeResult(
        reply=message, reached=True, shook_hands=True, clock_offset_seconds=offset, round_trip_seconds=took
    )
