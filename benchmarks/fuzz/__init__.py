"""Coverage-guided fuzzing of everything that a stranger's bytes reach; `python -m benchmarks.fuzz` runs it.

Each target is a file with a function `run(data)` that feeds bytes to the code, checks what must hold, and returns one
word for what became of them; `seeds()` gives it something to start from. Whatever `run` raises is a crash.
"""

from __future__ import annotations


def check_line(text: str, limit: int = 2000) -> None:
    """What a refusal says must fit a log: one line, printable, and not as long as the sender likes."""
    assert text.isprintable(), repr(text)
    assert len(text) < limit, len(text)
