"""Table of the mutation run, for CONTRIBUTING.md and the terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table


def lines(result: dict[str, Any]) -> list[str]:
    """Write one row for each module and one for all of them."""
    rows = [(f"`{module}`", of["mutants"], of["share_killed"]) for module, of in result["modules"].items()]
    total = sum(mutants for _, mutants, _ in rows)
    rows.append(("all", total, sum(mutants * share for _, mutants, share in rows) / max(1, total)))
    return table(
        ("module", "mutants", "killed", "survived"),
        [(name, f"{mutants:,}", f"{share:.1%}", f"{mutants * (1 - share):,.0f}") for name, mutants, share in rows],
    )


WRITERS = {"mutants": lines}
