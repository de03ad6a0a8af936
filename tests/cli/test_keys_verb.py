"""`koopmon keys`: creation, printing and rotation of pairs, without printing secrets."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import main
from koopmon.wire.curve import pair_of
from koopmon.wire.keys import AGENTS, public_file, read_public, read_secret, secret_file


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("KOOPMON_KEYS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "koopmon" / "keys"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["keys", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    rows: list[dict[str, Any]] = json.loads(out)["keys"]
    return rows


def test_make_gives_monitor_and_agent_all_they_need(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, "make")
    assert {(row["name"], row["what"]) for row in rows} == {
        ("monitor", "secret and public"), ("agent", "secret and public"), ("agent", "served here"),
    }  # fmt: skip
    for name in ("monitor", "agent"):
        assert stat.S_IMODE(secret_file(place, name).stat().st_mode) == 0o600
        assert pair_of(read_secret(place, name)).public == read_public(public_file(place, name)).public
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE((place / AGENTS).stat().st_mode) == 0o700
    assert read_public(public_file(place / AGENTS, "agent")).runs == ("*",)


def test_make_binds_agents_to_runs_and_overwrites_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, "make", "alice", "--runs", "alice/*", "--runs", "shared")
    assert rows[0]["runs"] == ["alice/*", "shared"]
    secret = read_secret(place, "alice")
    status, out, err = run(capsys, "make", "bob", "alice")
    assert (status, out) == (2, "")
    assert err == (f"koopmon: {secret_file(place, 'alice')}: exists; `koopmon keys rotate alice` replaces it\n")
    assert read_secret(place, "alice") == secret
    assert not secret_file(place, "bob").exists(), "all or nothing"


def test_show_lists_everything_but_secrets(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed(capsys, "make")
    secrets = [read_secret(place, name) for name in ("monitor", "agent")]
    for words in (("show",), ("show", "--json")):
        status, out, err = run(capsys, *words)
        assert (status, err) == (0, "")
        assert read_public(public_file(place, "monitor")).public in out
        assert str(place) in out
        assert not any(secret in out for secret in secrets)


@pytest.mark.parametrize(
    "patterns",
    [
        [""],
        ["  "],
        ["ok", " "],
        ["a\nb"],
        ["\x7f"],
        ["x" * 129],
        ["ok", ""],
        ["a"] * 257,
        [f"{number:0128}" for number in range(100)],
    ],
)
def test_patterns_that_no_key_file_holds_are_refused_before_a_key_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], patterns: list[str]
) -> None:
    words = [word for pattern in patterns for word in ("--runs", pattern)]
    status, out, err = run(capsys, "make", "bob", *words)
    assert (status, out) == (2, "")
    assert err.startswith("koopmon: --runs")
    assert err.count("\n") == 1
    assert not list(place.rglob("*.secret"))


@pytest.mark.parametrize("verb", [["show"], ["rotate", "agent"]])
def test_files_that_cannot_be_used_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    status, out, err = run(capsys, *verb)
    assert (status, out) == (2, "")
    assert err.startswith(f"koopmon: keys {place}: no such file")
    listed(capsys, "make")
    secret_file(place, "agent").chmod(0o644)
    status, out, err = run(capsys, *verb)
    assert (status, out) == (2, "")
    assert f"chmod 600 {secret_file(place, 'agent')}" in err
    assert err.count("\n") == 1


def test_a_public_key_of_another_pair_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed(capsys, "make")
    public_file(place, "agent").write_text(public_file(place, "monitor").read_text())
    status, _, err = run(capsys, "show")
    assert status == 2
    assert "agent.key: not the public key of agent.secret" in err


def test_rotate_keeps_the_old_key_for_a_while_and_the_runs_for_good(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed(capsys, "make", "agent", "--runs", "mine")
    old = read_public(public_file(place, "agent")).public
    listed(capsys, "rotate", "agent", "--keep-days", "2")
    for directory in (place, place / AGENTS):
        key = read_public(public_file(directory, "agent"))
        assert key.keys() == (pair_of(read_secret(place, "agent")).public, old)
        assert key.runs == ("mine",)
    listed(capsys, "rotate", "agent", "--keep-days", "0")
    assert read_public(public_file(place, "agent")).keys() == (pair_of(read_secret(place, "agent")).public,)


def test_rotating_an_agent_does_not_let_one_in_that_was_shut_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed(capsys, "make")
    public_file(place / AGENTS, "agent").unlink()
    rows = listed(capsys, "rotate", "agent")
    assert [row["what"] for row in rows] == ["secret and public"]
    assert not public_file(place / AGENTS, "agent").exists()


def test_rotating_the_monitor_says_to_restart_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed(capsys, "make")
    old = read_public(public_file(place, "monitor")).public
    status, _, err = run(capsys, "rotate", "monitor")
    assert status == 0
    assert "restart the monitor" in err
    assert read_public(public_file(place, "monitor")).keys()[1] == old


@pytest.mark.parametrize("verb", [[], ["make"], ["show"], ["rotate"]])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    status, out, _ = run(capsys, *verb, "--help")
    assert status == 0
    assert "Example: koopmon keys" in out


def test_make_takes_another_directory(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listed(capsys, "make", "--keys", str(tmp_path / "elsewhere"))
    assert secret_file(tmp_path / "elsewhere", "monitor").exists()
    assert not place.exists()
