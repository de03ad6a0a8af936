"""Detection of a normalised residual stream before training: `python -m benchmarks.brake`.

The models are untrained, of every residual scheme and family, on each task and at three sizes. The table compares the
update exponent measured from their states (koopmon.spectral.update_exponent) with koopmon's value, which uses the
structure first (koopmon.chain_verifier.known_exponent). A value is right if the normalisation strength is above one
half with a normalisation and below it without. An exponent that cannot be measured, because the layers hardly change
the state, counts as unnormalised, as in the risk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import campaign
from benchmarks.families import SCHEMES, Family
from benchmarks.models import Norm
from benchmarks.provenance import provenance
from benchmarks.tasks import TASKS, draw
from benchmarks.training import INITIAL_SAMPLES, Recipe, full_profile
from koopmon.risk.normalization import normalization_from_exponent

RESULT = Path(__file__).parent / "results" / "brake.json"
SIZES = ((64, 4), (96, 3), (128, 6))
TRANSFORMERS: Sequence[Norm] = ("pre", "rms", "sub", "post", "none", "deep")
OTHERS: Sequence[Family] = ("moe-1", "moe-2", "mamba", "kan")
UNBRAKED: Sequence[Norm] = ("none", "deep")


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme of one family, over all tasks, sizes and initialisations."""

    family: Family
    norm: Norm
    num_models: int
    lowest: float
    """Smallest measured exponent."""
    highest: float
    right_by_states: int
    right: int
    """Number of models with koopmon's value right."""


def recipes(family: Family, norm: Norm) -> Iterator[Recipe]:
    for initialisation in ("gpt2", "torch") if family == "transformer" else ("gpt2",):
        for task in TASKS:
            if task != "text-full":
                for width, num_layers in SIZES:
                    yield Recipe(
                        task=task,
                        family=family,
                        norm=norm,
                        initialisation=initialisation,
                        width=width,
                        num_layers=num_layers,
                        lr=0.0,
                        seed=3000,
                        steps=1,
                    )


def measure(family: Family, norm: Norm) -> Row:
    read: list[float] = []
    num_models = right_by_states = right = 0
    for recipe in recipes(family, norm):
        rows = -(-INITIAL_SAMPLES // TASKS[recipe.task]["num_tokens"]) * 2
        tokens, _ = draw(recipe.task, rows, seed=recipe.seed)
        captured, profile = full_profile(recipe.model(), tokens, seed=recipe.seed)
        exponent = profile.update_exponent
        known = exponent if captured.known_exponent is None else captured.known_exponent
        num_models += 1
        read += [] if exponent is None else [exponent]
        right_by_states += _is_braked(exponent) is (norm not in UNBRAKED)
        right += _is_braked(known) is (norm not in UNBRAKED)
    return Row(family, norm, num_models, min(read), max(read), right_by_states, right)


def _is_braked(exponent: float | None) -> bool:
    return exponent is not None and normalization_from_exponent(exponent) > 0.5


def table(rows: Sequence[Row]) -> Table:
    drawn = Table("family, scheme", "models", "exponent read", "right by states", "right")
    for row in rows:
        span = f"{row.lowest:.2f} to {row.highest:.2f}"
        cells = (str(row.num_models), span, str(row.right_by_states), str(row.right))
        drawn.add_row(f"{row.family}, {row.norm}", *cells)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.brake", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console: Console = campaign.console()
    wanted: list[tuple[Family, Norm]] = [("transformer", norm) for norm in TRANSFORMERS]
    wanted += [(family, scheme) for family in OTHERS for scheme in SCHEMES]
    rows = [measure(*each) for each in track(wanted, description="profiling", console=console)]
    console.print(table(rows))
    document: Mapping[str, object] = {"provenance": provenance(3000), "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
