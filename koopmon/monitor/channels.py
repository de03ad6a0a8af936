"""The control and the data socket of a monitor: they open, wait, close and open again together."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from koopmon.errors import EndpointError
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.curve import Refusal
from koopmon.wire.endpoints import is_loopback
from koopmon.wire.headers import WireLimits
from koopmon.wire.sockets import ControlServer, DataReceiver, Poller
from koopmon.wire.transport import WireContext
from koopmon.wire.wakeup import Wakeup

logger = logging.getLogger(__name__)

REOPEN_SECONDS = 30.0
"""Time in seconds for which an address that another process took meanwhile is tried again."""
RETRY_SECONDS = 0.1
"""Time in seconds between two attempts."""


class Channels:
    """Both sockets of a monitor. `data_bind` defaults to an endpoint beside `bind`. `wakeup` ends a wait.

    Raises EndpointError or KeysError, also if one channel requires keys and the other does not.
    """

    def __init__(
        self, bind: str, data_bind: str | None, *, trust: AuthPolicy, limits: WireLimits, wakeup: Wakeup
    ) -> None:
        self._trust, self._limits, self._wakeup = trust, limits, wakeup
        self._open(bind, data_bind)
        for server in (self.control, self.data):
            if not server.requires_keys and not is_loopback(server.endpoint):
                logger.warning(
                    "monitor: %s is plaintext: anyone who can reach it can read and command the training",
                    server.endpoint,
                )

    def close(self) -> None:
        self._wire.close()

    @property
    def agents(self) -> AuthorizedKeys | None:
        """The agents' keys; None without key authentication."""
        return self._wire.agents

    def wait(self, seconds: float, *, data_only: bool = False) -> None:
        """Wait for a message, one on the data channel with `data_only`, or for the wakeup."""
        (self._data_poller if data_only else self._poller).wait(max(0.0, seconds))

    def take_refusals(self) -> Sequence[Refusal]:
        """Return the peers and messages that the sockets have refused since the last call."""
        return [*self.control.take_refusals(), *self.data.take_refusals()]

    def reopen(self) -> None:
        """Close all connections, and free the messages that they have begun. Raises EndpointError."""
        addresses = self.control.endpoint, self.data.endpoint
        # An ipc path can be bound again only after its context is closed.
        self._wire.close()
        until = time.monotonic() + REOPEN_SECONDS
        while True:
            try:
                self._open(*addresses)
            except EndpointError:
                if time.monotonic() >= until:
                    raise
                time.sleep(RETRY_SECONDS)
            else:
                return

    def _open(self, bind: str, data_bind: str | None) -> None:
        self._wire = wire = WireContext(self._trust)
        try:
            self.control = ControlServer(wire, bind, limits=self._limits)
            self.data = DataReceiver(wire, data_bind or _data_beside(self.control.endpoint), limits=self._limits)
            self._check_alike()
        except BaseException:
            wire.close()
            raise
        self._poller = Poller(self._wakeup, self.control, self.data)
        self._data_poller = Poller(self._wakeup, self.data)

    def _check_alike(self) -> None:
        """Raise EndpointError unless both channels require keys, or neither does.

        Data is attributed to the peer authenticated on the control channel, so both must use the same authentication.
        """
        control, data = self.control, self.data
        if control.requires_keys != data.requires_keys:
            demanding, other = (control, data) if control.requires_keys else (data, control)
            raise EndpointError(
                f"endpoint {demanding.endpoint!r} demands keys and {other.endpoint!r} does not: bind both alike, or set"
                " [security] loopback = 'curve'"
            )


def _data_beside(endpoint: str) -> str:
    """Return a data endpoint beside `endpoint`: another port of its address, or another socket in its directory."""
    if endpoint.startswith("ipc://"):
        return f"{endpoint}-data"
    return f"{endpoint.rpartition(':')[0]}:0"
