"""Spectra of seven residual schemes at initialisation beside the paper's: `python -m benchmarks.norm_table`.

Each scheme is the decoder of `benchmarks.models` (D 128, L 4, T 64, V 256). `koopmon.profile` profiles it at full rank
on N 2048 tokens of a new batch of associative recall, over several seeds of weights, batch and tokens together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import koopmon
from benchmarks.models import Decoder, Norm, associative_recall
from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "norm_table.json"
FIELDS = ("near_unit_mass", "expansive_mass", "spectral_radius", "nonlinearity_ratio", "reliable_mode_ratio")
HEADINGS = ("near-unit", "expansive", "rho", "eta", "reliable")
NUM_SAMPLES = 2048
NUM_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class Reference:
    """One row of the paper (docs/method.md, "Reported spectra") and its required near-unit mass."""

    label: str
    paper: tuple[float, float, float] | None
    """Near-unit mass, expansive mass, spectral radius; None where the paper gives no row."""
    band: tuple[float, float] | None
    """Allowed mean near-unit mass; None if the profile must not be informative."""


REFERENCES: dict[Norm, Reference] = {
    "pre": Reference("Pre-LN", (0.16, 0.54, 2.29), (0.08, 0.21)),
    "rms": Reference("RMSNorm", (0.16, 0.54, 2.28), (0.08, 0.21)),
    "sub": Reference("SubLN", (0.13, 0.54, 2.23), (0.08, 0.21)),
    "post": Reference("Post-LN", (0.66, 0.31, 7.48), (0.60, 0.80)),
    "none": Reference("No-Norm", (0.80, 0.19, 1.11), (0.75, 1.00)),
    "deep": Reference("DeepNorm", (0.00, 1.00, 3.94), (0.00, 0.05)),
    "rezero": Reference("ReZero", None, None),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one scheme: per field the mean and the standard deviation over seeds of the mean over layers."""

    norm: Norm
    mean: dict[str, float]
    spread: dict[str, float]
    num_informative: int
    """Number of seeds with an informative profile."""
    num_seeds: int
    reason: str

    @property
    def holds(self) -> bool:
        """True if the row meets `REFERENCES`."""
        band = REFERENCES[self.norm].band
        if band is None:
            return self.num_informative == 0
        return self.num_informative == self.num_seeds and band[0] <= self.mean["near_unit_mass"] <= band[1]


def profile_norm(norm: Norm, seed: int) -> koopmon.SpectralProfile:
    """Profile one scheme at initialisation at full rank, for one seed of weights, batch and tokens."""
    tokens, _ = associative_recall(NUM_SEQUENCES, seed=seed)
    return koopmon.profile(Decoder(norm, seed=seed), tokens, num_samples=NUM_SAMPLES, seed=seed)


def measure(norm: Norm, seeds: Sequence[int]) -> Row:
    """Profile one scheme over `seeds`."""
    profiles = [profile_norm(norm, seed) for seed in seeds]
    values = {field: [profile.mean(field) or 0.0 for profile in profiles] for field in FIELDS}
    return Row(
        norm=norm,
        mean={field: statistics.fmean(numbers) for field, numbers in values.items()},
        spread={field: statistics.pstdev(numbers) for field, numbers in values.items()},
        num_informative=sum(profile.informative for profile in profiles),
        num_seeds=len(profiles),
        reason=profiles[0].reason,
    )


def render(row: Row) -> str:
    """Format one line of the table: mean ± spread per field, then the paper's three figures."""
    reference = REFERENCES[row.norm]
    cells = [f"{row.mean[field]:5.2f} ±{row.spread[field]:4.2f}" for field in FIELDS]
    paper = " / ".join(f"{value:.2f}" for value in reference.paper) if reference.paper else "no row"
    if row.num_informative == row.num_seeds:
        verdict = ""
    elif row.num_informative == 0:
        verdict = f"not informative: {row.reason}"
    else:
        verdict = f"informative for {row.num_informative} of {row.num_seeds} seeds: {row.reason}"
    return f"{reference.label:<9}" + "".join(f"{cell:>14}" for cell in cells) + f"   {paper:<19} {verdict}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it as JSON; return exit status 1 if a row does not meet its reference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norm_table", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds per row (default 5)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: must be at least 1")
    start = time.perf_counter()
    print(f"{'':<9}" + "".join(f"{heading:>14}" for heading in HEADINGS) + "   paper: near-unit / expansive / rho")
    rows = []
    for norm in REFERENCES:
        rows.append(measure(norm, range(options.seeds)))
        print(render(rows[-1]), flush=True)
    wrong = [REFERENCES[row.norm].label for row in rows if not row.holds]
    print(f"mean over layers, ± over {options.seeds} seeds; {time.perf_counter() - start:.0f} s; ", end="")
    print(f"outside the bands: {', '.join(wrong)}" if wrong else "every row within its band")
    document = {
        "provenance": provenance(0),
        "settings": {"num_samples": NUM_SAMPLES, "svd_rank": None, "seeds": list(range(options.seeds))},
        "rows": [{**asdict(row), "reference": asdict(REFERENCES[row.norm]), "holds": row.holds} for row in rows],
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
