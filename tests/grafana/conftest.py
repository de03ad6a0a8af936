"""A Grafana below a sub-path, and a push to it through the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from koopmon.cli import main
from tests.fake_grafana import TOKEN, FakeGrafana
from tests.monitor.conftest import (
    connect,
    one_snapshot_is_enough,
    start_monitor,
    start_process,
    store_path,
    until,
)

__all__ = ["connect", "one_snapshot_is_enough", "start_monitor", "start_process", "store_path", "until"]

Push = Callable[..., tuple[int, str, str]]


@pytest.fixture
def grafana() -> Iterator[FakeGrafana]:
    fake = FakeGrafana(prefix="/grafana")
    yield fake
    fake.close()


@pytest.fixture
def push(grafana: FakeGrafana, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    """Push to `grafana`; return exit status, output and errors, which never contain a secret."""
    pytest.importorskip("grafana_client")
    for name in ("KOOPMON_CONFIG", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KOOPMON_GRAFANA_TOKEN", TOKEN)
    monkeypatch.setenv("KOOPMON_GRAFANA_URL", grafana.url)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        grafana.requests.clear()
        status = main(["grafana", "push", *words])
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        return status, said.out, said.err

    return run
