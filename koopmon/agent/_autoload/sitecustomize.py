"""Runs at the start of every Python process under `koopmon run`, which puts this directory first on PYTHONPATH.

It arms the zero-code attach, removes its own directory from the path, and runs the sitecustomize module that it hides.
Any Python of the job may load it: it uses plain syntax, and does nothing where koopmon is not installed.
"""

import contextlib
import importlib.util
import os
import sys


def _arm() -> None:
    # No error here may reach a process that koopmon does not watch.
    with contextlib.suppress(Exception):
        from koopmon.agent import autoload

        autoload.arm()


def _hand_over() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    mine = sys.modules.pop("sitecustomize", None)
    spec = importlib.util.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        if mine is not None:
            sys.modules["sitecustomize"] = mine
        return
    theirs = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = theirs
    # site.py reports an exception of this module, as it would without koopmon.
    spec.loader.exec_module(theirs)


_arm()
_hand_over()
