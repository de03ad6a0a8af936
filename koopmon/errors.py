"""Errors that koopmon raises. Each message is one line that says what to do."""

from __future__ import annotations


def one_line(text: object, limit: int = 400) -> str:
    """A text that may quote a file or a peer, fit for a log line: printable, and at most `limit` characters."""
    line = "".join(character if character.isprintable() else "?" for character in str(text))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


class KoopmonError(Exception):
    """Parent of every error koopmon raises on purpose; `exit_status` is what the CLI returns for it."""

    exit_status = 1


class ConfigError(KoopmonError, ValueError):
    """A configuration value is malformed: names the field, the value and what is allowed."""

    exit_status = 2


class MissingExtraError(KoopmonError, ImportError):
    """A library that comes with an extra of koopmon is not installed: names it, and what installs it."""

    exit_status = 2

    def __init__(self, module: str, library: str, install: str) -> None:
        super().__init__(f"{module} needs {library}, which is not installed: pip install {install!r}")


class AdapterError(KoopmonError):
    """An architecture adapter cannot be selected: unknown name, no claim, or two claims of equal specificity."""

    exit_status = 2


class DiscoveryError(AdapterError):
    """No residual chain was found or verified in a model; lists what was seen."""


class ProtocolError(KoopmonError):
    """A message breaks PROTOCOL.md.

    `reason` is one of `koopmon.wire.codec.REJECTION_REASONS`: a bounded label for metrics.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class EndpointError(KoopmonError):
    """An endpoint cannot be used: malformed, in use, unreachable, or within others' reach and without keys."""

    exit_status = 2


class KeysError(KoopmonError):
    """A key file cannot be used: missing, malformed, or open to others. Names the file, never what it holds."""

    exit_status = 2


class StoreError(KoopmonError):
    """The history store cannot be opened, is in use, or has a schema that this version does not know."""

    exit_status = 2


class CalibrationError(KoopmonError):
    """A calibrator, or what it is to be fitted on, does not fit: says what is wrong and what would do."""

    exit_status = 2


class GrafanaError(KoopmonError):
    """Grafana did not do what it was asked for, or answered what no Grafana that is served here would."""


class GrafanaDeniedError(GrafanaError):
    """Grafana does not know the token, or the token may not do what it was used for."""

    exit_status = 3


class GrafanaUnreachableError(GrafanaError):
    """Nobody answers where Grafana should be, or not in time."""

    exit_status = 4


class GrafanaKeptError(GrafanaError):
    """Something in Grafana is not ours to overwrite: made by others, or edited by hand since it was pushed."""

    exit_status = 5
