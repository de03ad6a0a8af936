"""Size of a history, CPU time of recording, and of reading it: `python -m benchmarks.history_size`.

Histories of 6 and 48 layers hold profile, observation and checkpoint of each snapshot, as a monitor records them. The
form of earlier versions (JSON with nine digits, zlib level 6) is measured beside today's, in turn. Then
`koopmon report` and `koopmon replay` read a run of 100,000 snapshots, which `--long` keeps for the next time. Times are
CPU seconds. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance
from koopmon.config import Config
from koopmon.history import writer
from koopmon.history.plain_profile import PlainProfile
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.run_controller import RunController
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.wire.messages import Applied, Hello, TrainingStep

RESULT = Path(__file__).parent / "results" / "history_size.json"
SHAPES = {6: (512, 256), 48: (128, 64)}
"""Layers with the samples N and the width D of their snapshots."""
SVD_RANK = 32
NUM_PROFILES, NUM_SIZED, NUM_BLOCKS, BLOCK = 20, 1000, 12, 20
RUN, INCARNATION = "job", "0123abcd"
GOALS = {"megabytes_48": 4.0, "recording_ratio_48": 0.1, "report_seconds": 3.0, "replay_seconds": 3.0}
"""Upper bounds: MB of 1,000 snapshots, CPU time of recording over that before, CPU seconds of reading 100,000."""


def profiles(num_layers: int, seed: int) -> list[SpectralProfile]:
    """Profile residual streams whose blocks are random maps with a nonlinearity."""
    samples, width = SHAPES[num_layers]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(NUM_PROFILES):
        states = [torch.randn((samples, width), generator=generator)]
        for _ in range(num_layers):
            block = torch.randn((width, width), generator=generator) / width**0.5
            states.append(states[-1] + 0.3 * torch.tanh(states[-1] @ block))
        found.append(profile_states(states, svd_rank=SVD_RANK, kreiss="never"))
    return found


def said(num_layers: int) -> Hello:
    shape: Any = {"num_layers": num_layers, "width": SHAPES[num_layers][1], "process_rank": 0, "step": 0}
    ranks: Any = {"world_size": 1, "num_senders": 1, "adapter": "transformer", "acts": True, "applied": Applied()}
    return Hello(run=RUN, incarnation=INCARNATION, koopmon_version="0", torch_version="0", **shape, **ranks)


def write(path: Path, found: Sequence[SpectralProfile], number: int) -> None:
    """Write `number` snapshots of a calm run like a monitor."""
    hello = said(found[0].num_layers)
    store, guard = HistoryWriter.open(path), RunController(Config(), hello, Applied())
    store.record_hello(0.0, hello)
    plain = [PlainProfile.of(profile) for profile in found]
    for step in range(1, number + 1):
        place, at = step % len(found), 0.5 * step
        training = TrainingStep(step=step, learning_rate=1e-3, loss=2.0 + step % 7 / 100, grad_norm=1.0)
        verdict = guard.assess(at, training, found[place], step=step, decide=False)
        record_profile(store, step, plain[place])
        store.record_observation(
            *(at, RUN, INCARNATION, training),
            non_finite=False,
            observation=verdict.observation,
            risk=verdict.risk.value,
            reason=verdict.risk.reason,
            components=verdict.risk.components,
        )
        store.record_memory(at, RUN, INCARNATION, guard.checkpoint())
        if step % 100 == 0:
            store.commit()
    store.close()


def record_profile(store: HistoryWriter, step: int, profile: PlainProfile | None) -> None:
    columns = {"num_shards": 1, "masked": False, "seconds": 0.1, "observables": None}
    store.record_profile(0.5 * step, RUN, INCARNATION, step, profile=profile, **columns)  # type: ignore[arg-type]


def rounded(value: Any) -> Any:
    """Round to nine digits, as earlier versions did."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def packed_before(plain: dict[str, Any]) -> bytes:
    return zlib.compress(msgspec.json.encode(rounded(plain)), 6)


@contextlib.contextmanager
def form_before() -> Iterator[None]:
    """Let the writer write the JSON of earlier versions."""
    with mock.patch.object(writer, "pack", lambda profile, _: packed_before(profile.to_dict())):
        yield


def recording(path: Path, found: Sequence[SpectralProfile]) -> dict[str, float]:
    """Return the least CPU milliseconds of recording a profile, today and before: blocks of each in turn."""
    store = HistoryWriter.open(path)

    def before(step: int) -> None:
        packed = packed_before(found[step % len(found)].to_dict())
        with mock.patch.object(writer, "pack", return_value=packed):
            record_profile(store, step, None)

    arms: dict[str, Callable[[int], None]] = {
        "now": lambda step: record_profile(store, step, PlainProfile.of(found[step % len(found)])),
        "before": before,
    }
    took: dict[str, list[float]] = {name: [] for name in arms}
    for block in range(NUM_BLOCKS):
        for name, arm in arms.items():
            began = time.process_time()
            for step in range(BLOCK):
                arm(BLOCK * block + step)
            took[name].append((time.process_time() - began) / BLOCK)
    store.close()
    return {name: 1e3 * min(seconds) for name, seconds in took.items()}


def reading(verb: str, path: Path, folder: Path) -> float:
    """Return the CPU seconds of a verb."""
    command = [sys.executable, "-m", "koopmon", verb, RUN, "--store", str(path)]
    command += ["--out", str(folder)] if verb == "report" else []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"koopmon {verb} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(folder: Path, long: Path, num_read: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"sizes": {}, "milliseconds": {}}
    for num_layers in SHAPES:
        known = profiles(num_layers, seed)
        sizes = {}
        write(folder / f"{num_layers}-empty.sqlite3", known, 0)
        empty = (folder / f"{num_layers}-empty.sqlite3").stat().st_size
        for name, form in (("now", contextlib.nullcontext), ("before", form_before)):
            path = folder / f"{num_layers}-{name}.sqlite3"
            with form():
                write(path, known, NUM_SIZED)
            sizes[name] = (path.stat().st_size - empty) / NUM_SIZED / 1e3
        found["sizes"][str(num_layers)] = sizes
        found["milliseconds"][str(num_layers)] = recording(folder / f"{num_layers}.sqlite3", known)
        if num_layers == 6 and not long.exists():
            write(long, known, num_read)
    found["seconds"] = {verb: reading(verb, long, folder / "out") for verb in ("report", "replay")}
    deep = found["milliseconds"]["48"]
    found["measured"] = {
        "megabytes_48": found["sizes"]["48"]["now"],
        "recording_ratio_48": deep["now"] / deep["before"],
        "report_seconds": found["seconds"]["report"],
        "replay_seconds": found["seconds"]["replay"],
    }
    return found


def missed(measured: Mapping[str, float]) -> list[str]:
    """Return the goals that are not met."""
    return [name for name, goal in GOALS.items() if not measured[name] <= goal]


def report(result: dict[str, Any]) -> None:
    table = Table("", "measured", "goal", title="histories")
    for name, goal in result["goals"].items():
        table.add_row(name, f"{result['measured'][name]:.3f}", f"{goal:g}")
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history_size", description=__doc__)
    parser.add_argument("--snapshots", type=int, default=100_000, help="snapshots of the run that is read")
    parser.add_argument("--long", type=Path, help="file of that run; written if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.snapshots < 1:
        parser.error("--snapshots: allowed are 1 or more")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.long or Path(folder) / "long.sqlite3", options.snapshots, options.seed)
    settings = {"shapes": {str(name): shape for name, shape in SHAPES.items()}, "svd_rank": SVD_RANK}
    settings |= {"snapshots_read": options.snapshots, "snapshots_sized": NUM_SIZED}
    result = {**provenance(options.seed), "settings": settings, "goals": GOALS, **found}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result)
    return int(bool(missed(result["measured"])))


if __name__ == "__main__":
    raise SystemExit(main())
