"""The monitor's own profile beside a floor, at widths from 64 to 4096; `benchmarks.spectral_speed` measures it too.

The floor is the least work in numpy and LAPACK that gives the same numbers as accurately.

The floor of a layer is straight numpy and scipy on one thread, without checks, records or batches: centring, basis,
projection, whitened operator, eigenvalues and vectors, residuals, condition number, eta, update ratio and exponent.
A second, lower floor stops at the eigenvalues and vectors.

The basis comes from the cheapest of three: all eigenvectors of the smaller Gram matrix in float64, only the leading
ones of it (LAPACK's subset), or koopmon's randomised method in float32 with the same depth and width.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks.provenance import provenance
from koopmon.spectral import profile_states
from koopmon.spectral.whitening import KRYLOV_DEPTH

RESULT = Path(__file__).parent / "results" / "spectral_floor.json"
WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
NUM_LAYERS = 12
NUM_SAMPLES = 512
SVD_RANK = 32
GOAL_RATIO = 1.2
"""Most CPU time of koopmon's profile, as a multiple of that of the floor, at every width."""

Matrix = NDArray[np.floating[Any]]


def residual_stream(seed: int, num_samples: int, width: int) -> list[Tensor]:
    """Draw L+1 states (N, D), float32: a stream with a decaying spectrum that every layer changes by about a third."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(num_samples, width, generator=generator) * torch.logspace(0, -2, width)]
    for _ in range(NUM_LAYERS):
        weight = torch.randn(width, width, generator=generator) / width**0.5
        states.append(states[-1] + torch.tanh(states[-1] @ weight))
    return states


def full(x: Matrix) -> Matrix:
    """Compute the basis from all eigenvectors of the smaller Gram matrix."""
    return _from_gram(x, lambda gram: np.linalg.eigh(gram)[1][:, -SVD_RANK:])


def leading(x: Matrix) -> Matrix:
    """Compute the basis from the leading eigenvectors alone."""
    size = min(x.shape)
    wanted = (size - SVD_RANK, size - 1)
    return _from_gram(x, lambda gram: scipy.linalg.eigh(gram, subset_by_index=wanted, check_finite=False)[1])


def _from_gram(x: Matrix, vectors: Callable[[Matrix], Matrix]) -> Matrix:
    wide = x.astype(np.float64)
    if len(x) >= x.shape[1]:
        return vectors(wide.T @ wide).astype(x.dtype)
    return np.linalg.qr(wide.T @ vectors(wide @ wide.T))[0].astype(x.dtype)


def randomised(x: Matrix) -> Matrix:
    """Compute the basis by block Krylov iteration, with two orthogonalisations of each block."""
    block = SVD_RANK // 2
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((x.shape[1], block), dtype=np.float32))[0]
    images = [x @ basis]
    for _ in range(KRYLOV_DEPTH):
        following = x.T @ images[-1]
        for _ in range(2):
            following = np.linalg.qr(following - basis @ (basis.T @ following))[0]
        basis = np.hstack((basis, following))
        images.append(x @ following)
    image = np.hstack(images).astype(np.float64)
    return basis @ np.linalg.eigh(image.T @ image)[1][:, -SVD_RANK:].astype(x.dtype)


BASES = {
    "all eigenvectors": (full, 64, 256),
    "leading eigenvectors": (leading, 64, 512),
    "randomised": (randomised, 128, 4096),
}
"""Bases and the widths at which they can be the cheapest."""


def floor(states: Sequence[Matrix], basis: Callable[[Matrix], Matrix], *, spectrum_alone: bool = False) -> list[float]:
    """Compute the numbers of a profile of every transition, or the spectrum alone; return the update ratios, if any."""
    ratios = []
    centred = [state - state.mean(0) for state in states]
    for (start, end), (x, y) in zip(pairwise(states), pairwise(centred), strict=True):
        frame = basis(x)
        x_r, y_r = (x @ frame).astype(np.float64), (y @ frame).astype(np.float64)
        gain = 1.0 / np.sqrt((x_r**2).sum(0) / (len(x) - 1) + 1e-5)
        x_r *= gain
        y_r *= gain
        gram = x_r.T @ x_r
        operator = np.linalg.solve(gram, x_r.T @ y_r).T
        _, vectors = np.linalg.eig(operator)
        if spectrum_alone:
            continue
        error = y_r - x_r @ operator.T
        error_gram = error.T @ error
        left = np.linalg.inv(vectors)
        signal, noise = (((left @ each) * left.conj()).sum(1).real for each in (gram, error_gram))
        _ = np.sqrt(noise) / (np.sqrt(signal) + 1e-5), np.linalg.cond(vectors)
        change = np.linalg.norm(y_r - x_r)
        _ = np.sqrt(np.trace(error_gram)) / (change + 1e-5)
        ratios.append(float(change / np.linalg.norm(x_r)))
        lengths, updates = (np.log(np.linalg.norm(rows, axis=1)) for rows in (start, end - start))
        _ = np.cov(lengths, updates)
    return ratios


def row(states: Sequence[Tensor], repeats: int) -> dict[str, Any]:
    """Measure one width on one thread, each side in turn; figures are the least CPU seconds of the repeats."""
    arrays, width, num_layers = [state.numpy() for state in states], states[0].shape[1], len(states) - 1
    stack = torch.stack(list(states))
    sides: dict[str, Callable[[], object]] = {"ours": lambda: profile_states(stack, svd_rank=SVD_RANK, kreiss="never")}
    for name, (basis, narrowest, widest) in BASES.items():
        if narrowest <= width <= widest:
            sides[name] = partial(floor, arrays, basis)
            sides[f"{name}, spectrum alone"] = partial(floor, arrays, basis, spectrum_alone=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for repeat in range(repeats + 1):
                for name, run in sides.items():
                    start = time.process_time()
                    run()
                    if repeat:  # the first one loads libraries
                        seconds[name].append(time.process_time() - start)
            exact = np.array(floor(arrays, full))
            found = profile_states(stack, svd_rank=SVD_RANK, kreiss="never").layers
    finally:
        torch.set_num_threads(threads)
    least = {name: min(values) / num_layers for name, values in seconds.items()}
    ours = least.pop("ours")
    cheapest = min(sides.keys() & BASES.keys(), key=least.__getitem__)
    error = np.abs(np.array([layer.update_ratio for layer in found]) / exact - 1.0).max()
    return {
        "width": width,
        "cpu_ms_per_layer": 1e3 * ours,
        "floor_ms_per_layer": 1e3 * least[cheapest],
        "floor": cheapest,
        "ratio": ours / least[cheapest],
        "ratio_to_the_spectrum_alone": ours / min(least.values()),
        "largest_error_of_the_update_ratio": float(error),
        "all_floors_ms_per_layer": {name: 1e3 * value for name, value in least.items()},
    }


def goals(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Judge the rows: near the floor at every width, and no dearer at a smaller width than at a larger one."""
    times = [each["cpu_ms_per_layer"] for each in rows]
    worst = max(each["ratio"] for each in rows)
    return {
        "floor": {"at_most": GOAL_RATIO, "worst": worst, "holds": worst <= GOAL_RATIO},
        "monotone": {"holds": times == sorted(times)},
    }


def render(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    table = Table(title=f"The monitor's own call: N {NUM_SAMPLES}, svd_rank {SVD_RANK}, one thread")
    for heading in (
        "D",
        "CPU ms per layer",
        "floor",
        "ratio",
        "to the spectrum alone",
        "its basis",
        "error of update ratio",
    ):
        table.add_column(heading, justify="right")
    for each in rows:
        keys = ("cpu_ms_per_layer", "floor_ms_per_layer", "ratio", "ratio_to_the_spectrum_alone")
        times = (f"{each[key]:.2f}" for key in keys)
        table.add_row(str(each["width"]), *times, each["floor"], f"{each['largest_error_of_the_update_ratio']:.0e}")
    return table


def measure(seed: int, repeats: int, out: Path) -> bool:
    """Measure every width, print the table, write the JSON and return True if all goals hold."""
    before = os.getloadavg()[0]
    rows = [row(residual_stream(seed, NUM_SAMPLES, width), repeats) for width in WIDTHS]
    found = goals(rows)
    Console(width=140).print(render(rows))
    for goal, words in (("floor", f"at most x{GOAL_RATIO:g} of the floor"), ("monotone", "monotone in D")):
        print(f"goal {words}: {'holds' if found[goal]['holds'] else 'FAILS'}")
    settings = {"num_layers": NUM_LAYERS, "num_samples": NUM_SAMPLES, "svd_rank": SVD_RANK, "repeats": repeats}
    load = (round(before, 1), round(os.getloadavg()[0], 1))
    result = {
        "provenance": provenance(seed),
        "settings": {**settings, "load_average": load},
        "rows": rows,
        "goals": found,
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return all(goal["holds"] for goal in found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral_floor", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="rounds at each width (default 7)")
    parser.add_argument("--seed", type=int, default=0, help="of the states (default 0)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    return 0 if measure(options.seed, options.repeats, options.out) else 1


if __name__ == "__main__":
    raise SystemExit(main())
