"""`web.config.yml` of exporter-toolkit: users with bcrypt hashes, TLS and client certificates, on real sockets."""

from __future__ import annotations

import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from koopmon.config import HttpConfig
from koopmon.errors import ConfigError, EndpointError, MissingExtraError
from koopmon.monitor.http.server import WebServer
from koopmon.monitor.http.web_config import HashedUsers, read_access_to_pages, read_web_config
from koopmon.telemetry.metrics import Metrics

httpx = pytest.importorskip("httpx")

# Of "correct horse", by `htpasswd -nbB -C 4 eve ...`.
HASH = "$2y$04$3S2Hx2Hw7m3zT8eYV3B7mu7tUc1nJcQ6K8p0Q0m1w9wI4b5yJ5m2e"


def hashed(password: str) -> str:
    bcrypt = pytest.importorskip("bcrypt")
    found: str = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
    return found.replace("$2b$", "$2y$", 1)  # as htpasswd writes it


@pytest.fixture
def serve() -> Iterator[Callable[..., WebServer]]:
    servers: list[WebServer] = []

    def start(path: Path, address: str = "127.0.0.1:0") -> WebServer:
        registry = CollectorRegistry()
        Metrics(registry, {"version": "0"})
        login, tls = read_web_config(path)
        servers.append(WebServer(address, registry, {"healthz": lambda: True}, login=login, tls=tls))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def written(directory: Path, text: str) -> Path:
    path = directory / "web.config.yml"
    path.write_text(text)
    return path


def test_users_with_hashes(serve: Callable[..., WebServer], tmp_path: Path) -> None:
    users = {"eve": "correct horse", "prom": "pass:word ü"}
    text = "basic_auth_users:\n" + "".join(f"  {user}: '{hashed(each)}'\n" for user, each in users.items())
    server = serve(written(tmp_path, text))
    with httpx.Client(base_url=f"http://{server.address}", timeout=30.0) as client:
        assert client.get("/healthz").status_code == 200
        for _ in range(2):
            for user, password in users.items():
                assert client.get("/metrics", auth=(user, password)).status_code == 200
            for user, password in [("eve", "x"), ("eve", ""), ("", ""), ("nobody", "correct horse"), ("eve", "y" * 99)]:
                refused = client.get("/metrics", auth=(user, password))
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == 'Basic realm="koopmon"'
        assert client.get("/metrics", headers={"authorization": "Bearer x"}).status_code == 401
        assert client.get("/metrics", headers={"authorization": "Basic !!!"}).status_code == 401


def test_a_right_password_is_checked_once_and_a_wrong_one_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    users = HashedUsers({"eve": hashed("Zw7-right")}, "x")
    checked: list[bytes] = []
    check = users._check
    monkeypatch.setattr(users, "_check", lambda password, each: checked.append(password) or check(password, each))
    for credentials in (b"eve:Zw7-right", b"eve:wrong"):
        for _ in range(3):
            if not users.remembered(credentials):
                users.check(credentials)
    assert checked == [b"Zw7-right", b"wrong", b"wrong", b"wrong"]
    assert "Zw7" not in repr(vars(users))


def test_wrong_passwords_delay_no_request_with_a_known_one(
    serve: Callable[..., WebServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(written(tmp_path, f"basic_auth_users: {{eve: '{hashed('right')}'}}\n"))
    url = f"http://{server.address}/metrics"
    assert httpx.get(url, auth=("eve", "right"), timeout=30.0).status_code == 200
    release, begun = threading.Event(), threading.Semaphore(0)

    def slow(users: HashedUsers, credentials: bytes) -> bool:
        begun.release()
        release.wait(30)
        return False

    monkeypatch.setattr(HashedUsers, "check", slow)
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(httpx.get(url, auth=("eve", "wrong"), timeout=60).status_code))
        for _ in range(5)
    ]
    try:
        for thread in threads:
            thread.start()
        begun.acquire(timeout=30)
        assert httpx.get(url, auth=("eve", "right"), timeout=30.0).status_code == 200
        assert httpx.get(f"http://{server.address}/healthz", timeout=30.0).status_code == 200
        assert statuses == []
        assert not begun.acquire(blocking=False), "one check at a time"
    finally:
        release.set()
        for thread in threads:
            thread.join(60)
    assert statuses == [401] * 5


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an authority, certificates of 127.0.0.1 and of a client from it, and another authority."""
    place = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60, cwd=place)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl(
            "req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"
        )
    for name in ("server", "client"):
        openssl("req", *key, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key",
                "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days",
                "2", "-copy_extensions", "copy", "-out", f"{name}.pem")  # fmt: skip
    for path in place.glob("*.key"):
        path.chmod(0o600)
    return place


def client_context(place: Path, name: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=place / "ca.pem")
    if name:
        context.load_cert_chain(place / f"{name}.pem", place / f"{name}.key")
    return context


TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
MUTUAL = TLS + "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n"


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_client_certificates(serve: Callable[..., WebServer], authority: Path) -> None:
    server = serve(written(authority, MUTUAL), "0.0.0.0:0")  # a certificate is a login: other hosts may reach it
    url = f"https://127.0.0.1:{server.address.rpartition(':')[2]}/metrics"
    assert httpx.get(url, verify=client_context(authority, "client"), timeout=30).status_code == 200
    for name in ("", "other"):
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=client_context(authority, name), timeout=30)


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_tls_alone_is_no_login(serve: Callable[..., WebServer], authority: Path) -> None:
    path = written(authority, TLS + "  min_version: TLS13\n")
    old = client_context(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    server = serve(path)
    assert (
        httpx.get(f"https://{server.address}/metrics", verify=client_context(authority), timeout=30).status_code == 200
    )
    with pytest.raises(httpx.TransportError):
        httpx.get(f"https://{server.address}/metrics", verify=old, timeout=30)
    with pytest.raises(EndpointError, match="other hosts reach it"):
        serve(path, "0.0.0.0:0")
    given = MUTUAL.replace("RequireAndVerifyClientCert", "VerifyClientCertIfGiven")
    with pytest.raises(EndpointError, match="other hosts reach it"):
        serve(written(authority, given), "0.0.0.0:0")


MISTAKES = [
    ("a: [", "not valid YAML"),
    ("[1, 2]", "Expected `object`, got `array`"),
    ("basic_auth_user: {}", "unknown field `basic_auth_user`; supported are tls_server_config (cert_file, key_file,"),
    ("http_server_config: {http2: true}", "unknown field `http_server_config`"),
    ("tls_server_config: {cert_file: a}", "missing required field `key_file`"),
    ("tls_server_config: {cert_file: a, key_file: b, cipher_suites: [x]}", "unknown field `cipher_suites`"),
    ("tls_server_config: {cert_file: a, key_file: b, client_auth_type: RequireAnyClientCert}", "RequireAnyClientCert"),
    ("tls_server_config: {cert_file: a, key_file: b, client_ca_file: c}", "client certificates need both"),
    ("tls_server_config: {cert_file: a, key_file: b, client_auth_type: VerifyClientCertIfGiven}", "need both"),
    ("tls_server_config: {cert_file: a, key_file: b, min_version: TLS10}", "TLS10"),
    ("tls_server_config: {cert_file: a, key_file: b}", "No such file"),
    ("basic_auth_users: {eve: SECRET}", "'eve': expected a user without a colon and a bcrypt hash of cost 4 to 15"),
    (f"basic_auth_users: {{eve: '{HASH.replace('$04$', '$31$')}'}}", "of cost 4 to 15"),
    (f"basic_auth_users: {{'e:ve': '{HASH}'}}", "a user without a colon"),
    ("basic_auth_users: {eve: 3}", "Expected `str`, got `int`"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES, ids=[text[:70] for text, _ in MISTAKES])
def test_a_mistake_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_web_config(path)
    line = str(caught.value)
    assert says in line
    assert line.startswith(f"http.web_config = '{path}': ")
    assert line.isprintable()
    assert "SECRET" not in line
    assert "$2y$" not in line


def test_a_missing_file_and_a_second_source_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"http\.web_config = '/no/such': No such file"):
        read_access_to_pages(HttpConfig(web_config="/no/such"), {})
    path = written(tmp_path, "")
    with pytest.raises(ConfigError, match="expected no certificate, token or password beside it"):
        read_access_to_pages(HttpConfig(web_config=str(path)), {"KOOPMON_HTTP_TOKEN": "t"})
    login, tls = read_access_to_pages(HttpConfig(web_config=str(path)), {})
    assert (login.required, tls) == (False, None), "an empty file opens nothing and asks for nothing"


def test_without_bcrypt_the_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcrypt", None)
    with pytest.raises(MissingExtraError, match=r"needs bcrypt, which is not installed: pip install 'koopmon\[web-con"):
        read_web_config(written(tmp_path, f"basic_auth_users: {{eve: '{HASH}'}}\n"))
