"""The tests mirror the tree: each module has a test file of its own, or this file names the one that covers it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT)
    for top in ("koopmon", "plugins")
    for path in (ROOT / top).rglob("*.py")
    if path.name != "__init__.py" and "build" not in path.parts
)

WITHOUT_TESTS = {
    "koopmon/__main__.py": "two lines; every test of the command line starts it",
    "koopmon/errors.py": "classes without behaviour",
    "koopmon/notify/target.py": "an interface without behaviour",
    "koopmon/hookspecs.py": "one signature; pluggy validates it in tests/test_plugins.py",
}
"""Modules without behaviour of their own, with the reason."""

TESTED_IN = {
    "koopmon/policy/answers.py": "tests/policy/test_decide.py",
    "koopmon/policy/kss_rules.py": "tests/policy/test_decide.py",
    "koopmon/policy/rate_rules.py": "tests/policy/test_decide.py",
    "koopmon/policy/ruin_rules.py": "tests/policy/test_decide.py",
    "koopmon/policy/state.py": "tests/policy/test_decide.py",
    "koopmon/agent/_autoload/sitecustomize.py": "tests/agent/test_autoload.py",
    "koopmon/agent/capture/chain_search.py": "tests/agent/capture/test_what_trains.py",
    "koopmon/agent/capture/compiled_stacks.py": "tests/agent/capture/test_graph_taps.py",
    "koopmon/agent/capture/forward_kind.py": "tests/agent/capture/test_training_modes.py",
    "koopmon/agent/capture/sampler.py": "tests/agent/capture/test_taps.py",
    "koopmon/agent/capture/missed_snapshots.py": "tests/agent/capture/test_training_modes.py",
    "koopmon/agent/capture/snapshot_capture.py": "tests/agent/capture/test_taps.py",
    "koopmon/agent/capture/tap_events.py": "tests/agent/capture/test_taps.py",
    "koopmon/agent/capture/tapped_stacks.py": "tests/agent/capture/test_what_trains.py",
    "koopmon/agent/capture/training_forwards.py": "tests/agent/capture/test_training_modes.py",
    "koopmon/agent/comms/io_thread.py": "tests/agent/test_dead_peers.py",
    "koopmon/agent/control/all_actions.py": "tests/agent/control/test_actuator.py",
    "koopmon/agent/control/command_judge.py": "tests/agent/control/test_actuator.py",
    "koopmon/agent/handle.py": "tests/agent/test_attach.py",
    "koopmon/agent/optimizer_watch.py": "tests/agent/test_autoload.py",
    "koopmon/agent/rank_identity.py": "tests/agent/test_parallelism.py",
    "koopmon/agent/roles.py": "tests/agent/test_lifecycle.py",
    "koopmon/agent/runtime.py": "tests/agent/test_attach.py",
    "koopmon/agent/training_steps.py": "tests/agent/test_several_optimizers.py",
    "koopmon/agent/unhooked_steps.py": "tests/agent/test_compiled.py",
    "koopmon/api.py": "tests/test_plugins.py",
    "koopmon/block_finder.py": "tests/test_discovery.py",
    "koopmon/candidate_trace.py": "tests/test_chain_verifier.py",
    "koopmon/cli/adapters.py": "tests/cli/test_adapters_check.py",
    "koopmon/cli/app.py": "tests/cli/test_command_line.py",
    "koopmon/cli/calibrate.py": "tests/cli/test_calibrate_verb.py",
    "koopmon/cli/check.py": "tests/cli/test_adapters_check.py",
    "koopmon/cli/compare.py": "tests/cli/test_compare_verb.py",
    "koopmon/cli/console.py": "tests/cli/test_run.py",
    "koopmon/cli/demo.py": "tests/test_demo.py",
    "koopmon/cli/doctor.py": "tests/cli/test_doctor_verb.py",
    "koopmon/cli/embedded.py": "tests/cli/test_embedded_monitor.py",
    "koopmon/cli/export.py": "tests/cli/test_export_verb.py",
    "koopmon/cli/extras.py": "tests/cli/test_agent_only.py",
    "koopmon/cli/factory.py": "tests/cli/test_profile_verb.py",
    "koopmon/cli/find_history.py": "tests/cli/test_report_verb.py",
    "koopmon/cli/grafana.py": "tests/grafana/test_push.py",
    "koopmon/cli/keys.py": "tests/cli/test_keys_verb.py",
    "koopmon/cli/monitor.py": "tests/monitor/test_process.py",
    "koopmon/cli/options.py": "tests/cli/test_run.py",
    "koopmon/cli/overview.py": "tests/cli/test_command_line.py",
    "koopmon/cli/profile.py": "tests/cli/test_profile_verb.py",
    "koopmon/cli/replay.py": "tests/cli/test_replay_verb.py",
    "koopmon/cli/report.py": "tests/cli/test_report_verb.py",
    "koopmon/cli/runs.py": "tests/cli/test_runs_verb.py",
    "koopmon/cli/shared_monitor.py": "tests/cli/test_run.py",
    "koopmon/cli/supervise.py": "tests/cli/test_launchers.py",
    "koopmon/cli/table_writers.py": "tests/cli/test_export_verb.py",
    "koopmon/config/hints.py": "tests/config/test_reading.py",
    "koopmon/config/rules.py": "tests/config/test_tables.py",
    "koopmon/conformance/check_selection.py": "tests/conformance/test_broken_adapters.py",
    "koopmon/conformance/check_state_io.py": "tests/conformance/test_broken_adapters.py",
    "koopmon/conformance/check_training.py": "tests/conformance/test_broken_adapters.py",
    "koopmon/conformance/checks.py": "tests/conformance/test_broken_adapters.py",
    "koopmon/conformance/families.py": "tests/conformance/test_kit.py",
    "koopmon/conformance/harness.py": "tests/conformance/test_kit.py",
    "koopmon/conformance/result.py": "tests/conformance/test_kit.py",
    "koopmon/conformance/training.py": "tests/conformance/test_kit.py",
    "koopmon/demo/train.py": "tests/test_demo.py",
    "koopmon/demo/training.py": "tests/test_demo.py",
    "koopmon/demo/view.py": "tests/test_demo.py",
    "koopmon/doctor/connection.py": "tests/cli/test_doctor_verb.py",
    "koopmon/doctor/environment.py": "tests/cli/test_doctor_verb.py",
    "koopmon/doctor/findings.py": "tests/cli/test_doctor_verb.py",
    "koopmon/doctor/http_checks.py": "tests/cli/test_doctor_verb.py",
    "koopmon/doctor/model.py": "tests/cli/test_doctor_verb.py",
    "koopmon/grafana/access.py": "tests/grafana/test_push_failures.py",
    "koopmon/grafana/rules.py": "tests/grafana/test_alert_rules.py",
    "koopmon/guarded_adapter.py": "tests/test_hostile_plugins.py",
    "koopmon/history/database.py": "tests/history/test_durability.py",
    "koopmon/history/journal.py": "tests/history/test_durability.py",
    "koopmon/history/retention.py": "tests/history/test_durability.py",
    "koopmon/history/rows.py": "tests/history/test_reader.py",
    "koopmon/history/schema.py": "tests/history/test_durability.py",
    "koopmon/monitor/http/address.py": "tests/monitor/http/test_server.py",
    "koopmon/monitor/history_sink.py": "tests/monitor/test_sinks.py",
    "koopmon/monitor/metrics_sink.py": "tests/monitor/test_sinks.py",
    "koopmon/monitor/log_sink.py": "tests/monitor/test_sinks.py",
    "koopmon/observables.py": "tests/adapters/test_observables.py",
    "koopmon/plots.py": "tests/cli/test_profile_verb.py",
    "koopmon/plugin_calls.py": "tests/test_hostile_plugins.py",
    "koopmon/plugin_loading.py": "tests/test_plugins.py",
    "koopmon/process_state.py": "tests/test_hostile_plugins.py",
    "koopmon/spectral/_linalg.py": "tests/spectral/test_linalg.py",
    "koopmon/spectral/profiles.py": "tests/spectral/test_profile.py",
    "koopmon/traversals.py": "tests/test_chain_verifier.py",
    "koopmon/walk.py": "tests/agent/capture/test_traversals.py",
    "koopmon/wire/auth_policy.py": "tests/wire/test_curve.py",
    "koopmon/wire/authorized_keys.py": "tests/wire/test_curve.py",
    "koopmon/wire/client.py": "tests/wire/test_sockets.py",
    "koopmon/wire/headers.py": "tests/wire/test_codec.py",
    "koopmon/wire/messages.py": "tests/wire/test_protocol_page.py",
    "koopmon/wire/server.py": "tests/wire/test_sockets.py",
    "koopmon/wire/transport.py": "tests/wire/test_options.py",
    "koopmon/wire/wakeup.py": "tests/wire/test_sockets.py",
    "plugins/koopmon_adapters/kan.py": "tests/adapters/test_families.py",
    "plugins/koopmon_adapters/mamba.py": "tests/adapters/test_families.py",
    "plugins/koopmon_adapters/moe.py": "tests/adapters/test_families.py",
}
"""Modules without a test file of the same name, with the file that covers them."""


def own_test(module: Path) -> Path:
    folder = Path("adapters") if module.parts[0] == "plugins" else Path(*module.parts[1:-1])
    return Path("tests") / folder / f"test_{module.name}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_each_module_has_a_test_file(module: Path) -> None:
    named = TESTED_IN.get(module.as_posix(), own_test(module).as_posix())
    assert module.as_posix() in WITHOUT_TESTS or (ROOT / named).is_file(), f"no {named}"


def test_the_tables_are_not_out_of_date() -> None:
    assert {*TESTED_IN, *WITHOUT_TESTS} <= {module.as_posix() for module in MODULES}, "a module that is gone"
    assert not TESTED_IN.keys() & WITHOUT_TESTS.keys()
    listed = [Path(name) for name in (*TESTED_IN, *WITHOUT_TESTS)]
    assert [module for module in listed if (ROOT / own_test(module)).is_file()] == [], (
        "modules with a file of their own"
    )
