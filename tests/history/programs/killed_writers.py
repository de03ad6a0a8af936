"""Writers of one history file, each killed by SIGKILL at a random moment, and the records that each reported as
written.

`python killed_writers.py STORE KILLS SEED` prints one line of JSON with the reported ids, in order.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from array import array
from pathlib import Path

from koopmon.config import StoreConfig
from koopmon.history.plain_profile import QUANTITIES, PlainProfile
from koopmon.history.writer import HistoryWriter
from koopmon.wire.messages import Ack, Applied, Command

RUN, INCARNATION = "job", "aaaaaaaa"


def write(path: Path, told: int, number: int) -> None:
    """Write decisions and acks without end; report each id on disk."""
    # A small limit, so that some kills hit the pruning.
    store = HistoryWriter.open(path, StoreConfig(max_bytes=1 << 20))
    noise = PlainProfile(
        columns=dict.fromkeys(QUANTITIES, (1.0,)),
        eigenvalues=(array("f", [random.uniform(-1.0, 1.0) for _ in range(14_000)]),),
        informative=(True,),
        reasons=("",),
        num_samples=8,
        svd_rank=None,
        is_informative=True,
        reason="",
    )
    while True:
        command = Command(run=RUN, incarnation=INCARNATION, id=f"{number:08x}", kind="stop", reason="", expires_step=1)
        store.record_profile(1.0, RUN, INCARNATION, number, num_shards=1, masked=False, seconds=0.0, profile=noise)
        store.record_decision(
            time.time(),
            RUN,
            INCARNATION,
            number,
            phase="alert",
            reason="because",
            risk=0.5,
            commands=[command],
            outcome="pending",
        )
        os.write(told, f"{number}\n".encode())
        answer = Ack(
            run=RUN, incarnation=INCARNATION, command_id=command.id, outcome="applied", step=number, applied=Applied()
        )
        store.record_ack(time.time(), answer)
        os.write(told, f"{number}!\n".encode())
        store._upkeep_at = 0.0
        store.upkeep([RUN])
        number += 1


def kill_one(path: Path, number: int, seconds: float) -> list[str]:
    """Start a writer at `number` and kill it `seconds` after its first report; return its reports."""
    reading, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            write(path, telling, number)
        finally:
            os._exit(1)
    os.close(telling)
    with os.fdopen(reading, "rb") as pipe:
        first = pipe.readline()
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said = first + pipe.read()
    # A truncated line does not count as a report.
    return said.decode().split("\n")[:-1]


def main() -> None:
    path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    told: list[str] = []
    number = 0
    for _ in range(kills):
        told += kill_one(path, number, chance.uniform(0.0, 0.03))
        number += 1_000
    print(json.dumps(told))


if __name__ == "__main__":
    main()
