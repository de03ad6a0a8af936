"""`koopmon profile`: the spectrum and the risk of a model before training, from one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from koopmon import plots
from koopmon.cli import factory as factories
from koopmon.cli.console import print_json, results
from koopmon.cli.options import AsJson, option
from koopmon.errors import CalibrationError, ConfigError, KoopmonError, foreign_code
from koopmon.numbers import mean

if TYPE_CHECKING:
    from koopmon.profiling import CapturedStates
    from koopmon.risk.initial_score import InitialRisk
    from koopmon.spectral import LayerProfile, SpectralProfile

SURVIVES = 0.95
_COLUMNS = {
    "M~1": "near_unit_mass",
    "M>1": "expansive_mass",
    "M<1": "contractive_mass",
    "rho": "spectral_radius",
    "kappa": "eigenvector_condition_number",
    "Kreiss": "kreiss_constant",
    "eta": "nonlinearity_ratio",
    "update": "update_ratio",
    "k": "update_exponent",
    "reliable": "reliable_mode_ratio",
}
_LEGEND = (
    "M~1, M>1, M<1: shares of the eigenvalues near, above and below modulus 1; rho: largest modulus; kappa: condition"
    " number of the eigenvectors; Kreiss: bound of transient growth; eta: nonlinearity; update: size of the update"
    " relative to the state; k: growth of the update with the state, 0 behind a normalisation; reliable: share of modes"
    " with a small residual"
)


def profile(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="FACTORY",
            help="module:function or file.py:function that returns (model, batch) or (model, batch, loss).",
        ),
    ],
    adapter: Annotated[str | None, option("NAME", "Architecture adapter. Default: the one that fits best.")] = None,
    stack: Annotated[str | None, option("PATH", "List of residual blocks in the model. Default: found.")] = None,
    num_samples: Annotated[int, option("N", "Tokens, the same ones at every depth.", min=16)] = 2048,
    svd_rank: Annotated[
        int | None, option("R", "Leading directions. Default: all, which needs N >= width.", min=1)
    ] = None,
    seed: Annotated[int, option("N", "Seed of the choice of tokens.", min=0)] = 0,
    as_json: AsJson = False,
    png: Annotated[Path | None, option("FILE", "Draw the eigenvalues on the unit circle, coloured by depth.")] = None,
    calibrator: Annotated[
        Path | None, option("FILE", "Calibrator, as `koopmon calibrate` writes it. Default: koopmon's own.")
    ] = None,
    learning_rate: Annotated[
        float | None, option("RATE", "Predict the probability of divergence.", "--lr", min=1e-12)
    ] = None,
    max_lr: Annotated[
        bool, typer.Option("--max-lr", help="Predict the highest peak learning rate that is safe.")
    ] = False,
) -> int:
    """Profile a model's residual stream from one forward pass: its spectrum, layer by layer, and its initial risk.

    The score is the mean near-unit mass over layers: below 0.3 low, above 0.5 high. It separates architectures and does
    not depend on the learning rate.

    With --max-lr a copy of a normalised model trains for some tens of steps. loss(model) draws the next batch of the
    training data and returns the loss of the model it is given. Without a loss, the rate follows from the width alone.
    """
    if png is not None:
        plots.require(f"--png {png}")
    if calibrator is not None and learning_rate is None and not max_lr:
        raise ConfigError("--calibrator FILE needs --lr RATE or --max-lr")
    with Console(stderr=True).status("loading torch") as status:
        from koopmon.profiling import capture_states
        from koopmon.rate_probe import peak_rate
        from koopmon.risk.calibration import SHIPPED
        from koopmon.risk.initial_score import initial_risk
        from koopmon.risk.normalization import normalization_from_exponent
        from koopmon.spectral import profile_states

        status.update("making the model")
        model, args, kwargs, loss = factories.load_with_loss(factory)
        status.update("profiling")
        chosen: dict[str, Any] = {"adapter": adapter, "stack": stack, "num_samples": num_samples, "seed": seed}
        with foreign_code(lambda why: KoopmonError(f"{factory}: the forward pass {why}")):
            captured = capture_states(model, *args, **chosen, **kwargs)
            spectrum = profile_states(captured.states, svd_rank=svd_rank, seed=seed, paired=captured.paired)
        risk = initial_risk(spectrum, known_exponent=captured.known_exponent)
        peak = None
        if max_lr and risk.update_exponent is not None and normalization_from_exponent(risk.update_exponent) >= 0.5:
            status.update("warming up copies of the model")
            with foreign_code(lambda why: KoopmonError(f"{factory}: a copy of the model {why} in a warm-up")):
                peak = peak_rate(model, loss, captured, risk.update_exponent, args, kwargs)
        forecast = None
        if calibrator is not None or learning_rate is not None or (max_lr and peak is None):
            forecast = _forecast(calibrator or SHIPPED, captured, spectrum, risk, learning_rate)
        name = type(model).__name__
        verdict = f"not informative: {risk.reason}" if risk.score is None else f"{risk.level} ({risk.reason})"
        if png is not None:
            status.update("drawing")
            plots.spectrum(spectrum, png, title=f"{name}: {verdict}")
    if as_json:
        discovery = captured.discovery
        result = {
            "model": name,
            "adapter": discovery.adapter.name,
            "stack": discovery.stack.name,
            "points": [point.name for point in discovery.points],
            "masked": captured.masked,
            "initial_risk": risk,
            "profile": spectrum.to_dict(),
            "observables": captured.observables,
        }
        found = {"forecast": forecast, "peak_rate": peak}
        print_json(result | {name: value for name, value in found.items() if value is not None})
        return 0
    out = results()
    out.print(_table(name, captured, spectrum))
    lines = [f"{name}: {text}" for name, text in captured.measures.items()]
    lines += [f"initial risk: {verdict}", *([] if forecast is None else forecast.lines())]
    lines += [] if peak is None else [peak.line()]
    out.print(*lines, sep="\n", soft_wrap=True)
    return 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of a calibrator for a model. A rate is None when the calibrator covers no rate that low."""

    learning_rate: float | None
    divergence_probability: float | None
    max_learning_rate: float | None
    """Learning rate at which the run survives with the probability SURVIVES."""
    even_learning_rate: float | None
    """Learning rate at which the run survives with probability one half."""
    highest_known_learning_rate: float
    """Learning rate of this size above which the calibrator has no run: the two above never exceed it."""
    held_out_error: float | None

    def lines(self) -> list[str]:
        error = "" if self.held_out_error is None else f" (expected calibration error {self.held_out_error:.3f})"
        lines = []
        if self.divergence_probability is not None:
            at = f"at learning rate {self.learning_rate:g}"
            lines.append(f"divergence probability {at}: {self.divergence_probability:.2f}{error}")
        elif self.learning_rate is not None:
            rate = f"learning rate {self.learning_rate:g}"
            lines.append(f"{rate} is higher, for this size, than any that the calibrator has seen")
        if self.max_learning_rate is not None and self.even_learning_rate is not None:
            safe, even = self._bounded(self.max_learning_rate), self._bounded(self.even_learning_rate)
            lines.append(
                f"highest learning rate survived with probability {SURVIVES:.0%}: {safe}; with 50%: {even}{error}"
            )
        return lines or ["the calibrator has no example of such a model at any learning rate"]

    def _bounded(self, rate: float) -> str:
        """Format a rate, and say where the runs of the calibrator end."""
        at_the_end = rate >= self.highest_known_learning_rate * (1 - 1e-9)
        return f"{rate:.2g}" + (
            " or more, the highest that the calibrator has seen for this size" if at_the_end else ""
        )


def _forecast(
    path: Path, captured: CapturedStates, spectrum: SpectralProfile, risk: InitialRisk, learning_rate: float | None
) -> Forecast:
    from koopmon.risk.calibration import Example, load

    calibrator = load(path)
    adapter = captured.discovery.adapter.name
    if risk.update_exponent is None:
        raise CalibrationError(f"calibrator {path}: the profile is not informative: {risk.reason}")
    if calibrator.adapter != adapter:
        raise CalibrationError(f"calibrator {path} is for {calibrator.adapter}; this model's adapter is {adapter}")
    example = Example(
        update_exponent=risk.update_exponent,
        learning_rate=learning_rate or 1.0,
        width=int(captured.states[0].shape[-1]),
        num_layers=spectrum.num_layers,
    )
    covered = learning_rate is not None and calibrator.covers(example)
    return Forecast(
        learning_rate=learning_rate,
        divergence_probability=calibrator.probability(example) if covered else None,
        max_learning_rate=calibrator.max_learning_rate(example, 1 - SURVIVES),
        even_learning_rate=calibrator.max_learning_rate(example, 0.5),
        highest_known_learning_rate=calibrator.highest_effective_rate / (example.width * example.num_layers),
        held_out_error=calibrator.held_out_error,
    )


def _table(name: str, captured: CapturedStates, spectrum: SpectralProfile) -> Table:
    rank = "full rank" if spectrum.svd_rank is None else f"svd_rank {spectrum.svd_rank}"
    tokens = f"{spectrum.num_samples} of {captured.num_tokens} tokens{', masked' if captured.masked else ''}"
    stack = captured.discovery.stack.name or "the model itself"  # a Sequential of blocks has an empty path
    found = f"adapter {captured.discovery.adapter.name}, stack {stack}"
    table = Table(
        title=f"{name}: {found}; {tokens}, {rank}", title_justify="left", title_style="",
        caption=_LEGEND, caption_justify="left", caption_style="",
    )  # fmt: skip
    table.add_column("layer", justify="right")
    for heading in (*_COLUMNS, *captured.observables):
        table.add_column(heading, justify="right")
    remarks = [_remark(layer) for layer in spectrum.layers]
    if any(remarks):
        table.add_column("remark")
    for index, (layer, remark) in enumerate(zip(spectrum.layers, remarks, strict=True)):
        cells = [_cell(getattr(layer, field)) for field in _COLUMNS.values()]
        cells += [_cell(values[index]) for values in captured.observables.values()]
        cells += [remark] if any(remarks) else []
        table.add_row(str(index), *cells, style=None if layer.informative else "dim")
    table.add_section()
    means = [spectrum.mean(field) for field in _COLUMNS.values()]
    table.add_row("mean", *map(_cell, [*means, *map(mean, captured.observables.values())]))
    return table


def _remark(layer: LayerProfile) -> str:
    return layer.reason if layer.informative or not layer.reason else f"not informative: {layer.reason}"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.1e}"
