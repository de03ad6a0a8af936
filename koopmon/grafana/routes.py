"""One route of ours in a notification policy tree that is everybody's. Pure.

Grafana takes the tree as a whole or not at all, so all else of it is handed back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from koopmon.grafana.bundle import CONTACT_POINT, LABEL

Json = dict[str, Any]
ROUTE = f"route {LABEL[0]}={LABEL[1]}"


def merged_policies(tree: Json, *, force: bool = False) -> tuple[Literal["update", "unchanged", "edited"], Json]:
    """What becomes of a tree, and the tree with our route. One that leads elsewhere by now was edited by hand.

    Whatever else people set on our route, such as its timing, or where they move it to, is theirs to choose.
    """
    ours = [route for route in _all_routes(tree) if _is_ours(route)]
    if any(route.get("receiver") == CONTACT_POINT for route in ours):
        return "unchanged", tree
    if ours:
        return ("update", _redirected(tree)) if force else ("edited", tree)
    # First, since a route of others may take all alerts; they get ours as well, since the search goes on.
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
