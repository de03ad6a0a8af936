"""Key files: content, refusals with their messages, and the runs of a key."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from koopmon.errors import KeysError
from koopmon.wire.auth_policy import AuthPolicy, make_auth_policy
from koopmon.wire.authorized_keys import CHECK_SECONDS, AuthorizedKeys
from koopmon.wire.curve import KeyPair, new_pair, pair_of
from koopmon.wire.keys import (
    AGENTS,
    PublicKey,
    check_name,
    keys_directory,
    make_directory,
    public_file,
    read_public,
    read_secret,
    secret_file,
    write_public,
    write_secret,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_directory(tmp_path / "keys")
    make_directory(tmp_path / "keys" / AGENTS)
    return tmp_path / "keys"


def put(place: Path, name: str, **fields: object) -> KeyPair:
    """A pair with both halves in `place`, and its public half among the agents."""
    pair = new_pair()
    write_secret(place, name, pair.secret)
    for directory in (place, place / AGENTS):
        write_public(public_file(directory, name), PublicKey(public=pair.public, **fields))  # type: ignore[arg-type]
    return pair


def test_a_pair_comes_back_as_it_was_written(place: Path) -> None:
    pair = put(place, "agent", runs=("team-a/*", "x'\"[0-9]"))
    assert read_secret(place, "agent") == pair.secret
    assert pair_of(pair.secret) == pair
    assert read_public(public_file(place, "agent")) == PublicKey(public=pair.public, runs=("team-a/*", "x'\"[0-9]"))
    assert stat.S_IMODE(secret_file(place, "agent").stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert pair.secret not in repr(pair)
    assert {path.name for path in place.iterdir()} == {"agent.secret", "agent.key", AGENTS}, "nothing half-written"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o610])
def test_a_secret_that_others_read_is_refused_with_what_to_do(place: Path, mode: int) -> None:
    put(place, "agent")
    path = secret_file(place, "agent")
    path.chmod(mode)
    with pytest.raises(KeysError, match=f"{path}: mode {mode:04o} lets others read it; chmod 600 {path}"):
        read_secret(place, "agent")
    path.chmod(0o400)
    read_secret(place, "agent")


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_directory_that_others_enter_is_refused(place: Path, mode: int) -> None:
    put(place, "agent")
    place.chmod(mode)
    with pytest.raises(KeysError, match=f"{place}: mode {mode:04o} lets others in; .* chmod 700 {place}"):
        read_secret(place, "agent")
    with pytest.raises(KeysError, match="chmod 700"):
        make_directory(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_what_belongs_to_another_user_is_refused(place: Path) -> None:
    put(place, "agent")
    os.chown(secret_file(place, "agent"), 12345, -1)
    with pytest.raises(KeysError, match=r"agent\.secret: belongs to user 12345"):
        read_secret(place, "agent")
    os.chown(place, 12345, -1)
    with pytest.raises(KeysError, match="belongs to user 12345"):
        read_secret(place, "agent")


def test_what_is_not_there_says_how_to_make_it(place: Path, tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"nowhere: no such file.*`koopmon keys make` makes them"):
        read_secret(tmp_path / "nowhere", "agent")
    with pytest.raises(KeysError, match=r"agent\.secret: no such file.*`koopmon keys make agent` makes it"):
        read_secret(place, "agent")
    with pytest.raises(KeysError, match=r"monitor\.key: no such file.*copy it"):
        read_public(public_file(place, "monitor"))
    secret_file(place, "agent").mkdir()
    with pytest.raises(KeysError, match=r"agent\.secret"):
        read_secret(place, "agent")


def test_a_pipe_is_no_key(place: Path) -> None:
    os.mkfifo(secret_file(place, "agent"), 0o600)
    os.mkfifo(public_file(place, "agent"))
    with pytest.raises(KeysError, match=r"agent\.secret: not a regular file"):
        read_secret(place, "agent")
    with pytest.raises(KeysError, match=r"agent\.key: not a regular file"):
        read_public(public_file(place, "agent"))


@pytest.mark.parametrize(
    "text", ["", "secret = 5", 'secret = "{secret}x"', 'secret = "{secret}"\nmore = 1', '"{secret}', "\0", "x" * 20_000]
)
def test_a_secret_file_that_is_none_is_one_line_without_its_content(place: Path, text: str) -> None:
    secret = new_pair().secret
    path = secret_file(place, "agent")
    path.touch(0o600)
    path.write_text(text.replace("{secret}", secret))
    with pytest.raises(KeysError) as caught:
        read_secret(place, "agent")
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert secret[:8] not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "public = 1", 'public = "short"', 'public = "{public}"\nruns = [""]', 'public = "{public}"\nrun = []']
)
def test_a_public_file_that_is_none_is_one_line(place: Path, text: str) -> None:
    path = public_file(place, "agent")
    path.write_text(text.replace("{public}", new_pair().public))
    with pytest.raises(KeysError, match="not a key file of koopmon") as caught:
        read_public(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_after_a_rotation_the_old_key_counts_for_a_while(place: Path) -> None:
    old, new = new_pair().public, new_pair().public
    write_public(public_file(place, "a"), PublicKey(public=new, previous=old, previous_until=NOW))
    key = read_public(public_file(place, "a"))
    assert key.keys(NOW - timedelta(seconds=1)) == (new, old)
    assert key.keys(NOW) == (new,)
    assert PublicKey(public=new, previous=old, previous_until=NOW.replace(tzinfo=None)).keys(NOW) == (new,)
    assert PublicKey(public=new, previous=old).keys(NOW) == (new,), "without an end it is over"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "agents", "-a", "a" * 65, "a b", "a\n"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(KeysError, match="key name"):
        check_name(name)


def test_where_keys_are_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for base, expected in (("", tmp_path / ".config"), ("relative", tmp_path / ".config"), ("/x", Path("/x"))):
        monkeypatch.setenv("XDG_CONFIG_HOME", base)
        assert keys_directory("", {}) == expected / "koopmon" / "keys"
    assert keys_directory("", {"KOOPMON_KEYS": "/k"}) == Path("/k")
    assert keys_directory("/c", {"KOOPMON_KEYS": "/k"}) == Path("/c")


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def later(self) -> None:
        self.seconds += 2 * CHECK_SECONDS


def test_agents_speak_for_their_runs_and_no_others(place: Path) -> None:
    bound, free = put(place, "bound", runs=("team-a/*", "solo")), put(place, "free")
    agents = AuthorizedKeys(place)
    assert len(agents._agents) == 2
    assert agents.name_of(bound.public) == "bound"
    assert agents.name_of(free.public) == "free"
    assert agents.name_of(new_pair().public) is None
    assert agents.name_of("") is None
    assert [agents.is_authorized("bound", run) for run in ("team-a/x", "solo", "team-b/x", "solo2", "team-a")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert agents.is_authorized("free", "anything")
    assert not agents.is_authorized("nobody", "anything")


def test_agents_are_added_rotated_and_shut_out_while_the_monitor_serves(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    first = put(place, "first")
    agents = AuthorizedKeys(place, clock=clock, now=lambda: NOW)
    second = put(place, "second")
    assert agents.name_of(second.public) is None, "not before it looks again"
    clock.later()
    assert agents.name_of(second.public) == "second"
    newer = put(place, "second", previous=second.public, previous_until=NOW + timedelta(days=1))
    clock.later()
    assert agents.name_of(second.public) == agents.name_of(newer.public) == "second"
    public_file(place / AGENTS, "first").unlink()
    clock.later()
    assert agents.name_of(first.public) is None
    assert agents.name_of(newer.public) == "second"
    public_file(place / AGENTS, "second").write_text("nonsense")
    public_file(place / AGENTS, "third").write_text("more nonsense")
    clock.later()
    assert agents.name_of(newer.public) is None, "what cannot be read is nobody's"
    assert f"{place / AGENTS / 'second.key'}: not a key file" in caplog.text
    place.joinpath(AGENTS).chmod(0o777)
    clock.later()
    assert agents.name_of(newer.public) is None
    assert "lets others in" in caplog.text


def test_at_the_start_a_file_that_cannot_be_used_is_an_error(place: Path) -> None:
    public_file(place / AGENTS, "bad").write_text("nonsense")
    with pytest.raises(KeysError, match=r"bad\.key"):
        AuthorizedKeys(place)
    place.joinpath(AGENTS).chmod(0o755)
    with pytest.raises(KeysError, match="chmod 700"):
        AuthorizedKeys(place)


@pytest.mark.parametrize(
    ("endpoint", "trust", "curve"),
    [
        ("ipc:///run/x", AuthPolicy(Path("/k"), curve_on_loopback=True), False),
        ("tcp://127.0.0.1:1", AuthPolicy(Path("/k")), False),
        ("tcp://[::1]:1", AuthPolicy(Path("/k")), False),
        ("tcp://127.0.0.1:1", AuthPolicy(Path("/k"), curve_on_loopback=True), True),
        ("tcp://10.0.0.1:1", AuthPolicy(Path("/k")), True),
        ("tcp://node:1", AuthPolicy(Path("/k")), True),
        ("tcp://10.0.0.1:1", AuthPolicy(Path("/k"), plaintext_tcp=True), False),
        ("tcp://10.0.0.1:1", AuthPolicy(plaintext_tcp=True), False),
    ],
)
def test_which_endpoints_take_keys(endpoint: str, trust: AuthPolicy, curve: bool) -> None:
    assert trust.check(endpoint) == endpoint
    assert trust.uses_curve(endpoint) is curve


def test_the_environment_may_name_the_risk() -> None:
    table = {"keys": "", "agent": "agent", "loopback": "plain", "insecure_plaintext_tcp": False}
    for value, plain in (("1", True), ("0", False), ("", False)):
        trust = make_auth_policy(**table, environ={"KOOPMON_INSECURE_PLAINTEXT_TCP": value})  # type: ignore[arg-type]
        assert trust.plaintext_tcp is plain
