"""The deadline ends a read that a socket timeout does not end."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from koopmon.deadline import Deadline, LimitedCalls


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


def test_a_call_that_does_not_end_is_left_behind_once() -> None:
    """Further calls fail without a thread of their own until it has ended."""
    calls, released, began = LimitedCalls(0.05), threading.Event(), []

    def wait() -> None:
        began.append(threading.current_thread())
        released.wait()

    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"no complete answer within 0\.05 s"):
            calls.run(wait)
    assert len(began) == 1
    assert began[0].daemon
    released.set()
    began[0].join()
    assert LimitedCalls(60.0).run(lambda: 3) == 3
    assert calls.run(lambda: None) is None


def test_the_error_of_a_call_reaches_the_caller() -> None:
    def fail() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        LimitedCalls(60.0).run(fail)
