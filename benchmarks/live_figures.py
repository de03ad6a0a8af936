"""Writer of the live page's results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import paragraph

Document = Mapping[str, Any]


def live_page(told: Document) -> list[str]:
    """Write the times of paint, updates and scrapes, and the memory."""
    paint, scrapes, hour, settings = told["paint"], told["metrics"], told["hour"], told["settings"]
    times = [paint["at_the_start_ms"], *paint["fleet_ms"], *paint["run_ms"]]
    layers, latencies = settings["num_layers"], [1000 * each for each in scrapes["seconds"]]
    sizes = f"{scrapes['bytes'] / 1e6:.1f} MB, compressed to {scrapes['sent_bytes'] / 1e6:.1f}"
    machine = f"{scrapes['provenance']['machine']['cores']} cores at a load of {scrapes['load_average']:.0f}"
    cpu = [1000 * each for each in scrapes["cpu_seconds"]]
    grown = (max(hour["rss_bytes"]) - hour["rss_bytes"][1]) / 1e6
    return paragraph(
        [
            f"With {settings['num_recorded']} runs x {layers} layers recorded, the first paint in Chromium takes",
            f"{statistics.median(times):.0f} ms ({max(times):.0f} at worst), and a snapshot is on the page",
            f"{statistics.median(told['updates_seconds']):.2f} s after it was sent",
            f"({max(told['updates_seconds']):.2f} at worst). With {scrapes['num_runs']} runs x {layers} layers,",
            f"/metrics takes {statistics.median(cpu):.0f} ms of CPU time ({max(cpu):.0f} at worst) and answers in",
            f"{statistics.median(latencies):.0f} ms ({max(latencies):.0f} at worst; {machine}):",
            f"{scrapes['series']:,} series, {sizes}. Over an hour of theirs, simulated, the",
            f"monitor's memory stays within {grown:.1f} MB of {hour['rss_bytes'][1] / 1e6:.0f} MB.",
        ]
    )


WRITERS: Mapping[str, Callable[[Document], list[str]]] = {"live_page": live_page}
