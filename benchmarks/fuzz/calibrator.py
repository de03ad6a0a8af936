"""Target calibrator: any bytes as its JSON file. A calibrator that loads must return a probability."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.fuzz import check_line
from koopmon.errors import CalibrationError
from koopmon.risk.calibration import Example, load

_file = os.memfd_create("calibrator")
EXAMPLES = tuple(
    Example(update_exponent=exponent, learning_rate=rate, width=width, num_layers=layers)
    for exponent, rate, width, layers in [(0.0, 1e-3, 128, 4), (1.0, 1e-7, 1, 1), (-1000.0, 1.0, 1 << 20, 4096)]
)


def seeds() -> Iterator[bytes]:
    yield (
        b'{"version":3,"adapter":"transformer","features":["log10_effective_rate","brake"],"weights":[1.5,-0.7],'
        b'"intercept":0.1,"means":[0.2,0.5],"scales":[1.0,0.4],"highest_effective_rate":10.0,"num_runs":40,'
        b'"num_diverged":20,"held_out_error":0.05,"provenance":{"seed":0,"commit":null}}'
    )
    yield (
        b'{"version":3,"adapter":"","weights":[-1e9,1e9],"intercept":-1e9,"means":[1e9,-1e9],"scales":[1e-9,1e-300],'
        b'"highest_effective_rate":5e-324,"num_runs":0,"num_diverged":0}'
    )


def run(data: bytes) -> str:
    os.ftruncate(_file, 0)
    os.pwrite(_file, data, 0)
    try:
        calibrator = load(Path(f"/proc/self/fd/{_file}"))
    except CalibrationError as error:
        text = str(error)
        check_line(text)
        return "refused"
    for example in EXAMPLES:
        assert 0.0 < calibrator.probability(example) < 1.0
        calibrator.covers(example)
        rate = calibrator.max_learning_rate(example, 0.5)
        assert rate is None or 0.0 < rate <= 1.0, rate
    return "taken"
