"""Any sequence of legal messages with extreme legal numbers: the output of the monitor is valid.

`benchmarks.fuzz.composition` runs it against the service without sockets, with its own clock.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.composition import MAX_TURNS, Choices, Play, made
from koopmon.wire.codec import encode
from koopmon.wire.messages import Ack, Goodbye, Heartbeat, Hello


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_no_sequence_of_legal_messages_breaks_the_monitor(data: st.DataObject) -> None:
    def choose(options: Any) -> Any:
        return options[data.draw(st.integers(0, len(options) - 1))]

    with TemporaryDirectory() as folder:
        play = Play(choose, Path(folder))
        try:
            for _ in range(data.draw(st.integers(1, MAX_TURNS))):
                play.turn()
                play.check()
        finally:
            play.close()


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=300, max_size=300))
def test_the_extremes_are_legal(data: bytes) -> None:
    choose = Choices(data)
    for kind in (Hello, Heartbeat, Ack, Goodbye):
        message = made(
            kind,
            choose,
            run="job",
            incarnation="a" * 8,
            **({"command_id": "b" * 8} if kind is Ack else {"process_rank": 0}),
            **({"world_size": 1} if kind is Hello else {}),
        )
        assert encode(message)


def test_the_extremes_are_extreme() -> None:
    """Each number has both of its bounds, or the limits of doubles."""
    found: dict[str, set[float]] = {}
    for seed in range(3000):
        choose = Choices(bytes((seed * 7919 + place * 104729) % 251 for place in range(120)))
        beat = made(Heartbeat, choose, run="job", incarnation="a" * 8, process_rank=0)
        for name in ("step", "overhead_ratio", "loss"):
            value = getattr(beat.training if name == "loss" else beat, name)
            found.setdefault(name, set()).update(() if value is None else (value,))
    assert {0, (1 << 53) - 1} <= found["step"]
    assert {0.0, sys.float_info.max} <= found["overhead_ratio"]
    assert {math.inf, -math.inf, -sys.float_info.max} <= found["loss"]


@pytest.mark.parametrize("kind", [Hello, Heartbeat, Ack, Goodbye])
def test_every_field_of_a_message_can_be_chosen(kind: type[msgspec.Struct]) -> None:
    fixed = {"run": "job", "incarnation": "a" * 8, "command_id": "b" * 8}
    names = {name: value for name, value in fixed.items() if name in kind.__struct_fields__}
    assert made(kind, lambda options: options[-1], **names)
