"""Failures on the way to Grafana: each has a clear message and an exit status for scripts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_grafana import TOKEN, FakeGrafana

Push = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hurried(tmp_path: Path) -> tuple[str, str]:
    """Options that wait one second for a response."""
    (tmp_path / "koopmon.toml").write_text("[grafana]\ntimeout_seconds = 1.0\n")
    return "--config", str(tmp_path / "koopmon.toml")


def refused(pushed: tuple[int, str, str], status: int, *words: str) -> None:
    """Check that a push ended with one line that contains these words."""
    assert pushed[0] == status, pushed[2]
    assert pushed[2].startswith("koopmon: ")
    assert pushed[2].count("\n") == 1
    for word in words:
        assert word in pushed[2]


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (401, 3, "does not know the token (401): told to answer 401"),
        (403, 3, "the token may not read its settings (403)"),
        (404, 2, "its settings are missing; expected Grafana's address, with its sub-path"),
        (500, 1, "cannot read its settings (500): told to answer 500"),
        ("html", 2, "no JSON (read its settings); expected Grafana's address"),
        ("text", 2, "a redirect, or no JSON (read its settings)"),
        ("redirect", 2, "a redirect, or no JSON (read its settings)"),
        ("close", 4, "cannot be reached: "),
        ("hang", 4, "no answer within 1 s"),
    ],
)
def test_a_grafana_that_does_not_serve_is_told_from_one_that_does(
    push: Push, grafana: FakeGrafana, hurried: tuple[str, str], fault: int | str, status: int, words: str
) -> None:
    with grafana.failing(fault):
        pushed = push(*hurried)
    refused(pushed, status, grafana.url, words)
    assert pushed[1] == ""
    assert len(grafana.requests) == 1


def test_a_token_of_another_grafana(push: Push, grafana: FakeGrafana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOOPMON_GRAFANA_TOKEN", "glsa_another")
    refused(push(), 3, "does not know the token (401): Invalid API key; has it expired?")


def test_nobody_listens(push: Push) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        refused(push("--url", url), 4, f"Grafana at {url}: cannot be reached: Connection refused")


def test_an_address_without_its_sub_path(push: Push, grafana: FakeGrafana) -> None:
    refused(push("--url", f"http://127.0.0.1:{grafana.port}"), 2, "expected Grafana's address, with its sub-path")


@pytest.mark.parametrize(
    ("method", "path", "fault", "status", "words"),
    [
        ("POST", "folders", 403, 3, "may not create folder 'koopmon' (403): told to answer 403; it needs role"),
        ("GET", "datasources", 403, 3, "may not read data source 'koopmon-prometheus' (403)"),
        (
            "POST",
            "datasources",
            409,
            1,
            "cannot create data source 'koopmon Prometheus' (409): told to answer 409; some",
        ),
        ("POST", "dashboards", 412, 1, "cannot create dashboard 'koopmon / Fleet' (412)"),
        ("POST", "dashboards", 400, 1, "cannot create dashboard 'koopmon / Fleet' (400)"),
        ("POST", "dashboards", 500, 1, "cannot create dashboard 'koopmon / Fleet' (500): told to answer 500"),
        ("PUT", "koopmon risk", 404, 1, "cannot create rule group 'koopmon risk' (404)"),
        ("GET", "koopmon-run", "html", 2, "no JSON (read dashboard 'koopmon / Run')"),
        ("PUT", "koopmon monitor", "hang", 4, "no answer within 1 s (create rule group 'koopmon monitor')"),
        ("POST", "folders", "close", 4, "cannot be reached"),
    ],
)
def test_a_failure_on_the_way_says_what_was_done_and_the_next_push_finishes(
    push: Push,
    grafana: FakeGrafana,
    hurried: tuple[str, str],
    method: str,
    path: str,
    fault: int | str,
    status: int,
    words: str,
) -> None:
    with grafana.failing(fault, method=method, path=path):
        pushed = push(*hurried) if fault == "hang" else push()
    refused(pushed, status, words)
    made = len([request for request in grafana.writes if path not in request.path])
    if method == "GET":
        assert made == 0
    else:
        assert f"{made} of 8 changes are made; the same command continues" in pushed[2]
        assert pushed[1].count("not done") == 8 - made
    assert push()[0] == 0
    assert push()[0] == 0
    assert grafana.writes == []
    assert (len(grafana.state.dashboards), len(grafana.state.groups)) == (3, 3)


def test_a_dashboard_that_is_saved_in_between_is_not_overwritten(push: Push, grafana: FakeGrafana) -> None:
    """Grafana compares the versions of concurrent edits."""
    push()
    fleet = grafana.state.dashboards["koopmon-fleet"]["dashboard"]
    fleet["version"] += 1
    fleet["title"] = "mine"
    with grafana.failing(412, method="POST", path="dashboards"):
        refused(push("--force"), 1, "cannot update dashboard 'koopmon / Fleet' (412)", "somebody changed it meanwhile")
    (sent,) = grafana.writes
    assert (sent.body["dashboard"]["version"], sent.body["overwrite"]) == (2, False)
    assert fleet["title"] == "mine"


def test_an_old_grafana_takes_dashboards_alone(push: Push, grafana: FakeGrafana) -> None:
    grafana.state.version = "8.5.27"
    refused(push(), 1, "cannot create rule group 'koopmon risk' (404)", "rules need Grafana 9.1", "--no-alerts")
    assert push("--no-alerts")[0] == 0
    assert len(grafana.state.dashboards) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--url", "ftp://example.org/"], "grafana.url = 'ftp://example.org/': expected http://HOST[:PORT]/"),
        (["--url", "grafana:3000"], "grafana.url = 'grafana:3000': expected http"),
        (["--url", "http://me:pass@example.org/"], "grafana.url = 'example.org/': without user and password"),
        (["--url", "http://example.org/?orgId=1"], "grafana.url = 'http://example.org/': expected nothing behind"),
        (["--url", ""], "grafana.url = '': expected Grafana's address: --url, KOOPMON_GRAFANA_URL or"),
        (["--prometheus-url", "prometheus:9090"], "--prometheus-url = 'prometheus:9090': expected http"),
        (["--prometheus-url", "http://p:9090", "--datasource", "x"], "--datasource and --prometheus-url: one or the"),
        (["--datasource", "nowhere"], "--datasource 'nowhere': Grafana has no Prometheus data source of this uid"),
        (["--folder", "a/b"], "--folder 'a/b': expected a uid"),
        (["--datasource", ""], "--datasource '': Grafana has no Prometheus data source"),
        (["--token-file", "nowhere.token"], "grafana.token_file = 'nowhere.token': No such file or directory"),
    ],
)
def test_a_mistake_in_what_was_asked_is_named(push: Push, grafana: FakeGrafana, words: list[str], says: str) -> None:
    refused(push(*words), 2, says)
    assert grafana.writes == []


def test_a_data_source_of_another_kind_is_refused(push: Push, grafana: FakeGrafana) -> None:
    grafana.state.datasources["logs"] = {"uid": "logs", "name": "Logs", "type": "loki"}
    refused(push("--datasource", "logs"), 2, "--datasource 'logs': Grafana has no Prometheus data source of this uid")


def test_a_token_comes_from_a_private_file_or_the_environment(
    push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KOOPMON_GRAFANA_TOKEN")
    refused(push(), 2, "a service account's token is needed", "KOOPMON_GRAFANA_TOKEN")
    file = tmp_path / "grafana.token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o640)
    refused(push("--token-file", str(file)), 2, f"mode 0640 lets others read it; chmod 600 {file}")
    file.chmod(0o600)
    assert push("--token-file", str(file))[0] == 0
    file.write_bytes(b"two words\n")
    refused(push("--token-file", str(file)), 2, "expected a token of printable ASCII without blanks")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str], push: Push) -> None:
    status, out, _ = push("--help")
    assert status == 0
    assert "Example: koopmon grafana push" in out


@pytest.fixture
def command(grafana: FakeGrafana, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command line in another process; `before` is Python that runs in it first."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KOOPMON_")}
    environ |= {"KOOPMON_GRAFANA_TOKEN": TOKEN, "KOOPMON_GRAFANA_URL": grafana.url, "COLUMNS": "200"}

    def run(*words: str, before: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        program = f"import sys\n{before}\nfrom koopmon.cli import main\nsys.exit(main(sys.argv[1:]))"
        return subprocess.run(
            [sys.executable, "-c", program, "grafana", "push", *words],
            env={**environ, **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.mark.process
def test_exit_statuses_of_the_real_command(
    command: Callable[..., subprocess.CompletedProcess[str]], grafana: FakeGrafana
) -> None:
    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    assert command(KOOPMON_GRAFANA_TOKEN="glsa_another").returncode == 3
    grafana.state.dashboards["koopmon-fleet"]["dashboard"]["panels"].pop()
    kept = command("--json")
    assert (kept.returncode, kept.stderr.count("\n")) == (5, 1)
    grafana.close()
    gone = command()
    assert (gone.returncode, gone.stdout) == (4, "")
    assert gone.stderr.startswith("koopmon: Grafana at http://127.0.0.1:")
    assert "Traceback" not in gone.stderr


@pytest.mark.process
def test_without_the_extra_one_line_says_what_to_install(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = command(before="sys.modules['grafana_client'] = None")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        'koopmon: koopmon grafana push needs grafana_client, which is not there: pip install "koopmon[grafana]"\n'
    )
