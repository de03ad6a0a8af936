"""Lines for a whole job, and lines at a bounded rate."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path

import pytest

import koopmon
from koopmon.logs import MAX_KEYS, MINUTE, LogLimit, announced, log_for_job, tell

LOGGER = logging.getLogger("koopmon.test")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "many"}, (3, 1)),
        ({"RANK": "x", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, (2, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5"}, (1, 2)),
    ],
)
def test_the_rank_that_a_launcher_announced(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: tuple[int, int]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert announced() == expected


def test_a_line_of_every_rank_is_a_warning_on_the_first_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    log_for_job(LOGGER, "100% sure")
    monkeypatch.setenv("RANK", "1")
    log_for_job(LOGGER, "again")
    log_for_job(LOGGER, "told", rank=0, level=logging.INFO)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "koopmon: 100% sure"),
        ("DEBUG", "koopmon: again"),
        ("INFO", "koopmon: told"),
    ]


def test_one_line_a_minute_for_each_key_and_the_rest_is_counted() -> None:
    limit = LogLimit()
    assert limit.admit(0.0, "a") == limit.admit(1.0, "b") == ""
    assert limit.admit(MINUTE - 0.1, "a") is None
    assert limit.admit(MINUTE - 0.1, "a", count=3) is None
    assert limit.admit(MINUTE, "a") == " (4 more since the last such line)"
    assert limit.admit(2 * MINUTE, "a") == ""


def test_the_oldest_keys_are_forgotten() -> None:
    limit = LogLimit()
    for key in range(MAX_KEYS):
        limit.admit(float(key) / MAX_KEYS, key)
        limit.admit(float(key) / MAX_KEYS, key)
    assert limit.admit(1.0, "one more") == ""
    assert limit.admit(1.0, MAX_KEYS - 1) is None, "a recent key is kept"
    assert limit.admit(1.0, 0) == "", "the oldest key is forgotten, with its count"


def test_news_go_to_standard_error_unless_the_application_logs_them(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("koopmon.a-test")
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # without those that other tests left
    tell(logger, "one")
    tell(logger, "two", rank=1)
    with caplog.at_level(logging.INFO, logger=logger.name):
        tell(logger, "three", rank=0)
    monkeypatch.setenv("RANK", "3")
    tell(logger, "four")
    assert capsys.readouterr().err == "koopmon: one\n"
    assert [record.message for record in caplog.records] == ["koopmon: three"]


def test_news_need_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("koopmon.a-test")
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        tell(logger, "one")


class Faulty(logging.Handler):
    """A handler that raises itself, as one of an application may."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def emit(self, record: logging.LogRecord) -> None:
        raise self.error


@pytest.mark.parametrize("name", ["agent", "config", "integrations", "observables", "plugins"])
@pytest.mark.parametrize("above", [False, True], ids=["at the logger", "at the root"])
@pytest.mark.parametrize("as_filter", [False, True], ids=["handler", "filter"])
def test_a_handler_that_raises_reaches_no_caller(name: str, above: bool, as_filter: bool) -> None:
    logger = logging.getLogger(f"koopmon.{name}")
    place, faulty = logging.getLogger() if above else logger, Faulty(OSError("no disk"))
    if as_filter:
        faulty.emit = lambda record: None  # type: ignore[method-assign]
        faulty.addFilter(lambda record: 1 / 0 > 0)
    place.addHandler(faulty)
    try:
        logger.error("text")
    finally:
        place.removeHandler(faulty)


def test_an_interrupt_within_a_handler_passes() -> None:
    logger, faulty = logging.getLogger("koopmon.agent"), Faulty(KeyboardInterrupt())
    logger.addHandler(faulty)
    try:
        with pytest.raises(KeyboardInterrupt):
            logger.error("text")
    finally:
        logger.removeHandler(faulty)


def test_every_logger_of_a_training_is_contained() -> None:
    """Modules outside of the monitor and the command line use no other logger."""
    others = ["monitor", "cli", "history", "grafana", "notify", "demo", "doctor", "report", "wire"]
    root = Path(koopmon.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        if place.parts[0] not in others:
            names = re.findall(r'getLogger\((?:"koopmon\.(\w+)"|__name__)\)', path.read_text(encoding="utf-8"))
            found |= {name or place.stem for name in names}
    assert found == {"agent", "config", "integrations", "observables", "plugins"}
