"""Acks are kept until the monitor has read them for certain, and no longer."""

from __future__ import annotations

from koopmon.agent.comms.pending_acks import MAX_PENDING_ACKS, PendingAcks
from tests.factories import ack


def unsent(acks: PendingAcks) -> list[str]:
    return [each.command_id for each in acks.unsent()]


def unread(acks: PendingAcks) -> list[str]:
    """Return the acks that a new connection repeats."""
    acks.on_reconnect()
    return unsent(acks)


def sent(*numbers: int) -> PendingAcks:
    acks = PendingAcks()
    for number in numbers:
        acks.add(ack(number), sent=True)
    return acks


def test_an_ack_that_the_transport_took_is_not_sent_again_on_this_connection() -> None:
    acks = sent(1)
    acks.add(ack(2), sent=False)
    assert unsent(acks) == [ack(2).command_id]
    acks.add(ack(2), sent=True)
    assert unsent(acks) == []


def test_a_reply_to_a_heartbeat_before_the_ack_proves_nothing() -> None:
    """The monitor replies in order: it may have read that heartbeat and not the later messages."""
    acks = PendingAcks()
    acks.on_heartbeat_sent()
    acks.add(ack(1), sent=True)
    acks.on_heartbeat_reply()
    assert unread(acks) == [ack(1).command_id]


def test_a_reply_to_a_heartbeat_after_the_ack_proves_it_read() -> None:
    acks = PendingAcks()
    acks.on_heartbeat_sent()
    acks.add(ack(1), sent=True)
    acks.on_heartbeat_sent()
    acks.add(ack(2), sent=True)
    acks.on_heartbeat_reply()
    acks.on_heartbeat_reply()
    assert unread(acks) == [ack(2).command_id]


def test_a_first_heartbeat_proves_the_acks_before_it() -> None:
    acks = sent(1, 2)
    acks.on_heartbeat_sent()
    acks.on_heartbeat_reply()
    assert unread(acks) == []


def test_an_ack_that_was_never_sent_stays_whatever_is_replied() -> None:
    acks = PendingAcks()
    acks.add(ack(1), sent=False)
    acks.on_heartbeat_sent()
    acks.on_heartbeat_reply()
    assert unsent(acks) == [ack(1).command_id]


def test_a_new_connection_counts_its_own_heartbeats() -> None:
    """Otherwise missing replies of the old connection would count for the new one."""
    acks = PendingAcks()
    for _ in range(3):
        acks.on_heartbeat_sent()
    acks.on_heartbeat_reply()
    acks.on_reconnect()
    acks.add(ack(1), sent=True)
    acks.on_heartbeat_sent()
    acks.on_heartbeat_reply()
    assert unread(acks) == []
    for _ in range(3):
        acks.on_heartbeat_sent()
        acks.on_heartbeat_reply()
    acks.on_reconnect()
    acks.on_heartbeat_sent()
    acks.add(ack(2), sent=True)
    acks.on_heartbeat_reply()
    assert unread(acks) == [ack(2).command_id]


def test_the_oldest_are_dropped_beyond_the_bound() -> None:
    acks = sent(*range(MAX_PENDING_ACKS + 3))
    assert unread(acks) == [ack(number).command_id for number in range(3, MAX_PENDING_ACKS + 3)]
