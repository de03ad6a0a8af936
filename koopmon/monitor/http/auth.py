"""Authentication and TLS of the monitor's pages: a bearer token or a password."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from koopmon.config import HttpConfig
from koopmon.errors import ConfigError
from koopmon.files import check_private, read_secret
from koopmon.wire.endpoints import is_loopback

if TYPE_CHECKING:
    from koopmon.monitor.http.web_config import HashedUsers

TOKEN_VARIABLE = "KOOPMON_HTTP_TOKEN"  # noqa: S105 - the name of a variable
PASSWORD_VARIABLE = "KOOPMON_HTTP_PASSWORD"  # noqa: S105
OPEN = frozenset({"/healthz", "/readyz"})
"""Health checks that need no authentication and contain no run data."""
LOCAL_HOSTS = ("localhost", "")
"""Names of this host on loopback beside its addresses. HTTP/1.0 clients send none."""
BROWSERS = (
    "A browser cannot show a bearer token: for the live page set [http] user and password_file as well, or ask with\n"
    "  curl -H 'Authorization: Bearer TOKEN' ADDRESS\n"
)


@dataclass(frozen=True, slots=True)
class HttpAuth:
    """Credentials that a request must present: a token, or a user and password. Without either, pages are open."""

    token: bytes | None = field(default=None, repr=False)
    user: bytes | None = None
    password: bytes | None = field(default=None, repr=False)
    users: HashedUsers | None = field(default=None, repr=False)
    """Users of a `web.config.yml`."""

    @property
    def required(self) -> bool:
        return self.token is not None or self.has_passwords

    @property
    def has_passwords(self) -> bool:
        return self.password is not None or self.users is not None

    def admits(self, header: bytes) -> bool:
        """Return True if an `Authorization` header is valid. Compares in constant time."""
        scheme, _, credentials = header.strip().partition(b" ")
        if scheme.lower() == b"bearer" and self.token is not None:
            return hmac.compare_digest(credentials.strip(), self.token)
        shown = _basic(header)
        if shown is None or not self.has_passwords:
            return False
        if self.password is not None and hmac.compare_digest(shown, b"%b:%b" % (self.user or b"", self.password)):
            return True
        return self.users is not None and (self.users.remembered(shown) or self.users.check(shown))

    def wrap(self, pages: ASGIApp) -> ASGIApp:
        """Return `pages` with this authentication in front."""
        if not self.required:
            return pages
        words = "a token or a password is needed\n" + ("" if self.has_passwords else BROWSERS)
        schemes = [b"Bearer"] * (self.token is not None) + [b'Basic realm="koopmon"'] * self.has_passwords
        # One check at a time: wrong passwords take no more than one CPU, and block no request with a known one.
        one_check = asyncio.Semaphore(1)

        async def valid(header: bytes) -> bool:
            shown = _basic(header)
            if self.users is None or shown is None or self.users.remembered(shown):
                return self.admits(header)
            async with one_check:
                return await asyncio.to_thread(self.admits, header)

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
            is_open = scope["type"] == "http" and scope["path"] in OPEN
            if is_open or scope["type"] == "lifespan" or (len(given) == 1 and await valid(given[0])):
                await pages(scope, receive, send)
                return
            headers = [(b"content-type", b"text/plain; charset=utf-8"), *((b"www-authenticate", s) for s in schemes)]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": words.encode()})

        return guarded


def only_for_hosts(pages: ASGIApp, hosts: Collection[str]) -> ASGIApp:
    """Return `pages` for requests whose `Host` is localhost, a loopback address or one of `hosts`.

    A browser sends the name in its address line, so a foreign name that resolves to this host is refused.
    """
    allowed = frozenset(host.lower() for host in (*LOCAL_HOSTS, *hosts))

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        given = [host_of(value) for name, value in scope.get("headers", ()) if name == b"host"]
        is_open = scope.get("path") in OPEN
        if is_open or (len(given) <= 1 and all(host in allowed or is_loopback(f"tcp://{host}:0") for host in given)):
            await pages(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 421, "headers": headers})
        await send({"type": "http.response.body", "body": b"the name of this host is not in [http] hosts\n"})

    return checked


def host_of(header: bytes) -> str:
    """Return the host of a `Host` header in lower case, without port and final dot."""
    text = header.decode("latin-1").strip().lower()
    host, colon, port = text.rpartition(":")
    return (host if colon and port.isdecimal() else text).removesuffix(".")


def _basic(header: bytes) -> bytes | None:
    """Return `user:password` of a header for basic authentication; None for any other header."""
    scheme, _, credentials = header.strip().partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        return base64.b64decode(credentials.strip(), validate=True)
    except binascii.Error:
        return None


def read_http_auth(config: HttpConfig, environ: Mapping[str, str]) -> HttpAuth:
    """Read the credentials from configuration and environment. Raises ConfigError, which never quotes a secret."""
    token = read_secret(config.token_file, environ, TOKEN_VARIABLE, "http.token_file")
    password = read_secret(config.password_file, environ, PASSWORD_VARIABLE, "http.password_file")
    if (password is None) != (not config.user):
        raise ConfigError(
            f"http.user = {config.user!r}: a user and a password go together; the password is in http.password_file"
            f" or {PASSWORD_VARIABLE}"
        )
    return HttpAuth(token, config.user.encode() or None, password)


def read_tls(config: HttpConfig) -> ssl.SSLContext | None:
    """Load the configured certificate and key; None without them. Raises ConfigError."""
    certificate, key = config.tls_certificate, config.tls_key
    if not certificate and not key:
        return None
    if not certificate or not key:
        missing = "tls_key" if certificate else "tls_certificate"
        raise ConfigError(f"http.{missing} = '': a certificate and its key go together")
    return make_tls(certificate, key, "http.tls_certificate", "http.tls_key")


def make_tls(certificate: str, key: str, *names: str) -> ssl.SSLContext:
    """Load a certificate and its key from the configuration fields `names`. Raises ConfigError."""
    check_private(Path(key), names[-1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password callback, OpenSSL would prompt on the terminal for the passphrase of an encrypted key.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as error:  # ssl.SSLError among them
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{names[0]} = {certificate!r}, {names[-1]} = {key!r}: {why}; expected PEM files that belong together, the"
            " key without a passphrase"
        ) from None
    return context
