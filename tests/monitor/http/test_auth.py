"""Access to the pages: tokens, passwords, TLS, and errors for bad files."""

from __future__ import annotations

import base64
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon.config import HttpConfig, from_mapping
from koopmon.errors import ConfigError, EndpointError
from koopmon.monitor.http.address import parse_address
from koopmon.monitor.http.auth import HttpAuth, read_http_auth, read_tls
from koopmon.monitor.http.server import WebServer
from koopmon.telemetry.metrics import Metrics

httpx = pytest.importorskip("httpx")

TOKEN, PASSWORD = "t0ken-of-the-test", "p:ss wörd"


def secret_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.touch(mode)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


HOSTS = (
    "localhost",
    "127.0.0.1:9464",
    "LOCALHOST:1",
    "[::1]:9464",
    "[::1]",
    "127.8.9.10",
    "localhost.",
    "proxy.example",
)
FOREIGN = ("evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]")


@pytest.fixture
def serve() -> Iterator[Callable[..., WebServer]]:
    servers: list[WebServer] = []

    def start(address: str = "127.0.0.1:0", **options: Any) -> WebServer:
        registry = CollectorRegistry()
        Metrics(registry, {"version": "0"}).begin_run("job")
        servers.append(WebServer(address, registry, {"healthz": lambda: True}, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


GOOD = [f"Bearer {TOKEN}", f"bearer  {TOKEN}", basic("eve", PASSWORD)]
BAD = [
    "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Basic !!!",
    basic("eve", ""), basic("", PASSWORD), basic("eve", PASSWORD + "x"), basic("eve2", PASSWORD), "Digest x",
    basic("eve", PASSWORD).replace("Basic", "Bearer"),
]  # fmt: skip


def test_pages_behind_a_login(serve: Callable[..., WebServer]) -> None:
    server = serve(login=HttpAuth(TOKEN.encode(), b"eve", PASSWORD.encode()))
    with httpx.Client(base_url=f"http://{server.address}", timeout=30.0) as client:
        assert client.get("/healthz").status_code == 200, "it contains no data"
        for page in ("/", "/metrics", "/nothing", "/healthz/", "//metrics", "/healthz%2f..%2fmetrics"):
            refused = client.get(page)
            assert refused.status_code == 401, page
            assert refused.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="koopmon"']
            assert "koopmon_" not in refused.text
        for header in GOOD:
            assert "koopmon_" in client.get("/metrics", headers={"authorization": header}).text, header
        for header in BAD:
            assert client.get("/metrics", headers={"authorization": header}).status_code == 401, header
        twice = [("authorization", GOOD[0]), ("authorization", "Bearer x")]
        assert client.get("/metrics", headers=twice).status_code == 401, "one of two is not enough"


@pytest.mark.parametrize("login", [HttpAuth(TOKEN.encode()), HttpAuth(None, b"eve", PASSWORD.encode())])
def test_only_the_kind_that_is_set_up_is_taken(login: HttpAuth) -> None:
    header_of = {True: GOOD[0], False: GOOD[2]}
    assert login.admits(header_of[login.token is not None].encode())
    assert not login.admits(header_of[login.token is None].encode())
    assert not login.admits(b"Bearer ")
    assert not login.admits(basic("", "").encode())
    assert TOKEN not in repr(login)
    assert PASSWORD not in repr(login)


def test_secrets_come_from_files_or_from_the_environment(tmp_path: Path) -> None:
    config = HttpConfig(
        token_file=secret_file(tmp_path / "token", f"{TOKEN}\n"),
        user="eve",
        password_file=secret_file(tmp_path / "password", PASSWORD, 0o400),
    )
    assert read_http_auth(config, {"KOOPMON_HTTP_TOKEN": "not this"}).admits(GOOD[0].encode())
    assert read_http_auth(config, {}).admits(GOOD[2].encode())
    environ = {"KOOPMON_HTTP_TOKEN": TOKEN, "KOOPMON_HTTP_PASSWORD": PASSWORD}
    from_environment = read_http_auth(HttpConfig(user="eve"), environ)
    assert all(from_environment.admits(header.encode()) for header in GOOD)
    assert not read_http_auth(HttpConfig(), {}).required


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [(TOKEN, 0o644, "mode 0644 lets others read it; chmod 600"), ("", 0o600, "one line"), ("\n", 0o600, "one line"),
     (f"{TOKEN}\nmore", 0o600, "one line"), ("x" * 5000, 0o600, "one line")],
)  # fmt: skip
def test_a_bad_secret_file_is_one_line_without_the_secret(tmp_path: Path, text: str, mode: int, says: str) -> None:
    path = secret_file(tmp_path / "token", text, mode)
    with pytest.raises(ConfigError, match=says) as caught:
        read_http_auth(HttpConfig(token_file=path), {})
    assert path in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_half_a_login_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="go together"):
        read_http_auth(HttpConfig(user="eve"), {})
    with pytest.raises(ConfigError, match="go together"):
        read_http_auth(HttpConfig(), {"KOOPMON_HTTP_PASSWORD": PASSWORD})
    with pytest.raises(ConfigError, match=r"http\.token_file = '/no/such': No such file"):
        read_http_auth(HttpConfig(token_file="/no/such"), {})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Create a self-signed certificate for 127.0.0.1, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    files = str(directory / "cert.pem"), str(directory / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=koopmon", "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    Path(files[1]).chmod(0o600)
    return files


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_pages_over_tls(serve: Callable[..., WebServer], certificate: tuple[str, str]) -> None:
    tls = read_tls(HttpConfig(tls_certificate=certificate[0], tls_key=certificate[1]))
    server = serve(tls=tls, login=HttpAuth(TOKEN.encode()))
    trusting = ssl.create_default_context(cafile=certificate[0])
    page = httpx.get(
        f"https://{server.address}/metrics", verify=trusting, headers={"authorization": GOOD[0]}, timeout=30.0
    )
    assert "koopmon_" in page.text
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{server.address}/metrics", timeout=10.0)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{server.address}/metrics", timeout=10.0)


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_bad_certificates_and_keys_are_one_line(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    other = secret_file(tmp_path / "other.pem", "no key")
    for config, says in (
        (HttpConfig(tls_certificate=cert), r"http\.tls_key = '': .*go together"),
        (HttpConfig(tls_key=key), r"http\.tls_certificate = '': .*go together"),
        (HttpConfig(tls_certificate=cert, tls_key="/no/such"), r"http\.tls_key = '/no/such': No such file"),
        (HttpConfig(tls_certificate="/no/such", tls_key=key), r"http\.tls_certificate = '/no/such'"),
        (HttpConfig(tls_certificate=cert, tls_key=other), "expected PEM files that belong together"),
        (HttpConfig(tls_certificate=cert, tls_key=secret_file(tmp_path / "open", "x", 0o640)), "chmod 600"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            read_tls(config)
        assert str(caught.value).count("\n") == 0


def test_other_hosts_take_tls_and_a_login_or_the_risks_name(serve: Callable[..., WebServer]) -> None:
    tls, login = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), HttpAuth(TOKEN.encode())
    for options in ({}, {"tls": tls}, {"login": login}):
        with pytest.raises(EndpointError, match=r"other hosts reach it.*insecure_plaintext"):
            serve("0.0.0.0:0", **options)
    assert parse_address("0.0.0.0:0", exposed=True) == ("0.0.0.0", 0)
    serve("0.0.0.0:0", tls=tls, login=login)
    serve("0.0.0.0:0", config=from_mapping({"http": {"insecure_plaintext": True}}))


def test_loopback_without_a_login_is_for_names_of_this_host(serve: Callable[..., WebServer]) -> None:
    """A web page elsewhere can point its own name at this host (DNS rebinding)."""
    server = serve(config=from_mapping({"http": {"hosts": ["proxy.example"]}}))

    def status(host: str, path: str = "/metrics") -> int:
        return int(httpx.get(f"http://{server.address}{path}", headers={"host": host}).status_code)

    assert [status(host) for host in HOSTS] == [200] * len(HOSTS)
    assert [status(host) for host in FOREIGN] == [421] * len(FOREIGN)
    assert status("evil.example", "/api/v1/runs") == 421


def test_a_login_needs_no_name(serve: Callable[..., WebServer]) -> None:
    server = serve(login=HttpAuth(token=TOKEN.encode()))
    headers = {"host": "monitor.example", "authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"http://{server.address}/metrics", headers=headers).status_code == 200


def test_no_answer_repeats_the_name_of_the_request(serve: Callable[..., WebServer]) -> None:
    server = serve(config=from_mapping({"http": {"hosts": ["proxy.example"]}}))
    for path in ("/metrics/", "/alerts/", "//evil.example", "/runs"):
        answer = httpx.get(f"http://{server.address}{path}", headers={"host": "proxy.example"})
        assert answer.status_code in (200, 404)
        assert "location" not in answer.headers
