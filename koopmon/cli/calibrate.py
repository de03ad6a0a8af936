"""`koopmon calibrate`: fits a probability of divergence to recorded runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

from koopmon import plots
from koopmon.cli.console import print_json, results, say
from koopmon.cli.options import AsJson, option
from koopmon.errors import StoreError

if TYPE_CHECKING:
    from koopmon.offline.calibration_examples import RunExample


def calibrate(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Histories of runs, SQLite.")],
    out: Annotated[Path, option("FILE", "File of the calibrator, JSON.")],
    adapter: Annotated[str | None, option("NAME", "Architecture. Default: that of most of the runs.")] = None,
    png: Annotated[Path | None, option("FILE", "Draw predicted against observed frequencies of held-out runs.")] = None,
    as_json: AsJson = False,
) -> int:
    """Fit the probability that a run diverges, from its spectrum at the start and its learning rate.

    The examples are runs without an action: those of `koopmon run --policy observe`, and those that stayed calm. The
    error is measured on runs of sizes that the fit did not use.
    """
    if png is not None:
        plots.require(f"--png {png}")
    from koopmon.history.reader import HistoryReader
    from koopmon.offline.calibration_examples import calibration_examples
    from koopmon.risk import calibration

    console = Console(stderr=True)
    found: list[RunExample] = []
    for path in track(stores, "reading", console=console, transient=True, disable=not console.is_terminal):
        with HistoryReader.open(path) as history:
            found += calibration_examples(history)
    usable = [each for each in found if each.example is not None and each.adapter is not None]
    for why, count in Counter(each.why for each in found if each.why).most_common():
        say(f"{count} of {len(found)} runs left out: {why}")
    chosen = _chosen(usable, adapter)
    examples = [each.example for each in usable if each.adapter == chosen and each.example is not None]
    if others := len(usable) - len(examples):
        say(f"{others} runs left out: not {chosen}")
    # The fit comes first because it rejects too few runs and reports their number.
    names = ", ".join(sorted(path.name for path in stores))[:512]
    calibrator = calibration.fit(examples, adapter=chosen, provenance={"stores": names})
    diverged = [example.diverged for example in examples]
    probabilities = calibration.held_out(examples)
    error = calibration.calibration_error(diverged, probabilities)
    calibrator = replace(calibrator, held_out_error=error)
    calibration.save(calibrator, out)
    bins = calibration.reliability(diverged, probabilities)
    if png is not None:
        plots.reliability(bins, png, title=f"{chosen}: {len(examples)} runs, error {error:.3f}")
    if as_json:
        print_json({"calibrator": calibrator, "reliability": bins})
        return 0
    fitted = f"{chosen}: fitted on {len(examples)} runs, {sum(diverged)} of them diverged"
    measured = f"expected calibration error {error:.3f} on held-out sizes"
    results().print(f"{fitted}; {measured}; written to {out}", soft_wrap=True)
    return 0


def _chosen(usable: list[RunExample], adapter: str | None) -> str:
    counts = Counter(each.adapter for each in usable if each.adapter and adapter in (None, each.adapter))
    if not counts:
        known = sorted({each.adapter for each in usable if each.adapter})
        wanted = f"--adapter {adapter!r}: " if adapter else ""
        raise StoreError(f"{wanted}no run can serve; architectures seen: {', '.join(known) or 'none'}")
    return counts.most_common(1)[0][0]
