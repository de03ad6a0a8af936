"""What a check found, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from koopmon.errors import one_line

FindingLevel = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's: what was looked at, how it is, what was found, and the fix where it is not well."""

    check: str
    level: FindingLevel
    found: str
    fix: str = ""


MAX_TEXT = 1000
"""Characters: what is found may quote a peer, and is made fit for a terminal."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", one_line(found, MAX_TEXT))


def warn(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "warn", one_line(found, MAX_TEXT), one_line(fix, MAX_TEXT))


def fail(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "fail", one_line(found, MAX_TEXT), one_line(fix, MAX_TEXT))
