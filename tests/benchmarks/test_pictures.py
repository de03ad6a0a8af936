"""Pages show every picture of the command, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import pictures


def test_every_picture_is_drawn_by_the_command_and_shown() -> None:
    assert {path.stem for path in pictures.DIRECTORY.iterdir()} == set(pictures.PICTURES)
    pages = "".join(page.read_text(encoding="utf-8") for page in (pictures.ROOT / "docs").rglob("*.md"))
    for name in pictures.PICTURES:
        assert f"pictures/{name}.png)" in pages
        assert f"`python -m benchmarks.pictures --only {name}`" in pages


def test_a_picture(tmp_path: Path) -> None:
    assert pictures.main(["--only", "faults", "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "faults.png").read_bytes().startswith(b"\x89PNG")
