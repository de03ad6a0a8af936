"""The table of failures, for a page: what each fault is in words, and what the campaign measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS: Mapping[str, tuple[str, str, str]] = {
    "monitor_killed": (
        "The monitor is killed (SIGKILL); another takes up its store up to 3 s later",
        "nothing; what is in force stays, snapshots are dropped and counted",
        "hello to the new monitor, which goes on where the store stands; answers that the old one may not have read are"
        " said again",
    ),
    "monitor_stopped": (
        "The monitor is stopped (SIGSTOP) for up to 6 s, and goes on",
        "nothing; snapshots are dropped once its queue is full or it counts as lost",
        "by itself",
    ),
    "agents_flood": (
        "Eight other agents flood the monitor on both channels for up to 2 s and are killed (SIGKILL)",
        "nothing",
        "by itself: each peer has its share of what may wait, and loses what is above it",
    ),
    "monitor_floods": (
        "The monitor is killed; something else floods the jobs from its endpoint for up to 2 s and is killed; another"
        " monitor takes up the store",
        "nothing",
        "as after a killed monitor",
    ),
    "monitor_moved": (
        "The monitor is restarted with its data port elsewhere; half of the times it serves at another control port"
        " first, where no agent looks",
        "nothing",
        "at the control endpoint that agents were given; its welcome names the new data port",
    ),
    "partition": (
        "The cable between two network namespaces is cut, for up to 6 s, now and then for 20 s",
        "nothing",
        "by retransmission, or by a new connection when the old one counted as dead",
    ),
    "slow_link": (
        "The cable carries 32 to 256 kbit/s for up to 4 s (a token bucket)",
        "nothing; snapshots that do not fit are dropped and counted",
        "by itself, once what was queued has left",
    ),
    "disk_full": (
        "Every block under the store is taken, for up to 4 s",
        "nothing; commands go on",
        "recording is tried again every 2 s; decisions and answers wait in memory and are written first",
    ),
    "disk_read_only": (
        "The kernel refuses every write of the monitor to a file, for up to 4 s (a limit of 0 on file sizes, put on"
        " from outside: a mount with open files cannot be made read-only)",
        "nothing; commands go on",
        "as above",
    ),
    "store_corrupted": (
        "Garbage in the store's header, pages or log, or half of it cut off, under a running monitor or between two;"
        " then the operator puts the file aside (policy `observe`)",
        "nothing",
        "a monitor on a new file",
    ),
    "clock_jump": (
        "The wall clock of monitor and ranks jumps by 10 s, an hour, a day or a year, either way (falsified within the"
        " processes)",
        "nothing",
        "nothing goes by the wall clock but the times in the store",
    ),
    "sender_killed": (
        "The thread of a rank that speaks to the monitor is ended",
        "nothing",
        "another thread takes over, in the same incarnation",
    ),
    "rank_killed": (
        "A rank is killed (SIGKILL)",
        "what it does without koopmon: torchrun starts the ranks again, from the checkpoint",
        "a new incarnation of the run gets back what was applied; counted from its first step",
    ),
    "rank_hung": (
        "A rank is stopped (SIGSTOP) for up to 4 s, and goes on",
        "what it does without koopmon: the other rank waits",
        "by itself",
    ),
    "resumed": (
        "A job under `koopmon run`, its script unchanged, dies whole and is started again from its checkpoint, with one"
        " rank or with two",
        "what it does without koopmon",
        "as after a killed rank",
    ),
    "last_step": (
        "Commands arrive in the last 8 steps of a training",
        "each is in force on all ranks from one step on, or on none",
        "counted until the next training's first snapshot",
    ),
    "duplicate": (
        "A command arrives 2 to 5 times",
        "it is applied once",
        "counted until the next command is applied, here and below",
    ),
    "reordered": (
        "Commands arrive in another order than they were made in, an old one again after newer ones",
        "each is applied once, in the order of arrival",
        "-",
    ),
    "expired": (
        "A command's last step is past, or comes before it can be applied",
        "it is not applied after that step",
        "-",
    ),
    "conflicting": (
        "Commands contradict each other in one breath, one goes below the cap, one is for another incarnation",
        "the last one stands, within the cap; the stranger's is refused",
        "-",
    ),
    "poisoned": (
        "NaN or infinity in the activations of a step",
        "what it does without koopmon: the script drops that step's gradient",
        "that snapshot is kept back and counted; it is an observation all the same",
    ),
    "extreme_numbers": (
        "An agent of another run sends legal messages with numbers at the edges of what is legal, for up to 3 s",
        "nothing; commands go on",
        "nothing is broken: the monitor composes nothing of them that it cannot send or record",
    ),
    "adapter_raises": (
        "An architecture adapter raises, in any of its methods, at its first call or later",
        "nothing; before the chain is verified koopmon's own adapter takes its place, after that the agent goes off,"
        " with one line",
        "an agent that is off stays so by design; counted until the next training's first snapshot",
    ),
    "hostile_plugin": (
        "While a job under `koopmon run` starts, a plugin exits, interrupts or hangs, takes the name or the claim of a"
        " built-in adapter, reads no chain, or changes torch's global state",
        "nothing; a plugin that hangs delays the start by 10 s at most",
        "koopmon's own adapter is used, with one line that names the plugin; counted from the first step",
    ),
    "same_name": (
        "A second job begins under the name of one that trains (policy `observe`)",
        "nothing; the first goes on unguarded, and is told so",
        "the second is the run; counted until its first snapshot, its start included",
    ),
}
"""By kind: what happens, what the training sees, how it recovers."""
HEADING = [
    "what happens",
    "what training sees",
    "how it recovers",
    "injections",
    "unaffected",
    "recovery: median, 95%, most",
]


def failures(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Heading, rows and closing words of the table."""
    rows = []
    for row in told["kinds"]:
        seconds = [row[f"recovery_{name}_seconds"] for name in ("median", "p95", "max")]
        measured = ", ".join("-" if each is None else f"{each:.1f}" for each in seconds) + " s"
        if row["not_recovered"]:
            measured += f"; {row['not_recovered']} not within a minute"
        rows.append([*WORDS[row["kind"]], str(row["injections"]), str(row["unaffected"]), measured])
    total, at = told["total"], told["provenance"]
    left_out = [f"Left out: {words}." for words in told["settings"]["left_out"].values()]
    prose = [
        f"{total['unaffected']} of {total['injections']} injections left training unaffected beyond the fault itself,",
        f"in {total['steps']:,} steps, each of them compared. Of {total['commands']} commands decided",
        f"{total['applied']} were applied; {total['lost']} were lost and {total['doubled']} doubled.",
        f"{total['restored']} restarts got back what was applied. 95% had recovered within",
        f"{total['recovery_p95_seconds']:.1f} s. Measured on {at['date']},",
        f"{at['machine']['cores']} cores, seed {at['seed']}, {told['settings']['workers']} scenes at a time.",
        *left_out,
    ]
    return HEADING, rows, prose
