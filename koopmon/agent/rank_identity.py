"""Which rank this process is, and how all ranks come to call the run by one name.

Whatever passes between ranks here passes through a connection of our own to the default store, and no call waits for
another rank: the user's process groups, and the lock of the user's own store connection, are never touched.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from koopmon.errors import ConfigError

SETTLE_SECONDS = 300.0
"""How long rank 0 may take until it has named the run."""
_LAUNCHED = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""In which variables launchers say who a process is; torchrun's win, since it may run inside a step of Slurm's."""
_ordinals: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}")


@dataclass(frozen=True, slots=True)
class RankContext:
    """This process among the ranks; `store` is None when it trains alone."""

    rank: int = 0
    size: int = 1
    store: Any = None


@dataclass(frozen=True, slots=True)
class Identity:
    """The job's name and the hexadecimal name of this launch of it, equal on all ranks."""

    run: str
    incarnation: str


def current_context() -> RankContext | None:
    """The world as torch.distributed has it; None while a launcher has announced ranks that have not met yet."""
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return RankContext()
        return RankContext(dist.get_rank(), dist.get_world_size(), _own_store())
    return None if announced_size() > 1 else RankContext()


def announced_size() -> int:
    """What the launcher says the world's size is; 1 when it says nothing."""
    return _announced()[1]


def rank_from_env() -> int:
    """What the launcher says this process's rank is; 0 when it says nothing."""
    return _announced()[0]


def _announced() -> tuple[int, int]:
    """Rank and world size by the first launcher that names this process's rank."""
    for rank, size in _LAUNCHED:
        if os.environ.get(rank, "").isdecimal():
            world = os.environ.get(size, "")
            return int(os.environ[rank]), int(world) if world.isdecimal() else 1
    return 0, 1


def _own_store() -> Any:
    store = dist.distributed_c10d._get_default_store()
    # A second connection where the store has such: a thread of ours then never holds the lock of the user's.
    return store.clone() if hasattr(store, "clone") else store


def check_run_name(name: str) -> str:
    """`name` if it can name a run. Raises ConfigError."""
    if _RUN_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"run = {name!r}: allowed are 1 to 128 letters, digits and . _ : / + -, beginning with a letter or a digit"
        )
    return name


def default_run_name() -> str:
    """The script's name and 8 random hexadecimal digits."""
    stem = re.sub(r"[^A-Za-z0-9._+-]", "-", Path(sys.argv[0] or "python").stem).strip("-.") or "python"
    stem = stem if stem[0].isalnum() else f"run{stem}"
    return f"{stem[:100]}-{secrets.token_hex(4)}"


def store_prefix(model: nn.Module, run: str | None) -> str:
    """A key in the store, the same on all ranks that attach this training, whatever else each of them attaches.

    Trainings that look alike are told apart by their order in this process.
    """
    names = "\n".join(name.removeprefix("module.") for name, _ in model.named_parameters())
    digest = hashlib.blake2b(f"{run}\n{names}".encode(), digest_size=8).hexdigest()
    return f"koopmon/{digest}/{next(_ordinals[digest])}"


class RunRendezvous:
    """Settles the run's identity: rank 0 makes it and writes it to the store, the others ask until it is there.

    `place` is where in the store the agents of one training meet (`store_prefix`).
    """

    def __init__(self, world: RankContext, run: str | None, place: str) -> None:
        self._world = world
        self._run = run
        self._key = f"{place}/identity"
        self._deadline = time.monotonic() + SETTLE_SECONDS

    def resolve(self) -> Identity | None:
        """The identity, or None while rank 0 has not spoken; one short exchange with the store, no waiting."""
        if self._world.rank == 0:
            identity = Identity(self._run or default_run_name(), secrets.token_hex(8))
            if self._world.store is not None:
                self._world.store.set(self._key, f"{identity.incarnation} {identity.run}")
            return identity
        if not self._world.store.check([self._key]):
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"rank 0 did not attach within {SETTLE_SECONDS:.0f} s; attach on every rank alike")
            return None
        incarnation, run = self._world.store.get(self._key).decode().split(" ", 1)
        return Identity(run, incarnation)
