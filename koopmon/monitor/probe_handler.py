"""Answers probes (`koopmon doctor`, `koopmon run --monitor`).

Probes create no run and are not counted. A probe also returns the reason why the run's last hello was refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from koopmon.errors import ProtocolError
from koopmon.monitor.registry import RunRegistry
from koopmon.wire.messages import Probe, ProbedState, ProbeReply

MAX_REFUSED = 256
"""Maximum number of runs with a stored reason of refusal."""


@dataclass(slots=True, kw_only=True)
class ProbeHandler:
    """Replies to probes. `build` holds "version" and "torch", `wall` returns Unix seconds."""

    registry: RunRegistry
    build: Mapping[str, str]
    data_endpoint: str
    wall: Callable[[], float]
    refused: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """Reason why the last hello was refused, by run."""

    def note_refused(self, run: str, reason: str) -> None:
        """Store the reason why a hello for `run` was refused."""
        self.refused[run] = reason
        self.refused.move_to_end(run)
        if len(self.refused) > MAX_REFUSED:
            self.refused.popitem(last=False)

    def note_welcomed(self, run: str) -> None:
        """Delete the stored reason after an accepted hello for `run`."""
        self.refused.pop(run, None)

    def reply(self, probe: Probe, key: str) -> ProbeReply:
        """Return the reply for a peer with `key`. A run of another agent looks like an unknown run."""
        run, refused = self.registry.get(probe.run), self.refused.get(probe.run, "")
        try:
            agent = self.registry.agent(key, probe.run)
        except ProtocolError as error:
            run, refused = None, error.detail[:512]
        else:
            run = run if run is not None and run.agent == agent else None
        return ProbeReply(
            run=probe.run,
            incarnation=probe.incarnation,
            koopmon_version=self.build.get("version", "unknown")[:64],
            torch_version=self.build.get("torch", "unknown")[:64],
            time=max(0.0, self.wall()),
            data_endpoint=self.data_endpoint,
            run_state=None if run is None else cast(ProbedState, run.state.name.lower()),
            step=None if run is None else run.step,
            refused=refused,
        )
