"""Both sockets of a monitor: they open alike or not at all, and again at the same addresses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.errors import EndpointError
from koopmon.monitor import channels as module
from koopmon.monitor.channels import Channels
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.headers import WireLimits
from koopmon.wire.wakeup import Wakeup
from tests.keyring import Keyring


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    made = Wakeup()
    yield made
    made.close()


def opened(wakeup: Wakeup, bind: str, data_bind: str | None = None, trust: AuthPolicy | None = None) -> Channels:
    return Channels(bind, data_bind, trust=trust or AuthPolicy(), limits=WireLimits(), wakeup=wakeup)


def test_the_data_channel_is_beside_the_control_channel(wakeup: Wakeup, tmp_path: Path) -> None:
    for bind in ("tcp://127.0.0.1:0", f"ipc://{tmp_path}/control"):
        channels = opened(wakeup, bind)
        control, data = channels.control.endpoint, channels.data.endpoint
        channels.close()
        if bind.startswith("ipc"):
            assert (control, data) == (bind, f"{bind}-data")
        else:
            assert control != data
            assert data.startswith("tcp://127.0.0.1:")
            assert not data.endswith(":0")


@pytest.mark.parametrize("control_has_keys", [True, False])
def test_one_channel_with_keys_and_one_without_are_refused_and_closed(
    wakeup: Wakeup, tmp_path: Path, control_has_keys: bool
) -> None:
    ring = Keyring(tmp_path / "keys")
    ring.agent()
    binds = ["tcp://0.0.0.0:0", f"ipc://{tmp_path}/plain"]
    control, data = binds if control_has_keys else reversed(binds)
    with pytest.raises(EndpointError, match=r"^endpoint 'tcp.*demands keys and 'ipc.*: bind both alike, or set \["):
        opened(wakeup, control, data, ring.trust())
    opened(wakeup, binds[1]).close()  # its address is free again


def test_they_open_again_at_the_same_addresses(wakeup: Wakeup, tmp_path: Path) -> None:
    for bind in ("tcp://127.0.0.1:0", f"ipc://{tmp_path}/control"):
        channels = opened(wakeup, bind)
        before = channels.control.endpoint, channels.data.endpoint
        channels.reopen()
        assert (channels.control.endpoint, channels.data.endpoint) == before
        channels.close()


def test_an_address_that_stays_taken_is_an_error(wakeup: Wakeup, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, attempts = opened(wakeup, "tcp://127.0.0.1:0"), []

    def refused(*addresses: Any) -> None:
        attempts.append(addresses)
        raise EndpointError("in use")

    monkeypatch.setattr(module, "REOPEN_SECONDS", 0.05)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(channels, "_open", refused)
    with pytest.raises(EndpointError, match="in use"):
        channels.reopen()
    assert len(attempts) > 1


def test_plaintext_that_other_hosts_reach_is_a_warning(wakeup: Wakeup, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "koopmon.monitor.channels"):
        opened(wakeup, "tcp://127.0.0.1:0").close()
        assert caplog.messages == []
        opened(wakeup, "tcp://0.0.0.0:0", trust=AuthPolicy(plaintext_tcp=True)).close()
    assert [line.partition(" is plaintext")[1] for line in caplog.messages] == [" is plaintext"] * 2


def test_a_wakeup_ends_a_wait(wakeup: Wakeup) -> None:
    channels = opened(wakeup, "tcp://127.0.0.1:0")
    for data_only in (True, False):
        wakeup.wake()
        channels.wait(60.0, data_only=data_only)
    channels.close()
