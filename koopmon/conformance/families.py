"""Checks of a family's observables and of its modules that are shielded from KSS."""

from __future__ import annotations

import math
from typing import Any

from msgspec.structs import replace

from koopmon.api import Observable
from koopmon.conformance.check_training import KSS
from koopmon.conformance.harness import Bench, described, same_bits
from koopmon.conformance.result import demand
from koopmon.conformance.training import Attached, Training
from koopmon.observables import flaw


def observables(bench: Bench) -> str:
    """Observables are declared, belong to transitions of the stack, and are finite numbers in a snapshot."""
    training = Training(bench)
    stack = bench.stack(training.model)
    why = flaw(bench.adapter.measures)
    demand(not why, why)
    offered: list[Any] = list(bench.adapter.observables(stack))
    listed, last = ", ".join(bench.adapter.measures) or "nothing", len(stack.points) - 1
    inside = set(training.model.modules())
    for each in offered:
        demand(isinstance(each, Observable), f"observables() gives {described(each)}, expected an Observable")
        demand(each.name in bench.adapter.measures, f"observables() gives {each.name!r}, and `measures` lists {listed}")
        name = f"observable {each.name!r}"
        demand(0 <= each.layer <= last, f"{name} is of transition {each.layer}, allowed are 0 to {last}")
        demand(each.module in inside, f"{name} of transition {each.layer} is read from no module of the model")
    if not offered:
        return "measures nothing beside the spectra"
    with Attached(training) as attached:
        training.run(2)
        attached.check()
        demand(not attached.runtime.taps.stacks.readers.reason, attached.runtime.taps.stacks.readers.reason)
        (snapshot,) = attached.notebook.snapshots
    for (name, layer), value in snapshot.observed.items():
        demand(math.isfinite(value), f"observable {name!r} of transition {layer} reads {value}")
    silent = {each.name for each in offered} - {name for name, _ in snapshot.observed}
    absent = f", nothing to read of {', '.join(sorted(silent))}" if silent else ""
    return f"{len(snapshot.observed)} readings in a snapshot{absent}"


def shields(bench: Bench) -> str:
    """For a family with shielded modules, the agent refuses KSS in one line and no gradient changes."""
    bench.stack(bench.build())
    names = bench.shields
    if not names:
        return "nothing is shielded"
    plain, guarded = Training(bench), Training(bench)
    with Attached(guarded) as attached:
        for step in range(3):
            if step == 1:
                attached.command("set_kss", kss=replace(KSS, alpha=1.0))
            for training in (plain, guarded):
                training.backward()
            demand(attached.alpha == 0.0, f"alpha {attached.alpha} is in force, and {names[0]} is shielded from KSS")
            same = same_bits(guarded.gradient(), plain.gradient())
            demand(same, f"KSS reaches gradients of the model, and {names[0]} is shielded from it")
            for training in (plain, guarded):
                training.update()
        given = attached.notebook.outcomes
    demand(len(given) == 1, f"a command of KSS has {len(given)} outcomes, expected one")
    (outcome,) = given
    refused = outcome.outcome == "refused" and outcome.permanent
    demand(refused, f"KSS is {outcome.outcome}, expected to be refused as shielded: {names[0]} is shielded from it")
    complete = any(name in outcome.detail for name in names) and "through_shielded" in outcome.detail
    good = complete and len(outcome.detail.splitlines()) == 1
    demand(good, f"the refusal lacks the shielded module or through_shielded, or is not one line: {outcome.detail!r}")
    return f"KSS is refused: {len(names)} modules are shielded"
