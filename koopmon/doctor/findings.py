"""Result of one check and its suggested fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from koopmon.errors import one_line

FindingLevel = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's output: the check, its level, its result, and a fix unless the level is "ok"."""

    check: str
    level: FindingLevel
    found: str
    fix: str = ""


MAX_TEXT = 1000
"""Maximum length of a text in characters. Findings may quote a peer, so they are also made printable."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", one_line(found, MAX_TEXT))


def warn(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "warn", one_line(found, MAX_TEXT), one_line(fix, MAX_TEXT))


def fail(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "fail", one_line(found, MAX_TEXT), one_line(fix, MAX_TEXT))
