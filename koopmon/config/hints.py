"""Defaults of a run from the hints of its adapter."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from koopmon.config.rules import Config
from koopmon.config.tables import KssConfig, RiskConfig, Section
from koopmon.logs import LogLimit
from koopmon.wire.messages import Hello

logger = logging.getLogger("koopmon.config")

S = TypeVar("S", bound=Section)


_ignored = LogLimit()
"""Hints come with every hello of every rank."""


def merged(section: S, hints: Mapping[str, Any], source: str) -> S:
    """Return `section` with an adapter's `hints` in the fields that have their default.

    A hint without a field or with a value out of bounds is skipped and logged.
    """
    defaults, now = type(section)(), time.monotonic()
    for name, value in hints.items():
        if name not in section.__struct_fields__:
            if (more := _ignored.admit(now, source)) is not None:
                logger.warning("hello: %s: ignored %r: this version has no such key%s", source, name, more)
        elif getattr(section, name) == getattr(defaults, name):
            try:
                values = {**msgspec.structs.asdict(section), name: value}
                section = msgspec.convert(values, type(section))
            except msgspec.ValidationError as error:
                if (more := _ignored.admit(now, (source, name))) is not None:
                    logger.warning("hello: %s: ignored %s = %r: %s%s", source, name, value, error, more)
    return section


def with_hints(config: Config, hello: Hello) -> tuple[RiskConfig, KssConfig]:
    """Return the tables [risk] and [kss] for a run, with the hints of its adapter (see `merged`)."""
    hints = {} if hello.kss is None else msgspec.structs.asdict(hello.kss)
    known = {name: value for name, value in hints.items() if name in KssConfig.__struct_fields__}
    return merged(config.risk, hello.thresholds, "thresholds"), merged(config.kss, known, "kss")
