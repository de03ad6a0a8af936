"""One rank's side of the control channel, message by message, over a channel of the test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace

from koopmon.agent.comms.control_channel import HELLO_SECONDS, ControlChannel, RankInfo
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.rank_identity import Identity
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig
from koopmon.errors import EndpointError
from koopmon.wire.codec import decode_for_monitor, encode
from koopmon.wire.headers import PREFIX, Frame, WireLimits
from koopmon.wire.messages import (
    Ack,
    AgentMessage,
    Applied,
    Command,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Judgement,
    Refused,
    TrainingStep,
    Welcome,
)
from koopmon.wire.sockets import ControlClient

IDENTITY = Identity("run-1", "0123456789abcdef")
DESCRIPTION = RankInfo(process_rank=0, world_size=2, num_senders=2, adapter="transformer")
VERIFIED = replace(DESCRIPTION, num_layers=4, width=64, acts=True)


class Channel:
    """Control client that accepts messages while `takes` is true."""

    endpoint = "ipc:///nowhere"
    connected = True
    connections = 1
    failure = ""
    takes = True

    def __init__(self) -> None:
        self.sent: list[AgentMessage] = []
        self.reconnects: list[float] = []

    def reconnect(self, pause_seconds: float = 0.0) -> None:
        self.reconnects.append(pause_seconds)

    def send(self, frames: Sequence[Frame]) -> bool:
        if self.takes:
            self.sent.append(decode_for_monitor([memoryview(frame) for frame in frames], limits=WireLimits()))
        return self.takes

    def hellos(self) -> list[Hello]:
        return [message for message in self.sent if isinstance(message, Hello)]


class Nothing:
    """Actuator that applies nothing."""

    ready = False
    num_lost = 0

    def applied(self) -> Applied:
        return Applied()

    def at_step(self) -> TrainingStep:
        return TrainingStep(step=0)

    def submit(self, command: Command) -> None:
        pytest.fail("no command was sent")

    def restore(self, applied: Applied) -> None:
        pytest.fail("nothing was to be restored")

    def monitor_lost(self) -> None:
        self.num_lost += 1


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def link(channel: Channel) -> ControlChannel:
    control: Any = channel
    return ControlChannel(cast(ControlClient, control), IDENTITY, ControlConfig(), AgentStats(), Nothing(), DESCRIPTION)


def welcome(link: ControlChannel, now: float, heartbeat_seconds: float = 1.0) -> None:
    name = {"run": IDENTITY.run, "incarnation": IDENTITY.incarnation}
    message = Welcome(**name, data_endpoint="ipc:///data", heartbeat_seconds=heartbeat_seconds)
    assert isinstance(link.receive([memoryview(frame) for frame in encode(message)], now), Welcome)


def test_a_welcome_ends_the_hellos(link: ControlChannel, channel: Channel) -> None:
    link.tick(0.0)
    link.tick(0.5 * HELLO_SECONDS)
    assert len(channel.hellos()) == 1
    welcome(link, 0.6 * HELLO_SECONDS)
    assert link.welcomed
    link.tick(10.0 * HELLO_SECONDS)
    assert len(channel.hellos()) == 1


def test_a_welcome_to_an_older_hello_does_not_swallow_a_newer_description(
    link: ControlChannel, channel: Channel
) -> None:
    link.tick(0.0)
    link.describe(VERIFIED)
    welcome(link, 0.1)
    link.tick(0.1)
    assert [hello.num_layers for hello in channel.hellos()] == [0, 4]
    assert channel.hellos()[-1].acts


def test_a_description_that_could_not_be_sent_is_sent_later(link: ControlChannel, channel: Channel) -> None:
    link.tick(0.0)
    link.describe(VERIFIED)
    channel.takes = False
    link.tick(0.1)
    channel.takes = True
    welcome(link, 0.2)
    link.tick(0.2)
    assert channel.hellos()[-1].num_layers == 4


def reply(link: ControlChannel, now: float, **fields: Any) -> None:
    message = HeartbeatReply(run=IDENTITY.run, incarnation=IDENTITY.incarnation, **fields)
    link.receive([memoryview(frame) for frame in encode(message)], now)


def test_what_the_monitor_says_of_the_training_is_kept(link: ControlChannel, channel: Channel) -> None:
    link.tick(0.0)
    welcome(link, 0.1)
    judgement = Judgement(step=3, risk=0.5)
    message = HeartbeatReply(run=IDENTITY.run, incarnation=IDENTITY.incarnation, judgement=judgement)
    link.receive([memoryview(frame) for frame in encode(message)], 0.2)
    assert link._stats.judgement == judgement
    reply(link, 0.3)
    assert link._stats.judgement is None, "a monitor that knows nothing takes back what an earlier one said"


def acks(channel: Channel) -> list[str]:
    return [message.command_id for message in channel.sent if isinstance(message, Ack)]


def test_what_became_of_a_command_is_said_again_to_a_monitor_that_may_not_know(
    link: ControlChannel, channel: Channel
) -> None:
    link.tick(0.0)
    welcome(link, 0.1)
    link.acknowledge(CommandResult("00000001", "applied", 5))
    link.tick(0.2)  # a heartbeat and its reply: the monitor has read the earlier messages
    reply(link, 0.3)
    link.acknowledge(CommandResult("00000002", "applied", 6))
    channel.connections += 1  # messages in transit are lost
    link.tick(0.4)
    link.acknowledge(CommandResult("00000003", "expired", 7))
    assert acks(channel) == ["00000001", "00000002", "00000003"]
    welcome(link, 0.5)
    assert acks(channel)[3:] == ["00000002", "00000003"]
    link.tick(2.0)
    welcome(link, 2.1)
    assert len(acks(channel)) == 5, "once for each connection"


def test_an_ack_that_could_not_be_sent_is_sent_with_the_next_heartbeat(link: ControlChannel, channel: Channel) -> None:
    link.tick(0.0)
    welcome(link, 0.1)
    channel.takes = False
    link.acknowledge(CommandResult("00000001", "applied", 5))
    channel.takes = True
    link.tick(0.2)
    link.tick(5.0)
    assert acks(channel) == ["00000001"]


SILENCE = ControlConfig().monitor_lost_seconds


def ticks(link: ControlChannel, since: float, until: float) -> None:
    for tenth in range(int(10 * since), int(10 * until) + 1):
        link.tick(tenth / 10)


def test_a_connection_on_which_nothing_comes_back_is_made_anew(link: ControlChannel, channel: Channel) -> None:
    ticks(link, 0.0, SILENCE)
    assert channel.reconnects == [], "not before its time"
    ticks(link, SILENCE + 0.1, SILENCE + 0.2)
    assert channel.reconnects == [0.0]
    channel.connections += 1
    ticks(link, SILENCE + 0.3, 2.0 * SILENCE + 0.2)
    assert len(channel.reconnects) == 1, "the new one gets as long"
    ticks(link, 2.0 * SILENCE + 0.3, 3.0 * SILENCE)
    assert len(channel.reconnects) == 2


def test_heartbeats_that_get_no_reply_count_from_the_first_on(link: ControlChannel, channel: Channel) -> None:
    link.tick(0.0)
    welcome(link, 0.1)
    for second in range(1, 31):
        link.tick(float(second))
        reply(link, second + 0.5)
    assert channel.reconnects == []
    ticks(link, 31.0, 31.0 + SILENCE)
    assert channel.reconnects == []
    ticks(link, 31.1 + SILENCE, 31.2 + SILENCE)
    assert len(channel.reconnects) == 1


def test_a_monitor_that_was_never_there_is_not_lost(link: ControlChannel, channel: Channel) -> None:
    started, handler = time.monotonic(), cast(Nothing, link._handler)
    link.tick(started + SILENCE + 1.0)
    assert handler.num_lost == 0, "it may still start, and settings of a killed launch are in force"
    welcome(link, started + SILENCE + 2.0)
    link.tick(started + 2 * SILENCE + 3.0)
    assert handler.num_lost == 1


@pytest.mark.parametrize("seconds", [1.0, 60.0])
def test_rare_heartbeats_may_wait_longer_for_a_reply(link: ControlChannel, channel: Channel, seconds: float) -> None:
    message = Welcome(
        run=IDENTITY.run, incarnation=IDENTITY.incarnation, data_endpoint="ipc:///data", heartbeat_seconds=seconds
    )
    link.tick(0.0)
    link.receive([memoryview(frame) for frame in encode(message)], 0.0)
    silence = max(SILENCE, 3.0 * seconds)
    ticks(link, 0.1, silence)
    assert channel.reconnects == []
    ticks(link, silence, silence + 1.0)
    assert len(channel.reconnects) == 1


@pytest.mark.parametrize("answer", [b"rubbish", "refused"])
def test_any_answer_shows_that_the_connection_lives(link: ControlChannel, channel: Channel, answer: Any) -> None:
    refused = encode(Refused(run=IDENTITY.run, incarnation=IDENTITY.incarnation, reason="full"))
    for second in range(100):
        link.tick(float(second))
        link.receive([memoryview(answer if isinstance(answer, bytes) else refused[0])], second + 0.5)
    assert channel.reconnects == []


def test_what_could_not_be_sent_is_not_waited_for(link: ControlChannel, channel: Channel) -> None:
    channel.takes = False
    ticks(link, 0.0, 3.0 * SILENCE)
    assert channel.reconnects == [], "the transport makes the connection"
    channel.takes = True
    ticks(link, 3.0 * SILENCE, 4.0 * SILENCE)
    assert channel.reconnects == []


def test_a_connection_that_cannot_be_replaced_stays_and_is_tried_again(
    link: ControlChannel, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[float] = []

    def fail(pause_seconds: float = 0.0) -> None:
        tried.append(pause_seconds)
        raise EndpointError("no room for a socket")

    channel.reconnect = fail  # type: ignore[method-assign]
    ticks(link, 0.0, 3.0 * SILENCE)
    assert len(tried) == 2
    assert "stays as it is: no room for a socket" in caplog.text


def test_a_monitor_that_refuses_is_left_alone_for_half_a_minute(link: ControlChannel, channel: Channel) -> None:
    link.tick(0.0)
    refused = encode(Refused(run=IDENTITY.run, incarnation=IDENTITY.incarnation, reason="full"))
    link.receive([memoryview(frame) for frame in refused], 1.0)
    assert not link.welcomed
    for now in (2.0, 15.0, 30.9):
        link.tick(now)
    assert len(channel.hellos()) == 1
    link.tick(31.0)
    assert len(channel.hellos()) == 2


def test_states_that_are_not_finite_are_reported_soon(channel: Channel) -> None:
    """A rank of a large run has a slow heartbeat, and may be the only one whose states show the divergence."""
    stats, control = AgentStats(), cast(Any, channel)
    link = ControlChannel(control, IDENTITY, ControlConfig(), stats, Nothing(), DESCRIPTION)

    def beats(now: float) -> list[int]:
        link.tick(now)
        return [said.dropped["not_finite"] for said in channel.sent if isinstance(said, Heartbeat)]

    link.tick(0.0)
    welcome(link, 0.1, heartbeat_seconds=10.0)
    assert beats(0.1) == [0]
    assert beats(5.0) == [0]
    stats.drop("budget")
    assert beats(5.1) == [0]
    stats.drop("not_finite")
    assert link.next_due() == 10.1
    assert beats(5.2) == [0, 1]
    stats.drop("not_finite")
    assert beats(5.3) == [0, 1]
    assert beats(6.3) == [0, 1, 2]
    assert beats(16.2) == [0, 1, 2]
    assert beats(16.3) == [0, 1, 2, 2]


@pytest.mark.parametrize(("rank", "num_lines"), [(0, 1), (1, 0)])
def test_the_least_stride_of_a_busy_monitor_is_kept_and_told_once(
    rank: int, num_lines: int, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    stats, control = AgentStats(), cast(Any, channel)
    description = replace(DESCRIPTION, process_rank=rank)
    link = ControlChannel(control, IDENTITY, ControlConfig(), stats, Nothing(), description)
    reply(link, 1.0)
    reply(link, 2.0, min_stride=8, min_stride_from=50)
    reply(link, 3.0, min_stride=4, min_stride_from=90)
    assert [stats.stride_limit.at(step) for step in (89, 90)] == [8, 4]
    told = [record.getMessage() for record in caplog.records if "cannot judge" in record.getMessage()]
    assert len(told) == num_lines
    assert all("from step 50 on, snapshots are at least 8 steps apart" in words for words in told)


@pytest.mark.parametrize("fields", [{"min_stride": 0}, {"min_stride": 1025}, {"min_stride": 2, "min_stride_from": -1}])
def test_a_stride_out_of_bounds_is_refused(fields: dict[str, int], link: ControlChannel) -> None:
    message = HeartbeatReply(run=IDENTITY.run, incarnation=IDENTITY.incarnation, **fields)
    encoded = PREFIX + msgspec.msgpack.encode(message)
    assert link.receive([memoryview(encoded)], 1.0) is None
    assert link._stats.rejected == {"schema": 1}
    assert link._stats.stride_limit.at(10) == 1
