"""Pictures of the live page with real trainings under one monitor.

The models have no normalisation. Some rates diverge and one does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from benchmarks.live_scenes import chromium, monitor
from koopmon.demo.training import Setting

RATES = (0.006, 0.008, 0.001)
STEPS, UNTIL = 240, 140
LIMIT_SECONDS = 400.0
SIZE = {"width": 1440, "height": 900}


def take(folder: Path, docs: Path) -> Mapping[str, Any]:
    """Train, and write docs/live-fleet.png and docs/live-run.png during the training; return their numbers."""
    names = [f"no-norm-lr-{rate:g}" for rate in RATES]
    with monitor(folder, folder / "pictures.sqlite3") as served:
        jobs = [_train(folder, served.endpoint, name, rate) for name, rate in zip(names, RATES, strict=True)]
        try:
            deadline = time.monotonic() + LIMIT_SECONDS
            while time.monotonic() < deadline and any(job.poll() is None for job in jobs):
                time.sleep(1.0)
                steps = {run["run"]: run["step"] for run in httpx.get(f"{served.url}/api/v1/runs").json()["runs"]}
                if steps.get(names[0], 0) >= UNTIL:
                    break
            with chromium() as browser:
                for path, file in (("/", "live-fleet.png"), (f"/runs/{names[0]}", "live-run.png")):
                    page = browser.new_page(viewport=SIZE)
                    page.goto(served.url + path)
                    page.wait_for_selector(".connection[data-state=live]")
                    page.wait_for_timeout(1500)
                    page.screenshot(path=str(docs / file), full_page=True)
            told = httpx.get(f"{served.url}/api/v1/runs/{names[0]}").json()
        finally:
            for job in jobs:
                job.terminate()
            for job in jobs:
                job.wait(60.0)
    commands = [each for decision in told["decisions"] for each in decision["commands"]]
    applied = [each for each in commands if each["kind"] == "set_lr_scale" and each["outcome"] == "applied"]
    highest = max(point["risk"] for point in told["points"])
    return {"run": names[0], "step": told["step"], "highest_risk": highest, "backed_off": len(applied)}


def _train(folder: Path, endpoint: str, name: str, rate: float) -> subprocess.Popen[bytes]:
    setting = Setting(
        lr=rate, norm="none", clip=0.0, steps=STEPS, layers=8, batch=4, context=128, width=128, num_ranks=1
    )
    words = ["run", "--monitor", endpoint, "--run", name, "--", *setting.command(folder / f"{name}.jsonl")]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KOOPMON_")}
    # A launch of the same name that was killed left its settings in the state directory.
    environ |= {"XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.output").open("wb") as output:
        command = [sys.executable, "-m", "koopmon", *words]
        return subprocess.Popen(command, env=environ, stdout=output, stderr=output)
