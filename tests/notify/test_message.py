"""Forms of a notification. The text of a peer cannot escape its line, its format or its header."""

from __future__ import annotations

import json
from typing import Any

import pytest

from koopmon.notify.message import json_body, plain_text, slack_body
from tests.notify.conftest import notification

HOSTILE = [
    "<!channel> look",
    "<https://evil.example|click>",
    "@channel @here",
    "a\nb: injected",
    "a\r\nBcc: eve@example.org",
    "*bold* `code` &lt;",
    "\u202eevil\x00\x1b[31m",
    "x" * 5000,
]
PAGE = "http://127.0.0.1:9464/runs/job"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("field", ["run", "happened", "did"])
def test_the_text_of_a_peer_is_only_text(text: str, field: str) -> None:
    fields: dict[str, Any] = {"did": "nothing", "page": PAGE, field: text}
    told = notification(**fields)
    slack = json.loads(slack_body(told))["text"]
    assert len(slack.split("\n")) == 4
    assert not set("<>") & set(slack)
    assert "@channel" not in slack
    assert "`" not in slack
    assert slack.count("*") == 2, "the title alone is bold"
    assert all(line.isprintable() or line == "" or "\u200b" in line for line in slack.split("\n"))
    assert "\r" not in told.title
    assert "\n" not in told.title
    lines = plain_text(told).split("\n")
    assert lines[0] == told.title
    assert lines[-2] == PAGE
    assert all(line.isprintable() for line in lines)
    assert "\n" not in json.loads(json_body(told))["happened"]


def test_an_alarm_in_each_form() -> None:
    told = notification(means="It may diverge.", did="koopmon acts: learning rate x 0.5.", page=PAGE, note="Last one.")
    lines = ["Step 3: the risk is 0.90", "It may diverge.", "koopmon acts: learning rate x 0.5.", "Last one."]
    assert json.loads(slack_body(told)) == {"text": "\n".join(["*koopmon alarm: job*", *lines, PAGE])}
    assert plain_text(told) == "\n".join(["koopmon alarm: job", "", *lines, "", PAGE, ""])
    assert json.loads(json_body(told)) == {
        "version": 1,
        "event": "alarm",
        "events": ["alarm"],
        "run": "job",
        "time": 1.7e9,
        "step": 3,
        "risk": 0.9,
        "happened": "the risk is 0.90",
        "means": "It may diverge.",
        "did": "koopmon acts: learning rate x 0.5.",
        "note": "Last one.",
        "page": PAGE,
        "text": "\n".join(["koopmon alarm: job", *lines]),
    }
