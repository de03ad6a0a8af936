"""Authorization of messages: the agent that owns a key, and the runs that this agent may use."""

from __future__ import annotations

from koopmon.errors import ProtocolError
from koopmon.wire.authorized_keys import AuthorizedKeys


class Authorization:
    """Checks keys against the list of agents.

    `agents` is None without key authentication: the operating system then controls access, for all runs.
    """

    def __init__(self, agents: AuthorizedKeys | None = None) -> None:
        self._agents = agents

    def agent(self, key: str, run: str) -> str:
        """Return the name of the agent with this key, if it may use `run`; "" without key authentication.

        Call it for each message, because a key can be revoked during a connection. Raises ProtocolError "authorisation"
        for an unknown or revoked key, and for an agent without permission for this run.
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
