"""Whole layer profiles beside the eigenvalues of PyDMD alone: `python -m benchmarks.spectral_speed`.

Both process the same L = 12 transitions of a residual stream (D 768, N 2048), in one process with equal numbers of
threads (default 2). The measurements alternate, so that load on the machine affects both.

koopmon's side is `koopmon.spectral.profile_states`, from the raw float32 states to the L `LayerProfile`s: checks,
centring, randomised basis, whitening, operator, eigenvalues and eigenvectors, masses, kappa(V), eta, update ratio,
residuals, and the Kreiss constant ("auto": at svd_rank 32, not at full rank) or all but that ("never").

PyDMD's side is `DMD(svd_rank=32).fit(x, y).eigs`, its only public way to eigenvalues, on states that were centred and
transposed before, untimed. The goal refers to it. `fit` adds the modes and their amplitudes, more than half of its
time. A second row therefore has the minimum of PyDMD, its inner `operator.compute_operator`: the SVD of x, the
projected operator, its eigenvalues. Both use float32 at svd_rank 32, as koopmon does on float32 states (float64 takes
as long). At full rank both sides use float64.

`benchmarks.spectral_floor` follows: the monitor's own call beside the least work for the same numbers, with goals and a
JSON of its own.

Times are extrapolated in proportion to the number of transitions, and the table says so. CPU seconds are beside the
wall-clock ones. On a machine with other users they are more accurate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydmd import DMD
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks import spectral_floor
from benchmarks.provenance import provenance
from benchmarks.spectral_floor import NUM_LAYERS
from koopmon.spectral import profile_states

RESULT = Path(__file__).parent / "results" / "spectral_speed.json"
NUM_SAMPLES = 2048
WIDTH = 768
SVD_RANK = 32
GOAL_RATIO = 20.0
"""Smallest required speed-up of koopmon's whole profile over PyDMD's eigenvalues, both at svd_rank 32, by wall clock.
"""
GOAL_SECONDS = 1.0
"""Most wall-clock seconds of koopmon's whole profile at svd_rank 32 on 2 cores."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One side of the comparison: `run` processes `num_layers` of the 12 transitions."""

    name: str
    run: Callable[[], object]
    num_layers: int
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def take(self) -> None:
        """Measure once more. Seconds are those of all 12 transitions, extrapolated from the measured ones."""
        scale = NUM_LAYERS / self.num_layers
        wall, cpu = time.perf_counter(), time.process_time()
        self.run()
        self.wall_seconds.append(scale * (time.perf_counter() - wall))
        self.cpu_seconds.append(scale * (time.process_time() - cpu))

    @property
    def wall(self) -> float:
        return statistics.median(self.wall_seconds)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpu_seconds)


def snapshots(states: Sequence[Tensor], dtype: torch.dtype) -> list[NDArray[np.floating[Any]]]:
    """Prepare the states for PyDMD: centred, (D, N)."""
    return [(state - state.mean(0)).to(dtype).T.contiguous().numpy() for state in states]


def fitted_eigenvalues(columns: Sequence[NDArray[np.floating[Any]]], svd_rank: int) -> list[NDArray[Any]]:
    """Compute PyDMD's eigenvalues of every transition among `columns` by `fit`; svd_rank -1 is full rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input data condition number", UserWarning)
        return [DMD(svd_rank=svd_rank).fit(x, y).eigs for x, y in pairwise(columns)]


def operator_eigenvalues(columns: Sequence[NDArray[np.floating[Any]]], svd_rank: int) -> list[NDArray[Any]]:
    """Compute the same eigenvalues with PyDMD's inner operator, without modes and amplitudes."""
    found = []
    for x, y in pairwise(columns):
        dmd = DMD(svd_rank=svd_rank)
        dmd.operator.compute_operator(x, y)
        found.append(dmd.operator.eigenvalues)
    return found


def contestants(states: list[Tensor], oracle_layers: int, full_layers: int) -> dict[str, Contestant]:
    """Return the seven sides by key."""
    single = snapshots(states[: oracle_layers + 1], torch.float32)
    double = snapshots(states[: full_layers + 1], torch.float64)
    few = states[: full_layers + 1]
    return {
        "ours": Contestant(
            f"koopmon, svd_rank {SVD_RANK}: whole profile",
            lambda: profile_states(states, svd_rank=SVD_RANK),
            NUM_LAYERS,
        ),
        "ours_without_kreiss": Contestant(
            f"koopmon, svd_rank {SVD_RANK}: all but the Kreiss constant",
            lambda: profile_states(states, svd_rank=SVD_RANK, kreiss="never"),
            NUM_LAYERS,
        ),
        "pydmd": Contestant(
            f"PyDMD, svd_rank {SVD_RANK}: fit(x, y).eigs", lambda: fitted_eigenvalues(single, SVD_RANK), oracle_layers
        ),
        "pydmd_operator": Contestant(
            f"PyDMD, svd_rank {SVD_RANK}: its inner operator alone",
            lambda: operator_eigenvalues(single, SVD_RANK),
            oracle_layers,
        ),
        "ours_full": Contestant("koopmon, full rank: whole profile", lambda: profile_states(few), full_layers),
        "pydmd_full": Contestant(
            "PyDMD, full rank: fit(x, y).eigs", lambda: fitted_eigenvalues(double, -1), full_layers
        ),
        "pydmd_operator_full": Contestant(
            "PyDMD, full rank: its inner operator alone", lambda: operator_eigenvalues(double, -1), full_layers
        ),
    }


def ratios(sides: dict[str, Contestant], ours: str) -> dict[str, float]:
    """Return the ratios of PyDMD's times to those of the side `ours` at the same rank, both ways, by wall clock and
    CPU.
    """
    full = "_full" if ours.endswith("_full") else ""
    public, inner, side = sides[f"pydmd{full}"], sides[f"pydmd_operator{full}"], sides[ours]
    return {
        "wall": public.wall / side.wall,
        "cpu": public.cpu / side.cpu,
        "wall_against_operator": inner.wall / side.wall,
        "cpu_against_operator": inner.cpu / side.cpu,
    }


def render(sides: dict[str, Contestant]) -> Table:
    """Return medians per 12 transitions, and the ratios of PyDMD's times by wall clock and by CPU time."""
    table = Table(title=f"{NUM_LAYERS} transitions, D {WIDTH}, N {NUM_SAMPLES}: median seconds")
    for heading in ("", "measured", "wall s", "least", "CPU s", "PyDMD's eigs (CPU)", "its operator (CPU)"):
        table.add_column(heading, justify="right" if heading else "left")
    for key, side in sides.items():
        cells = ("", "")
        if key.startswith("ours"):
            times = ratios(sides, key)
            cells = (
                f"{times['wall']:.1f}x ({times['cpu']:.1f}x)",
                f"{times['wall_against_operator']:.1f}x ({times['cpu_against_operator']:.1f}x)",
            )
        seconds = (f"{value:.3f}" for value in (side.wall, min(side.wall_seconds), side.cpu))
        table.add_row(side.name, f"{side.num_layers} of {NUM_LAYERS}", *seconds, *cells)
    return table


def document(sides: dict[str, Contestant], seed: int, threads: int, load: tuple[float, float]) -> dict[str, Any]:
    """Return the figures, the goals and their provenance as plain JSON values."""
    ours, ratio = sides["ours"], ratios(sides, "ours")["wall"]
    return {
        "provenance": provenance(seed),
        "settings": {
            "num_layers": NUM_LAYERS,
            "num_samples": NUM_SAMPLES,
            "width": WIDTH,
            "svd_rank": SVD_RANK,
            "threads": threads,
            "load_average": load,
        },
        "seconds_per_12_layers": {
            key: {
                "name": side.name,
                "layers_measured": side.num_layers,
                "wall_median": side.wall,
                "cpu_median": side.cpu,
                "wall": side.wall_seconds,
                "cpu": side.cpu_seconds,
            }
            for key, side in sides.items()
        },
        "ratios": {key: ratios(sides, key) for key in sides if key.startswith("ours")},
        "goals": {
            "ratio": {"at_least": GOAL_RATIO, "holds": ratio >= GOAL_RATIO},
            "seconds": {"below": GOAL_SECONDS, "holds": ours.wall < GOAL_SECONDS},
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON; return exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral_speed", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="rounds at svd_rank 32 (default 7)")
    parser.add_argument("--full-repeats", type=int, default=3, help="of them with full rank too (default 3)")
    parser.add_argument("--pydmd-layers", type=int, default=NUM_LAYERS, help="PyDMD's share of the 12 (default 12)")
    parser.add_argument("--full-layers", type=int, default=2, help="transitions at full rank, both sides (default 2)")
    parser.add_argument("--floor-repeats", type=int, default=7, help="rounds beside the floor (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the states (default 0)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("repeats", "full_repeats", "pydmd_layers", "full_layers", "floor_repeats", "threads"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("pydmd_layers", "full_layers"):
        if (value := getattr(options, name)) > NUM_LAYERS:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at most {NUM_LAYERS}")
    torch.set_num_threads(options.threads)
    states = spectral_floor.residual_stream(options.seed, NUM_SAMPLES, WIDTH)
    sides = contestants(states, options.pydmd_layers, options.full_layers)
    before = os.getloadavg()[0]
    with threadpool_limits(options.threads):
        profile_states(states[:2], svd_rank=SVD_RANK)
        for round_index in range(options.repeats):
            for key, side in sides.items():
                if round_index < options.full_repeats or not key.endswith("_full"):
                    side.take()
    load = (round(before, 1), round(os.getloadavg()[0], 1))
    Console(width=140).print(render(sides))
    result = document(sides, options.seed, options.threads, load)
    for goal, words in (
        ("ratio", f"{GOAL_RATIO:g}x faster than PyDMD's eigenvalues"),
        ("seconds", f"below {GOAL_SECONDS:g} s"),
    ):
        print(f"goal {words}: {'holds' if result['goals'][goal]['holds'] else 'FAILS'}")
    print(f"{options.threads} threads, load average {load[0]} before, {load[1]} after")
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    near_the_floor = spectral_floor.measure(options.seed, options.floor_repeats, spectral_floor.RESULT)
    return 0 if near_the_floor and all(goal["holds"] for goal in result["goals"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
