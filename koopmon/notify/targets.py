"""Targets of the configuration `[notify]`, with their secrets from files and the environment."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from koopmon.config import MailConfig, NotifyConfig, WebhookConfig
from koopmon.errors import ConfigError
from koopmon.files import read_secret
from koopmon.notify.message import json_body, slack_body
from koopmon.notify.target import NotifyTarget
from koopmon.notify.webhook import Webhook

logger = logging.getLogger(__name__)

WEBHOOK_VARIABLE = "KOOPMON_NOTIFY_WEBHOOK"
PASSWORD_VARIABLE = "KOOPMON_NOTIFY_PASSWORD"  # noqa: S105 - the name of a variable
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def read_targets(config: NotifyConfig, environ: Mapping[str, str]) -> tuple[NotifyTarget, ...]:
    """Read addresses and passwords. Raises ConfigError, which never quotes a secret."""
    return (*_webhooks(config, environ), *_mail(config, environ))


def _webhooks(config: NotifyConfig, environ: Mapping[str, str]) -> Iterator[Webhook]:
    for number, each in enumerate(config.webhooks):
        name = f"notify.webhooks[{number}]"
        url = _url(each, environ, name)
        host = urlsplit(url).hostname
        if url.startswith("http://") and host not in LOOPBACK:
            logger.warning("%s: %s has no TLS: others on the network can read the notifications", name, host)
        token = read_secret(each.token_file, {}, "", f"{name}.token_file") or b""
        if not token.isascii() or not token.decode("ascii").isprintable() or b" " in token:
            raise ConfigError(f"{name}.token_file: expected a token of printable ASCII without blanks")
        yield Webhook(
            label=f"{name} ({host})",
            events=each.events,
            url=url,
            body=slack_body if each.format == "slack" else json_body,
            token=token.decode("ascii"),
            timeout_seconds=config.timeout_seconds,
        )


def _url(config: WebhookConfig, environ: Mapping[str, str], name: str) -> str:
    """Return the address of a webhook; no message contains it, because it is a secret."""
    if config.url and config.url_file:
        raise ConfigError(f"{name}.url, {name}.url_file = {config.url_file!r}: expected one of the two")
    secret = config.url.encode() or read_secret(config.url_file, environ, WEBHOOK_VARIABLE, f"{name}.url_file")
    url = (secret or b"").decode("utf-8", "replace")
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        complete = False
    if not (complete and url.isascii() and url.isprintable() and " " not in url and "#" not in url and "@" not in url):
        source = f"{name}.url_file" if config.url_file else f"{name}.url, or {WEBHOOK_VARIABLE}"
        why = "has another form" if url else "is empty"
        raise ConfigError(f"{source}: expected https://HOST[:PORT]/PATH without user and password; the value {why}")
    return url


def _mail(config: NotifyConfig, environ: Mapping[str, str]) -> Iterator[NotifyTarget]:
    if not config.mail:
        return
    # Imported late because it imports the packages of the standard library for mail.
    from koopmon.notify.mail import Mail

    for number, each in enumerate(config.mail):
        name = f"notify.mail[{number}]"
        yield Mail(
            label=f"{name} ({each.server})",
            events=each.events,
            server=each.server,
            port=each.port,
            security=each.security,
            sender=each.sender,
            recipients=each.to,
            user=each.user,
            password=_password(each, environ, name),
            timeout_seconds=config.timeout_seconds,
        )


def _password(config: MailConfig, environ: Mapping[str, str], name: str) -> str:
    if not config.user:
        if config.password_file:
            raise ConfigError(f"{name}.user = '': a password needs its user")
        return ""
    if config.security == "none":
        raise ConfigError(f"{name}.security = 'none': expected 'starttls' or 'tls' beside a user: no password in clear")
    secret = read_secret(config.password_file, environ, PASSWORD_VARIABLE, f"{name}.password_file")
    if secret is None:
        raise ConfigError(
            f"{name}.password_file = '': the user needs a password, in a file of mode 0600 or in {PASSWORD_VARIABLE}"
        )
    if not secret.isascii():  # smtplib encodes it in ASCII
        raise ConfigError(f"{name}.password_file, or {PASSWORD_VARIABLE}: expected a password in ASCII")
    return secret.decode("ascii")
