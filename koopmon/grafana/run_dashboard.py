"""Dashboard of one run: state, actions, and layer statistics by depth and over time."""

from __future__ import annotations

from koopmon.grafana.layout import annotation, dashboard, datasource_variable, label_variable, link
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
    query,
    stat,
)
from koopmon.telemetry.alerts import ACT_RISK, HIGH_FORECAST, LIKELY, MAX_OVERHEAD_RATIO, SEVERE_RISK, STALE_SECONDS

UID = "koopmon-run"
RUN = '{run=~"$run"}'
LAYER = '{run=~"$run",layer=~"$layer"}'


def make() -> Json:
    """Return the dashboard's JSON."""
    return dashboard(
        UID,
        "koopmon / Run",
        "One run: its risk, what was done about it, and what its layers say by depth.",
        {
            "Now": [(each, 3, 4) for each in _now()],
            "Risk and actions": [(each, 12, 9) for each in _risk()],
            "Spectra by depth": [(each, 8, 9) for each in _masses()],
            "Layers": [(each, 12, 8) for each in _layers()],
            "Agent": [(each, 12, 8) for each in _agent()],
        },
        variables=[
            datasource_variable(),
            label_variable("run", "Run", "koopmon_run_state", "run", many=False),
            label_variable("layer", "Layer", 'koopmon_spectral_radius{run=~"$run"}', "layer"),
        ],
        links=[link("koopmon-fleet", "Fleet"), link("koopmon-monitor", "Monitors")],
        annotations=_commands(),
    )


def _commands() -> list[Json]:
    """Return annotations of all commands with their outcomes; a mark is as wide as the range of its query."""

    def changed(name: str, kinds: str, color: str) -> Json:
        changes = f'changes(koopmon_commands_total{{run=~"$run",{kinds},outcome!="sent"}}[1m])'
        return annotation(name, f"sum by (run, kind, outcome) ({changes}) > 0", "{{kind}} {{outcome}}", color)

    return [
        changed("Actions", 'kind!="set_cadence"', ORANGE),
        changed("Cadence", 'kind="set_cadence"', BLUE),
    ]


def _now() -> list[Json]:
    def now(metric: str) -> list[Json]:
        return [query(f"{metric}{RUN}", instant=True)]

    return [
        stat("State", "Running, ended or vanished.", now("koopmon_run_state"), mappings=RUN_STATES),
        stat("Step", "Last optimizer step heard of.", now("koopmon_step"), decimals=0),
        stat(
            "Risk now",
            f"Online risk of divergence; the policy acts at {ACT_RISK:g}, at once at {SEVERE_RISK:g}.",
            now("koopmon_risk"),
            steps=RISK_STEPS,
            decimals=2,
        ),
        stat(
            "Forecast now",
            "What is known beforehand, with the loss or the spectrum since; it only warns.",
            now("koopmon_forecast"),
            steps=((None, GREEN), (HIGH_FORECAST, ORANGE)),
            decimals=2,
        ),
        stat(
            "Probability",
            "Calibrated probability of divergence at this run's highest learning rate; empty without a calibrator.",
            now("koopmon_divergence_probability"),
            unit="percentunit",
            steps=((None, GREEN), (LIKELY, ORANGE)),
            decimals=0,
        ),
        stat(
            "Initial score",
            "Mean near-unit mass of the first informative snapshot.",
            now("koopmon_initial_risk"),
            decimals=2,
        ),
        stat(
            "Learning-rate scale",
            "The factor on the run's own schedule that is in force.",
            now("koopmon_lr_scale"),
            unit="percentunit",
            steps=((None, ORANGE), (1, GREEN)),
        ),
        stat(
            "Last snapshot",
            "How long ago the last snapshot came.",
            [query(f"time() - koopmon_last_snapshot_timestamp_seconds{RUN}", instant=True)],
            unit="s",
            steps=((None, GREEN), (STALE_SECONDS, ORANGE)),
        ),
    ]


def _risk() -> list[Json]:
    answered = 'koopmon_commands_total{run=~"$run",outcome!="sent"}'
    return [
        lines(
            "Risk",
            "The risk acts, the forecast warns; the probability needs a calibrator. The dashed lines are where the"
            " policy acts, and where it acts at once.",
            [
                query(f"koopmon_risk{RUN}", "risk"),
                query(f"koopmon_forecast{RUN}", "forecast"),
                query(f"koopmon_divergence_probability{RUN}", "probability"),
            ],
            unit="percentunit",
            steps=RISK_STEPS,
            minimum=0,
            maximum=1,
        ),
        lines(
            "What is in force",
            "The factor on the learning rate, and the weight of Koopman Spectral Shaping on the right.",
            [query(f"koopmon_lr_scale{RUN}", "learning-rate scale"), query(f"koopmon_kss_alpha{RUN}", "KSS alpha")],
            minimum=0,
            right="KSS alpha",
        ),
        lines(
            "Commands",
            "Commands in each minute, by kind and by what became of them.",
            [query(f"sum by (kind, outcome) (increase({answered}[1m])) > 0", "{{kind}} {{outcome}}")],
            bars=True,
            minimum=0,
        ),
        lines(
            "Alarms and effect",
            "Snapshots in each minute with a risk to act on, and checks of the last action: whether the risk fell"
            " after its time.",
            [
                query(f"increase(koopmon_risk_alarms_total{RUN}[1m])", "high risk"),
                query(f"increase(koopmon_effect_checks_total{RUN}[1m])", "action: {{outcome}}"),
            ],
            minimum=0,
        ),
    ]


def _masses() -> list[Json]:
    masses = (
        ("near_unit_mass", "Near-unit mass", "with modulus in [0.90, 1.05]: what neither grows nor fades", "Greens"),
        ("expansive_mass", "Expansive mass", "with modulus above 1.05: what grows from layer to layer", "Reds"),
        ("contractive_mass", "Contractive mass", "with modulus below 0.80: what fades from layer to layer", "Blues"),
    )
    maps = [
        heatmap(
            f"{title} by depth",
            f"Fraction of a layer's eigenvalues {what}. The first layer is at the bottom.",
            by_depth(f"koopmon_{name}{LAYER}"),
            unit="percentunit",
            scheme=scheme,
        )
        for name, title, what, scheme in masses
    ]
    plots = [
        lines(
            title,
            f"Fraction of a layer's eigenvalues {what}.",
            [query(by_depth(f"koopmon_{name}{LAYER}"), "layer {{layer}}")],
            unit="percentunit",
            minimum=0,
            maximum=1,
        )
        for name, title, what, _ in masses
    ]
    return maps + plots


def _layers() -> list[Json]:
    def each(name: str, title: str, text: str, *, log: bool = False) -> Json:
        return lines(title, text, [query(by_depth(f"koopmon_{name}{LAYER}"), "layer {{layer}}")], log=log)

    return [
        heatmap(
            "Update ratio by depth",
            "Size of each layer's update relative to its input. Before a divergence single layers lurch.",
            by_depth(f"koopmon_update_ratio{LAYER}"),
        ),
        each("update_ratio", "Update ratio", "Size of the layer's update relative to its input.", log=True),
        each(
            "update_exponent",
            "Update exponent",
            "k of |update| ~ |state|^k over tokens: 0 behind a normalisation, 1 without a brake.",
        ),
        each("spectral_radius", "Spectral radius (rho)", "Largest modulus of the layer's eigenvalues.", log=True),
        each(
            "eigenvector_condition_number",
            "Condition of the eigenvectors (kappa)",
            "Of the unit-norm right eigenvectors: how far the map is from normal.",
            log=True,
        ),
        each(
            "nonlinearity_ratio",
            "Nonlinearity (eta)",
            "Residual of the linear fit relative to the layer's update: what the spectrum cannot say.",
        ),
        lines(
            "Reliable modes",
            "Fraction of modes with a small residual, and the near-unit mass among them.",
            [
                query(by_depth(f"koopmon_reliable_mode_ratio{LAYER}"), "layer {{layer}} reliable"),
                query(by_depth(f"koopmon_reliable_near_unit_mass{LAYER}"), "layer {{layer}} near-unit among them"),
            ],
            unit="percentunit",
            minimum=0,
            maximum=1,
        ),
    ]


def _agent() -> list[Json]:
    dropped = f"sum by (reason) (increase(koopmon_snapshots_dropped_total{RUN}[1m]))"
    return [
        lines(
            "Agent overhead",
            "Largest share of step time that a rank spends in koopmon's hooks; the long-run budget is 0.5%.",
            [query(f"koopmon_agent_overhead_ratio{RUN}", "overhead")],
            unit="percentunit",
            steps=((None, GREEN), (MAX_OVERHEAD_RATIO, ORANGE)),
            minimum=0,
        ),
        lines(
            "Snapshots",
            "Snapshots in each minute: those that arrived, and those that were lost, by reason. An agent counts its own"
            " shards, the monitor whole snapshots.",
            [
                query(f"increase(koopmon_snapshots_received_total{RUN}[1m])", "received"),
                query(dropped, "dropped: {{reason}}"),
            ],
            minimum=0,
        ),
        lines(
            "Taps missing",
            "Snapshots in which a tap did not fire, summed over ranks.",
            [query(f"koopmon_taps_missing{RUN}", "taps missing")],
            steps=((None, GREEN), (1, ORANGE)),
            minimum=0,
        ),
        lines(
            "Steps per second",
            "Optimizer steps a second, over a minute.",
            [query(f"rate(koopmon_step{RUN}[1m])", "steps")],
            unit="ops",
            minimum=0,
        ),
        lines(
            "Informative",
            "1 where the last profile says something, 0 where not.",
            [query(f"koopmon_informative{RUN}", "informative")],
            minimum=0,
            maximum=1,
        ),
    ]
