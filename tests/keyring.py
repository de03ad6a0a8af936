"""Key files for tests of monitor and agents on one machine, where loopback stands for other hosts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.curve import KeyPair, new_pair
from koopmon.wire.keys import (
    AGENTS,
    MONITOR,
    PublicKey,
    make_directory,
    public_file,
    read_public,
    write_public,
    write_secret,
)


class Keyring:
    """Directory `place` with a monitor's pair; `agent` adds a pair for an agent that the monitor accepts."""

    def __init__(self, place: Path) -> None:
        self.place = place
        make_directory(place)
        make_directory(place / AGENTS)
        self.monitor = new_pair()
        write_secret(place, MONITOR, self.monitor.secret)
        write_public(public_file(place, MONITOR), PublicKey(public=self.monitor.public))

    def agent(self, name: str = "agent", *, runs: tuple[str, ...] = ("*",), served: bool = True) -> KeyPair:
        pair = new_pair()
        write_secret(self.place, name, pair.secret)
        write_public(public_file(self.place, name), PublicKey(public=pair.public, runs=runs))
        if served:
            self.serve(name)
        return pair

    def serve(self, name: str) -> None:
        write_public(public_file(self.place / AGENTS, name), read_public(public_file(self.place, name)))

    def shut_out(self, name: str) -> None:
        public_file(self.place / AGENTS, name).unlink()

    def rotate_monitor(self) -> None:
        old, self.monitor = self.monitor, new_pair()
        until = datetime.now(UTC) + timedelta(days=1)
        key = PublicKey(public=self.monitor.public, previous=old.public, previous_until=until)
        write_public(public_file(self.place, MONITOR), key)
        write_secret(self.place, MONITOR, self.monitor.secret)

    def trust(self, agent: str = "agent") -> AuthPolicy:
        return AuthPolicy(self.place, agent=agent, curve_on_loopback=True)

    def security(self, agent: str = "agent") -> dict[str, str]:
        """Return the same as a table of the configuration."""
        return {"keys": str(self.place), "agent": agent, "loopback": "curve"}
