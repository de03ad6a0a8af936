"""Unknown peers, and agents that use other runs, against a monitor and a training.

After each attack, the monitor has counted the rejection by its reason, and the losses are bit-identical to those of the
training alone.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from koopmon.wire.codec import encode
from koopmon.wire.headers import PREFIX, WireLimits
from koopmon.wire.messages import (
    Ack,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    Hello,
    Refused,
    Shard,
    TrainingStep,
    Welcome,
)
from tests import factories
from tests.keyring import Keyring
from tests.monitor.conftest import make_states

pytestmark = pytest.mark.process

Train = Callable[..., Any]
Connect = Callable[..., Any]


def name_of(training: Any) -> dict[str, str]:
    """Return run and incarnation of a training of the monitor."""
    training.until(lambda: training.agent.status()["connected"])
    status = training.agent.status()
    return {"run": status["run"], "incarnation": status["incarnation"]}


def say_all(attacker: Any, name: dict[str, str]) -> int:
    """Send every message except hello as the run `name` on both channels; return the number of messages."""
    messages = [
        Heartbeat(**name, process_rank=0, training=TrainingStep(step=1 << 40), applied=Applied(lr_scale=0.5)),
        Ack(**name, command_id="0" * 8, outcome="applied", step=1, applied=Applied()),
        Goodbye(**name, process_rank=0, step=1, reason="so that nobody watches it any more"),
    ]
    for message in messages:
        attacker.send(message)
    states = make_states(1)
    shape = dict(zip(("num_points", "num_samples", "width"), states.shape, strict=True))
    shard = Shard(
        **name, process_rank=0, num_senders=1, training=TrainingStep(step=1), first_point=0, dtype="bfloat16", **shape
    )
    attacker.send_data(encode(shard, states))
    return len(messages) + 1


def hello(name: dict[str, str]) -> Hello:
    return factories.hello(**name, num_layers=3, width=12)


def still_runs(monitor: Any, training: Any, name: dict[str, str]) -> bool:
    """Return True if the monitor still has the run unchanged."""
    training.go_on()
    samples = monitor.samples()
    running = samples[f'run_state{{run="{name["run"]}",state="running"}}']
    return running == 1 and samples[f'lr_scale{{run="{name["run"]}"}}'] == 1


@pytest.mark.parametrize(
    ("who", "reason", "says"),
    [("stranger", "key", "no agent here has"), (None, "handshake", "without keys")],
    ids=["a key that is not known", "no key"],
)
def test_strangers_do_not_get_in(
    monitor: Any, train: Train, attacker: Connect, who: str | None, reason: str, says: str
) -> None:
    training = train(monitor.addresses.endpoint)
    name = name_of(training)
    for endpoint in (monitor.addresses.endpoint, monitor.addresses.data_endpoint):
        stranger = attacker(endpoint, who)
        training.until(lambda stranger=stranger: stranger.control.failure)
        assert not stranger.control.connected
        assert not stranger.control.send(encode(hello(name))), "nothing can be said"
    training.until(lambda: monitor.refused().get(reason, 0) >= 2)
    assert set(monitor.refused()) <= {reason, "handshake"}
    assert f"message rejected ({reason})" in monitor.log.read_text()
    assert says in monitor.log.read_text()
    assert still_runs(monitor, training, name)
    assert training.untouched()


def test_an_agent_speaks_for_no_run_of_anothers(monitor: Any, train: Train, attacker: Connect) -> None:
    training = train(monitor.addresses.endpoint)
    name = name_of(training)
    thief = attacker(monitor.addresses.endpoint, "thief", run="thief/own")
    assert isinstance(thief.hello(), Welcome)
    thief.send(hello(name))
    answer = thief.expect(Refused)
    assert "'thief' may not use run victim/" in answer.reason
    thief.send(hello({**name, "incarnation": "deadbeef"}))
    assert isinstance(thief.expect(Refused), Refused)
    num_said = 2 + say_all(thief, name)
    training.until(lambda: monitor.refused() == {"authorisation": num_said})
    assert still_runs(monitor, training, name)
    assert training.untouched()


def test_a_run_that_is_running_is_not_taken_over_by_another_key(monitor: Any, train: Train, attacker: Connect) -> None:
    training = train(monitor.addresses.endpoint)
    name = name_of(training)
    rival = attacker(monitor.addresses.endpoint, "rival", run="rival")
    assert isinstance(rival.hello(), Welcome)
    for incarnation in (name["incarnation"], "deadbeef"):
        rival.send(hello({**name, "incarnation": incarnation}))
        assert "another agent's key" in rival.expect(Refused).reason
    num_said = 2 + say_all(rival, name)
    training.until(lambda: monitor.refused() == {"identity": num_said})
    assert still_runs(monitor, training, name)
    assert training.untouched()


def test_a_key_that_is_withdrawn_ends_its_living_connection(
    monitor: Any, ring: Keyring, train: Train, attacker: Connect
) -> None:
    training = train(monitor.addresses.endpoint)
    ring.agent("leaver", runs=("leaver/*",))
    leaver = attacker(monitor.addresses.endpoint, "leaver", run="leaver/x")
    training.until(lambda: leaver.control.retry() or leaver.control.connected)
    assert isinstance(leaver.hello(), Welcome)
    leaver.heartbeat(1)
    monitor.begin()  # the monitor had not yet read the key
    ring.shut_out("leaver")

    def refused() -> bool:
        leaver.send(Heartbeat(**leaver.name, process_rank=0, training=TrainingStep(step=2), applied=Applied()))
        return "authorisation" in monitor.refused()

    training.until(refused)
    assert set(monitor.refused()) == {"authorisation"}
    assert training.untouched()


def test_agents_command_nobody(monitor: Any, train: Train, attacker: Connect) -> None:
    training = train(monitor.addresses.endpoint)
    name = name_of(training)
    rival = attacker(monitor.addresses.endpoint, "rival", run="rival")
    rival.hello()
    for run in (name, rival.name):
        forged = Command(
            **run, id="0" * 16, kind="set_lr_scale", reason="a forgery", expires_step=1 << 40, lr_scale=0.05
        )
        rival.send_frames(encode(forged))
        rival.send_data(encode(forged))
    training.until(lambda: monitor.refused() == {"direction": 4})
    assert still_runs(monitor, training, name)
    assert training.agent.status()["applied"]["lr_scale"] == 1.0
    assert training.untouched()


BOMBS = {
    "a map of four billion entries": b"\xdf\xff\xff\xff\xff",
    "an array of four billion entries": b"\x81\xa4type\xdd\xff\xff\xff\xff",
    "a text of four gigabytes": b"\x81\xa4type\xdb\xff\xff\xff\xff",
    "bytes of four gigabytes": b"\x81\xa4type\xc6\xff\xff\xff\xff",
    "sixty thousand arrays, each in the other": b"\x81\xa4type" + b"\x91" * 60_000,
    "sixty thousand maps, each in the other": b"\x81\xa1x" * 20_000,
    "sixty thousand entries": b"\xdf\x00\x00\x75\x30" + b"\xa0\xc0" * 30_000,
}


def test_bombs_and_oversized_headers_cost_nothing(monitor: Any, train: Train, attacker: Connect) -> None:
    training = train(monitor.addresses.endpoint)
    name = name_of(training)
    rival = attacker(monitor.addresses.endpoint, "rival", run="rival")
    rival.hello()
    before = resident_bytes(monitor.process.pid)
    for bomb in BOMBS.values():
        rival.send_frames([PREFIX + bomb])
        rival.send_data([PREFIX + bomb])
    most = WireLimits().max_header_bytes
    rival.send_frames([PREFIX + bytes(most)])
    rival.send_data([PREFIX + bytes(most)])
    shard = Shard(
        **rival.name, process_rank=0, num_senders=1, training=TrainingStep(step=1),
            first_point=0, num_points=4097, num_samples=1 << 20,
        width=1 << 20, dtype="float32",
    )  # fmt: skip
    rival.send_data([PREFIX + msgspec.msgpack.encode(shard), b"far less than four exabytes"])
    rival.send_data([PREFIX + msgspec.msgpack.encode(shard)] + [b""] * 4097)
    expected = {"size": 2, "shape": 2}
    training.until(lambda: {k: v for k, v in monitor.refused().items() if k in expected} == expected)
    training.until(lambda: sum(monitor.refused().values()) == 2 * len(BOMBS) + 4)
    assert set(monitor.refused()) <= {"garbage", "schema", "size", "shape"}
    rival.send_frames([PREFIX + bytes(1 << 21)])  # closed by the transport
    training.until(lambda: rival.control.connections == 2)
    assert resident_bytes(monitor.process.pid) - before < 64 << 20
    assert still_runs(monitor, training, name)
    assert training.untouched()


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


class Wiretap:
    """Proxy before a port that records the bytes of each client."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.recorded: list[bytearray] = []
        self._stopping = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._stopping:
            if select.select([self._listener], [], [], 0.05)[0]:
                self.recorded.append(bytearray())
                pair = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._target))
                self._threads.append(threading.Thread(target=self._pass_on, args=(*pair, self.recorded[-1])))
                self._threads[-1].start()

    def _pass_on(self, client: socket.socket, server: socket.socket, record: bytearray) -> None:
        with client, server, contextlib.suppress(OSError):
            while not self._stopping:
                for side in select.select([client, server], [], [], 0.05)[0]:
                    data = side.recv(1 << 16)
                    if not data:
                        return
                    if side is client:
                        record += data
                    (server if side is client else client).sendall(data)

    def close(self) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join()
        self._listener.close()


@pytest.fixture
def wiretap(monitor: Any) -> Iterator[Wiretap]:
    tap = Wiretap(int(monitor.addresses.endpoint.rpartition(":")[2]))
    yield tap
    tap.close()


def test_a_recorded_connection_is_worth_nothing(monitor: Any, train: Train, wiretap: Wiretap) -> None:
    training = train(wiretap.endpoint)
    name = name_of(training)
    training.until(lambda: len(wiretap.recorded[0]) > 4000)
    record = bytes(wiretap.recorded[0])
    assert name["run"].encode() not in record, "it is encrypted"
    assert b"hello" not in record
    port = int(monitor.addresses.endpoint.rpartition(":")[2])
    for attempt in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=20.0) as replayed, contextlib.suppress(OSError):
            replayed.sendall(record)
            while replayed.recv(4096):  # until the monitor closes the connection
                pass
        training.until(lambda attempt=attempt: monitor.refused().get("handshake", 0) > attempt)
    assert set(monitor.refused()) == {"handshake"}
    assert still_runs(monitor, training, name)
    assert training.untouched()


def test_an_agents_frames_said_twice_count_once(monitor: Any, train: Train, attacker: Connect) -> None:
    training = train(monitor.addresses.endpoint)
    rival = attacker(monitor.addresses.endpoint, "rival", run=f"rival/{time.monotonic_ns()}")
    rival.hello()
    states = make_states(5)
    shape = dict(zip(("num_points", "num_samples", "width"), states.shape, strict=True))
    shard = Shard(
        **rival.name,
        process_rank=0,
        num_senders=2,
        training=TrainingStep(step=5),
        first_point=0,
        dtype="bfloat16",
        **shape,
    )
    for _ in range(3):
        rival.send_data(encode(shard, states))
    acknowledgement = Ack(**rival.name, command_id="f" * 16, outcome="applied", step=1, applied=Applied())
    for _ in range(2):
        rival.send(acknowledgement)
    training.until(lambda: monitor.refused() == {"duplicate": 2, "unknown_command": 2})
    assert training.untouched()
