"""Owners and modes of files that hold secrets, and lock files."""

from __future__ import annotations

import fcntl
import os
import resource
from pathlib import Path
from typing import IO

import pytest

from koopmon.errors import ConfigError
from koopmon.files import (
    check_private,
    is_locked,
    locked,
    open_private,
    open_regular,
    read_secret,
    why_not_private,
    write_whole,
)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("a word\n")
    file.chmod(0o600)
    return file


def test_a_private_file_and_directory_pass(secret: Path) -> None:
    assert why_not_private(secret, secret.stat()) == ""
    secret.parent.chmod(0o700)
    assert why_not_private(secret.parent, secret.parent.stat(), directory=True) == ""


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
def test_a_file_that_others_reach_is_refused_with_the_remedy(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    assert why_not_private(secret, secret.stat()) == f"mode {mode:04o} lets others read it; chmod 600 {secret}"


def test_nobody_is_advised_to_close_a_shared_directory_first(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    why = why_not_private(tmp_path, tmp_path.stat(), directory=True)
    assert why.startswith("mode 1777 lets others in; use a directory of your own, or chmod 700")


def test_a_file_is_no_directory_and_the_reverse(secret: Path) -> None:
    assert why_not_private(secret, secret.stat(), directory=True).startswith("not a directory")
    assert why_not_private(secret.parent, secret.parent.stat()).startswith("not a file")


def test_another_users_file_is_refused_and_roots_only_where_root_may_own_it(secret: Path) -> None:
    def owned_by(user: int) -> os.stat_result:
        values = list(secret.stat())
        values[4] = user
        return os.stat_result(values)

    other = os.geteuid() + 1
    assert why_not_private(secret, owned_by(other), root=True).startswith(f"belongs to user {other}")
    if os.geteuid() != 0:
        assert why_not_private(secret, owned_by(0)).startswith("belongs to user 0")
    assert why_not_private(secret, owned_by(0), root=True) == ""


def test_a_secret_is_one_line_and_its_field_is_named(secret: Path) -> None:
    assert read_secret(str(secret), {"WORD": "other"}, "WORD", "http.token_file") == b"a word"
    assert read_secret("", {"WORD": " other "}, "WORD", "http.token_file") == b"other"
    assert read_secret("", {}, "WORD", "http.token_file") is None
    for blank in ("", " ", "\t\n"):
        with pytest.raises(ConfigError, match=r"^WORD is set and empty"):
            read_secret("", {"WORD": blank}, "WORD", "http.token_file")
    for text in ("", "two\nlines", "x" * 5000):
        secret.write_text(text)
        with pytest.raises(ConfigError, match=r"^http.token_file = .*expected one line"):
            read_secret(str(secret), {}, "WORD", "http.token_file")


def test_a_file_of_our_own_is_private_and_keeps_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open_private(path) as file:
        file.write(b"words")
    assert path.stat().st_mode & 0o777 == 0o600
    with open_private(path) as file:
        assert file.read() == b"words"
    open_private(path, truncate=True).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "link to nothing", "directory", "fifo"])
def test_no_file_of_another_is_opened_through_ours(tmp_path: Path, kind: str) -> None:
    precious, path = tmp_path / "precious", tmp_path / "file"
    precious.write_text("precious")
    match kind:
        case "symbolic link":
            path.symlink_to(precious)
        case "hard link":
            path.hardlink_to(precious)
        case "link to nothing":
            path.symlink_to(tmp_path / "nothing")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
    with pytest.raises(OSError, match=r"link|directory|regular file"):
        open_private(path, truncate=True)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_nothing_but_a_file_is_opened_for_reading(tmp_path: Path, kind: str) -> None:
    """The opening of a pipe without a writer would never return."""
    path = tmp_path / "x"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    for opening in (open_regular, is_locked):
        with pytest.raises(OSError, match="not a regular file"):
            opening(path)


def test_a_file_that_cannot_be_written_whole_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_whole(path, "the earlier one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "the earlier one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        check_private(tmp_path / "none", "http.tls_key")


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    assert not is_locked(path)
    with locked(path):
        assert is_locked(path)
        with pytest.raises(BlockingIOError):
            locked(path)
    assert not is_locked(path)
    locked(path).close()


def test_a_file_that_its_holder_removes_while_it_is_opened_excludes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process opens the file just before the first one removes and closes it."""
    path = tmp_path / "x.lock"
    first = locked(path)
    flock, calls = fcntl.flock, []

    def late(file: IO[str], flags: int) -> None:
        if not calls:
            path.unlink()
            first.close()
        calls.append(flags)
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path) as second:
        assert os.path.samestat(os.fstat(second.fileno()), path.stat())
        assert len(calls) == 2
        with pytest.raises(BlockingIOError):
            locked(path)


def test_a_lock_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        locked(tmp_path / "none" / "x.lock")
