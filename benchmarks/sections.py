"""Writers of the result sections of the pages, as lines of Markdown: one for each file in results/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.fault_campaign.table import failures
from benchmarks.markdown import paragraph, table
from benchmarks.proving_ground.page import NAMES
from koopmon.offline.calibration_examples import MAX_LOSS

Document = Mapping[str, Any]


def unchanged_script(told: Document) -> list[str]:
    """Write the rates that diverge, by policy, then the healthy runs and the slowest commands."""
    others = told["settings"]["policies"]
    heading = [
        "learning rate",
        f"unguarded diverges at step ({len(told['settings']['seeds'])} seeds)",
        "saved, default policy",
    ]
    heading += [f"saved, policy `{name}`" for name in others]
    rows = []
    for lr, group in groupby(sorted(told["rows"], key=lambda row: row["lr"]), key=lambda row: row["lr"]):
        runs = list(group)
        first = [run for run in runs if not run["policy"]]
        saved = [
            f"{sum(run['saved'] for run in mine)} of {len(mine)}"
            for mine in ([run for run in runs if run["policy"] == name] for name in ("", *others))
        ]
        losses = ", ".join(f"{run['final_loss'] / run['best_fixed']:.2f}" for run in first if run["final_loss"])
        rows.append([f"{lr:g}", ", ".join(str(run["died_at"] or "-") for run in first), *saved, losses])
    lost = [run for run in told["rows"] if not run["saved"]]
    total, healthy = told["totals"], told["totals"]["healthy_runs"]
    waits = sorted(run["max_latency_steps"] for run in told["results"].values() if run["max_latency_steps"] is not None)
    identical = "all of them ended" if total["identical_when_left_alone"] else "not all of them ended"
    missed = [
        f"Policy `{run['policy'] or 'default'}` did not save one run at {run['lr']:g}: {run['why']}." for run in lost
    ]
    prose = [
        *missed,
        f"At the safe rate {told['settings']['safe_lr']:g} the default policy acted on {total['acted_no_norm']} of",
        f"{healthy} runs of that model and on {total['acted_pre_ln']} of {healthy} with Pre-LN, and {identical} with",
        "bit-identical parameters. The slowest command of a run was in force",
        f"{waits[len(waits) // 2]} steps after its snapshot in the median run,",
        f"{waits[-1]} steps in the worst.",
    ]
    return [*table([*heading, "loss at the end / best fixed rate, default"], rows), "", *paragraph(prose)]


def norm_table(told: Document) -> list[str]:
    rows = []
    for row in told["rows"]:
        paper, mean = row["reference"]["paper"], row["mean"]
        fields = ("near_unit_mass", "expansive_mass", "spectral_radius")
        label = row["reference"]["label"] + ("" if row["num_informative"] else " (not informative)")
        cells = [f"{mean[field]:.2f}" for field in fields]
        rows.append([label, *cells, ", ".join(f"{value:.2f}" for value in paper) if paper else "-"])
    heading = ["residual scheme", "near-unit mass", "expansive mass", "radius", "paper: near-unit, expansive, radius"]
    return table(heading, rows)


def spectral_speed(told: Document) -> list[str]:
    settings, took, ratios = told["settings"], told["seconds_per_12_layers"], told["ratios"]
    cores = f"{settings['threads']} {'core' if settings['threads'] == 1 else 'cores'}"
    full = ratios["ours_full"]
    return paragraph(
        [
            f"Whole profiles of {settings['num_layers']} transitions at D {settings['width']}, N",
            f"{settings['num_samples']}, svd_rank {settings['svd_rank']} take {took['ours']['wall_median']:.2f} s on",
            f"{cores}; PyDMD's `fit(x, y).eigs` takes {ratios['ours']['cpu']:.0f} times as much CPU, its inner",
            "operator alone",
            f"{ratios['ours']['cpu_against_operator']:.0f} times. At full rank the two take {full['cpu']:.1f} and",
            f"{full['cpu_against_operator']:.1f} times as much as koopmon.",
        ]
    )


def spectral_floor(told: Document) -> list[str]:
    """Write the rows of all widths, and the goals."""
    settings, rows, goals = told["settings"], told["rows"], told["goals"]
    near, rising = goals["floor"], goals["monotone"]["holds"]
    cells = [
        [title, *(format(row[key], digits) for row in rows)]
        for title, key, digits in (
            ("CPU ms per layer", "cpu_ms_per_layer", ".1f"),
            ("times the floor", "ratio", ".2f"),
            ("times the spectrum alone", "ratio_to_the_spectrum_alone", ".2f"),
            ("error of the update ratio", "largest_error_of_the_update_ratio", ".0e"),
        )
    ]
    prose = [
        f"At N {settings['num_samples']}, svd_rank {settings['svd_rank']} and L {settings['num_layers']}, the goal of",
        f"at most {near['at_most']:g} times the floor {'holds' if near['holds'] else 'is missed'} (at most",
        f"{near['worst']:.2f}), and the time {'rises' if rising else 'does not rise everywhere'} with D:",
    ]
    return [*paragraph(prose), "", *table(["D", *(str(row["width"]) for row in rows)], cells)]


def agent_overhead(told: Document) -> list[str]:
    settings = told["settings"]
    at = {"nice": "at nice 19", "idle": "at idle priority"}[settings["monitor"]]
    ranks = "1 rank trains" if settings["ranks"] == 1 else f"{settings['ranks']} ranks train"
    when = {"start": "At first, while the credit for snapshots lasts", "long": "In the long run"}

    def of(found: Mapping[str, float]) -> str:
        return f"{found['ratio']:.3f} times (95%: {found['low']:.3f} to {found['high']:.3f})"

    where = f"on the {settings['device'].upper()}, with the monitor {at}"
    where += "" if settings.get("copies", True) else " and without copies for a rewind"
    lines = [f"{ranks} a model of D {settings['d']} and L {settings['layers']} {where}."]
    for stage, found in told["stages"].items():
        wall, cpu = found["wall"], found["cpu"]
        lines.append(f"{when[stage]}, the mean step takes {of(wall['mean_step'])} as long as {told['against']}, and")
        lines.append(f"{of(cpu['mean_step'])} its CPU time. A snapshot step takes {of(wall['snapshot_step'])} as long.")
    return paragraph(lines)


def ceilings_cost(told: Document) -> list[str]:
    heading = ["width", "held layers", "CPU time of a step (ms)", "added by ceilings (us)", "ratio"]
    rows = [
        [
            str(row["width"]),
            str(row["layers"]),
            f"{row['step_ms']:.1f}",
            f"{row['added_us']:.0f}",
            f"{row['ratio']:.3f}",
        ]
        for row in told["rows"]
    ]
    return table(heading, rows)


def norms(told: Document) -> list[str]:
    """Write every score at the start, in both settings."""
    settings = told["auroc"]
    names = list(dict.fromkeys(name for areas in settings.values() for name in areas))
    sweep = settings[list(settings)[-1]]
    names.sort(key=lambda name: -(sweep[name]["value"] if sweep.get(name) else 0.0))
    rows = [[name, *(_interval(areas.get(name)) for areas in settings.values())] for name in names]
    by_size, by_scheme = (told[f"calibration_error_{kind}_held_out"] for kind in ("size", "scheme"))
    prose = [
        f"{told['num_runs']} runs, {told['num_diverged']} diverged. The expected calibration error of the calibrated",
        f"score is {by_size:.3f} with sizes held out, {by_scheme:.3f} with schemes held out.",
    ]
    return [
        *table(["score at the start", *(f"AUROC, {title} [95%]" for title in settings)], rows),
        "",
        *paragraph(prose),
    ]


def early_warning(told: Document) -> list[str]:
    """Write all detectors on all recordings, at the same rate of false alarms."""
    return _verdicts(told["tables"]["all"])


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            row["name"],
            _interval({**row, "value": row["auroc"]}) if row["auroc"] is not None else "-",
            f"{row['warned']} of {row['died']}",
            f"{row['median_lead']:.0f}",
            f"{row['median_share']:.0%}",
            f"{row['false_alarms']:.2f}",
        ]
        for row in verdicts
    ]
    heading = ["detector", "AUROC [95%]", "warned", "median lead, steps", "of the run's life", "false alarms / 1,000"]
    return table(heading, rows)


def fresh(told: Document) -> list[str]:
    """Write the score at the start by groups of runs, then every detector at thresholds from other runs."""
    scores = list(told["start"]["all"]["auroc"])
    rows = [
        [
            name,
            f"{row['num_diverged']} of {row['num_runs']}",
            *(_interval(row["auroc"][score]) for score in scores),
            f"{row['calibration_error']:.3f}",
        ]
        for name, row in told["start"].items()
    ]
    heading = ["runs", "diverged", *(f"{score}, AUROC [95%]" for score in scores), "calibration error"]
    return [*table(heading, rows), "", *_verdicts(told["warnings"])]


def kss(told: Document) -> list[str]:
    """Write the main settings with intervals, then the preliminary search."""
    quoted = [
        [
            row["setting"],
            f"{row['lr']:g}",
            f"{row['diverged']:.0%} [{row['low']:.0%}, {row['high']:.0%}]",
            _decimal(row["accuracy"]),
            _decimal(row["final_loss"]),
            "-" if row["step_ratio"] is None else f"{row['step_ratio']:.1f}",
        ]
        for row in told["cells"]
    ]
    heading = ["setting", "learning rate", "diverged [95%]", "accuracy", "loss at the end", "time of a step"]
    looked = []
    for name in dict.fromkeys(row["setting"] for row in told["look"]):
        mine = [row for row in told["look"] if row["setting"] == name]
        looked.append([name, *(f"{row['lr']:g}: {row['diverged']:.0%}, {_decimal(row['accuracy'])}" for row in mine)])
    return [
        *table(heading, quoted),
        "",
        f"Each row has {told['cells'][0]['num_runs']} runs. The next table is the preliminary search with",
        f"{told['look'][0]['num_runs']} runs each: the share of diverged runs, and the accuracy of the others.",
        "",
        *table(["setting", "at a lower rate", "at a higher rate"], looked),
    ]


def guarded(told: Document) -> list[str]:
    """Write each control over the rates that diverge, then the healthy runs."""
    plan, healthy = told["plan"], told["healthy"]
    rows = [
        [
            row["control"],
            f"{row['diverged']:.0%} [{row['low']:.0%}, {row['high']:.0%}]",
            *row["by_rate"],
            _decimal(row["accuracy"]),
            f"{row['actions']:.1f}",
        ]
        for row in told["rows"]
    ]
    heading = ["control", "diverged [95%]", *(f"{lr:g}" for lr in plan["rates"]), "accuracy", "actions"]
    replicas = "equal" if told["replicas_equal"] else "not always equal"
    prose = [
        f"The columns by learning rate count diverged runs. Each row has {told['rows'][0]['num_runs']} runs. The best",
        f"fixed rate ends at accuracy {told['best_fixed_accuracy']:.2f}. Of {healthy['num_runs']} healthy runs the",
        f"default policy acted on {healthy['acted_on']}; {healthy['identical']} ended bit-identical to the run without",
        f"koopmon, and the loss at the end was at most {healthy['worst_loss_ratio'] - 1:+.1%} of it.",
        f"Replicas were {replicas}.",
    ]
    return [*table(heading, rows), "", *paragraph(prose)]


def architectures(told: Document) -> list[str]:
    """Write the families' spectra at the start, and their trainings with and without KSS."""
    shown = {
        "near_unit_mass": "near-unit mass",
        "contractive_mass": "contractive mass",
        "spectral_radius": "radius",
        "nonlinearity_ratio": "eta",
        "reliable_mode_ratio": "reliable modes",
    }
    rows = []
    for row in told["spectra"]:
        mean, paper = row["mean"], row["paper"]
        cells = [f"{mean[name]:.2f}" + (f" ({paper[name]:.2f})" if name in paper else "") for name in shown]
        rows.append([row["label"], f"`{row['adapter']}`", *cells])
    rates = sorted({row["lr"] for row in told["trained"]})
    by_place = {(row["family"], row["setting"], row["lr"]): row for row in told["trained"]}
    trained = []
    for family, setting in dict.fromkeys((row["family"], row["setting"]) for row in told["trained"]):
        mine = [by_place[family, setting, lr] for lr in rates]
        ends = [f"{row['num_diverged']} of {row['num_runs']}, {_decimal(row['final_loss'])}" for row in mine]
        trained.append([family, setting, *ends])
    return [
        *table(["family (paper in brackets)", "adapter", *shown.values()], rows),
        "",
        "The next table has the trainings: the number of diverged runs, and the final loss of the others.",
        "",
        *table(["family", "KSS", *(f"{lr:g}" for lr in rates)], trained),
    ]


def family_alarms(told: Document) -> list[str]:
    """Write the warnings and false alarms of each family, with and without normalisation."""
    rows = []
    for row in told["rows"]:
        alarms, steps = row["false_alarms"], row["healthy_steps"]
        at = ", ".join(f"{count} at {lr}" for lr, count in row["alarms_by_rate"].items() if count)
        rows.append(
            [
                f"{row['family']}, {'Pre-LN' if row['norm'] == 'pre' else 'No-Norm'}",
                _decimal(row["update_exponent"]),
                f"{row['num_diverged']} of {row['num_runs']}",
                f"{row['num_warned']} of {row['num_diverged']}" if row["num_diverged"] else "-",
                "-" if row["median_lead"] is None else f"{row['median_lead']:g}",
                f"{1000 * alarms / steps:.1f}{f' ({at})' if at else ''}" if steps else "-",
            ]
        )
    heading = [
        "family",
        "update exponent",
        "diverged",
        "alarm before",
        "median lead, steps",
        "false alarms / 1,000 steps",
    ]
    return table(heading, rows)


def brake(told: Document) -> list[str]:
    """Write the exponent measured from states for each scheme of each family, and the accuracy of both methods."""
    rows = [
        [
            f"{row['family']}, {row['norm']}",
            f"{row['lowest']:.2f} to {row['highest']:.2f}",
            *(f"{row[name]} of {row['num_models']}" for name in ("right_by_states", "right")),
        ]
        for row in told["rows"]
    ]
    return table(["family, scheme", "measured update exponent", "right from states alone", "right in koopmon"], rows)


def guarded_families(told: Document) -> list[str]:
    """Write each family under each control at the rates that diverge, its best fixed rate and its healthy runs."""
    rates = told["plan"]["rates"]
    rows, acted, identical, num_healthy = [], 0, 0, 0
    for family, found in told["families"].items():
        healthy = found["healthy"]
        acted, identical = acted + healthy["acted_on"], identical + healthy["identical"]
        num_healthy += healthy["num_runs"]
        best = f"{_decimal(found['best_fixed_loss'])} at {found['best_fixed_lr']:g}"
        for row in found["rows"]:
            ends = [family, row["control"], f"{row['diverged']:.0%}", *row["by_rate"], _decimal(row["final_loss"])]
            rows.append([*ends, best if row is found["rows"][0] else "", f"{row['actions']:.1f}"])
    heading = ["family", "control", "diverged", *(f"{lr:g}" for lr in rates), "loss of the others"]
    heading += ["best fixed rate's", "actions"]
    counts = {row["num_runs"] for found in told["families"].values() for row in found["rows"]}
    replicas = "equal" if all(found["replicas_equal"] for found in told["families"].values()) else "not always equal"
    prose = [
        f"Each row has {' or '.join(map(str, sorted(counts, reverse=True)))} runs. Of {num_healthy} healthy",
        f"runs the default policy acted on {acted}; {identical} ended bit-identical. Replicas were {replicas}.",
    ]
    return [*table(heading, rows), "", *paragraph(prose)]


def fault_campaign(told: Document) -> list[str]:
    """Write each kind of fault with its measurements, then the totals."""
    heading, rows, prose = failures(told)
    return [*table(heading, rows), "", *paragraph(prose)]


def alert_lead(told: Document) -> list[str]:
    """Write the steps from the notification to the rise of the loss, and the outcomes of the guarded runs."""
    total = told["totals"]

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    rows = [
        [
            f"{row['seed']}",
            cell(row["warned_at"]),
            cell(row["left_band_at"]),
            cell(row["lead"]),
            cell(min(row["guarded"]["acted_at"], default=None)),
            cell(row["guarded"]["resolved_at"]),
        ]
        for row in told["rows"]
    ]
    moved = sum(row["guarded"]["left_band_at"] is not None for row in told["rows"])
    lost = sum(row["guarded"]["last_loss"] is None or row["guarded"]["last_loss"] > MAX_LOSS for row in told["rows"])
    heading = ["seed", "notified at step", "loss leaves its band", "lead, steps"]
    prose = [
        f"`python -m benchmarks.alert_lead` trains {total['num_runs']} runs without normalisation at a rate that",
        "diverges, with one step, scrape and evaluation per second. The loss leaves its band when it is more than",
        "10% above the highest of the 20 steps before. The notification of KoopmonRiskSpike came at least 5 steps",
        f"before that in {total['num_five_steps_before']} of {total['num_left_band']} (median lead",
        f"{total['median_lead']:g}, smallest {total['least_lead']:g}). With the same seeds under the default policy,",
        f"koopmon acted on {total['num_acted']} runs, and the alert resolved afterwards in {total['num_resolved']}.",
        f"The loss left its band in {moved} of them, and {lost} diverged.",
    ]
    return [*paragraph(prose), "", *table([*heading, "guarded: acts at", "guarded: resolved at"], rows)]


def _interval(area: Mapping[str, float] | None) -> str:
    return "-" if area is None else f"{area['value']:.2f} [{area['low']:.2f}, {area['high']:.2f}]"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def flood_and_kill(told: Document) -> list[str]:
    heading = ["flooded process", "survived", "messages", "slowest reply, or 2 steps", "memory growth"]
    rows = [
        [
            f"a {name}",
            f"{row['survived']} of {row['cycles']}",
            f"{row['messages']:,}",
            f"{row['slowest_seconds']:.2f} s",
            f"{row['growth_bytes'] / 1e6:.1f} MB",
        ]
        for name, row in told["sides"].items()
    ]
    return table(heading, rows)


def restarts(told: Document) -> list[str]:
    heading = ["killed and restarted", "restarts", "updates after one", "above the rate at the kill", "ranks differ"]
    columns = ("restarts", "updates", "above", "ranks_differ")
    rows = [
        [way, *(f"{row[name]:,}" for name in columns), f"{row['last_factor']:.3f}"] for way, row in told["ways"].items()
    ]
    return table([*heading, "LR scale at the end"], rows)


def monitor_load(told: Document) -> list[str]:
    """Write the measured values beside their goals, and the machine."""
    rows = [
        [goal["what"], f"{goal['value']:.3g} {goal['unit']}", f"{goal['goal']:g} {goal['unit']}"]
        for goal in told["goals"]
    ]
    machine, load = told["provenance"]["machine"], told["load_average"]
    where = f"{machine['cores']} cores ({machine['cpu']}) at a load of {load:.1f}"
    ranks = f"{told['ranks']['heartbeats_per_second']:.0f} heartbeats per second of the ranks"
    beats = f"{told['runs']['heartbeats_per_second']:.0f} of the runs"
    return [
        *table(["load", "measured", "goal"], rows),
        "",
        *paragraph([f"Measured on {where}, with {ranks} and {beats}."]),
    ]


AGES = ("median", "p95")


def judged_age(told: Document) -> list[str]:
    """Write the ages by load, and the load that the engine bears."""
    rows = [
        [
            f"x {load}",
            f"{found['sent']:,}",
            f"{found['judged']:,}",
            *(f"{found[name]:.2f}" for name in ("median", "p95")),
        ]
        for load, found in told["loads"].items()
    ]
    every, machine = told["bearable_interval_seconds"], told["provenance"]["machine"]
    where = f"{machine['cores']} cores ({machine['cpu']}) at a load of {told['load_average']:.1f}"
    return [
        *table(["load", "snapshots sent", "judged", "median age in snapshots", "95th percentile"], rows),
        "",
        *paragraph([f"The engine bears one snapshot every {1e3 * every:.0f} ms. Measured on {where}."]),
    ]


def history_size(told: Document) -> list[str]:
    """Write sizes and CPU times of today's form beside those of the form before, then the times of reading."""
    rows = [
        [
            layers,
            f"{sizes['now']:.1f} MB, {sizes['before']:.1f} MB before",
            f"{told['milliseconds'][layers]['now']:.2f} ms, {told['milliseconds'][layers]['before']:.2f} ms before",
        ]
        for layers, sizes in told["sizes"].items()
    ]
    measured, goals = told["measured"], told["goals"]
    verdicts = [
        ("1,000 snapshots of 48 layers", "megabytes_48", "{:.1f} MB"),
        ("recording a profile of 48 layers, over the time before", "recording_ratio_48", "{:.2f}"),
        (f"`koopmon report` of {told['settings']['snapshots_read']:,} snapshots", "report_seconds", "{:.1f} s"),
        (f"`koopmon replay` of {told['settings']['snapshots_read']:,} snapshots", "replay_seconds", "{:.1f} s"),
    ]
    goal_rows = [
        [name, form.format(measured[key]), form.format(goals[key]), "yes" if measured[key] <= goals[key] else "**no**"]
        for name, key, form in verdicts
    ]
    return [
        *table(["layers", "1,000 snapshots", "recording one profile (CPU)"], rows),
        "",
        *table(["what", "measured", "goal, at most", "met"], goal_rows),
    ]


def max_rate(told: Document) -> list[str]:
    """Write the estimates of the probe beside the safe and the ruined rates, then the model without normalisation."""
    rows = []
    for model in told["models"]:
        probes = model["probes"]
        known = [each for each in probes if each["low"] is not None]
        compared = [each for each in known if each["is_safe"] is not None]
        rows.append(
            [
                f"{NAMES[model['family']]}, D {model['width']}",
                f"{model['safe']:g}",
                "-" if model["ruined"] is None else f"{model['ruined']:g}",
                ", ".join(_estimate(each) for each in probes),
                f"{sum(each['overlaps'] for each in known)} of {len(known)}" if known else "-",
                f"{sum(each['is_safe'] for each in compared)} of {len(compared)}" if compared else "-",
                "-" if not known else f"{max(each['num_steps'] for each in known)}",
                f"{max(each['cpu_seconds'] for each in probes):.0f} s",
            ]
        )
    columns = ["model", "highest safe rate", "next rate of the grid, ruined", "estimates by seed"]
    columns += ["interval meets the range", "estimate below the ruined rate", "steps, at most", "CPU time, at most"]
    bare = told["unnormalised"]
    ruined = "no rate is ruined" if bare["ruined"] is None else f"{bare['ruined']:g} is ruined"
    predicted = "no rate" if bare["calibrated"] is None else f"{bare['calibrated']:.2g}"
    prose = [
        f"No-Norm, D {bare['width']}, by the calibrator: {predicted} survives with probability 95%. In trainings",
        f"{bare['safe']:g} is safe and {ruined}.",
    ]
    return [*table(columns, rows), "", *paragraph(prose)]


def _estimate(probe: Document) -> str:
    if probe["low"] is None:
        return "none"
    return f"above {probe['low']:.2g}" if probe["rate"] is None else f"{probe['rate']:.2g}"


WRITERS: Mapping[str, Callable[[Document], list[str]]] = {
    "unchanged_script": unchanged_script,
    "norm_table": norm_table,
    "spectral_speed": spectral_speed,
    "spectral_floor": spectral_floor,
    "agent_overhead": agent_overhead,
    "ceilings_cost": ceilings_cost,
    "norms": norms,
    "fresh": fresh,
    "early_warning": early_warning,
    "kss": kss,
    "guarded": guarded,
    "architectures": architectures,
    "family_alarms": family_alarms,
    "guarded_families": guarded_families,
    "brake": brake,
    "fault_campaign": fault_campaign,
    "flood_and_kill": flood_and_kill,
    "restarts": restarts,
    "history_size": history_size,
    "judged_age": judged_age,
    "alert_lead": alert_lead,
    "monitor_load": monitor_load,
    "max_rate": max_rate,
}
