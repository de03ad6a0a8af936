"""What pre-commit asks of every text file.

Usage: check_files.py FILE... Status 1 when something is wrong; one line each: file, line, what.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

MAX_BYTES = 500_000
CONFLICT = re.compile(r"^(<{7}|>{7}|={7}$)( |$)")
SECRET = re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----\n")


def findings(path: Path) -> Iterator[str]:
    """What is wrong with one file."""
    raw = path.read_bytes()
    if len(raw) > MAX_BYTES:
        yield f"{path}: {len(raw)} bytes; allowed are {MAX_BYTES}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield f"{path}: not UTF-8 at byte {error.start}"
        return
    if "\r" in text:
        yield f"{path}: carriage return"
    for number, line in enumerate(text.split("\n"), start=1):
        if line != line.rstrip() and path.suffix != ".md":  # two blanks break a line in Markdown
            yield f"{path}:{number}: blanks at the end of the line"
        if CONFLICT.match(line):
            yield f"{path}:{number}: conflict marker"
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        yield f"{path}: the file ends with one line end"
    if SECRET.search(text):
        yield f"{path}: a private key"
    yield from _syntax(path, text)


def _syntax(path: Path, text: str) -> Iterator[str]:
    try:
        if path.suffix in (".yml", ".yaml"):
            list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        elif path.suffix in (".toml",):
            tomllib.loads(text)
        elif path.suffix == ".json":
            json.loads(text)
    except (yaml.YAMLError, ValueError) as error:
        yield f"{path}: {' '.join(str(error).split())}"


def main(names: list[str]) -> int:
    found = [finding for name in names for finding in findings(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
