"""Inserts koopmon's route into the shared notification policy tree, without I/O.

Grafana accepts only the whole tree, so everything else in it is returned unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from koopmon.grafana.bundle import CONTACT_POINT, LABEL

Json = dict[str, Any]
ROUTE = f"route {LABEL[0]}={LABEL[1]}"


def merged_policies(tree: Json, *, force: bool = False) -> tuple[Literal["update", "unchanged", "edited"], Json]:
    """Return the action and the tree with our route. A route to another receiver counts as edited by hand.

    Users may change other settings of our route, such as its timing or position; they are kept.
    """
    ours = [route for route in _all_routes(tree) if _is_ours(route)]
    if any(route.get("receiver") == CONTACT_POINT for route in ours):
        return "unchanged", tree
    if ours:
        return ("update", _redirected(tree)) if force else ("edited", tree)
    # The route is first because another route may match all alerts. `continue` lets the other routes receive them too.
    route = {"receiver": CONTACT_POINT, "object_matchers": [[LABEL[0], "=", LABEL[1]]], "continue": True}
    return "update", {**tree, "routes": [route, *(tree.get("routes") or [])]}


def _is_ours(route: Json) -> bool:
    name, value = LABEL
    written = [matcher.replace('"', "").replace(" ", "") for matcher in route.get("matchers") or []]
    return [name, "=", value] in (route.get("object_matchers") or []) or f"{name}={value}" in written


def _all_routes(tree: Json) -> Iterator[Json]:
    for route in tree.get("routes") or []:
        yield route
        yield from _all_routes(route)


def _redirected(tree: Json) -> Json:
    if not tree.get("routes"):
        return tree
    routes = [
        {**route, "receiver": CONTACT_POINT} if _is_ours(route) else _redirected(route) for route in tree["routes"]
    ]
    return {**tree, "routes": routes}
