"""What is known of discriminators of patches without building one; without torch."""

from __future__ import annotations

from modelsoup import ParameterError

from .described import Network

MADE_BY = "modelsoup_i2i.networks.patch:PatchDiscriminator"
PIXELS_BY = "modelsoup_i2i.networks.patch:PixelDiscriminator"
MAX_GROWTH = 8  # at most this many times the first layer's width
LAYERS = {
    1: 0,
    16: 1,
    34: 2,
    70: 3,
    142: 4,
    286: 5,
}  # of stride 2, by the patch's side; 1 is a pixel


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


def patch(layers: int) -> int:
    """The side of what a verdict sees: 16, 34, 70, … pixels; 1 without layers of stride 2."""
    side = 1
    for stride in [1, 1, *[2] * layers] if layers else []:  # from the verdict back
        side = (side - 1) * stride + 4
    return side


def discriminator(seen: int, width: int, channels: int, norm: str) -> Network:
    """One whose verdicts see patches of a side of `LAYERS`."""
    sizes = {"width": width, "channels": channels, "norm": norm}
    if seen == 1:
        return Network(PIXELS_BY, sizes)
    return Network(MADE_BY, {**sizes, "layers": LAYERS[seen]})


def must_see(side: int, seen: int) -> None:
    """Check that images of a side are large enough for such a one.

    Raises:
        ParameterError: they are not.
    """
    if seen > 1 and verdicts(side, LAYERS[seen]) < 1:
        raise ParameterError(
            f"crop_size {side} is too small for a discriminator of patches of {seen} (a smaller "
            f"patch sees smaller images)"
        )


def stand(seen: int, *, batch_norm: bool) -> list[list[str]]:
    """Where what has tensors stands in such a one: each convolution, with its norm if that has."""
    room, found = ("net" if seen == 1 else "model"), places(LAYERS[seen] or 1)
    normed = found[1:-1] if batch_norm else []
    return [[f"{room}.{n}", *([f"{room}.{n + 1}"] if n in normed else [])] for n in found]
