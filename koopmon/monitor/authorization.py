"""Which agent a key makes of its bearer, and whether that agent may speak for a run."""

from __future__ import annotations

from koopmon.errors import ProtocolError
from koopmon.wire.authorized_keys import AuthorizedKeys


class Authorization:
    """`agents` is None where no keys are demanded: there the operating system says who may speak, and for all runs."""

    def __init__(self, agents: AuthorizedKeys | None = None) -> None:
        self._agents = agents

    def agent(self, key: str, run: str) -> str:
        """The name of the agent that speaks for `run` by this key; "" where no keys are demanded.

        Asked for each message, since a key may be withdrawn while its connection lives. Raises ProtocolError
        "authorisation" for a key that is nobody's any more, and for an agent that may not speak for this run.
        """
        if self._agents is None:
            return ""
        name = self._agents.name_of(key)
        if name is None:
            raise ProtocolError("authorisation", "the peer's key is no agent's any more: `koopmon keys show`")
        if not self._agents.is_authorized(name, run):
            raise ProtocolError(
                "authorisation",
                f"agent {name!r} may not speak for run {run}: its file in agents/ says for which it may",
            )
        return name
