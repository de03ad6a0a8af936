"""The live page in a real browser with a real monitor: accessible, live, and complete without scripts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axe_playwright_python")
pytest.importorskip("playwright")

import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from prometheus_client import CollectorRegistry

from koopmon.config import from_mapping
from koopmon.monitor.http.auth import HttpAuth
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.server import WebServer
from koopmon.wire.messages import Applied

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.process, pytest.mark.timeout(180)]
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
)
WAIT_MS = 60_000
NAME = "team/no-norm:3e-3"
PATH = "/runs/team%2Fno-norm%3A3e-3"
SIZES = {"telephone": (375, 812), "wide": (1600, 1000)}
Start = Callable[..., Any]
Until = Callable[[Callable[[], Any]], Any]
Open = Callable[..., Page]
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def monitor(start_monitor: Start, connect: Start, until: Until) -> Any:
    """A monitor with two runs, one of them after an action and its ack; `agent` continues that one."""
    monitor = start_monitor()
    other = connect(monitor.addresses.endpoint, run="calm")
    other.hello()
    other.snapshot(1)
    agent = monitor.agent = connect(monitor.addresses.endpoint, run=NAME)
    agent.hello(hostname="node-1")
    for step in (1, 2, 3):
        agent.snapshot(step)
    agent.heartbeat(3, overhead_ratio=0.004, dropped={"queue_full": 2})
    agent.snapshot(4, torch.full((4, 96, 12), math.nan).bfloat16())
    command = agent.expect_command("set_lr_scale")
    monitor.held = Applied(lr_scale=command.lr_scale)
    agent.acknowledge(command, "applied", monitor.held, step=5)
    until(lambda: monitor.sample(f'commands_settled_total{{kind="set_lr_scale",outcome="applied",run="{NAME}"}}') == 1)
    return monitor


@pytest.fixture
def open_page(browser: Browser, monitor: Any) -> Iterator[Open]:
    """Open a path of the monitor. Any message in the console fails the test at the end."""
    contexts, said = [], []

    def start(path: str, *, size: str = "wide", **options: Any) -> Page:
        width, height = SIZES[size]
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://{monitor.addresses.http}{path}")
        return page

    yield start
    for context in contexts:
        context.close()
    assert said == []


def live(page: Page) -> Page:
    expect(page.locator("#connection")).to_have_text("live")
    return page


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_in_every_guise(open_page: Open, scheme: str, size: str) -> None:
    for path in ("/", PATH, "/alerts"):
        page = open_page(path, size=size, color_scheme=scheme)
        if path != "/alerts":
            live(page)
        for summary in page.locator("summary").all():
            summary.click()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "nothing sticks out"
        background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (background == "rgb(14, 19, 26)") == (scheme == "dark")


def test_an_update_arrives_and_leaves_the_reader_where_they_are(open_page: Open, monitor: Any) -> None:
    page = live(open_page(PATH))
    assert "risk 1.00" in page.title()
    page.locator("#layer-values summary").click()
    monitor.agent.snapshot(6, lr_scale=0.25)
    expect(page.locator("#eigenvalues")).to_contain_text("Step 6.")
    assert page.locator("#layer-values").get_attribute("open") is not None, "what was opened stays open"
    assert page.evaluate("document.activeElement.id") == "layer-values-summary", "the focus stays"
    expect(page.locator("#news")).to_have_text("")  # a snapshot must not be announced aloud
    monitor.agent.snapshot(40, torch.full((4, 96, 12), math.nan).bfloat16())
    expect(page.locator("#decisions li.decision").first).to_contain_text("step 40")
    expect(page.locator("#news")).to_contain_text(f"{NAME}, step 40: ")


def test_the_fleet_hears_of_new_runs_and_of_those_that_end(open_page: Open, monitor: Any, connect: Start) -> None:
    page = live(open_page("/"))
    expect(page.get_by_role("row")).to_have_count(3)
    newcomer = connect(monitor.addresses.endpoint, run="newcomer")
    newcomer.hello()
    expect(page.get_by_role("row")).to_have_count(4)
    newcomer.goodbye()
    expect(page.locator("tr", has_text="newcomer")).to_contain_text("ended")
    expect(page.locator("#news")).to_have_text("newcomer is ended.")
    connect(monitor.addresses.endpoint, run="another").hello()
    expect(page.locator("#news")).to_contain_text("another is ")
    page.get_by_role("link", name=NAME).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(NAME)


def test_a_fleet_without_runs_hears_of_the_first_one(
    open_page: Open, start_monitor: Start, connect: Start, tmp_path: Path
) -> None:
    empty = start_monitor(store=tmp_path / "empty.sqlite3")
    page = open_page("/")
    page.goto(f"http://{empty.addresses.http}/")
    live(page)
    expect(page.locator("#news")).to_have_text("")
    connect(empty.addresses.endpoint, run="first").hello()
    expect(page.locator("#news")).to_contain_text("first is ")


def test_everything_is_reached_by_keyboard(open_page: Open) -> None:
    page = live(open_page(PATH))
    reached, outlines = [], {}
    while len(reached) < 60 and "readiness" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        outlines[reached[-1]] = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert reached[0] == "Skip to content"
    wanted = ["Runs", "risk-values-summary", "show", "layer-values-summary", "log", "metrics", "readiness"]
    assert [name for name in reached if name in wanted] == wanted
    assert {outlines[name] for name in wanted} == {"3px"}, "the focus is seen"
    page.locator("#show").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("img", name="Expansive mass of 3 layers")).to_be_visible()
    expect(page.locator("#show")).to_be_focused()
    assert page.url.endswith("?show=expansive_mass")


def test_without_scripts_it_is_complete_and_says_so(open_page: Open) -> None:
    fleet = open_page("/", java_script_enabled=False)
    expect(fleet.get_by_role("row")).to_have_count(3)
    expect(fleet.locator("#connection")).to_have_text("not live, load again")
    fleet.get_by_role("link", name="load again").click()
    expect(fleet.get_by_role("row")).to_have_count(3)
    page = open_page(PATH, java_script_enabled=False)
    for name in (
        "Risk, loss and learning rate",
        "Next action of the policy",
        "Layers over steps",
        "Eigenvalues",
        "Agents",
        "Decisions",
    ):
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    expect(page.locator("#decisions")).to_contain_text("applied at step 5")
    page.locator("#show").select_option("spectral_radius")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("img", name="Spectral radius of 3 layers")).to_be_visible()


@pytest.fixture
def serve(live_state: LiveState) -> Iterator[Callable[..., WebServer]]:
    servers: list[WebServer] = []

    def start(address: str = "127.0.0.1:0", **options: Any) -> WebServer:
        servers.append(WebServer(address, CollectorRegistry(), {}, live_state=live_state, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open the page of a server; its console may contain refused requests."""
    contexts = []

    def start(server: WebServer, **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.goto(f"http://{server.address}/")
        return page

    yield start
    for context in contexts:
        context.close()


def test_a_monitor_that_comes_back_is_found_again(visit: Open, serve: Start, feed: Start) -> None:
    feed("before")
    first = serve()
    page = live(visit(first))
    first.close()
    expect(page.locator("#connection")).not_to_have_text("live")
    feed("after")
    serve(first.address)
    live(page)
    expect(page.get_by_role("link", name="after")).to_be_visible()


def test_where_streams_are_refused_the_page_says_so(visit: Open, serve: Start, feed: Start) -> None:
    feed("job")
    page = visit(serve(config=from_mapping({"http": {"max_streams": 0}})))
    expect(page.locator("#connection")).to_have_text("no stream, polling every 15 s")


def test_a_password_opens_the_page_and_its_stream(visit: Open, serve: Start, feed: Start) -> None:
    feed("job")
    server = serve(login=HttpAuth(None, b"eve", b"a password"))
    page = live(visit(server, http_credentials={"username": "eve", "password": "a password"}))
    expect(page.get_by_role("link", name="job")).to_be_visible()
