"""Dashboard of one run: state, actions, and layer statistics by depth and over time."""

from __future__ import annotations

from koopmon.grafana.layout import annotation, dashboard, datasource_variable, label_variable, link, sized
from koopmon.grafana.panels import (
    BLUE,
    GREEN,
    ORANGE,
    RISK_STEPS,
    RUN_STATES,
    Json,
    by_depth,
    heatmap,
    lines,
    stat,
    warn,
)
from koopmon.telemetry.alerts import ACT_RISK, HIGH_FORECAST, LIKELY, MAX_OVERHEAD_RATIO, SEVERE_RISK, STALE_SECONDS

UID = "koopmon-run"
RUN = '{run=~"$run"}'
SETTLED = 'koopmon_commands_total{run=~"$run",%soutcome!="sent"}'
MASSES = (
    ("near_unit_mass", "Near-unit mass", "with modulus in [0.90, 1.05]: what neither grows nor fades", "Greens"),
    ("expansive_mass", "Expansive mass", "with modulus above 1.05: what grows from layer to layer", "Reds"),
    ("contractive_mass", "Contractive mass", "with modulus below 0.80: what fades from layer to layer", "Blues"),
)


def make() -> Json:
    """Return the dashboard's JSON."""
    return dashboard(
        UID,
        "koopmon / Run",
        "One run: its risk, what was done about it, and what its layers say by depth.",
        {
            "Now": sized(3, 4, *_now()),
            "Risk and actions": sized(12, 9, *_risk()),
            "Spectra by depth": sized(8, 9, *_masses()),
            "Layers": sized(12, 8, *_layers()),
            "Agent": sized(12, 8, *_agent()),
        },
        variables=[
            datasource_variable(),
            label_variable("run", "Run", "koopmon_run_state", "run", many=False),
            label_variable("layer", "Layer", 'koopmon_spectral_radius{run=~"$run"}', "layer"),
        ],
        links=[link("koopmon-fleet", "Fleet"), link("koopmon-monitor", "Monitors")],
        annotations=[
            _commands("Actions", 'kind!="set_cadence",', ORANGE),
            _commands("Cadence", 'kind="set_cadence",', BLUE),
        ],
    )


def _commands(name: str, kinds: str, color: str) -> Json:
    """Return an annotation of commands with their outcomes; a mark is as wide as the range of its query."""
    expr = f"sum by (run, kind, outcome) (changes({SETTLED % kinds}[1m])) > 0"
    return annotation(name, expr, "{{kind}} {{outcome}}", color)


def _of(metric: str) -> str:
    return f"koopmon_{metric}{RUN}"


def _layered(metric: str) -> str:
    return by_depth(f'koopmon_{metric}{{run=~"$run",layer=~"$layer"}}')


def _now() -> list[Json]:
    snapshot_age = f"time() - {_of('last_snapshot_timestamp_seconds')}"
    return [
        stat("State", "Running, ended or vanished.", _of("run_state"), mappings=RUN_STATES),
        stat("Step", "Last optimizer step heard of.", _of("step"), decimals=0),
        stat(
            "Risk now",
            f"Online risk of divergence; the policy acts at {ACT_RISK:g}, at once at {SEVERE_RISK:g}.",
            _of("risk"),
            steps=RISK_STEPS,
            decimals=2,
        ),
        stat(
            "Forecast now",
            "What is known beforehand, with the loss or the spectrum since; it only warns.",
            _of("forecast"),
            steps=warn(HIGH_FORECAST),
            decimals=2,
        ),
        stat(
            "Probability",
            "Calibrated probability of divergence at this run's highest learning rate; empty without a calibrator.",
            _of("divergence_probability"),
            unit="percentunit",
            steps=warn(LIKELY),
            decimals=0,
        ),
        stat(
            "Initial score", "Mean near-unit mass of the first informative snapshot.", _of("initial_risk"), decimals=2
        ),
        stat(
            "Learning-rate scale",
            "The factor on the run's own schedule that is in force.",
            _of("lr_scale"),
            unit="percentunit",
            steps=((None, ORANGE), (1, GREEN)),
        ),
        stat(
            "Last snapshot", "How long ago the last snapshot came.", snapshot_age, unit="s", steps=warn(STALE_SECONDS)
        ),
    ]


def _risk() -> list[Json]:
    return [
        lines(
            "Risk",
            "The risk acts, the forecast warns; the probability needs a calibrator. The dashed lines are where the"
            " policy acts, and where it acts at once.",
            {"risk": _of("risk"), "forecast": _of("forecast"), "probability": _of("divergence_probability")},
            unit="percentunit",
            steps=RISK_STEPS,
            maximum=1,
        ),
        lines(
            "What is in force",
            "The factor on the learning rate, and the weight of Koopman Spectral Shaping on the right.",
            {"learning-rate scale": _of("lr_scale"), "KSS alpha": _of("kss_alpha")},
            right="KSS alpha",
        ),
        lines(
            "Commands",
            "Commands in each minute, by kind and by what became of them.",
            {"{{kind}} {{outcome}}": f"sum by (kind, outcome) (increase({SETTLED % ''}[1m])) > 0"},
            bars=True,
        ),
        lines(
            "Alarms and effect",
            "Snapshots in each minute with a risk to act on, and checks of the last action: whether the risk fell"
            " after its time.",
            {
                "high risk": f"increase({_of('risk_alarms_total')}[1m])",
                "action: {{outcome}}": f"increase({_of('effect_checks_total')}[1m])",
            },
        ),
    ]


def _masses() -> list[Json]:
    depth = "Fraction of a layer's eigenvalues {}. The first layer is at the bottom."
    maps = [
        heatmap(f"{title} by depth", depth.format(what), _layered(name), unit="percentunit", scheme=scheme)
        for name, title, what, scheme in MASSES
    ]
    plots = [
        lines(
            title,
            f"Fraction of a layer's eigenvalues {what}.",
            {"layer {{layer}}": _layered(name)},
            unit="percentunit",
            maximum=1,
        )
        for name, title, what, _ in MASSES
    ]
    return maps + plots


def _layers() -> list[Json]:
    def each(name: str, title: str, text: str, *, log: bool = True) -> Json:
        return lines(title, text, {"layer {{layer}}": _layered(name)}, minimum=None, log=log)

    return [
        heatmap(
            "Update ratio by depth",
            "Size of each layer's update relative to its input. Before a divergence single layers lurch.",
            _layered("update_ratio"),
        ),
        each("update_ratio", "Update ratio", "Size of the layer's update relative to its input."),
        each(
            "update_exponent",
            "Update exponent",
            "k of |update| ~ |state|^k over tokens: 0 behind a normalisation, 1 without a brake.",
            log=False,
        ),
        each("spectral_radius", "Spectral radius (rho)", "Largest modulus of the layer's eigenvalues."),
        each(
            "eigenvector_condition_number",
            "Condition of the eigenvectors (kappa)",
            "Of the unit-norm right eigenvectors: how far the map is from normal.",
        ),
        each(
            "nonlinearity_ratio",
            "Nonlinearity (eta)",
            "Residual of the linear fit relative to the layer's update: what the spectrum cannot say.",
            log=False,
        ),
        lines(
            "Reliable modes",
            "Fraction of modes with a small residual, and the near-unit mass among them.",
            {
                "layer {{layer}} reliable": _layered("reliable_mode_ratio"),
                "layer {{layer}} near-unit among them": _layered("reliable_near_unit_mass"),
            },
            unit="percentunit",
            maximum=1,
        ),
    ]


def _agent() -> list[Json]:
    return [
        lines(
            "Agent overhead",
            "Largest share of step time that a rank spends in koopmon's hooks; the long-run budget is 0.5%.",
            {"overhead": _of("agent_overhead_ratio")},
            unit="percentunit",
            steps=warn(MAX_OVERHEAD_RATIO),
        ),
        lines(
            "Snapshots",
            "Snapshots in each minute: those that arrived, and those that were lost, by reason. An agent counts its own"
            " shards, the monitor whole snapshots.",
            {
                "received": f"increase({_of('snapshots_received_total')}[1m])",
                "dropped: {{reason}}": f"sum by (reason) (increase({_of('snapshots_dropped_total')}[1m]))",
            },
        ),
        lines(
            "Taps missing",
            "Snapshots in which a tap did not fire, summed over ranks.",
            {"taps missing": _of("taps_missing")},
            steps=warn(1),
        ),
        lines(
            "Steps per second",
            "Optimizer steps a second, over a minute.",
            {"steps": f"rate({_of('step')}[1m])"},
            unit="ops",
        ),
        lines(
            "Informative",
            "1 where the last profile says something, 0 where not.",
            {"informative": _of("informative")},
            maximum=1,
        ),
    ]
