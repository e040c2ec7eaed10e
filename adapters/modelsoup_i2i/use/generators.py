"""The generators of a checkpoint, as they are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from modelsoup import CheckpointError, MismatchError, ParameterError, open_checkpoint

from ..networks.resnet import ResnetGenerator, resnet_in

GENERATORS = ("G_A", "G_B")
DISCRIMINATORS = ("D_A", "D_B")
NETWORKS = (*GENERATORS, *DISCRIMINATORS)
DIRECTIONS = {"x2y": "G_A", "y2x": "G_B"}


def generator_in(checkpoint: str | Path, direction: str = "x2y") -> dict[str, int]:
    """What one generator of a checkpoint was built with: width, blocks and channels.

    Raises:
        as `load_generator`.
    """
    if direction not in DIRECTIONS:
        raise ParameterError(f"the direction is {direction!r}, but must be x2y or y2x")
    shapes = {name: info.shape for name, info in open_checkpoint(checkpoint).tensors.items()}
    try:
        return resnet_in(shapes, f"{DIRECTIONS[direction]}.")
    except MismatchError as error:
        raise MismatchError(f"{checkpoint}: {error}") from None


def load_generator(checkpoint: str | Path, direction: str = "x2y") -> ResnetGenerator:
    """One generator of a checkpoint, in eval mode, in float32 on the CPU.

    Args:
        checkpoint: a safetensors file with `G_A.*` (X to Y) or `G_B.*` (Y to X).
        direction: `x2y` or `y2x`.

    Raises:
        ParameterError: another direction.
        CheckpointError: the file is missing or damaged.
        MismatchError: it holds no such generator, or one of another kind.
    """
    sizes = generator_in(checkpoint, direction)
    network, opened = ResnetGenerator(**sizes), open_checkpoint(checkpoint)
    prefix = f"{DIRECTIONS[direction]}."
    state = {}
    for name in network.state_dict():
        values = np.asarray(opened[prefix + name], np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{checkpoint}: {prefix + name} holds NaN or infinity")
        state[name] = torch.from_numpy(values)
    network.load_state_dict(state)
    network.eval()
    return network
