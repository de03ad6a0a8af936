"""Endpoints: bound, connected and refused ones."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from koopmon.errors import EndpointError
from koopmon.wire.endpoints import MAX_IPC_PATH_BYTES, check_endpoint, is_loopback, reached_beside
from koopmon.wire.sockets import ControlClient, ControlServer, DataReceiver, DataSender
from koopmon.wire.transport import WireContext


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("tcp://127.0.0.1:9465", "tcp://127.0.0.1:9465"),
        ("tcp://127.1.2.3:1", "tcp://127.1.2.3:1"),
        ("tcp://localhost:65535", "tcp://127.0.0.1:65535"),
        ("tcp://[::1]:9465", "tcp://[::1]:9465"),
        ("tcp://[0:0:0:0:0:0:0:1]:09465", "tcp://[::1]:9465"),
        ("ipc:///run/koopmon/control", "ipc:///run/koopmon/control"),
        ("ipc:///run/../run/control", "ipc:///run/control"),
    ],
)
def test_what_is_accepted_and_its_normal_form(given: str, normal: str) -> None:
    assert check_endpoint(given) == normal
    assert check_endpoint(check_endpoint(given)) == normal
    assert check_endpoint(given, binding=True) == normal


def test_a_relative_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_endpoint("ipc://run/control") == f"ipc://{tmp_path}/run/control"


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("tcp://10.0.0.1:9465", "tcp://10.0.0.1:9465"),
        ("tcp://Node-7.Example.org:9465", "tcp://node-7.example.org:9465"),
        ("tcp://localhost.example.org:9465", "tcp://localhost.example.org:9465"),
        ("tcp://[FE80::1]:9465", "tcp://[fe80::1]:9465"),
    ],
)
def test_other_hosts_to_connect_to(given: str, normal: str) -> None:
    assert check_endpoint(given) == normal
    assert not is_loopback(normal)


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("tcp://*:9465", "tcp://0.0.0.0:9465"),
        ("tcp://0.0.0.0:0", "tcp://0.0.0.0:*"),
        ("tcp://10.0.0.1:9465", "tcp://10.0.0.1:9465"),
        ("tcp://[::]:9465", "tcp://[::]:9465"),
    ],
)
def test_what_other_hosts_reach_may_be_bound(given: str, normal: str) -> None:
    assert check_endpoint(given, binding=True) == normal
    assert not is_loopback(normal)


@pytest.mark.parametrize(
    "host",
    ["[::ffff:127.0.0.1]", "[127.0.0.1]", "127.1", "127.0.0.01", "2130706433", "a..b", "-a", "a_b", "10.0.0.256"],
)
@pytest.mark.parametrize("binding", [False, True])
def test_what_is_no_host_is_refused(host: str, binding: bool) -> None:
    with pytest.raises(EndpointError, match="host") as caught:
        check_endpoint(f"tcp://{host}:9465", binding=binding)
    assert host in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("host", "binding"), [("0.0.0.0", False), ("[::]", False), ("*", False), ("node-7", True)])
def test_all_hosts_are_nowhere_to_connect_to_and_a_name_is_nothing_to_bind(host: str, binding: bool) -> None:
    with pytest.raises(EndpointError, match="host"):
        check_endpoint(f"tcp://{host}:9465", binding=binding)


@pytest.mark.parametrize(
    ("named", "known", "reached"),
    [
        ("tcp://0.0.0.0:7", "tcp://node-7:9465", "tcp://node-7:7"),
        ("tcp://[::]:7", "tcp://[fe80::1]:9465", "tcp://[fe80::1]:7"),
        ("tcp://10.0.0.1:7", "tcp://node-7:9465", "tcp://10.0.0.1:7"),
        ("ipc:///run/data", "tcp://node-7:9465", "ipc:///run/data"),
        ("tcp://0.0.0.0:7", "ipc:///run/control", "tcp://0.0.0.0:7"),
    ],
)
def test_an_endpoint_on_all_addresses_is_reached_where_its_neighbour_was(named: str, known: str, reached: str) -> None:
    assert reached_beside(named, known) == reached


@pytest.mark.parametrize(
    "malformed",
    ["", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:-1", "tcp://:9465",
     "tcp://127.0.0.1:9465/x", "tcp://127.0.0.1:9465 ", "tcp://10.0.0.1:1;127.0.0.1:9465", "udp://127.0.0.1:9465",
     "inproc://x", "pgm://x", "ws://127.0.0.1:9465", "127.0.0.1:9465", "ipc://", "ipc://@abstract", "ipc:///a/b\0c",
     "ipc:///run/", "TCP://127.0.0.1:9465", "tcp://[::1%lo]:9465"],
)  # fmt: skip
@pytest.mark.parametrize("binding", [False, True])
def test_malformed_endpoints_are_refused(malformed: str, binding: bool) -> None:
    with pytest.raises(EndpointError) as caught:
        check_endpoint(malformed, binding=binding)
    assert repr(malformed) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("wildcard", ["tcp://127.0.0.1:0", "tcp://localhost:*", "ipc://*"])
def test_only_who_binds_may_leave_the_choice_open(wildcard: str) -> None:
    assert check_endpoint(wildcard, binding=True).endswith("*")
    with pytest.raises(EndpointError):
        check_endpoint(wildcard)


@pytest.mark.parametrize("kind", [ControlClient, DataSender])
def test_a_client_without_keys_connects_to_no_other_host(
    kind: type[ControlClient | DataSender], near: WireContext
) -> None:
    with pytest.raises(EndpointError, match=r"tcp://192\.0\.2\.1:9465.*koopmon keys make.*--insecure-plaintext-tcp"):
        kind(near, "tcp://192.0.2.1:9465")


@pytest.mark.parametrize("kind", [ControlServer, DataReceiver])
def test_a_server_without_keys_binds_nothing_that_others_reach(
    kind: type[ControlServer | DataReceiver], far: WireContext
) -> None:
    with pytest.raises(EndpointError, match=r"koopmon keys make.*--insecure-plaintext-tcp"):
        kind(far, "tcp://0.0.0.0:0")


def test_ports_left_open_are_told(far: WireContext) -> None:
    ports = {ControlServer(far, wildcard).endpoint for wildcard in ("tcp://127.0.0.1:0", "tcp://127.0.0.1:*")}
    assert len(ports) == 2
    assert all(check_endpoint(endpoint) == endpoint for endpoint in ports)


def test_ipv6_loopback(far: WireContext, near: WireContext) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 loopback here: {error}")
    server = ControlServer(far, "tcp://[::1]:0")
    assert check_endpoint(server.endpoint) == server.endpoint
    ControlClient(near, server.endpoint)


def test_an_ipc_path_left_open_is_private_and_goes_with_its_socket() -> None:
    with WireContext() as far:
        server = ControlServer(far, "ipc://*")
        path = Path(server.endpoint.removeprefix("ipc://"))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert path.is_socket()
    assert not path.parent.exists()


def test_an_ipc_socket_is_its_owners_alone(far: WireContext, tmp_path: Path) -> None:
    path = tmp_path / "new" / "control"
    ControlServer(far, f"ipc://{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1777])
def test_a_directory_that_others_enter_is_refused_on_both_sides(
    mode: int, far: WireContext, near: WireContext, tmp_path: Path
) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    for attempt in (lambda e: ControlServer(far, e), lambda e: ControlClient(near, e), lambda e: DataSender(near, e)):
        with pytest.raises(EndpointError, match="chmod 700"):
            attempt(f"ipc://{directory}/control")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory away takes root")
def test_another_users_directory_is_refused(far: WireContext, near: WireContext, tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, -1)
    for attempt in (lambda e: ControlServer(far, e), lambda e: ControlClient(near, e)):
        with pytest.raises(EndpointError, match="belongs to user 12345"):
            attempt(f"ipc://{directory}/control")


def test_a_path_too_long_for_the_system_is_told(far: WireContext, tmp_path: Path) -> None:
    room = MAX_IPC_PATH_BYTES - len(str(tmp_path)) - 1
    ControlServer(far, f"ipc://{tmp_path}/{'x' * room}")
    with pytest.raises(EndpointError, match=f"{MAX_IPC_PATH_BYTES + 1} bytes.*takes {MAX_IPC_PATH_BYTES}.*shorter"):
        ControlServer(far, f"ipc://{tmp_path}/{'x' * (room + 1)}")


@pytest.mark.parametrize("kind", [ControlServer, DataReceiver])
def test_an_endpoint_in_use_is_told(kind: type[ControlServer | DataReceiver], endpoint: str, far: WireContext) -> None:
    first = kind(far, endpoint)
    with WireContext() as other, pytest.raises(EndpointError, match="in use by another process; stop it or choose"):
        kind(other, first.endpoint)
    if endpoint.startswith("ipc"):
        assert Path(endpoint.removeprefix("ipc://")).is_socket(), "the live socket must stay"


@pytest.mark.process
def test_an_ipc_file_left_by_a_killed_process_is_replaced(far: WireContext, tmp_path: Path) -> None:
    path = tmp_path / "run" / "control"
    script = (
        "import os, sys; from koopmon.wire.sockets import *; ControlServer(WireContext(), sys.argv[1]); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, f"ipc://{path}"], timeout=120, check=False)
    assert done.returncode == 9
    assert path.is_socket(), "the stale file that this test is about"
    assert ControlServer(far, f"ipc://{path}").endpoint == f"ipc://{path}"


def test_a_file_that_is_no_socket_is_left_alone(far: WireContext, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(EndpointError, match="not a socket"):
        ControlServer(far, f"ipc://{path}")
    assert path.read_text() == "data"
    with pytest.raises(EndpointError, match="choose another"):
        ControlServer(far, f"ipc://{path}/control")


def test_a_directory_that_cannot_be_made_is_told(far: WireContext) -> None:
    with pytest.raises(EndpointError, match=r"/proc/koopmon: .*choose another"):
        ControlServer(far, "ipc:///proc/koopmon/control")


def test_a_failed_bind_leaves_nothing_open(far: WireContext) -> None:
    taken = ControlServer(far, "tcp://127.0.0.1:0").endpoint
    with WireContext() as other:
        for _ in range(3):
            with pytest.raises(EndpointError):
                ControlServer(other, taken)
        assert not other._sockets
