"""What is known of U-Nets without building one; without torch."""

from __future__ import annotations

from .described import Network

MADE_BY = "modelsoup_i2i.networks.unet:UnetGenerator"
LEAST_DOWNS, MOST_DOWNS = 2, 8


def generator(width: int, downs: int, channels: int, norm: str, *, dropout: bool) -> Network:
    """One of such sizes."""
    sizes = {"width": width, "downs": downs, "channels": channels, "norm": norm}
    return Network(MADE_BY, {**sizes, "dropout": dropout})


def downs_for(height: int, width: int) -> int:
    """The halvings for images of a size: those that leave one pixel of the shorter side."""
    return min(max(min(height, width).bit_length() - 1, LEAST_DOWNS), MOST_DOWNS)


def stand(downs: int, *, batch_norm: bool) -> tuple[list[list[str]], list[list[str]]]:
    """Where what has tensors stands: a list for each level, the outermost first.

    Args:
        downs: how many levels there are.
        batch_norm: whether norms have tensors.

    Returns:
        those that halve, and those that double.
    """
    encoder, decoder = [["model.model.0"]], [["model.model.3"]]
    for level in range(1, downs):
        within = "model.model.1.model." + "3.model." * (level - 1)
        innermost = level == downs - 1
        down, up = ([1], [3, 4]) if innermost else ([1, 2], [5, 6])
        if not batch_norm:
            down, up = down[:1], up[:1]
        encoder.append([f"{within}{place}" for place in down])
        decoder.append([f"{within}{place}" for place in up])
    return encoder, decoder
