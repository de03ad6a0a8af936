"""What a check says: an outcome of one line, or a promise that was broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from koopmon.errors import KoopmonError

CheckStatus = Literal["passed", "failed", "skipped"]


class ConformanceError(KoopmonError, AssertionError):
    """An adapter breaks a promise; one line that says which, where and how."""


def demand(kept: object, broken: str) -> None:
    """Raises ConformanceError with `broken` unless `kept` is true."""
    if not kept:
        raise ConformanceError(broken)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of one adapter with one example model; `detail` is one line, with the reason when it did not pass."""

    adapter: str
    example: str
    check: str
    verdict: CheckStatus
    detail: str


def describe_error(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}".rstrip(": ")
