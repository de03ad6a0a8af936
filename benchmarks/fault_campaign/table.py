"""Table of the injected faults for docs/failures.md: a description of each kind, and the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS: Mapping[str, tuple[str, str, str]] = {
    "monitor_killed": (
        "The monitor is killed (SIGKILL); another one opens its store up to 3 s later",
        "none; settings in force stay, snapshots are dropped and counted",
        "agents register with the new monitor, which continues from the store, and repeat acknowledgements that the old"
        " one may not have read",
    ),
    "monitor_stopped": (
        "The monitor is stopped (SIGSTOP) for up to 6 s, then continues",
        "none; snapshots are dropped once its queue is full or it counts as lost",
        "automatic",
    ),
    "agents_flood": (
        "Eight other agents flood the monitor on both channels for up to 2 s and are killed (SIGKILL)",
        "none",
        "automatic: each peer has a share of the receive queue and loses the messages above it",
    ),
    "monitor_floods": (
        "The monitor is killed; another program floods the jobs from its endpoint for up to 2 s and is killed; another"
        " monitor opens the store",
        "none",
        "as after a killed monitor",
    ),
    "monitor_moved": (
        "The monitor restarts with another data port; half of the times it first serves at another control port, which"
        " no agent uses",
        "none",
        "agents reconnect at their control endpoint; the reply has the new data port",
    ),
    "partition": (
        "The link between two network namespaces is cut for up to 6 s, sometimes for 20 s",
        "none",
        "by retransmission, or by a new connection if the old one counts as dead",
    ),
    "slow_link": (
        "The link is limited to 32 to 256 kbit/s for up to 4 s (a token bucket)",
        "none; snapshots that do not fit are dropped and counted",
        "automatic, once the queue is sent",
    ),
    "disk_full": (
        "The file system of the store is full for up to 4 s",
        "none; commands continue",
        "the monitor tries again every 2 s; decisions and acknowledgements wait in memory and are written first",
    ),
    "disk_read_only": (
        "The kernel refuses every write of the monitor to a file for up to 4 s (a limit of 0 on file sizes, set from"
        " outside, because a mount with open files cannot become read-only)",
        "none; commands continue",
        "as above",
    ),
    "store_corrupted": (
        "The store gets garbage in its header, pages or log, or is cut in half, under a running monitor or between two;"
        " then the operator moves the file away (policy `observe`)",
        "none",
        "a monitor starts a new file",
    ),
    "clock_jump": (
        "The wall clock of monitor and ranks jumps by 10 s, an hour, a day or a year, forwards or backwards (falsified"
        " inside the processes)",
        "none",
        "automatic: only the times in the store use the wall clock",
    ),
    "rank_killed": (
        "A rank is killed (SIGKILL)",
        "as without koopmon: torchrun restarts the ranks from the checkpoint",
        "the next launch of the run gets back the applied settings; counted from its first step",
    ),
    "rank_hung": (
        "A rank is stopped (SIGSTOP) for up to 4 s, then continues",
        "as without koopmon: the other rank waits",
        "automatic",
    ),
    "resumed": (
        "A job with an unchanged script under `koopmon run` is killed and restarted from its checkpoint, with one rank"
        " or with two",
        "as without koopmon",
        "as after a killed rank",
    ),
    "last_step": (
        "Commands arrive in the last 8 steps of a training",
        "each is applied by all ranks at one step, or by none",
        "counted until the first snapshot of the next training",
    ),
    "duplicate": (
        "A command arrives 2 to 5 times",
        "it is applied once",
        "counted until the next command is applied, here and below",
    ),
    "reordered": (
        "Commands arrive out of order, and an old one repeats after newer ones",
        "each is applied once, in the order of arrival",
        "-",
    ),
    "expired": (
        "A command has expired, or expires before it can be applied",
        "it is not applied after that step",
        "-",
    ),
    "conflicting": (
        "Commands in one batch contradict each other, one is below the agent's limit, one is for another launch",
        "the last one is in force, within the limit; the one for another launch is refused",
        "-",
    ),
    "poisoned": (
        "NaN or infinity in the activations of a step",
        "as without koopmon: the script drops that step's gradient",
        "the snapshot is not sent but counted; the monitor records that the states were not finite",
    ),
    "extreme_numbers": (
        "An agent of another run sends legal messages with numbers at the edges of what is legal, for up to 3 s",
        "none; commands continue",
        "automatic: the monitor sends and records only values within the bounds of the protocol",
    ),
    "adapter_raises": (
        "An architecture adapter raises, in any of its methods, at its first call or later",
        "none; koopmon's own adapter replaces it before the chain is verified; after that, the agent switches off with"
        " one line",
        "by design, an agent stays off; counted until the first snapshot of the next training",
    ),
    "hostile_plugin": (
        "While a job under `koopmon run` starts, a plugin exits, interrupts or hangs, takes the name or the claim of a"
        " built-in adapter, reads no chain, or changes torch's global state",
        "none; a plugin that hangs delays the start by 10 s at most",
        "koopmon uses its own adapter and logs one line with the plugin; counted from the first step",
    ),
    "same_name": (
        "A second job starts under the name of a running one (policy `observe`)",
        "none; the first job continues unguarded and logs a line",
        "the second job becomes the run; counted from its start until its first snapshot",
    ),
}
"""Fault, effect on the training, and recovery, by kind."""
HEADING = [
    "fault",
    "effect on training",
    "recovery",
    "injections",
    "unaffected",
    "recovery time: median, 95%, largest",
]


def failures(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the heading, the rows and the closing sentences of the table."""
    rows = []
    for row in told["kinds"]:
        seconds = [row[f"recovery_{name}_seconds"] for name in ("median", "p95", "max")]
        measured = ", ".join("-" if each is None else f"{each:.1f}" for each in seconds) + " s"
        if row["not_recovered"]:
            measured += f"; {row['not_recovered']} not within a minute"
        rows.append([*WORDS[row["kind"]], str(row["injections"]), str(row["unaffected"]), measured])
    total, at = told["total"], told["provenance"]
    left_out = [f"Not injected: {words}." for words in told["settings"]["left_out"].values()]
    prose = [
        f"{total['unaffected']} of {total['injections']} injections left training unaffected beyond the fault itself,",
        f"in {total['steps']:,} compared steps. Of {total['commands']} commands decided",
        f"{total['applied']} were applied; {total['lost']} were lost and {total['doubled']} doubled.",
        f"{total['restored']} restarts got back the applied settings. 95% had recovered within",
        f"{total['recovery_p95_seconds']:.1f} s. Measured on {at['date']},",
        f"{at['machine']['cores']} cores, seed {at['seed']}, {told['settings']['workers']} scenes at a time.",
        *left_out,
    ]
    return HEADING, rows, prose
