"""Dashboard of one run: state, actions, and layer statistics by depth and over time."""

from __future__ import annotations

from typing import Any

from koopmon.telemetry.alerts import HIGH_FORECAST, MAX_OVERHEAD_RATIO, STALE_SECONDS
from koopmon.telemetry.metrics import BY_NAME
from manual.dashboards import panels
from manual.dashboards.layout import annotation, dashboard, label_variable, sized
from manual.dashboards.panels import GREEN, ORANGE, Json, warn

UID = "koopmon-run"
SELECTED = 'job=~"$job",run=~"$run"'
RUN = f"{{{SELECTED}}}"
SETTLED = f"koopmon_commands_settled_total{{{SELECTED}%s}}"
ACTS = "The policy acts at the lower dashed line, and at once at the upper one."
MASSES = {
    "near_unit_mass": ("Near-unit mass", "Greens"),
    "expansive_mass": ("Expansive mass", "Reds"),
    "contractive_mass": ("Contractive mass", "Blues"),
}


def make() -> Json:
    """Return the dashboard's JSON."""
    (risk, *actions), (loss, rate, *training) = _risk(), _training()
    return dashboard(
        UID,
        "koopmon / Run",
        "One run: risk, actions, and statistics of its layers by depth.",
        {
            "Now": sized(3, 4, *_now()),
            "Risk, loss and learning rate": sized(24, 7, risk, loss, rate),
            "Actions": sized(8, 8, *actions),
            "Training": sized(8, 8, *training),
            "Spectra by depth": sized(8, 9, *_masses()),
            "Layers": sized(12, 8, *_layers()),
            "Agent": sized(12, 8, *_agent()),
        },
        variables=[
            label_variable("run", "Run", 'koopmon_run_state{job=~"$job"}', "run", many=False),
            label_variable("layer", "Layer", f"koopmon_spectral_radius{RUN}", "layer"),
        ],
        links={"koopmon-fleet": "Fleet", "koopmon-monitor": "Monitors"},
        annotations=[
            _commands("Actions", ',kind!="set_cadence"', ORANGE),
            _commands("Cadence", ',kind="set_cadence"', panels.BLUE),
        ],
    )


def _commands(name: str, kinds: str, color: str) -> Json:
    """Return an annotation of commands with their outcomes; a mark is as wide as the range of its query."""
    expr = f"sum by (run, kind, outcome) (changes({SETTLED % kinds}[$__interval])) > 0"
    return annotation(name, expr, "{{kind}} {{outcome}}", color)


def _of(metric: str) -> str:
    return f"koopmon_{metric}{RUN}"


def _increase(metric: str) -> str:
    return f"increase({_of(metric)}[$__rate_interval])"


def _layered(metric: str) -> str:
    return f'koopmon_{metric}{{{SELECTED},layer=~"$layer"}}'


def _now() -> list[Json]:
    def now(title: str, metric: str, **settings: Any) -> Json:
        return panels.stat(title, BY_NAME[metric].help, _of(metric), **settings)

    age = f"time() - {_of('last_snapshot_timestamp_seconds')}"
    return [
        panels.stat("State", "State of the run.", panels.state_of(SELECTED), "{{run}}", mappings=panels.RUN_STATES),
        now("Step", "step", decimals=0),
        now("Risk now", "risk", steps=panels.RISK_STEPS, decimals=2),
        now("Forecast now", "forecast", steps=warn(HIGH_FORECAST), decimals=2),
        now("Loss now", "loss", decimals=3),
        now("Near-unit mass at the start", "initial_near_unit_mass", unit="percentunit", decimals=0),
        now("Learning-rate scale", "lr_scale", unit="percentunit", steps=((None, ORANGE), (1, GREEN))),
        panels.stat("Last snapshot", "Age of the last snapshot.", age, unit="s", steps=warn(STALE_SECONDS)),
    ]


def _risk() -> list[Json]:
    return [
        panels.lines(
            "Risk",
            f"The risk leads to actions, the forecast only to alerts. The probability needs a calibrator. {ACTS}",
            {
                "risk": _of("risk"),
                "forecast": _of("forecast"),
                "{{level}}": _of("risk_threshold"),
                "probability": _of("divergence_probability"),
            },
            unit="percentunit",
            steps=panels.RISK_STEPS,
            maximum=1,
        ),
        panels.lines(
            "Settings in force",
            "LR scale: factor on the learning rate; on the right axis the weight of KSS as published, "
            "and the number of layers under ceilings.",
            {
                "learning-rate scale": _of("lr_scale"),
                "KSS alpha": _of("kss_alpha"),
                "held layers": _of("kss_held_layers"),
            },
            right="KSS alpha|held layers",
        ),
        panels.lines(
            "Commands",
            "Commands a minute, by kind and outcome.",
            {
                "{{kind}} {{outcome}}": f"sum by (kind, outcome) (increase({SETTLED % ''}[$__rate_interval]))",
                "{{kind}} issued": f"sum by (kind) (increase({_of('commands_issued_total')}[$__rate_interval]))",
            },
            bars=True,
        ),
        panels.lines(
            "Alarms and effect",
            "Snapshots a minute with a risk of at least act_risk, and checks of the last action by its effect.",
            {
                "high risk": f"increase({_of('risk_alarms_total')}[$__rate_interval])",
                "action: {{outcome}}": f"increase({_of('effect_checks_total')}[$__rate_interval])",
            },
        ),
    ]


def _training() -> list[Json]:
    def lines(title: str, metric: str, **settings: Any) -> Json:
        return panels.lines(title, BY_NAME[metric].help, {title[0].lower() + title[1:]: _of(metric)}, **settings)

    return [
        panels.lines(
            "Loss",
            f"{BY_NAME['loss'].help} The band is that of the run's own history.",
            {"loss": _of("loss"), "upper limit of its band": f'koopmon_band_high{{{SELECTED},name="loss"}}'},
            minimum=None,
        ),
        panels.lines(
            "Learning rate",
            BY_NAME["learning_rate"].help,
            {"scheduled": _of("learning_rate"), "in force": f"{_of('learning_rate')} * {_of('lr_scale')}"},
        ),
        panels.lines(
            "Logged scalars",
            "Values that the script logs, with their bands, and the number of times that a scalar left its band.",
            {
                "{{name}}": _of("logged_value"),
                "{{name}} low": _of("band_low"),
                "{{name}} high": _of("band_high"),
                "{{name}} departures": _increase("band_departures_total"),
            },
            minimum=None,
        ),
        lines("Gradient norm", "gradient_norm", log=True),
        lines("Step time", "step_seconds", unit="s"),
        lines("Update RMS", "update_rms_ratio", log=True),
        lines("Log-partition", "log_partition_nats", minimum=None),
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
        each("Stream RMS", "stream_rms"),
        panels.lines(
            "Largest attention logit",
            "Largest log(sum(exp(logits))) over queries, at most log(keys) above the largest logit.",
            {"layer {{layer}}": _layered("observable_max_attention_logit")},
            minimum=None,
            log=True,
        ),
    ]


def _agent() -> list[Json]:
    def lines(title: str, metric: str, legend: str, **settings: Any) -> Json:
        return panels.lines(title, BY_NAME[metric].help, {legend: _of(metric)}, **settings)

    overhead = {"unit": "percentunit", "steps": warn(MAX_OVERHEAD_RATIO)}
    rate = {"steps": f"rate({_of('step')}[$__rate_interval])"}
    return [
        lines("Agent overhead", "agent_overhead_ratio", "overhead", **overhead),
        panels.lines(
            "Snapshots",
            "Snapshots a minute: received, and lost by reason. An agent counts its own shards, the monitor whole"
            " snapshots.",
            {
                "received": f"increase({_of('snapshots_received_total')}[$__rate_interval])",
                "lost by the monitor: {{reason}}": f"sum by (reason) ({_increase('snapshots_dropped_total')})",
                "not sent by agents: {{reason}}": f"sum by (reason) ({_increase('agent_snapshots_dropped_total')})",
            },
        ),
        panels.lines(
            "Taps missing",
            BY_NAME["taps_missing"].help,
            {"taps missing": f"increase({_of('taps_missing_total')}[$__rate_interval])"},
            steps=warn(1),
            unit="short",
        ),
        panels.lines(
            "Control",
            "Does the monitor act on the run? Watch-only: the policy would act, and no command is sent.",
            {"acting": _of("acting"), "watch-only": _of("watch_only"), "ranks connected": _of("ranks")},
            right="ranks connected",
        ),
        panels.lines("Steps per second", "Optimizer steps per second, over a minute.", rate, unit="ops"),
        lines("Informative", "informative", "informative", maximum=1),
    ]
