"""One notification, and its forms: plain text, Slack text and JSON. The text of a peer is escaped and has one line."""

from __future__ import annotations

import json
from dataclasses import dataclass

from koopmon.config import NotifyEvent
from koopmon.errors import one_line

MAX_LINE = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """A fact about one run.

    `events` are the kinds of the fact, the most important one first. A target receives it if it wants one of them.
    """

    events: tuple[NotifyEvent, ...]
    run: str
    at: float
    """Unix seconds."""
    happened: str
    step: int | None = None
    risk: float | None = None
    means: str = ""
    did: str = ""
    """Reaction of koopmon."""
    page: str = ""
    """Address of the run's page; empty if it is unknown."""
    note: str = ""
    """Remark about the notification itself, such as the limit that it reached."""

    @property
    def title(self) -> str:
        """Event and run, in one line."""
        return f"koopmon {self.events[0]}: {one_line(self.run, 128)}"

    def lines(self) -> list[str]:
        """Return the text below the title, one fact in each line."""
        where = "" if self.step is None else f"Step {self.step}: "
        texts = (f"{where}{self.happened}", self.means, self.did, self.note)
        return [one_line(text, MAX_LINE) for text in texts if text]


def plain_text(notification: Notification) -> str:
    """Return the text of a mail."""
    page = [f"\n{notification.page}"] if notification.page else []
    return "\n".join([notification.title, "", *notification.lines(), *page, ""])


def slack_body(notification: Notification) -> bytes:
    """Return the body for a webhook of Slack, Mattermost, or Discord's `/slack` address."""
    page = [notification.page] if notification.page else []
    lines = [f"*{_slack(notification.title)}*", *map(_slack, notification.lines()), *map(_slack_link, page)]
    return json.dumps({"text": "\n".join(lines)}).encode()


def json_body(notification: Notification) -> bytes:
    """Return the body for any other receiver. Missing facts are null or empty."""
    fields = {
        "version": 1,
        "event": notification.events[0],
        "events": notification.events,
        "run": notification.run,
        "time": notification.at,
        "step": notification.step,
        "risk": notification.risk,
        "happened": one_line(notification.happened, MAX_LINE),
        "means": notification.means,
        "did": one_line(notification.did, MAX_LINE),
        "note": notification.note,
        "page": notification.page,
        "text": "\n".join([notification.title, *notification.lines()]),
    }
    return json.dumps(fields).encode()


def _slack(text: str) -> str:
    """Escape control sequences of Slack, which begin with <, and mentions of Mattermost, which begin with @."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("@", "@\u200b").replace("`", "'").replace("*", "\u2217")


def _slack_link(url: str) -> str:
    return url.replace("&", "&amp;").replace("<", "%3C").replace(">", "%3E")
