"""Result of a check, and the exception for a violated requirement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from koopmon.errors import KoopmonError

CheckStatus = Literal["passed", "failed", "skipped"]


class ConformanceError(KoopmonError, AssertionError):
    """An adapter violates a requirement; the one-line message contains the method, the location and the difference."""


def demand(kept: object, broken: str) -> None:
    """Raise ConformanceError with `broken` unless `kept` is true."""
    if not kept:
        raise ConformanceError(broken)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of one check of one adapter with one example model; `detail` is one line."""

    adapter: str
    example: str
    check: str
    verdict: CheckStatus
    detail: str
