"""Misbehaving plugins, installed where a job of the fault campaign starts."""

from __future__ import annotations

import random
import textwrap
import time
from pathlib import Path

from benchmarks.fault_campaign.machine import wait
from benchmarks.fault_campaign.stages import Found, Injection, Watched

ADAPTER = """
import itertools, random, sys, time
import torch
from koopmon import ArchitectureAdapter, block_lists, hookimpl

class Hostile(ArchitectureAdapter):
    name = "hostile"

    def specificity(self, model):
        return 50

    def stacks(self, model):
        return [each.stack(residual=True) for each in block_lists(model)]

{methods}

@hookimpl
def koopmon_architecture_adapters():
    {hook}
"""


def _adapter(methods: str = "", hook: str = "return [Hostile()]") -> str:
    return ADAPTER.format(methods=textwrap.indent(methods, "    "), hook=hook)


MANNERS = {
    "exits at import": "import sys; sys.exit(7)",
    "raises KeyboardInterrupt in its hook": _adapter(hook="raise KeyboardInterrupt"),
    "exits in specificity": _adapter("def specificity(self, model):\n    sys.exit(9)"),
    "never ends its import": "import time; time.sleep(86400)",
    "offers adapters without end": _adapter(hook="return (Hostile() for _ in itertools.count())"),
    "takes the name of a built-in": _adapter("name = 'transformer'"),
    "claims as much as a built-in": _adapter("name = 'a'\ndef specificity(self, model):\n    return 10"),
    "claims NaN": _adapter("def specificity(self, model):\n    return float('nan')"),
    "reads no chain": _adapter("def block_output(self, module, output):\n    return output + 1"),
    "exits in the forward pass": _adapter("def block_input(self, *args):\n    sys.exit(9)"),
    "sets the default dtype, the seed and grad mode": _adapter(
        "def specificity(self, model):\n"
        "    torch.set_default_dtype(torch.float64); torch.manual_seed(9); torch.set_grad_enabled(False)\n"
        "    return 0"
    ),
}
"""Source of the plugin, with its misbehaviour."""


def hostile_plugin(directory: Path, rng: random.Random, count: int) -> Found:
    """Trainings under `koopmon run`, each beside one of the plugins. The fault ends with the first step."""
    manners: list[str] = []
    while len(manners) < count:
        manners += rng.sample(list(MANNERS), len(MANNERS))
    injections = []
    with Watched(directory, rng) as stage:
        for number, manner in enumerate(manners[:count]):
            job = stage.steered(
                world=1, guarded="run", name=f"job-{number}", paths=str(_site(directory, number, manner))
            )
            started = time.monotonic()
            job.launch()
            wait(lambda job=job: job.last() is not None or not job.running, f"the first step of {job.run}")  # type: ignore[misc]
            ended = time.monotonic()
            injections.append(Injection(manner, started, ended, stage.recovery(ended, {job.run: 0})))
            stage.await_command(job.run)
            job.end()
        return stage.conclude(injections)


def _site(directory: Path, number: int, manner: str) -> Path:
    """Directory with the installed plugin."""
    site = directory / f"site-{number}"
    info = site / "hostile-0.dist-info"
    info.mkdir(parents=True)
    (site / "hostile_plugin.py").write_text(MANNERS[manner])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[koopmon.adapters]\nhostile = hostile_plugin\n")
    return site
