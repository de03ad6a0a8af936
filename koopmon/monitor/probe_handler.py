"""Answers probes (`koopmon doctor`, `koopmon run --monitor`).

Probes create no run and are not counted. A probe also returns the reason why the run's last hello was refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from koopmon.errors import ProtocolError
from koopmon.history.schema import RunState
from koopmon.monitor.registry import RunRegistry
from koopmon.wire.messages import Probe, ProbedState, ProbeReply

MAX_REFUSED = 256
"""Maximum number of runs with a stored reason of refusal."""
_STATES: Mapping[RunState, ProbedState] = {
    RunState.ENDED: "ended",
    RunState.RUNNING: "running",
    RunState.VANISHED: "vanished",
}


class ProbeHandler:
    """Replies to probes. `build` holds "version" and "torch", `wall` returns Unix seconds."""

    def __init__(
        self,
        registry: RunRegistry,
        *,
        build: Mapping[str, str],
        data_endpoint: str,
        wall: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._build = build
        self._data_endpoint = data_endpoint
        self._wall = wall
        self._refused: OrderedDict[str, str] = OrderedDict()

    def note_refused(self, run: str, reason: str) -> None:
        """Store the reason why a hello for `run` was refused."""
        self._refused[run] = reason
        self._refused.move_to_end(run)
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def note_welcomed(self, run: str) -> None:
        """Delete the stored reason after an accepted hello for `run`."""
        self._refused.pop(run, None)

    def reply(self, probe: Probe, key: str) -> ProbeReply:
        """Return the reply for a peer with `key`. A run of another agent looks like an unknown run."""
        run, refused = self._registry.get(probe.run), self._refused.get(probe.run, "")
        try:
            agent = self._registry.agent(key, probe.run)
        except ProtocolError as error:
            run, refused = None, error.detail[:512]
        else:
            run = run if run is not None and run.agent == agent else None
        return ProbeReply(
            run=probe.run,
            incarnation=probe.incarnation,
            koopmon_version=self._build.get("version", "unknown")[:64],
            torch_version=self._build.get("torch", "unknown")[:64],
            time=max(0.0, self._wall()),
            data_endpoint=self._data_endpoint,
            run_state=None if run is None else _STATES[run.state],
            step=None if run is None else run.step,
            refused=refused,
        )
