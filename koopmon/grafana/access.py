"""Address and token of Grafana, for the monitor's annotations and for `koopmon grafana push`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from koopmon.config import GrafanaConfig
from koopmon.errors import ConfigError, one_line
from koopmon.files import read_secret

TOKEN_VARIABLE = "KOOPMON_GRAFANA_TOKEN"  # noqa: S105 - the name of a variable


@dataclass(frozen=True, slots=True)
class GrafanaAccess:
    """Address, token and timeout of Grafana. `url` ends with a slash; request paths are appended to it."""

    url: str
    token: str = field(repr=False)
    timeout_seconds: float

    @property
    def in_clear(self) -> bool:
        """True if the token would travel to another host without TLS."""
        parts = urlsplit(self.url)
        return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


def read_access(config: GrafanaConfig, environ: Mapping[str, str]) -> GrafanaAccess:
    """Read address and token from configuration and environment.

    Raises ConfigError, which never quotes a secret, when either is missing or malformed.
    """
    if not config.url:
        raise ConfigError("grafana.url = '': expected Grafana's address: --url, KOOPMON_GRAFANA_URL or [grafana] url")
    url = check_url(config.url)
    token = read_secret(config.token_file, environ, TOKEN_VARIABLE, "grafana.token_file")
    if token is None:
        raise ConfigError(
            "grafana.token_file = '': a service account's token is needed, in a file of mode 0600 or in"
            f" {TOKEN_VARIABLE}"
        )
    if not token.isascii() or not token.decode("ascii").isprintable() or b" " in token:
        raise ConfigError(
            f"grafana.token_file, or {TOKEN_VARIABLE}: expected a token of printable ASCII without blanks"
        )
    return GrafanaAccess(url, token.decode("ascii"), config.timeout_seconds)


def check_url(url: str, name: str = "grafana.url") -> str:
    """Return `url` with a slash at its end. Raises ConfigError with the field `name`, without quoting a password."""
    shown = one_line(url.partition("?")[0].rpartition("@")[2])
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise ConfigError(f"{name} = {shown!r}: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{name} = {shown!r}: without user and password: the token is enough")
    if not (complete and url.isascii() and url.isprintable() and " " not in url):
        raise ConfigError(
            f"{name} = {shown!r}: expected http://HOST[:PORT]/ or https://, with the sub-path if it has one"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{name} = {shown!r}: expected nothing behind the path")
    return url if url.endswith("/") else f"{url}/"
