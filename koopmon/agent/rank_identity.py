"""The rank of this process, and the run's identity that all ranks share.

The ranks communicate through koopmon's own connection to the default store, and no call waits for another rank. The
user's process groups, and the lock of the user's own store connection, are never touched.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from koopmon.logs import announced
from koopmon.run_names import new_run_name

SETTLE_SECONDS = 300.0
"""Time that rank 0 has to publish the run's identity."""
_ordinals: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


@dataclass(frozen=True, slots=True)
class RankContext:
    """Rank and size of this process. `store` is None if it trains alone."""

    rank: int = 0
    size: int = 1
    store: Any = None


@dataclass(frozen=True, slots=True)
class Identity:
    """The job's name and the hexadecimal id of this launch, equal on all ranks."""

    run: str
    incarnation: str


def current_context() -> RankContext | None:
    """Return the world of torch.distributed. None while a launcher has announced ranks that are not initialized yet."""
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return RankContext()
        store = own_connection(dist.distributed_c10d._get_default_store())
        return RankContext(dist.get_rank(), dist.get_world_size(), store)
    return None if announced()[1] > 1 else RankContext()


def own_connection(store: Any) -> Any:
    """Return another connection to `store`, if its kind has connections.

    A thread of koopmon then never holds the lock of the user's connection, or of another thread.
    """
    return store.clone() if hasattr(store, "clone") else store


def default_run_name() -> str:
    """Return the script's name and 8 random hexadecimal digits."""
    return new_run_name(Path(sys.argv[0] or "python").stem)


def store_prefix(model: nn.Module, run: str | None) -> str:
    """Return a key in the store. It is the same on all ranks that attach this training.

    A counter of this process separates trainings with equal names and parameters. Other trainings that a rank attaches
    do not change the key.
    """
    names = "\n".join(name.removeprefix("module.") for name, _ in model.named_parameters())
    digest = hashlib.blake2b(f"{run}\n{names}".encode(), digest_size=8).hexdigest()
    return f"koopmon/{digest}/{next(_ordinals[digest])}"


class RunRendezvous:
    """Settles the run's identity: rank 0 creates it and writes it to the store; the other ranks poll the store.

    `place` is the key of one training in the store (`store_prefix`).
    """

    def __init__(self, world: RankContext, run: str | None, place: str) -> None:
        self._world = world
        self._run = run
        self._key = f"{place}/identity"
        self._deadline = time.monotonic() + SETTLE_SECONDS

    def resolve(self) -> Identity | None:
        """Return the identity, or None until rank 0 has published it. One short exchange with the store; never waits.

        Raises TimeoutError after SETTLE_SECONDS.
        """
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
