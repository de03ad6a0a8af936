"""Cost of the live page and /metrics: `python -m benchmarks.live_page`.

A monitor in its own process starts on a history of 20 runs x 48 layers. The benchmark measures the first contentful
paint in Chromium, and the time from sending a snapshot to the change of the page. Then 50 runs x 48 layers report to
another monitor, for the latency, CPU time and size of a scrape. Then one hour of 50 runs is simulated, for the memory.
Finally it takes docs/live-fleet.png and docs/live-run.png of real trainings. `--only-scrapes` measures /metrics alone
and replaces that part of the result. The exit status is 1 if a bound is exceeded.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.table import Table

from benchmarks import campaign, live_hour, live_pictures
from benchmarks.live_scenes import NUM_LAYERS, Agent, Served, chromium, monitor, profiles, record, states, wait_until
from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "live_page.json"
DOCS = Path(__file__).parents[1] / "docs"
NUM_RECORDED, NUM_SNAPSHOTS, NUM_SIMULATED = 20, 60, 50
PAINTS, UPDATES, SCRAPES = 7, 15, 40
PAINT_SECONDS, UPDATE_SECONDS, SCRAPE_CPU_SECONDS = 1.0, 2.0, 0.25
MAX_GROWTH_BYTES = 16 << 20
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
"""Accept header of Prometheus."""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def first_paint(browser: Any, served: Served, began: float) -> dict[str, Any]:
    """Return the first paint of both pages in milliseconds, each in a new browser; the first one right at the start."""

    def paint(path: str) -> float:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url + path)
        # Poll, because the content security policy of the page forbids the method of wait_for_function.
        found = float(wait_until(lambda: page.evaluate(FIRST_PAINT), 0.01))
        context.close()
        return found

    first = paint("/")

    def recalled() -> bool:
        runs = httpx.get(f"{served.url}/api/v1/runs", timeout=30.0).json()["runs"]
        return len(runs) == NUM_RECORDED and all(run["risk"] is not None for run in runs)

    wait_until(recalled)
    listed = time.monotonic() - began
    last = f"/api/v1/runs/recorded-{NUM_RECORDED - 1:02d}", "/api/v1/runs/recorded-00"
    wait_until(lambda: all(httpx.get(served.url + path, timeout=30.0).json()["layers"]["steps"] for path in last), 0.2)
    whole = time.monotonic() - began
    return {
        "at_the_start_ms": first,
        "all_runs_listed_seconds": listed,
        "all_heatmaps_seconds": whole,
        "fleet_ms": [paint("/") for _ in range(PAINTS)],
        "run_ms": [paint("/runs/recorded-03") for _ in range(PAINTS)],
    }


def updates(browser: Any, served: Served) -> list[float]:
    """Return the seconds from passing a snapshot to the socket until the page shows its step."""
    agent = Agent(served.endpoint, "watched")
    agent.snapshot(1, states(0).bfloat16())
    page = browser.new_page()
    wait_until(lambda: httpx.get(f"{served.url}/api/v1/runs/watched").json().get("points"))
    page.goto(f"{served.url}/runs/watched")
    page.wait_for_selector(".connection[data-state=live]")
    took = []
    for step in range(2, UPDATES + 2):
        held, began = states(step).bfloat16(), time.monotonic()
        agent.snapshot(step, held)
        seen = f"document.querySelector('#eigenvalues').textContent.includes('Step {step}.')"
        wait_until(partial(page.evaluate, seen), 0.02)
        took.append(time.monotonic() - began)
        time.sleep(0.37)  # vary the phase relative to the interval of the stream
    agent.close()
    return took


def scrapes(folder: Path) -> dict[str, Any]:
    """Measure latency, CPU time and size of /metrics, compressed, while many runs report."""
    settings = "[monitor]\nmax_runs = 64\nqueue_length = 100\nvanished_after_seconds = 600\n"
    with monitor(folder, folder / "many.sqlite3", settings) as served:
        agents = [Agent(served.endpoint, f"run-{number:02d}") for number in range(NUM_SIMULATED)]
        held = states(1).bfloat16()
        for agent in agents:
            agent.snapshot(1, held)
            agent.heartbeat(1)

        def reported() -> bool:
            text = httpx.get(f"{served.url}/metrics", timeout=30.0).text
            return text.count(f'layer="{NUM_LAYERS - 1}"') >= 10 * NUM_SIMULATED

        wait_until(reported, 0.5)
        took, cpu, packed = [], [], b""
        for number in range(SCRAPES):
            agents[number % NUM_SIMULATED].heartbeat(number + 2)
            time.sleep(0.1)
            began, spent = time.monotonic(), cpu_seconds(served.pid)
            connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30.0)
            connection.request("GET", "/metrics", headers={"Accept": ACCEPT, "Accept-Encoding": "gzip"})
            packed = connection.getresponse().read()
            took.append(time.monotonic() - began)
            cpu.append(cpu_seconds(served.pid) - spent)
            connection.close()
        for agent in agents:
            agent.close()
    text = gzip.decompress(packed)
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    told = {"seconds": took, "cpu_seconds": cpu, "series": series, "bytes": len(text), "sent_bytes": len(packed)}
    # Latency depends on what else the machine does; CPU time hardly does.
    return {"provenance": provenance(0), "load_average": os.getloadavg()[0], "num_runs": NUM_SIMULATED, **told}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads, in steps of a clock tick (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, console: Any) -> dict[str, Any]:
    found = profiles(8)
    console.print(f"recording {NUM_RECORDED} runs x {NUM_LAYERS} layers x {NUM_SNAPSHOTS} snapshots")
    record(folder / "recorded.sqlite3", NUM_RECORDED, NUM_SNAPSHOTS, found)
    with chromium() as browser, monitor(folder, folder / "recorded.sqlite3") as served:
        told: dict[str, Any] = {"paint": first_paint(browser, served, time.monotonic())}
        console.print("first paint:", told["paint"])
        told["updates_seconds"] = updates(browser, served)
    console.print("updates:", [round(each, 2) for each in told["updates_seconds"]])
    told["metrics"] = scrapes(folder)
    console.print("scrapes:", statistics.median(told["metrics"]["seconds"]))
    # Use another process, whose memory is that of the monitor alone.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        told["hour"] = pool.apply(live_hour.simulate, (NUM_SIMULATED,))
    console.print("hour:", told["hour"])
    return told


def missed(told: dict[str, Any]) -> list[str]:
    """Return the exceeded bounds in words."""
    paint, hour = told["paint"], told["hour"]
    worst = max(paint["at_the_start_ms"], *paint["fleet_ms"], *paint["run_ms"]) / 1000
    found = []
    if worst > PAINT_SECONDS:
        found.append(f"first paint took {worst:.2f} s")
    if max(told["updates_seconds"]) > UPDATE_SECONDS:
        found.append(f"an update took {max(told['updates_seconds']):.2f} s")
    if max(told["metrics"]["cpu_seconds"]) > SCRAPE_CPU_SECONDS:
        found.append(f"a scrape took {max(told['metrics']['cpu_seconds']):.2f} s of CPU time")
    if max(hour["rss_bytes"]) - hour["rss_bytes"][1] > MAX_GROWTH_BYTES or len(set(hour["series"][1:])) > 1:
        found.append("memory or series grew")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_page", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the pictures go (default %(default)s)")
    parser.add_argument("--only-scrapes", action="store_true", help="measure /metrics alone, and keep the rest")
    parser.add_argument("--only-pictures", action="store_true", help="take the pictures alone, and keep the rest")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = campaign.console()
    origin = provenance(0)  # the provenance is read before the pictures change the tree
    with tempfile.TemporaryDirectory(prefix="koopmon-") as folder:
        if options.only_scrapes:
            document = json.loads(options.out.read_text(encoding="utf-8"))
            return _report({**document, "metrics": scrapes(Path(folder))}, options.out, console)
        if options.only_pictures:
            document = json.loads(options.out.read_text(encoding="utf-8"))
            return _report(
                {**document, "pictures": live_pictures.take(Path(folder), options.docs)}, options.out, console
            )
        told = measure(Path(folder), console)
        told["pictures"] = live_pictures.take(Path(folder), options.docs)
    settings = {"num_recorded": NUM_RECORDED, "num_layers": NUM_LAYERS}
    return _report({"provenance": origin, "settings": settings, **told}, options.out, console)


def _report(told: dict[str, Any], out: Path, console: Any) -> int:
    """Print and write the result; return the exit status."""
    table = Table("what", "median", "worst", title="live page")
    paint, hour = told["paint"], told["hour"]
    for name, values, unit in (
        ("first paint, all runs", paint["fleet_ms"], "ms"),
        ("first paint, one run", paint["run_ms"], "ms"),
        ("snapshot to page", told["updates_seconds"], "s"),
        ("/metrics", told["metrics"]["seconds"], "s"),
        ("/metrics, CPU time", told["metrics"]["cpu_seconds"], "s"),
    ):
        table.add_row(name, f"{statistics.median(values):.3g} {unit}", f"{max(values):.3g} {unit}")
    grown = (max(hour["rss_bytes"]) - hour["rss_bytes"][1]) / 1e6
    table.add_row("memory over an hour", f"{hour['rss_bytes'][1] / 1e6:.0f} MB", f"+{grown:.1f} MB")
    console.print(table)
    found = missed(told)
    for words in found:
        console.print(f"[red]{words}[/red]")
    out.write_text(json.dumps({**told, "missed": found}, indent=1) + "\n", encoding="utf-8")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
