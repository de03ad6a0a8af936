"""`koopmon keys`: makes, shows and rotates the keys of monitor and agents."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Column, Table

from koopmon.cli.console import print_json, results, say
from koopmon.cli.options import AsJson, KeysDirectory
from koopmon.errors import KeysError
from koopmon.wire import keys

EPILOG = "Example: koopmon keys make agent --runs 'team-a/*'"
MAKE_EPILOG = "Example: koopmon keys make monitor agent"
SHOW_EPILOG = "Example: koopmon keys show --json"
ROTATE_EPILOG = "Example: koopmon keys rotate agent --keep-days 7"
DEFAULT_NAMES = [keys.MONITOR, "agent"]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Make, show and rotate the keys by which monitor and agents meet.")
    group.callback(epilog=EPILOG)(lambda: None)
    group.command("make", epilog=MAKE_EPILOG)(make)
    group.command("show", epilog=SHOW_EPILOG)(show)
    group.command("rotate", epilog=ROTATE_EPILOG)(rotate)
    app.add_typer(group, name="keys")


def make(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="monitor, or an agent's name. Default: monitor agent."),
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Runs that the agents may speak for, as 'team-a/*'; repeatable. Default: *."
        ),
    ] = None,
    directory: KeysDirectory = None,
    as_json: AsJson = False,
) -> int:
    """Make pairs of keys: a secret file for its owner alone, and a public one for the other side.

    An agent made beside the monitor is served by it at once. One made elsewhere is served once its public file lies in
    the monitor's agents/ directory; an agent elsewhere needs the monitor's public file, monitor.key.
    """
    place = _place(directory)
    wanted = [keys.check_name(name) for name in names or DEFAULT_NAMES]
    patterns = tuple(runs or ["*"])
    _make_directories(place)
    for name in wanted:
        for path in (keys.secret_file(place, name), keys.public_file(place, name)):
            if path.exists():
                raise KeysError(f"{path}: is there already; `koopmon keys rotate {name}` replaces it")
    for name in wanted:
        pair = _new_pair()
        keys.write_secret(place, name, pair.secret)
        _publish(place, name, keys.PublicKey(public=pair.public, runs=patterns))
    return _report(place, wanted, as_json)


def show(directory: KeysDirectory = None, as_json: AsJson = False) -> int:
    """List the keys, which agents this monitor serves, and for which runs. Never shows a secret.

    Files that cannot be used are one line, and exit status 2.
    """
    place = _place(directory)
    keys.check_directory(place)
    return _report(place, None, as_json)


def rotate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="monitor, or an agent's name.")],
    keep_days: Annotated[
        float, typer.Option(min=0.0, max=365.0, metavar="DAYS", help="How long the old key counts too; 0: no longer.")
    ] = 7.0,
    directory: KeysDirectory = None,
    as_json: AsJson = False,
) -> int:
    """Replace a pair. Jobs that run go on: for a while both the old key and the new one count.

    After an agent's, copy its public file to the monitor, if that is elsewhere: running jobs keep the old key until
    they connect anew. After the monitor's, copy monitor.key to the agents, if they are elsewhere, then restart it.
    """
    place = _place(directory)
    keys.check_name(name)
    old = _pair_of(place, name)
    known = keys.read_public(keys.public_file(place, name))
    authorised = keys.public_file(place / keys.AGENTS, name)
    bound = keys.read_public(authorised) if name != keys.MONITOR and authorised.exists() else known
    pair = _new_pair()
    until = datetime.now(UTC) + timedelta(days=keep_days)
    changed = msgspec.structs.replace(
        known,
        public=pair.public,
        previous=old.public if keep_days else None,
        previous_until=until if keep_days else None,
        runs=bound.runs,
    )
    # The public file changes first: until the secret file changes, the old secret still counts as the previous key.
    _publish(place, name, changed, everywhere=authorised.exists())
    keys.write_secret(place, name, pair.secret)
    if name == keys.MONITOR:
        say("restart the monitor: it goes by the new key from then on")
    return _report(place, [name], as_json)


def _place(directory: Path | None) -> Path:
    return keys.keys_directory("" if directory is None else str(directory), os.environ)


def _make_directories(place: Path) -> None:
    keys.make_directory(place)
    keys.make_directory(place / keys.AGENTS)


def _publish(place: Path, name: str, key: keys.PublicKey, *, everywhere: bool = True) -> None:
    keys.write_public(keys.public_file(place, name), key)
    if name != keys.MONITOR and everywhere:
        keys.write_public(keys.public_file(place / keys.AGENTS, name), key)


def _new_pair() -> Any:
    # Imported late because it imports zmq.
    from koopmon.wire.curve import new_pair

    return new_pair()


def _pair_of(place: Path, name: str) -> Any:
    from koopmon.wire.curve import pair_of

    return pair_of(keys.read_secret(place, name))


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
    rows = []
    for path in sorted(place.glob("*.secret")):
        name = path.stem
        public = _pair_of(place, name).public
        known = keys.read_public(keys.public_file(place, name))
        if known.public != public:
            raise KeysError(
                f"{keys.public_file(place, name)}: not the public key to {path}; `koopmon keys rotate {name}`"
            )
        rows.append(_row(name, "secret and public", known, is_agent=name != keys.MONITOR))
    for path in sorted(place.glob("*.key")):
        if not keys.secret_file(place, path.stem).exists():
            known = keys.read_public(path)
            rows += [_row(path.stem, "public", known, is_agent=path.stem != keys.MONITOR)]
    agents = place / keys.AGENTS
    if agents.exists():
        keys.check_directory(agents)
        rows += [_row(path.stem, "served here", keys.read_public(path)) for path in sorted(agents.glob("*.key"))]
    return rows


def _row(name: str, what: str, key: keys.PublicKey, *, is_agent: bool = True) -> dict[str, Any]:
    counts = len(key.keys()) > 1 and key.previous_until is not None
    return {
        "name": name,
        "what": what,
        "public": key.public,
        "runs": list(key.runs) if is_agent else [],
        "previous_until": key.previous_until.isoformat() if counts and key.previous_until is not None else None,
    }
