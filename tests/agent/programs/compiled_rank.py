"""One rank of a compiled training under DistributedDataParallel: `python compiled_rank.py ENDPOINT ORDER`.

Prints its losses, the graphs, and the agent's status as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import koopmon
from tests.agent.models import batch, build, loss_of

STEPS = 5


def main(endpoint: str, order: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for name in ("alone", "watched"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        config = {"cadence": {"dense_every": 1}}
        agent = (
            koopmon.attach(model, optimizer, endpoint=endpoint, run="job", config=config) if name == "watched" else None
        )
        called: Any
        if order == "inside":
            called = DistributedDataParallel(torch.compile(model, backend="aot_eager"))  # type: ignore[arg-type]
        else:
            called = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        losses = []
        for step in range(STEPS):
            loss = loss_of(called, batch(step, rank))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            deadline = time.monotonic() + 20.0
            while agent is not None and time.monotonic() < deadline and not _settled(agent.status()):
                time.sleep(0.01)
        for step in range(200):  # the exchange of the ranks must have formed before the processes end
            ready = torch.tensor(float(agent is None or agent.status()["control_ready"]))
            dist.all_reduce(ready, dist.ReduceOp.MIN)
            if ready:
                break
            loss_of(called, batch(step, rank)).backward()
            optimizer.step()
            time.sleep(0.05)
        found[name] = losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if agent is not None:
            found["status"] = {key: agent.status()[key] for key in ("taps_missing", "errors", "layout", "acts", "sent")}
            dist.barrier()
            agent.close()
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def _settled(status: dict[str, Any]) -> bool:
    return bool(status["connected"] and status["sent"] + sum(status["dropped"].values()) >= status["step"] - 1)


main(*sys.argv[1:])
