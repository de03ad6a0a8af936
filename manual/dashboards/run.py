"""Dashboard of one run: state, actions, and layer statistics by depth and over time."""

from __future__ import annotations

from typing import Any

from koopmon.telemetry.alerts import HIGH_FORECAST, LIKELY, MAX_OVERHEAD_RATIO, STALE_SECONDS
from koopmon.telemetry.metrics import BY_NAME
from manual.dashboards import panels
from manual.dashboards.layout import annotation, dashboard, label_variable, sized
from manual.dashboards.panels import GREEN, ORANGE, Json, warn

UID = "koopmon-run"
RUN = '{run=~"$run"}'
SETTLED = 'koopmon_commands_total{run=~"$run",%soutcome!="sent"}'
ACTS = "The policy acts at the lower dashed line, and at once at the upper one."
MASSES = {
    "near_unit_mass": ("Near-unit mass", "Greens"),
    "expansive_mass": ("Expansive mass", "Reds"),
    "contractive_mass": ("Contractive mass", "Blues"),
}


def make() -> Json:
    """Return the dashboard's JSON."""
    return dashboard(
        UID,
        "koopmon / Run",
        "One run: risk, actions, and statistics of its layers by depth.",
        {
            "Now": sized(3, 4, *_now()),
            "Risk and actions": sized(12, 9, *_risk()),
            "Training": sized(12, 8, *_training()),
            "Spectra by depth": sized(8, 9, *_masses()),
            "Layers": sized(12, 8, *_layers()),
            "Agent": sized(12, 8, *_agent()),
        },
        variables=[
            label_variable("run", "Run", "koopmon_run_state", "run", many=False),
            label_variable("layer", "Layer", 'koopmon_spectral_radius{run=~"$run"}', "layer"),
        ],
        links={"koopmon-fleet": "Fleet", "koopmon-monitor": "Monitors"},
        annotations=[
            _commands("Actions", 'kind!="set_cadence",', ORANGE),
            _commands("Cadence", 'kind="set_cadence",', panels.BLUE),
        ],
    )


def _commands(name: str, kinds: str, color: str) -> Json:
    """Return an annotation of commands with their outcomes; a mark is as wide as the range of its query."""
    expr = f"sum by (run, kind, outcome) (changes({SETTLED % kinds}[1m])) > 0"
    return annotation(name, expr, "{{kind}} {{outcome}}", color)


def _of(metric: str) -> str:
    return f"koopmon_{metric}{RUN}"


def _layered(metric: str) -> str:
    return panels.by_depth(f'koopmon_{metric}{{run=~"$run",layer=~"$layer"}}')


def _now() -> list[Json]:
    def now(title: str, metric: str, **settings: Any) -> Json:
        return panels.stat(title, BY_NAME[metric].help, _of(metric), **settings)

    probability = {"unit": "percentunit", "steps": warn(LIKELY), "decimals": 0}
    age = f"time() - {_of('last_snapshot_timestamp_seconds')}"
    return [
        now("State", "run_state", mappings=panels.RUN_STATES),
        now("Step", "step", decimals=0),
        now("Risk now", "risk", steps=panels.RISK_STEPS, decimals=2),
        now("Forecast now", "forecast", steps=warn(HIGH_FORECAST), decimals=2),
        now("Probability", "divergence_probability", **probability),
        now("Initial score", "initial_risk", decimals=2),
        now("Learning-rate scale", "lr_scale", unit="percentunit", steps=((None, ORANGE), (1, GREEN))),
        panels.stat("Last snapshot", "Age of the last snapshot.", age, unit="s", steps=warn(STALE_SECONDS)),
    ]


def _risk() -> list[Json]:
    return [
        panels.lines(
            "Risk",
            f"The risk leads to actions, the forecast only to alerts. The probability needs a calibrator. {ACTS}",
            {"risk": _of("risk"), "forecast": _of("forecast"), "probability": _of("divergence_probability")},
            unit="percentunit",
            steps=panels.RISK_STEPS,
            maximum=1,
        ),
        panels.lines(
            "Settings in force",
            "Factor on the learning rate, and the weight of Koopman Spectral Shaping on the right axis.",
            {"learning-rate scale": _of("lr_scale"), "KSS alpha": _of("kss_alpha")},
            right="KSS alpha",
        ),
        panels.lines(
            "Commands",
            "Commands a minute, by kind and outcome.",
            {"{{kind}} {{outcome}}": f"sum by (kind, outcome) (increase({SETTLED % ''}[1m])) > 0"},
            bars=True,
        ),
        panels.lines(
            "Alarms and effect",
            "Snapshots a minute with a risk of at least act_risk, and checks of the last action by its effect.",
            {
                "high risk": f"increase({_of('risk_alarms_total')}[1m])",
                "action: {{outcome}}": f"increase({_of('effect_checks_total')}[1m])",
            },
        ),
    ]


def _training() -> list[Json]:
    def lines(title: str, metric: str, **settings: Any) -> Json:
        return panels.lines(title, BY_NAME[metric].help, {title.lower(): _of(metric)}, **settings)

    return [
        panels.lines(
            "Loss",
            f"{BY_NAME['loss'].help} The band is that of the run's own history.",
            {"loss": _of("loss"), "upper limit of its band": 'koopmon_band_high{run=~"$run",name="loss"}'},
            minimum=None,
        ),
        panels.lines(
            "Logged scalars",
            "Values that the script logs, with their bands, and the number of times that a scalar left its band.",
            {
                "{{name}}": _of("logged_value"),
                "{{name}} low": _of("band_low"),
                "{{name}} high": _of("band_high"),
                "{{name}} departures": _of("band_departures_total"),
            },
            minimum=None,
        ),
        lines("Gradient norm", "gradient_norm", log=True),
        lines("Learning rate", "learning_rate"),
        lines("Step time", "step_seconds", unit="s"),
    ]


def _masses() -> list[Json]:
    maps, plots, unit = [], [], "percentunit"
    for name, (title, scheme) in MASSES.items():
        text, expr = BY_NAME[name].help, _layered(name)
        depth = f"{text} The first layer is at the bottom."
        maps.append(panels.heatmap(f"{title} by depth", depth, expr, unit=unit, scheme=scheme))
        plots.append(panels.lines(title, text, {"layer {{layer}}": expr}, unit=unit, maximum=1))
    return maps + plots


def _layers() -> list[Json]:
    def each(title: str, metric: str, *, log: bool = True) -> Json:
        return panels.lines(title, BY_NAME[metric].help, {"layer {{layer}}": _layered(metric)}, minimum=None, log=log)

    by_depth = f"{BY_NAME['update_ratio'].help} Before a divergence it changes abruptly in single layers."
    return [
        panels.heatmap("Update ratio by depth", by_depth, _layered("update_ratio")),
        each("Update ratio", "update_ratio"),
        each("Update exponent", "update_exponent", log=False),
        each("Spectral radius (rho)", "spectral_radius"),
        each("Condition of the eigenvectors (kappa)", "eigenvector_condition_number"),
        each("Nonlinearity (eta)", "nonlinearity_ratio", log=False),
        panels.lines(
            "Reliable modes",
            "Fraction of modes with a ResDMD residual of at most 0.1, and the near-unit mass among them.",
            {
                "layer {{layer}} reliable": _layered("reliable_mode_ratio"),
                "layer {{layer}} near-unit among them": _layered("reliable_near_unit_mass"),
            },
            unit="percentunit",
            maximum=1,
        ),
    ]


def _agent() -> list[Json]:
    def lines(title: str, metric: str, legend: str, **settings: Any) -> Json:
        return panels.lines(title, BY_NAME[metric].help, {legend: _of(metric)}, **settings)

    overhead = {"unit": "percentunit", "steps": warn(MAX_OVERHEAD_RATIO)}
    rate = {"steps": f"rate({_of('step')}[1m])"}
    return [
        lines("Agent overhead", "agent_overhead_ratio", "overhead", **overhead),
        panels.lines(
            "Snapshots",
            "Snapshots a minute: received, and lost by reason. An agent counts its own shards, the monitor whole"
            " snapshots.",
            {
                "received": f"increase({_of('snapshots_received_total')}[1m])",
                "dropped: {{reason}}": f"sum by (reason) (increase({_of('snapshots_dropped_total')}[1m]))",
            },
        ),
        lines("Taps missing", "taps_missing", "taps missing", steps=warn(1)),
        panels.lines("Steps per second", "Optimizer steps per second, over a minute.", rate, unit="ops"),
        lines("Informative", "informative", "informative", maximum=1),
    ]
