"""Authentication policy: which endpoints need CURVE keys and which rely on the operating system.

The operating system restricts an ipc path to its owner and a loopback port to this host. Every endpoint that other
hosts reach needs keys, unless the user allows plaintext explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from koopmon.errors import EndpointError, KeysError
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.endpoints import check_endpoint, is_loopback
from koopmon.wire.keys import MONITOR, keys_directory, public_file, read_public, read_secret

PLAINTEXT_VARIABLE = "KOOPMON_INSECURE_PLAINTEXT_TCP"
"""The value 1 has the same effect as `[security] insecure_plaintext_tcp`."""


@dataclass(frozen=True, slots=True)
class AuthPolicy:
    """Authentication settings of one agent or one monitor.

    `directory` holds the key files; None means no keys. `agent` is the name of an agent's own key pair.
    `curve_on_loopback` requires keys on loopback too, because every user of a host reaches its loopback ports.
    `plaintext_tcp` disables keys on every tcp endpoint.
    """

    directory: Path | None = None
    agent: str = "agent"
    curve_on_loopback: bool = False
    plaintext_tcp: bool = False

    def check(self, endpoint: str, *, binding: bool = False) -> str:
        """Return the endpoint in its normal form (`check_endpoint`). Raises EndpointError if the policy forbids it."""
        checked = check_endpoint(endpoint, binding=binding)
        if not is_loopback(checked) and not self.plaintext_tcp and self.directory is None:
            raise EndpointError(
                f"endpoint {endpoint!r}: other hosts reach it, and there are no keys: `koopmon keys make` makes them;"
                " or let anyone who reaches it read and command the training, by --insecure-plaintext-tcp on both sides"
            )
        return checked

    def uses_curve(self, endpoint: str) -> bool:
        """Return True if peers at a checked endpoint authenticate with CURVE keys."""
        if endpoint.startswith("ipc://") or self.plaintext_tcp:
            return False
        return self.directory is not None and (self.curve_on_loopback or not is_loopback(endpoint))

    def check_agent_keys(self, endpoint: str) -> None:
        """Read the keys that an agent needs for a checked endpoint. Raises KeysError."""
        if self.uses_curve(endpoint):
            with self.needed_for(endpoint):
                self.agent_secret()
                self.monitor_key()

    @contextmanager
    def needed_for(self, endpoint: str) -> Iterator[None]:
        """Add the endpoint that needs the keys to the message of a KeysError."""
        try:
            yield
        except KeysError as error:
            raise KeysError(f"endpoint {endpoint!r} needs keys: {error}") from None

    def agent_secret(self) -> str:
        """Return the agent's secret key. Raises KeysError."""
        return read_secret(self._keys, self.agent)

    def monitor_key(self) -> tuple[str, ...]:
        """Return the monitor's accepted public keys, the newest first. Raises KeysError."""
        return read_public(public_file(self._keys, MONITOR)).keys()

    def monitor_secret(self) -> str:
        """Return the monitor's secret key. Raises KeysError."""
        return read_secret(self._keys, MONITOR)

    def authorized_keys(self) -> AuthorizedKeys:
        """Return the agents that a monitor serves. Raises KeysError."""
        return AuthorizedKeys(self._keys)

    @property
    def _keys(self) -> Path:
        assert self.directory is not None, "keys are read only where they are used"
        return self.directory


def make_auth_policy(
    *, keys: str, agent: str, loopback: str, insecure_plaintext_tcp: bool, environ: Mapping[str, str]
) -> AuthPolicy:
    """Build the policy from the table `[security]` of a configuration and from the environment."""
    return AuthPolicy(
        directory=keys_directory(keys, environ),
        agent=agent,
        curve_on_loopback=loopback == "curve",
        plaintext_tcp=insecure_plaintext_tcp or environ.get(PLAINTEXT_VARIABLE) == "1",
    )
