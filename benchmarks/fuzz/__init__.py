"""Coverage-guided fuzzing of every parser of untrusted bytes; `python -m benchmarks.fuzz` runs it.

Each target is a file with a function `run(data)` that passes bytes to the code, checks the invariants, and returns one
word for the outcome. `seeds()` gives initial inputs. Any exception of `run` is a crash.
"""

from __future__ import annotations


def check_line(text: str, limit: int = 2000) -> None:
    """Check that the text of a refusal fits a log: one printable line of bounded length."""
    assert text.isprintable(), repr(text)
    assert len(text) < limit, len(text)
