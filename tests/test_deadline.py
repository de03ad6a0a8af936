"""The deadline ends a read that a socket timeout does not end."""

from __future__ import annotations

import socket
import time

import pytest

from koopmon.deadline import Deadline


def read(sock: socket.socket, limit: Deadline, *, early: bool) -> None:
    """Read until the deadline; the socket is watched before it or after it."""
    with limit:
        while not early and not limit.passed:
            time.sleep(0.01)
        limit.watch(lambda: sock)
        if sock.recv(1) == b"":
            raise ConnectionResetError("the socket was shut down")


@pytest.mark.parametrize("early", [True, False], ids=["before the deadline", "after it"])
def test_a_read_ends_at_the_deadline(early: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError, match=r"no complete answer within 0\.05 s"):
        read(ours, Deadline(0.05), early=early)


def test_an_error_before_the_deadline_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match="own"), Deadline(60.0):
        raise ValueError("own")


def test_nothing_is_shut_down_after_a_success() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with Deadline(60.0) as limit:
            limit.watch(lambda: ours)
        assert not limit.passed
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"
