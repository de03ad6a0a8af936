"""Peers that flood a socket of koopmon and die, and the socket under attack: `python -m tests.wire.peers ROLE ...`.

Each runs in another process, because the tests look for an abort of the process.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import zmq

from koopmon.errors import ProtocolError
from koopmon.wire import client, server, sockets
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.sockets import ControlClient, ControlServer, DataReceiver, DataSender, Poller, ProbeClient
from koopmon.wire.transport import WireContext

SOCKETS: dict[str, Any] = {each.__name__: each for each in (ControlServer, DataReceiver, ControlClient, ProbeClient)}
PEERS = {
    "ControlServer": ControlClient,
    "DataReceiver": DataSender,
    "ControlClient": ControlServer,
    "ProbeClient": ControlServer,
}
NUM_MESSAGES = 250
READ_SECONDS = 0.6


def stand(kind: str, endpoint: str, trust: AuthPolicy) -> None:
    """Socket of koopmon: it waits for a line on stdin, then reads for a while and prints the number of messages.

    The time limit of a handshake has passed by then. Its timer must have stopped.
    """
    for options in (client.CLIENT, server.SERVER):
        options[zmq.HANDSHAKE_IVL] = 300
    with WireContext(trust) as context:
        ours = SOCKETS[kind](context, endpoint)
        poller = Poller(ours)
        print(ours.endpoint, flush=True)
        if isinstance(ours, ControlClient):
            while not ours.connected or not ours.send([b"here I am"]):
                poller.wait(0.05)
        elif trust.directory is not None:  # authorise the peer
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                ours._zap_handler.serve()
                time.sleep(0.01)
        sys.stdin.readline()
        count, until = 0, time.monotonic() + READ_SECONDS
        while time.monotonic() < until:
            poller.wait(0.05)
            try:
                while ours.recv() is not None:
                    count += 1
            except ProtocolError:
                count += 1
        print(count, flush=True)


def flood(kind: str, endpoint: str, trust: AuthPolicy) -> None:
    """Peer of such a socket with ZMTP heartbeats, as in older versions: it sends for a while, then exits.

    A PING lies between any two messages, so each message that is read late has one after it.
    """
    for options in (client.CLIENT, server.SERVER, sockets._CONTROL):
        options |= {zmq.HEARTBEAT_IVL: 1, zmq.HEARTBEAT_TIMEOUT: 15_000}
    peer_kind = PEERS[kind]
    with WireContext(trust) as context:
        peer = peer_kind(context, endpoint)
        print(peer.endpoint, flush=True)
        poller = Poller(peer)
        name: list[bytes] = []
        if isinstance(peer, ControlServer):
            while (heard := peer.recv()) is None:
                poller.wait(0.05)
            name = [heard[0]]
        else:
            while not peer.connected:
                poller.wait(0.05)
        print("found", flush=True)
        sys.stdin.readline()
        for _ in range(NUM_MESSAGES):
            peer._offer([*name, b"x" * 20])
            time.sleep(0.0015)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["stand", "flood"])
    parser.add_argument("kind", choices=list(SOCKETS))
    parser.add_argument("endpoint")
    parser.add_argument("keys", nargs="?")
    options = parser.parse_args()
    trust = AuthPolicy(Path(options.keys), curve_on_loopback=True) if options.keys else AuthPolicy()
    {"stand": stand, "flood": flood}[options.role](options.kind, options.endpoint, trust)
