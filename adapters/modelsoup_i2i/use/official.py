"""Checkpoints of the official CycleGAN code, made into one safetensors file.

A folder holds a file for each network: `latest_net_G_A.pth` and so on, `20_net_G_A.pth` of an
epoch, `iter_5000_net_G_A.pth`; a model for one direction is `latest_net_G.pth`, or downloaded, with
the task for a name, a single file. They hold weights alone. Pretrained ones have no discriminators:
a training that starts from them initialises those.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from modelsoup import (
    CheckpointError,
    MismatchError,
    OutputError,
    ParameterError,
    check_output,
    convert,
    open_checkpoint,
    placed,
)

from ..networks.patch import patch_in
from ..networks.resnet import resnet_in
from .generators import DIRECTIONS, DISCRIMINATORS, GENERATORS, NETWORKS

WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_FILE = re.compile(r"(?P<when>latest|\d+|iter_\d+)_net_(?P<network>G|G_A|G_B|D_A|D_B)\.pth")
_STALE = ("running_mean", "running_var", "num_batches_tracked")


def import_folder(
    source: str | Path, output: str | Path, *, force: bool = False, epoch: str = "latest",
    direction: str = "x2y",
) -> dict[str, int]:  # fmt: skip
    """Write the networks of an official checkpoint to one safetensors file.

    Args:
        source: a folder of the official layout, or the file of one generator.
        output: a path that ends in `.safetensors`.
        force: replace an existing output.
        epoch: which files of the folder: `latest`, an epoch, or `iter_N`.
        direction: what the generator of a one-sided model is: `x2y` or `y2x`.

    Returns:
        how many parameters each network has that was found.

    Raises:
        CheckpointError: a file is missing or damaged, or asks for code to be run.
        MismatchError: a network is of another kind than CycleGAN's default, such as one with
            dropout or batch normalisation, or the networks do not fit together.
        ParameterError: another direction.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    source, output = Path(source), Path(output)
    if direction not in DIRECTIONS:
        raise ParameterError(f"the direction is {direction!r}, but must be x2y or y2x")
    if output.suffix != ".safetensors":
        raise OutputError(f"the output {output} must end in .safetensors")
    check_output(output, force=force)
    files = dict(_found(source, epoch, direction))
    tensors: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    shapes: list[tuple[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        for network in NETWORKS:
            if network not in files:
                continue
            own = _read(files[network], Path(work) / f"{network}.safetensors")
            plain = {name: values.shape for name, values in own.items()}
            try:
                if network in GENERATORS:
                    shapes.append((network, resnet_in(plain, "")))
                else:
                    shapes.append((network, patch_in(plain, "")))
            except MismatchError as error:
                raise MismatchError(f"{files[network]}: {error}") from None
            tensors |= {f"{network}.{name}": values for name, values in own.items()}
            counts[network] = sum(values.size for values in own.values())
    _must_agree(shapes)
    with placed(output, force=force) as partial:
        partial.write_bytes(save(tensors, {"format": "pt"}))
    return counts


def _found(source: Path, epoch: str, direction: str) -> list[tuple[str, Path]]:
    """Network and file, for each file of a source."""
    alone = DIRECTIONS[direction]
    if source.is_file():
        return [(alone, source)]
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist")
    every = [(match, path) for path in sorted(source.iterdir())
             if (match := _FILE.fullmatch(path.name))]  # fmt: skip
    if not every:
        raise CheckpointError(
            f"{source} has no file of the official layout, such as latest_net_G_A.pth"
        )
    files = [(m["network"], path) for m, path in every if m["when"] == epoch]
    if not files:
        times = sorted({match["when"] for match, _ in every})
        raise CheckpointError(f"{source} has no networks of {epoch!r} (it has {', '.join(times)})")
    names = [network for network, _ in files]
    if "G" in names and len(names) > 1:
        raise CheckpointError(
            f"{source} has both {epoch}_net_G.pth, a model for one direction, and "
            f"{files[names.index('G') - 1][1].name}: name the one file that is meant"
        )
    if not {"G", *GENERATORS} & set(names):
        raise CheckpointError(f"{source} has no generator of {epoch!r} ({epoch}_net_G_A.pth)")
    return [(alone if network == "G" else network, path) for network, path in files]


def _read(path: Path, work: Path) -> dict[str, np.ndarray]:
    """A network's tensors under their plain names, read by torch's weights-only loader."""
    convert(path, work, force=True)
    opened = open_checkpoint(work)
    tensors: dict[str, np.ndarray] = {}
    for name in opened.tensors:
        plain = name
        while plain.startswith(WRAPPERS):
            plain = plain.partition(".")[2]
        if plain in tensors:
            raise CheckpointError(f"{path} has {plain} twice, with and without a wrapper's prefix")
        tensors[plain] = np.array(opened[name], np.float32)
    for name in _stale(tensors):
        del tensors[name]
    return tensors


def _stale(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Statistics that old versions saved for InstanceNorm, which has none: no weight is beside."""
    return [
        name for name in tensors
        if name.rpartition(".")[2] in _STALE
        and f"{name.rpartition('.')[0]}.weight" not in tensors
    ]  # fmt: skip


def _must_agree(shapes: list[tuple[str, Any]]) -> None:
    for kind in (GENERATORS, DISCRIMINATORS):
        own = [(network, shape) for network, shape in shapes if network in kind]
        if any(sizes != own[0][1] for _, sizes in own):
            said = " and ".join(f"{network} {sizes}" for network, sizes in own)
            raise MismatchError(f"the networks do not belong to one model: {said}")
