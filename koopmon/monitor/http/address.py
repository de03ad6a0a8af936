"""The address of the pages. It imports no web server, because `koopmon run` checks its option before the job starts."""

from __future__ import annotations

import os
import socket

from koopmon.errors import EndpointError
from koopmon.wire.endpoints import check_endpoint, is_loopback


def parse_address(address: str, *, exposed: bool = False) -> tuple[str, int]:
    """Parse `HOST:PORT`, an address of this host; the system chooses a port for 0.

    Without `exposed` it must be a loopback address. Raises EndpointError.
    """
    try:
        checked = check_endpoint(f"tcp://{address}", binding=True)
    except EndpointError:
        raise EndpointError(
            f"http {address!r}: expected HOST:PORT, an address of this host and a port from 0 to 65535, as"
            " 127.0.0.1:9464 or 0.0.0.0:9464"
        ) from None
    if not exposed and not is_loopback(checked):
        raise EndpointError(
            f"http {address!r}: other hosts reach it: give [http] a certificate and a token or password, or name the"
            " risk with insecure_plaintext; only loopback (127.0.0.1, [::1], localhost) goes without"
        )
    host, _, port = checked.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), 0 if port == "*" else int(port)


def reachable(address: str) -> str:
    """Return `HOST:PORT` with the name of this host in place of an address that means all of its addresses."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]") else address  # noqa: S104 - not bound here


def listen(address: str, *, exposed: bool = False) -> socket.socket:
    """Open a listening socket at `HOST:PORT`. Raises EndpointError when the address is not allowed or in use."""
    host, port = parse_address(address, exposed=exposed)
    ipv6 = ":" in host
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ipv6 else socket.AF_INET, dualstack_ipv6=ipv6
        )
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise EndpointError(f"http {address!r}: {why}: choose another --http address") from None
