"""What is known of discriminators of patches without building one; without torch."""

from __future__ import annotations

MAX_GROWTH = 8  # at most this many times the first layer's width


def widths(width: int, layers: int) -> list[int]:
    """Channels after each layer but the last: doubled by each, up to eight times."""
    return [width * min(2**n, MAX_GROWTH) for n in range(layers + 1)]


def verdicts(side: int, layers: int) -> int:
    """The side of the map of verdicts for an image's side; below 1 if that is too small."""
    for _ in range(layers):
        side //= 2  # kernel 4, stride 2, padding 1
    # Two more layers of stride 1 take one off each; the first of them is normalised over its
    # map, which must have more than one element.
    return side - 2 if side > 2 else 0


def places(layers: int) -> list[int]:
    """Where the convolutions stand: 0, 2, 5, 8, …; between them are norms and activations."""
    return [0, *(3 * n - 1 for n in range(1, layers + 2))]
