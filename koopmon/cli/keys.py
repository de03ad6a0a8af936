"""`koopmon keys`: creates, lists and rotates the keys of monitor and agents."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec.structs import replace
from rich.table import Column, Table

from koopmon.cli.console import print_json, results, say
from koopmon.cli.options import AsJson, KeysDirectory, option
from koopmon.errors import KeysError
from koopmon.wire import keys

DEFAULT_NAMES = [keys.MONITOR, "agent"]


def add_to(app: typer.Typer) -> None:
    title = "Create, list and rotate the keys of monitor and agents."
    example = "Example: koopmon keys make agent --runs 'team-a/*'"
    group = typer.Typer(no_args_is_help=True, help=title, epilog=example)
    group.command("make", epilog="Example: koopmon keys make monitor agent")(make)
    group.command("show", epilog="Example: koopmon keys show --json")(show)
    group.command("rotate", epilog="Example: koopmon keys rotate agent --keep-days 7")(rotate)
    app.add_typer(group, name="keys")


def make(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="monitor, or an agent's name. Default: monitor agent."),
    ] = None,
    runs: Annotated[
        list[str] | None, option("PATTERN", "Runs that the agents may send, as 'team-a/*'; repeatable. Default: *.")
    ] = None,
    directory: KeysDirectory = None,
    as_json: AsJson = False,
) -> int:
    """Create key pairs: a secret file for its owner, and a public file for the other side.

    A monitor in the same directory serves the agent at once. On another host, copy the agent's public file into the
    monitor's agents/ directory, and the monitor's public file, monitor.key, to the agent.
    """
    # Imported late because it imports zmq.
    from koopmon.wire import curve

    place = _place(directory)
    wanted = [keys.check_name(name) for name in names or DEFAULT_NAMES]
    patterns = keys.check_runs(runs or ["*"])
    for each in (place, place / keys.AGENTS):
        keys.make_directory(each)
    for name in wanted:
        for path in (keys.secret_file(place, name), keys.public_file(place, name)):
            if path.exists():
                raise KeysError(f"{path}: exists; `koopmon keys rotate {name}` replaces it")
    for name in wanted:
        pair = curve.new_pair()
        keys.write_secret(place, name, pair.secret)
        _publish(place, name, keys.PublicKey(public=pair.public, runs=patterns))
    return _report(place, wanted, as_json)


def show(directory: KeysDirectory = None, as_json: AsJson = False) -> int:
    """List the keys, the agents that this monitor serves, and their runs, but no secret.

    An unusable file gives one line and exit status 2.
    """
    place = _place(directory)
    keys.check_directory(place)
    return _report(place, None, as_json)


def rotate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="monitor, or an agent's name.")],
    keep_days: Annotated[float, option("DAYS", "Days for which the old key stays valid.", min=0.0, max=365.0)] = 7.0,
    directory: KeysDirectory = None,
    as_json: AsJson = False,
) -> int:
    """Replace a key pair without an interruption of running jobs: the old key stays valid for some days.

    After a rotation of an agent's key, copy its public file to the monitor on another host; running jobs use the old
    key until they reconnect. After one of the monitor's key, copy monitor.key to the agents, then restart the monitor.
    """
    from koopmon.wire import curve

    place = _place(directory)
    keys.check_name(name)
    old = curve.pair_of(keys.read_secret(place, name))
    known = keys.read_public(keys.public_file(place, name))
    authorised = keys.public_file(place / keys.AGENTS, name)
    bound = keys.read_public(authorised) if name != keys.MONITOR and authorised.exists() else known
    pair = curve.new_pair()
    changed = replace(known, public=pair.public, previous=None, previous_until=None, runs=bound.runs)
    if keep_days:
        until = datetime.now(UTC) + timedelta(days=keep_days)
        changed = replace(changed, previous=old.public, previous_until=until)
    # The public file changes first: until the secret file changes, the old secret still counts as the previous key.
    _publish(place, name, changed, everywhere=authorised.exists())
    keys.write_secret(place, name, pair.secret)
    if name == keys.MONITOR:
        say("restart the monitor to use the new key")
    return _report(place, [name], as_json)


def _place(directory: Path | None) -> Path:
    return keys.keys_directory("" if directory is None else str(directory), os.environ)


def _publish(place: Path, name: str, key: keys.PublicKey, *, everywhere: bool = True) -> None:
    keys.write_public(keys.public_file(place, name), key)
    if name != keys.MONITOR and everywhere:
        keys.write_public(keys.public_file(place / keys.AGENTS, name), key)


def _report(place: Path, names: list[str] | None, as_json: bool) -> int:
    rows = [row for row in _rows(place) if names is None or row["name"] in names]
    if as_json:
        print_json({"directory": str(place), "keys": rows})
        return 0
    public = Column("public key", min_width=40, no_wrap=True)
    table = Table("name", "what", public, "runs", "also until", title=str(place), title_justify="left")
    for row in rows:
        table.add_row(row["name"], row["what"], row["public"], " ".join(row["runs"]), row["previous_until"] or "")
    results().print(table, soft_wrap=True)
    return 0


def _rows(place: Path) -> list[dict[str, Any]]:
    from koopmon.wire import curve

    rows = []
    for name in sorted({path.stem for kind in ("*.secret", "*.key") for path in place.glob(kind)}):
        has_secret, public = keys.secret_file(place, name).exists(), keys.public_file(place, name)
        known = keys.read_public(public)
        if has_secret and curve.pair_of(keys.read_secret(place, name)).public != known.public:
            raise KeysError(f"{public}: not the public key of {name}.secret; `koopmon keys rotate {name}`")
        rows.append(_row(name, "secret and public" if has_secret else "public", known))
    agents = place / keys.AGENTS
    if agents.exists():
        keys.check_directory(agents)
        rows += [_row(path.stem, "served here", keys.read_public(path)) for path in sorted(agents.glob("*.key"))]
    return rows


def _row(name: str, what: str, key: keys.PublicKey) -> dict[str, Any]:
    until = key.previous_until if len(key.keys()) > 1 else None
    return {
        "name": name,
        "what": what,
        "public": key.public,
        "runs": list(key.runs) if name != keys.MONITOR else [],
        "previous_until": None if until is None else until.isoformat(),
    }
