"""Access to the pages from a `web.config.yml`, the file that exporters of Prometheus share (exporter-toolkit).

It holds TLS, client certificates, and users with bcrypt hashes. Keys of the format that the server cannot follow are
refused, because a file that is followed in part may protect less than it says.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import yaml
from msgspec import Struct

from koopmon.config import HttpConfig, read_file
from koopmon.errors import ConfigError, MissingExtraError, one_line
from koopmon.monitor.http.auth import HttpAuth, make_tls, read_http_auth, read_tls

HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
MAX_COST = 15
"""Largest cost of a hash: one check then takes about two seconds."""
VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
VERIFY: Final = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}


class TlsServerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """TLS of the server. Relative paths start at the directory of the file."""

    cert_file: str
    key_file: str
    client_auth_type: Literal["NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert"] = "NoClientCert"
    client_ca_file: str = ""
    min_version: Literal["TLS12", "TLS13"] = "TLS12"


class WebConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The supported part of the format."""

    tls_server_config: TlsServerConfig | None = None
    basic_auth_users: dict[str, str] = {}


class HashedUsers:
    """Checks passwords against bcrypt hashes, and remembers the right ones.

    A check takes tens of milliseconds on purpose, and each scrape repeats its password.
    """

    def __init__(self, hashes: Mapping[str, str], source: str) -> None:
        try:
            import bcrypt
        except ImportError:
            raise MissingExtraError(f"{source}: basic_auth_users", "bcrypt", "koopmon[web-config]") from None
        self._check = bcrypt.checkpw
        self._hashes = {user.encode(): each.encode() for user, each in hashes.items()}
        # An unknown user takes as long as a known one.
        self._nobody = bcrypt.hashpw(secrets.token_hex(16).encode(), bcrypt.gensalt(10))
        self._key = secrets.token_bytes(32)
        self._known: set[bytes] = set()

    def remembered(self, credentials: bytes) -> bool:
        """Return True if an earlier check has found `user:password` to be right."""
        return self._digest(credentials) in self._known

    def check(self, credentials: bytes) -> bool:
        """Check `user:password`, which takes tens of milliseconds of CPU time."""
        user, _, password = credentials.partition(b":")
        try:
            right = self._check(password, self._hashes.get(user, self._nobody)) and user in self._hashes
        except ValueError:  # a password of more than 72 bytes, or with a zero byte
            right = False
        if right:
            self._known.add(self._digest(credentials))
        return right

    def _digest(self, credentials: bytes) -> bytes:
        return hmac.digest(self._key, credentials, hashlib.sha256)


def read_access_to_pages(config: HttpConfig, environ: Mapping[str, str]) -> tuple[HttpAuth, ssl.SSLContext | None]:
    """Read credentials and TLS from `[http]` and the environment, or from its `web_config`. Raises ConfigError."""
    login, tls = read_http_auth(config, environ), read_tls(config)
    if not config.web_config:
        return login, tls
    if login.required or tls is not None:
        raise ConfigError(
            f"http.web_config = {config.web_config!r}: expected no certificate, token or password beside it, in [http]"
            " or the environment"
        )
    return read_web_config(Path(config.web_config))


def read_web_config(path: Path) -> tuple[HttpAuth, ssl.SSLContext | None]:
    """Read the file. Raises ConfigError or MissingExtraError, each one line without a hash."""
    source = f"http.web_config = {str(path)!r}"
    try:
        data: Any = yaml.safe_load(read_file(path)) or {}
        config = msgspec.convert(data, WebConfig)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError):
        raise ConfigError(f"{source}: not valid YAML") from None
    except msgspec.ValidationError as error:
        keys = f"tls_server_config ({', '.join(TlsServerConfig.__struct_fields__)}) and basic_auth_users"
        raise ConfigError(f"{source}: {one_line(error)}; supported are {keys}") from None
    users = None
    if config.basic_auth_users:
        for user, each in config.basic_auth_users.items():
            found = HASH.fullmatch(each)
            if found is None or not 4 <= int(found[1]) <= MAX_COST or ":" in user:
                raise ConfigError(
                    f"{source}: basic_auth_users {one_line(user, 60)!r}: expected a user without a colon and a bcrypt"
                    f" hash of cost 4 to {MAX_COST}, as `htpasswd -nB USER` prints it"
                )
        users = HashedUsers(config.basic_auth_users, source)
    return HttpAuth(users=users), _tls(config.tls_server_config, path.parent, source)


def _tls(config: TlsServerConfig | None, directory: Path, source: str) -> ssl.SSLContext | None:
    if config is None:
        return None
    wants = config.client_auth_type != "NoClientCert"
    if wants != bool(config.client_ca_file):
        raise ConfigError(
            f"{source}: client_auth_type = {config.client_auth_type!r}, client_ca_file = {config.client_ca_file!r}:"
            " client certificates need both"
        )
    files = str(directory / config.cert_file), str(directory / config.key_file)
    context = make_tls(*files, f"{source}: cert_file", f"{source}: key_file")
    context.minimum_version = VERSIONS[config.min_version]
    if wants:
        try:
            context.load_verify_locations(str(directory / config.client_ca_file))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{source}: client_ca_file = {config.client_ca_file!r}: {one_line(why)}") from None
        context.verify_mode = VERIFY[config.client_auth_type]
    return context
