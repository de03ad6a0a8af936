"""Machinery of the fault campaign: a monitor process, jobs of real ranks, a small disk, and a link between namespaces.

It ends everything that it starts, by process id, and removes its mounts and namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from benchmarks.fault_campaign.clock import VARIABLE
from benchmarks.fault_campaign.training import Line, last_line

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "train_under_fault.py"
PATIENCE_SECONDS = 300.0
MONITOR = """
import sys
import benchmarks.fault_campaign.clock
from koopmon.cli import main
from koopmon.monitor import process
sys.stdin.readline()
sys.exit(main())
"""
"""`koopmon monitor`, which finishes its imports and then waits for a line before it starts."""
T = TypeVar("T")


def wait(condition: Callable[[], T], what: str, seconds: float = PATIENCE_SECONDS) -> T:
    """Return the result of `condition` once it is true. Raises TimeoutError with `what`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {seconds:.0f} s")
        time.sleep(0.04)
    return found


def environment(clock: Path | None = None, **more: str) -> dict[str, str]:
    """Return the environment of a process of the campaign."""
    paths = [str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # Without this, ranks that torchrun restarts find the addresses of the dead ones in its store and hang, also without
    # koopmon.
    ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KOOPMON_")}
    return {**kept, **ours, **({VARIABLE: str(clock)} if clock else {}), **more}


class Monitor:
    """One monitor at a time on `store`, and a second process with finished imports."""

    def __init__(self, directory: Path, config: Path, *, clock: Path | None = None, within: Sequence[str] = ()) -> None:
        self.directory, self.store = directory, directory / "store.sqlite3"
        self.said: deque[str] = deque(maxlen=100_000)
        """Log of all monitors so far."""
        self._config, self._clock, self._within = config, clock, list(within)
        self._process: subprocess.Popen[str] | None = None
        self._spare: dict[tuple[str, ...], subprocess.Popen[str]] = {}

    def prepare(self, bind: str, *options: str) -> None:
        """Prepare a process that can serve at `bind`."""
        words: tuple[str, ...] = (
            "monitor",
            "--bind",
            bind,
            "--http",
            "127.0.0.1:0",
            "--store",
            str(self.store),
            "--device",
            "cpu",
        )
        words += ("--config", str(self._config), "--ready-file", str(self._ready), *options)
        self._spare[bind, *options] = subprocess.Popen(
            [*self._within, sys.executable, "-c", MONITOR, *words],
            cwd=ROOT,
            env=environment(self._clock),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start(self, bind: str, *options: str, serve: bool = True) -> bool:
        """Start serving. False if the monitor exited instead, which needs `serve` False."""
        if (bind, *options) not in self._spare:
            self.prepare(bind, *options)
        self._process = process = self._spare.pop((bind, *options))
        self._ready.unlink(missing_ok=True)
        assert process.stdin is not None
        assert process.stdout is not None
        threading.Thread(target=self._listen, args=(process.stdout,), daemon=True).start()
        process.stdin.write("begin\n")
        process.stdin.flush()
        wait(lambda: self._ready.exists() or process.poll() is not None, "the monitor")
        if process.poll() is None:
            return True
        if serve:
            raise RuntimeError(f"the monitor ended with {process.returncode}: {list(self.said)[-3:]}")
        return False

    @property
    def _ready(self) -> Path:
        return self.directory.parent / "ready.json"

    def _listen(self, output: IO[str]) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            self.said.extend(line.rstrip("\n") for line in output)

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL; its ready file stays, as after any crash."""
        if self._process is not None:
            _end(self._process)

    def terminate(self) -> None:
        """SIGTERM; wait until it has written everything."""
        assert self._process is not None, "start() comes first"
        self._process.terminate()
        self._process.wait(PATIENCE_SECONDS)
        time.sleep(0.1)  # the last lines of its log

    def close(self) -> None:
        for process in (*self._spare.values(), *([self._process] if self._process else [])):
            _end(process)


class Job:
    """A training of `world` ranks, under torchrun for more than one; `launch` restarts it."""

    def __init__(
        self,
        out: Path,
        run: str,
        endpoint: str,
        config: Path,
        *,
        world: int = 1,
        pace: float = 0.01,
        guarded: str = "attach",
        options: Sequence[str] = (),
        clock: Path | None = None,
        within: Sequence[str] = (),
        paths: str = "",
    ) -> None:
        """`guarded`: "attach" in the script, "run" by `koopmon run`, "" for unguarded."""
        self.out, self.run, self.endpoint, self.world = out, run, endpoint, world
        self.worlds: dict[str, int] = {}
        """Number of ranks of each launch."""
        self._config, self._pace, self._guarded, self._options = config, pace, guarded, list(options)
        self._clock, self._within, self._paths = clock, list(within), paths
        self._launches = 0
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        launch = str(self._launches)
        self._launches += 1
        self.worlds[launch] = self.world
        command = [str(SCRIPT), "--out", str(self.out), "--orders", str(self._orders), "--launch", launch]
        command += ["--pace", str(self._pace), *(["--attach"] if self._guarded == "attach" else []), *self._options]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--max-restarts", "99"]
        torchrun += ["--nproc-per-node", str(self.world)]
        command = [sys.executable, *(torchrun if self.world > 1 else []), *command]
        if self._guarded == "run":
            guard = ["-m", "koopmon", "run", "--monitor", self.endpoint, "--run", self.run, "--config"]
            command = [sys.executable, *guard, str(self._config), "--", *command]
        koopmon = {"KOOPMON_ENDPOINT": self.endpoint, "KOOPMON_RUN": self.run, "KOOPMON_CONFIG": str(self._config)}
        ours = environment(self._clock, **(koopmon if self._guarded == "attach" else {}))
        # Scenes run at one time under one name. Their files of settings in force must not meet.
        ours["XDG_STATE_HOME"] = f"{self.out}.state"
        if self._paths:
            ours["PYTHONPATH"] = os.pathsep.join([ours["PYTHONPATH"], self._paths])
        with Path(f"{self.out}.{launch}.err").open("wb") as errors:
            self._process = subprocess.Popen(
                [*self._within, *command], cwd=ROOT, env=ours, stdout=errors, stderr=errors, start_new_session=True
            )

    @property
    def _orders(self) -> Path:
        return Path(f"{self.out}.orders")

    def order(self, **order: Any) -> None:
        """Write one of the orders of the script."""
        with self._orders.open("a") as file:
            file.write(json.dumps(order) + "\n")

    def stretches(self) -> list[str]:
        """Return the launches and restarts that trained, in order, by the middle part of their logs' names."""
        found = {path.name.split(".")[-2] for path in self.out.parent.glob(f"{self.out.name}.*-*.0")}
        return sorted(found, key=lambda name: tuple(map(int, name.split("-"))))

    def log(self, stretch: str, rank: int) -> Path:
        return Path(f"{self.out}.{stretch}.{rank}")

    def pid(self, rank: int, stretch: str | None = None) -> int:
        return int(Path(f"{self.log(stretch or self.stretches()[-1], rank)}.pid").read_text())

    def last(self) -> Line | None:
        """Return the position of rank 0 in its latest stretch; None before its first step."""
        found = self.stretches()
        return last_line(self.log(found[-1], 0)) if found else None

    def step(self) -> int:
        """Return the last step of rank 0, counted from the start of its latest stretch, like its agent."""
        line = self.last()
        with self.log(self.stretches()[-1], 0).open() as file:
            first = file.readline()
        return 0 if line is None else line.step - int(first.split(" ")[0])

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def errors(self) -> str:
        return "".join(
            path.read_text(errors="replace") for path in sorted(self.out.parent.glob(f"{self.out.name}.*.err"))
        )

    def await_steps(self, more: int = 1) -> None:
        """Wait until the present stretch has advanced by `count` steps."""
        wait(lambda: not self.running or self.last() is not None, f"the first step of {self.run}")
        if not self.running:
            raise RuntimeError(f"{self.run} ended: {self.errors()[-2000:]}")
        first = self.last()
        wait(lambda: (now := self.last()) and first and now.step >= first.step + more, f"steps of {self.run}")

    def end(self) -> None:
        """Let the job end normally soon."""
        line = self.last()
        assert line is not None
        assert self._process is not None
        self.order(do="end", step=line.step + 60)
        if self._process.wait(PATIENCE_SECONDS):
            raise RuntimeError(f"{self.run} ended with {self._process.returncode}: {self.errors()[-2000:]}")

    def await_end(self) -> None:
        assert self._process is not None
        if self._process.wait(PATIENCE_SECONDS):
            raise RuntimeError(f"{self.run} ended with {self._process.returncode}: {self.errors()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL to the launcher and all ranks."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for each in Path("/proc").glob("[0-9]*"):  # each rank has its own session
                with contextlib.suppress(OSError):
                    if f"--out\0{self.out}\0" in (each / "cmdline").read_text():
                        os.kill(int(each.name), signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError, ValueError):
                pipe.close()


@contextlib.contextmanager
def small_disk(directory: Path, megabytes: int = 48) -> Iterator[Path]:
    """A separate file system in memory at `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(directory))
    try:
        yield directory
    finally:
        _run("umount", "--lazy", str(directory))


class Link:
    """A link between two network namespaces: `job` and `monitor` are the prefixes of a command at either end.

    Both ends have addresses of the loopback range, which need no keys.
    """

    address = "127.77.0.2"

    def __init__(self, number: int) -> None:
        self._names = [f"koopmon-{number}-{end}" for end in "ab"]
        self._devices = [f"kf{number % 100000}{end}" for end in "ab"]
        self.job, self.monitor = ([*_within(name)] for name in self._names)

    def __enter__(self) -> Link:
        for name in self._names:
            _run("ip", "netns", "add", name)
        a, b = self._devices
        _run("ip", "link", "add", a, "type", "veth", "peer", "name", b)
        for name, device, address in zip(self._names, self._devices, ("127.77.0.1", self.address), strict=True):
            _run("ip", "link", "set", device, "netns", name)
            route = f"/proc/sys/net/ipv4/conf/{device}/route_localnet"
            _run(*_within(name), sys.executable, "-c", f"open({route!r}, 'w').write('1')")
            _run(*_within(name), "ip", "link", "set", "lo", "up")
            _run(*_within(name), "ip", "address", "del", "127.0.0.1/8", "dev", "lo")
            _run(*_within(name), "ip", "address", "add", "127.0.0.1/32", "dev", "lo")
            _run(*_within(name), "ip", "address", "add", f"{address}/24", "dev", device)
            _run(*_within(name), "ip", "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self, *, down: bool) -> None:
        """Set the monitor's end down or up again: silence without a reset."""
        _run(*self.monitor, "ip", "link", "set", self._devices[1], "down" if down else "up")

    def slow(self, kilobits: int | None) -> None:
        """Limit the rate of both directions; None removes the limit."""
        for name, device in zip(self._names, self._devices, strict=True):
            if kilobits is None:
                _run(*_within(name), "tc", "qdisc", "del", "dev", device, "root")
            else:
                bucket = ["rate", f"{kilobits}kbit", "burst", "4kb", "latency", "2s"]
                _run(*_within(name), "tc", "qdisc", "add", "dev", device, "root", "tbf", *bucket)


def _within(namespace: str) -> list[str]:
    return ["ip", "netns", "exec", namespace]


def missing() -> Mapping[str, str]:
    """Return the faults that this machine does not allow, by the missing tool, in words; empty if it allows all."""
    found = {}
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        found["namespaces"] = "network namespaces cannot be made here"
        stack.enter_context(Link(os.getpid()))
        del found["namespaces"]
    found["mounts"] = "file systems cannot be mounted here"
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk", 1):
        del found["mounts"]
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
