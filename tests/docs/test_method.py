"""Constants of docs/method.md: each value in the tables equals the value in the code."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

from koopmon.config import Config
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(?P<name>\[\w+\] \w+|koopmon[\w.:]+)` \| (?P<value>[\d.e-]+) \|", re.MULTILINE)
CONSTANTS = [(row["name"], float(row["value"])) for row in ROW.finditer(PAGE)]


def in_code(name: str) -> Any:
    """Return the value of a configuration key (`[table] key`), a constant, or a default (`function:name`)."""
    if name.startswith("["):
        table, key = name[1:].split("] ")
        return getattr(getattr(Config(), table), key)
    path, _, parameter = name.partition(":")
    module, _, attribute = path.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    return inspect.signature(found).parameters[parameter].default if parameter else found


@pytest.mark.parametrize(("name", "value"), CONSTANTS, ids=[name for name, _ in CONSTANTS])
def test_a_constant_has_the_value_of_the_code(name: str, value: float) -> None:
    assert in_code(name) == value


def test_every_row_of_a_table_of_constants_is_read() -> None:
    tables = re.findall(r"^\| constant \| value \| origin \|\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [line for table in tables for line in table.splitlines()]
    assert len(rows) == len(CONSTANTS) > 40


def test_every_threshold_of_risk_and_kss_is_in_a_table() -> None:
    """The configuration reference alone has keys that only switch, bound or time something."""
    told = {name for name, _ in CONSTANTS}
    config = Config()
    assert {f"[risk] {key}" for key in config.risk.__struct_fields__} <= told
    left_out = {"method", "temperature", "gamma", "through_shielded"}
    assert {f"[kss] {key}" for key in config.kss.__struct_fields__ if key not in left_out} <= told
