"""Endpoints: what they look like, and what an ipc endpoint needs in the file system before a socket is bound to it.

An ipc path lies in a directory that only its owner enters: the operating system authenticates its peers. Which tcp
endpoints may be used, and with which keys, is `koopmon.wire.auth_policy`'s to say.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from koopmon.errors import EndpointError

MAX_IPC_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""Length of `sockaddr_un.sun_path` less its closing zero."""
_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:/;\s]+):(?P<port>[0-9]{1,5}|\*)")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?=[A-Za-z0-9-]*[A-Za-z]){_LABEL}")
_EVERYWHERE = ("0.0.0.0", "[::]")  # noqa: S104 - named, not bound to


def check_endpoint(endpoint: str, *, binding: bool = False) -> str:
    """The endpoint in its normal form: `ipc://` with an absolute path, or `tcp://` with a host and a port.

    Connecting takes an address or a host's name; binding takes an address, `*` for all of them. For binding, port 0 or
    `*` leaves the choice to the system, as `ipc://*` leaves the path. Raises EndpointError.
    """
    if endpoint.startswith("ipc://"):
        return _check_ipc(endpoint, binding)
    match = _TCP.fullmatch(endpoint)
    if match is None:
        raise EndpointError(f"endpoint {endpoint!r}: expected tcp://HOST:PORT or ipc:///PATH")
    host, port = _host(endpoint, match["host"], binding), match["port"]
    if port in ("*", "0", "00", "000", "0000", "00000"):
        if not binding:
            raise EndpointError(f"endpoint {endpoint!r}: to connect, name a port from 1 to 65535")
        return f"tcp://{host}:*"
    if int(port) > 65535:
        raise EndpointError(f"endpoint {endpoint!r}: port {port} is outside 1 to 65535")
    return f"tcp://{host}:{int(port)}"


def is_loopback(endpoint: str) -> bool:
    """Whether a checked endpoint is reached from this host alone; an ipc path always is."""
    if endpoint.startswith("ipc://"):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reached_beside(endpoint: str, known: str) -> str:
    """An endpoint that a peer at the endpoint `known` has named: bound to all its addresses, it is on the known one."""
    for everywhere in _EVERYWHERE:
        if endpoint.startswith(f"tcp://{everywhere}:") and known.startswith("tcp://"):
            return f"{known.rpartition(':')[0]}:{endpoint.rpartition(':')[2]}"
    return endpoint


def _host(endpoint: str, host: str, binding: bool) -> str:
    if host.lower() == "localhost":
        return "127.0.0.1"
    if host == "*" and binding:
        return "0.0.0.0"  # noqa: S104 - the user says so, and Trust asks for keys
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        address = None
    if isinstance(address, ipaddress.IPv4Address) and not host.startswith("["):
        normal = str(address)
    elif isinstance(address, ipaddress.IPv6Address) and host.startswith("[") and address.ipv4_mapped is None:
        normal = f"[{address}]"
    elif not binding and _HOST_NAME.fullmatch(host) is not None:
        return host.lower()
    else:
        allowed = "an address of this host, or * for all" if binding else "a host's name or address"
        raise EndpointError(f"endpoint {endpoint!r}: {host!r} is not {allowed}")
    if normal in _EVERYWHERE and not binding:
        raise EndpointError(f"endpoint {endpoint!r}: to connect, name one host")
    return normal


def _check_ipc(endpoint: str, binding: bool) -> str:
    path = endpoint.removeprefix("ipc://")
    if path == "*" and binding:
        return endpoint
    if not path or path in ("*", "/") or path.startswith("@") or "\0" in path or path.endswith("/"):
        raise EndpointError(
            f"endpoint {endpoint!r}: expected ipc:// and the path of a socket file, as ipc:///run/dir/name"
        )
    path = os.path.abspath(path)
    _check_length(path)
    return f"ipc://{path}"


def _check_length(path: str) -> None:
    length = len(os.fsencode(path))
    if length > MAX_IPC_PATH_BYTES:
        raise EndpointError(
            f"endpoint 'ipc://{path}': path of {length} bytes, this system takes {MAX_IPC_PATH_BYTES}: "
            "choose a shorter directory"
        )


def check_ipc_owner(endpoint: str) -> None:
    """Before connecting: refuse an ipc directory that others enter or own. What does not exist yet is no error."""
    if endpoint.startswith("ipc://"):
        with contextlib.suppress(FileNotFoundError):
            _check_directory(Path(endpoint.removeprefix("ipc://")).parent)


@contextlib.contextmanager
def claimed(endpoint: str) -> Iterator[str]:
    """Hold what binding to a checked endpoint needs, and give the address to bind.

    For ipc: the directory exists and is its owner's alone, a stale socket file is gone, no one else listens there (nor
    can start to while this is held), and the file ends up with mode 0600. Raises EndpointError.
    """
    if not endpoint.startswith("ipc://"):
        yield endpoint
        return
    path = Path(endpoint.removeprefix("ipc://"))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_directory(path.parent)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise EndpointError(
            f"endpoint {endpoint!r}: {path.parent}: {error.strerror}; choose another directory"
        ) from None
    try:
        # libzmq unlinks whatever is at the path before it binds: two monitors starting at once would steal it.
        fcntl.flock(directory, fcntl.LOCK_EX)
        _clear_stale(path)
        yield endpoint
        with contextlib.suppress(OSError):
            path.chmod(0o600)
    finally:
        os.close(directory)


def temporary_ipc() -> tuple[str, Path]:
    """A new `ipc://` endpoint in a directory of its own, mode 0700, and that directory, for the caller to remove."""
    directory = Path(tempfile.mkdtemp(prefix="koopmon-"))
    try:
        _check_length(str(directory / "socket"))
    except EndpointError:
        directory.rmdir()
        raise
    return f"ipc://{directory / 'socket'}", directory


def _check_directory(directory: Path) -> None:
    status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise EndpointError(f"endpoint in {directory}: not a directory; choose another path")
    if status.st_uid != os.geteuid():
        raise EndpointError(
            f"endpoint in {directory}: the directory belongs to user {status.st_uid}; use one of your own"
        )
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise EndpointError(
            f"endpoint in {directory}: mode {mode:04o} lets others in; chmod 700 it, or use a directory of its own"
        )


def _clear_stale(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise EndpointError(f"endpoint 'ipc://{path}': a file that is not a socket is there; choose another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
                return
    raise EndpointError(f"endpoint 'ipc://{path}': in use by another process; stop it or choose another name")
