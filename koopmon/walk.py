"""The walk of a forward through a kept stack."""

from __future__ import annotations

from koopmon.api import Point, Stack


class Walk:
    """Follows the first traversal of a kept stack through one forward. A block that is skipped is passed over."""

    def __init__(self, stack: Stack) -> None:
        self._layers: dict[int, list[int]] = {}
        for point in stack.points:
            self._layers.setdefault(id(point.module), []).append(point.layer)
        self.position = 0
        """Transitions passed: the state after them is h_position."""
        self.inside: int | None = None
        """The layer whose block runs now."""
        self.called: list[int] = []

    def following(self, point: Point) -> int | None:
        """Return the layer of a call of the block of `point` now; None if it does not belong to the traversal."""
        if self.inside is not None:
            return None
        return next((layer for layer in self._layers[id(point.module)] if layer >= self.position), None)

    def enter(self, layer: int) -> None:
        """Begin the call of the block of `layer`."""
        self.inside = self.position = layer

    def leave(self, point: Point) -> int | None:
        """End the call of the block of `point`; return its layer, or None if it does not belong to the traversal."""
        layer = self.inside
        if layer is None or layer not in self._layers[id(point.module)]:
            return None
        self.called.append(layer)
        self.inside, self.position = None, layer + 1
        return layer
