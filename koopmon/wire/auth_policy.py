"""By what the peers of one agent or monitor know each other: by keys, or by the operating system's word.

An ipc path is reached by its owner alone, a loopback port from this host only. Whatever other hosts reach needs keys,
unless the user has written down that it is to go without.
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
"""Set to 1, it stands for `[security] insecure_plaintext_tcp`."""


@dataclass(frozen=True, slots=True)
class AuthPolicy:
    """`directory` holds the key files, `agent` is the name of an agent's own pair. Without a directory: no keys.

    `curve_on_loopback`: keys also where the operating system's word would do, since every user of a host reaches its
    loopback ports. `plaintext_tcp`: no keys on tcp at all, whoever reaches it.
    """

    directory: Path | None = None
    agent: str = "agent"
    curve_on_loopback: bool = False
    plaintext_tcp: bool = False

    def check(self, endpoint: str, *, binding: bool = False) -> str:
        """The endpoint in its normal form (`check_endpoint`). Raises EndpointError for what these settings forbid."""
        checked = check_endpoint(endpoint, binding=binding)
        if not is_loopback(checked) and not self.plaintext_tcp and self.directory is None:
            raise EndpointError(
                f"endpoint {endpoint!r}: other hosts reach it, and there are no keys: `koopmon keys make` makes them;"
                " or let anyone who reaches it read and command the training, by --insecure-plaintext-tcp on both sides"
            )
        return checked

    def uses_curve(self, endpoint: str) -> bool:
        """Whether peers at a checked endpoint show each other keys."""
        if endpoint.startswith("ipc://") or self.plaintext_tcp:
            return False
        return self.directory is not None and (self.curve_on_loopback or not is_loopback(endpoint))

    def check_agent_keys(self, endpoint: str) -> None:
        """Read what an agent needs for a checked endpoint. Raises KeysError."""
        if self.uses_curve(endpoint):
            with self.needed_for(endpoint):
                self.agent_secret()
                self.monitor_key()

    @contextmanager
    def needed_for(self, endpoint: str) -> Iterator[None]:
        """Lets a KeysError say what the keys were needed for."""
        try:
            yield
        except KeysError as error:
            raise KeysError(f"endpoint {endpoint!r} needs keys: {error}") from None

    def agent_secret(self) -> str:
        """The agent's secret key. Raises KeysError."""
        return read_secret(self._keys, self.agent)

    def monitor_key(self) -> tuple[str, ...]:
        """The keys by which an agent knows its monitor now, the newest first. Raises KeysError."""
        return read_public(public_file(self._keys, MONITOR)).keys()

    def monitor_secret(self) -> str:
        """The monitor's secret key. Raises KeysError."""
        return read_secret(self._keys, MONITOR)

    def authorized_keys(self) -> AuthorizedKeys:
        """The agents that a monitor serves. Raises KeysError."""
        return AuthorizedKeys(self._keys)

    @property
    def _keys(self) -> Path:
        assert self.directory is not None, "keys are asked for only where they are used"
        return self.directory


def make_auth_policy(
    *, keys: str, agent: str, loopback: str, insecure_plaintext_tcp: bool, environ: Mapping[str, str]
) -> AuthPolicy:
    """Trust as the table `[security]` of a configuration and the environment have it."""
    return AuthPolicy(
        directory=keys_directory(keys, environ),
        agent=agent,
        curve_on_loopback=loopback == "curve",
        plaintext_tcp=insecure_plaintext_tcp or environ.get(PLAINTEXT_VARIABLE) == "1",
    )
