"""Names of runs."""

from __future__ import annotations

import re

import pytest

from koopmon.errors import ConfigError
from koopmon.run_names import check_run_name, file_name, new_run_name


@pytest.mark.parametrize("name", ["", " ", "-x", "a b", "x" * 129, "a\n", "ä"])
def test_names_that_a_run_cannot_have(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^--run {re.escape(repr(name))}: allowed are"):
        check_run_name(name, "--run")


@pytest.mark.parametrize("script", ["train", "my train.v2", "-c", "", "...", "ä" * 200, "x" * 500])
def test_every_script_gives_a_unique_valid_name(script: str) -> None:
    made = new_run_name(script)
    assert check_run_name(made) == made
    assert made != new_run_name(script)


def test_a_name_keeps_what_is_allowed_of_its_script() -> None:
    for script, kept in {"my train.v2": "my-train.v2", "-weird_name!": "weird_name", "...": "job", "ä": "job"}.items():
        assert new_run_name(script)[:-9] == kept


def test_names_that_differ_have_files_that_differ() -> None:
    names = ["a/b", "a_b", "a.b", "a:b", "a-b", "a+b", "a/b/c", "a/b_c", "a_b/c", "x" * 128, "x" + 127 * "/"]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert not any("/" in file or len(file.encode()) > 128 for file in files)
    for name in ("a,b", "a/,b"):
        with pytest.raises(ConfigError):
            check_run_name(name)
