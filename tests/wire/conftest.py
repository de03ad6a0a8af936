"""Transports for the tests: one context per side, and endpoints of both kinds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from koopmon.wire.transport import WireContext


@pytest.fixture
def near() -> Iterator[WireContext]:
    """Context of the agent's side."""
    with WireContext() as context:
        yield context


@pytest.fixture
def far() -> Iterator[WireContext]:
    """Context of the monitor's side."""
    with WireContext() as context:
        yield context


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Endpoint for a server; tcp leaves the port open."""
    return "tcp://127.0.0.1:0" if request.param == "tcp" else f"ipc://{tmp_path}/run/wire"


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for the effect of another thread or process; fail after `timeout` seconds."""

    def wait(condition: Callable[[], object], timeout: float = 20.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "the condition stayed false"
            time.sleep(0.002)

    return wait
