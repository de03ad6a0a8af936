"""Endpoint syntax, and the file system requirements of an ipc endpoint before a bind.

An ipc path lies in a directory that only its owner can enter, so the operating system authenticates its peers.
`koopmon.wire.auth_policy` decides which tcp endpoints are allowed and which need keys.
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
import tempfile
from collections.abc import Iterator
from pathlib import Path

from koopmon.errors import EndpointError
from koopmon.files import why_not_private

MAX_IPC_PATH_BYTES = 107
"""Length of `sockaddr_un.sun_path` without its terminating zero."""
_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:/;\s]+):(?P<port>[0-9]{1,5}|\*)")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?=[A-Za-z0-9-]*[A-Za-z]){_LABEL}")
_EVERYWHERE = ("0.0.0.0", "[::]")  # noqa: S104 - named, not bound to


def check_endpoint(endpoint: str, *, binding: bool = False) -> str:
    """Return the endpoint in its normal form: `ipc://` with an absolute path, or `tcp://` with a host and a port.

    Connecting accepts an address or a host name. Binding accepts an address, or `*` for all of them. For a bind, the
    system chooses the port for 0 or `*`, and the path for `ipc://*`. Raises EndpointError.
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
    """Return True if only this host reaches a checked endpoint; an ipc path always qualifies."""
    if endpoint.startswith("ipc://"):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reached_beside(endpoint: str, known: str) -> str:
    """Replace a wildcard host in `endpoint`, which a peer at `known` reported, by the host of `known`."""
    for everywhere in _EVERYWHERE:
        if endpoint.startswith(f"tcp://{everywhere}:") and known.startswith("tcp://"):
            return f"{known.rpartition(':')[0]}:{endpoint.rpartition(':')[2]}"
    return endpoint


def _host(endpoint: str, host: str, binding: bool) -> str:
    if host.lower() == "localhost":
        return "127.0.0.1"
    if host == "*" and binding:
        return "0.0.0.0"  # noqa: S104 - the user chose it, and AuthPolicy requires keys
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
    length = len(os.fsencode(path))
    if length > MAX_IPC_PATH_BYTES:
        raise EndpointError(
            f"endpoint 'ipc://{path}': path of {length} bytes, this system takes {MAX_IPC_PATH_BYTES}: "
            "choose a shorter directory"
        )
    return f"ipc://{path}"


def check_ipc_owner(endpoint: str) -> None:
    """Before a connect, refuse an ipc directory that others own or can enter. A missing directory is no error."""
    if endpoint.startswith("ipc://"):
        with contextlib.suppress(FileNotFoundError):
            _check_directory(Path(endpoint.removeprefix("ipc://")).parent)


@contextlib.contextmanager
def claimed(endpoint: str) -> Iterator[str]:
    """Prepare binding to a checked endpoint and yield the address to bind.

    For ipc: the directory exists and only its owner can enter it, a stale socket file is removed, and no other process
    listens there. A lock prevents other binds until the context exits. The file gets mode 0600. Raises EndpointError.
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
        # libzmq unlinks an existing file at the path before it binds: of two monitors starting at once, one would steal
        # it.
        fcntl.flock(directory, fcntl.LOCK_EX)
        _clear_stale(path)
        yield endpoint
        with contextlib.suppress(OSError):
            path.chmod(0o600)
    finally:
        os.close(directory)


def socket_directory() -> Path:
    """Create a directory, mode 0700, whose path leaves room for the name of a socket. The caller removes it."""
    directory = Path(tempfile.mkdtemp(prefix="koopmon-"))
    if len(os.fsencode(directory / "control")) > MAX_IPC_PATH_BYTES:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="koopmon-", dir="/tmp"))
    return directory


def _check_directory(directory: Path) -> None:
    if why := why_not_private(directory, directory.stat(), directory=True):
        raise EndpointError(f"endpoint in {directory}: {why}")


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
