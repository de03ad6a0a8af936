"""The pages and the JSON over real sockets: escaped, linked, restricted, and complete without scripts."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon.monitor.http import pages as layout
from koopmon.monitor.http.auth import HttpAuth
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.routes import FRESH_SECONDS, MAX_PAGES, PageCache
from koopmon.monitor.http.server import WebServer
from tests.reading import Reading

httpx = pytest.importorskip("httpx")

HOSTILE = """"><script>alert(1)</script>'&</title>{{7*7}}\u202e\x07"""
NAME = "team/exp:1.0+b"
Feed = Callable[..., Any]
Profile = Callable[..., Any]


@pytest.fixture
def client(live_state: LiveState) -> Iterator[httpx.Client]:
    server = WebServer("127.0.0.1:0", CollectorRegistry(), {"healthz": lambda: True}, live_state=live_state)
    with httpx.Client(base_url=f"http://{server.address}", timeout=30.0) as client:
        yield client
    server.close()


@pytest.fixture
def told(feed: Feed, make_profile: Profile, one_snapshot_is_enough: None) -> Any:
    """A run with hostile values in every name of a peer, after an action and its ack."""
    fed = feed(NAME, adapter=HOSTILE, hostname=HOSTILE)
    fed.judge(1, make_profile())
    fed.judge(2, make_profile(seed=1))
    assessment = fed.judge(3, None)
    scale = next(command for command in assessment.commands if command.kind == "set_lr_scale")
    fed.answer(scale.id, "refused", 4, HOSTILE)
    return fed


def test_both_pages_are_sound_and_complete_without_scripts(client: httpx.Client, told: Any) -> None:
    fleet = Reading(client.get("/").text)
    assert NAME in fleet.text
    assert "1.00" in fleet.text
    assert "learning rate x 0.25" in fleet.text, "the last decision, with its reason"
    (link,) = [each["href"] for each in fleet.of("a") if (each["href"] or "").startswith("runs/")]
    assert link == "runs/team%2Fexp%3A1.0%2Bb"
    page = Reading(client.get(f"/{link}").text)
    for words in (
        NAME,
        "Next action of the policy",
        "If the risk is severe",
        "refused at step 4",
        "near-unit mass",
        "of the last hour",
    ):
        assert words in page.text, words
    assert "set_lr_scale" not in page.text, "in words"
    assert {"header", "main", "footer", "nav", "h1", "noscript"} <= {name for name, _ in page.tags}
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert all(each.get("alt") for each in page.of("img"))
    assert all(each.get("aria-label") or each.get("aria-hidden") or each.get("x") or each.get("preserveaspectratio")
               for each in page.of("svg"))  # fmt: skip
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize("path", ["/", "/runs/team%2Fexp%3A1.0%2Bb", "/runs/" + "%22%3E%3Cscript%3E", "/%3Cscript%3E"])
def test_strangers_words_stay_words(client: httpx.Client, told: Any, path: str) -> None:
    text = client.get(path).text
    assert "<script>" not in text
    assert not {"\u202e", "\x07"} & set(text), "not printable"
    page = Reading(text)
    assert [each["src"] for each in page.of("script")] in ([], ["static/live.js"], ["../static/live.js"])
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            "the policy would block it"
        )
        for name in ("href", "src", "action"):
            assert not re.match(r"(https?:)?//|javascript:", attributes.get(name) or ""), "nothing from elsewhere"


def test_what_a_browser_is_allowed(client: httpx.Client, told: Any) -> None:
    for path in ("/", "/runs/none", "/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    for name, kind in (
        ("live.js", "text/javascript"),
        ("views.css", "text/css"),
        ("live.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
    ):
        answer = client.get(f"/static/{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/static/../pages.py").status_code == 404
    assert client.get("/static/%2e%2e%2fpages.py").status_code == 404
    for path in ("/", "/api/v1/runs", "/api/v1/events"):
        assert client.post(path).status_code == 405, "read-only"


def test_links_lead_back_from_wherever_a_page_is(client: httpx.Client, told: Any) -> None:
    for path, root in (("/runs/team%2Fexp%3A1.0%2Bb", "../"), ("/runs/team/exp:1.0+b", "../../")):
        page = Reading(client.get(path).text)
        assert root in [each["href"] for each in page.of("a")]
        (events,) = [each["data-events"] for each in page.of("main")]
        assert events == f"{root}api/v1/events?run=team%2Fexp%3A1.0%2Bb"
    assert layout.root_of(b"/") == ""


def test_an_unknown_run_is_told_in_words_which_there_are(client: httpx.Client, told: Any) -> None:
    page = client.get("/runs/nobody")
    assert page.status_code == 404
    assert "knows no run nobody" in Reading(page.text).text
    assert 'href="../runs/team%2Fexp%3A1.0%2Bb"' in page.text
    answer = client.get("/api/v1/runs/nobody")
    assert answer.status_code == 404
    assert answer.json() == {"error": "no run 'nobody' is known here", "runs": [NAME]}


def test_no_run_yet_says_how_to_start_one(client: httpx.Client) -> None:
    text = Reading(client.get("/").text).text
    assert "koopmon run --monitor ENDPOINT -- torchrun train.py" in text
    assert client.get("/api/v1/runs").json()["runs"] == []


def test_the_json_says_what_the_page_says(client: httpx.Client, told: Any) -> None:
    (line,) = client.get("/api/v1/runs").json()["runs"]
    assert (line["run"], line["state"], line["risk"], line["step"]) == (NAME, "running", 1.0, 0)
    assert line["last_decision"]["phase"] == "acting"
    run = client.get("/api/v1/runs/team%2Fexp%3A1.0%2Bb").json()
    assert run["version"] == 1
    assert [point["step"] for point in run["points"]] == [1, 2, 3]
    assert run["layers"]["steps"] == [1, 2]
    assert len(run["layers"]["near_unit_mass"][0]) == 3
    assert [len(pairs) for pairs in run["spectrum"]["eigenvalues"]] == [8, 8, 8]
    (scale,) = [each for each in run["decisions"][-1]["commands"] if each["kind"] == "set_lr_scale"]
    assert (scale["outcome"], scale["step"], scale["lr_scale"], scale["detail"]) == ("refused", 4, 0.25, HOSTILE)
    assert {"if": "If the risk is severe, 0.8 or more", "then": "Learning rate × 0.25."} in run["outlook"]["lines"]


@pytest.mark.parametrize("quantity", ["near_unit_mass", "spectral_radius", "nonsense"])
def test_the_heatmap_shows_what_was_chosen(client: httpx.Client, told: Any, quantity: str) -> None:
    page = Reading(client.get(f"/runs/{NAME}", params={"show": quantity}).text)
    chosen = [each["value"] for each in page.of("option") if "selected" in each]
    assert chosen == ["near_unit_mass" if quantity == "nonsense" else quantity]
    (heat,) = [each for each in page.of("img") if each["class"] == "heat"]
    assert heat["src"].startswith("data:image/png;base64,")
    assert "of 3 layers in 2 snapshots, step 1 to 2" in heat["alt"]


def test_a_token_alone_tells_browsers_what_to_do(live_state: LiveState) -> None:
    for login, says in ((HttpAuth(b"secret-token"), True), (HttpAuth(b"secret-token", b"eve", b"password"), False)):
        server = WebServer("127.0.0.1:0", CollectorRegistry(), {}, live_state=live_state, login=login)
        try:
            refused = httpx.get(f"http://{server.address}/", timeout=30.0)
            assert refused.status_code == 401
            assert ("A browser cannot show a bearer token" in refused.text) == says
            for path in ("/api/v1/runs", "/api/v1/events", "/static/live.js"):
                assert httpx.get(f"http://{server.address}{path}", timeout=30.0).status_code == 401
        finally:
            server.close()


def test_a_page_is_drawn_again_when_it_changed_or_its_times_are_old() -> None:
    now, drawn = [0.0], []
    once = PageCache(clock=lambda: now[0])

    def page(key: str, revision: int) -> str:
        return once.page(key, revision, lambda: drawn.append(key) or f"{key} {len(drawn)}")

    assert page("a", 1) == page("a", 1) == "a 1"
    assert page("b", 1) == "b 2"
    assert page("a", 2) == "a 3"
    now[0] = FRESH_SECONDS
    assert page("a", 2) == "a 4"
    for number in range(MAX_PAGES):
        page(f"other {number}", 1)
    assert page("b", 1) == f"b {5 + MAX_PAGES}", "only so many are remembered"


def test_one_page_is_drawn_at_a_time() -> None:
    once, drawing, most = PageCache(), [], []

    def draw() -> str:
        drawing.append(1)
        most.append(len(drawing))
        time.sleep(0.005)
        drawing.pop()
        return "page"

    readers = [threading.Thread(target=once.page, args=(number, 1, draw)) for number in range(12)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30.0)
    assert most == [1] * 12
