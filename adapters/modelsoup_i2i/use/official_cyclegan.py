"""Checkpoints of the official CycleGAN, pix2pix and CUT code, made into one safetensors file.

A folder holds a file for each network: `latest_net_G_A.pth` and so on, `20_net_G_A.pth` of an
epoch, `iter_5000_net_G_A.pth`; CycleGAN's model for one direction is `latest_net_G.pth`, or
downloaded, with the task for a name, a single file; so is pix2pix's generator, which its tensors'
names tell from that, with `latest_net_D.pth` beside it. So is CUT's, which its filters tell, with
`latest_net_F.pth` too. They hold weights alone. Pretrained ones have no discriminators: a training
that starts from them initialises those.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import CheckpointError, MismatchError

from ..networks import antialiased, antialiaseds
from ..networks.described import Network
from ..networks.patch import discriminator_in, patch_in
from ..networks.resnet import resnet_in
from ..networks.unet import is_unet, unet_in
from .generators import must_lead
from .official import Tensors, must_be_free, tensors_of, write

GENERATORS = ("G_A", "G_B")
DISCRIMINATORS = ("D_A", "D_B")
ALONE = {"x2y": "G_A", "y2x": "G_B"}  # what a generator of one direction is
_FILE = re.compile(r"(?P<when>latest|\d+|iter_\d+)_net_(?P<network>G|D|F|G_A|G_B|D_A|D_B)\.pth")
# What tells the sizes of a network by its names and shapes.
_KINDS: dict[str, dict[str, Callable[..., Any]]] = {
    "resnet": {
        "G": resnet_in, **dict.fromkeys(GENERATORS, resnet_in),
        **dict.fromkeys(DISCRIMINATORS, patch_in),
    },
    "unet": {"G": unet_in, "D": discriminator_in},
    "antialiased": {
        "G": antialiased.generator_in, "D": antialiased.discriminator_in,
        "F": antialiased.projection_in,
    },
}  # fmt: skip
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
        direction: what the generator of a one-sided CycleGAN is: `x2y` or `y2x`; those of pix2pix
            and CUT have the direction that they were trained for.

    Returns:
        how many parameters each network has that was found.

    Raises:
        CheckpointError: a file is missing or damaged, or asks for code to be run.
        MismatchError: a network is of another kind than CycleGAN's default, such as one with
            dropout or batch normalisation, or than pix2pix's or CUT's, or the networks do not fit
            together.
        ParameterError: another direction.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    source, output = Path(source), Path(output)
    must_lead(direction)
    must_be_free(output, force=force)
    read: dict[str, Tensors] = {}
    files = _found(source, epoch)
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        for network, file in files.items():
            read[network] = _plain(tensors_of(file, Path(work) / f"{network}.safetensors"))
    told: dict[str, Mapping[str, Any]] = {}
    kind = "unet" if is_unet(read.get("G", {})) else "resnet"
    if any(name.endswith(".filt") for name in read.get("G", {})):
        kind = "antialiased"
    for network, own in read.items():
        plain = {name: values.shape for name, values in own.items()}
        try:
            if network not in _KINDS[kind]:
                raise MismatchError(
                    f"such a {network} belongs to pix2pix or CUT, whose generator, in G's file, is "
                    f"a U-Net or has anti-aliasing filters"
                )
            sizes = _KINDS[kind][network](plain, "")
            told[network] = getattr(sizes, "sizes", sizes)
            if kind == "antialiased":
                _must_blur(network, own, told[network])
        except MismatchError as error:
            raise MismatchError(f"{files[network]}: {error}") from None
    _must_agree(told)
    if "G" in read and kind == "resnet":
        read[ALONE[direction]] = read.pop("G")
    order = ("G", "D", "F", *GENERATORS, *DISCRIMINATORS)
    write({network: read[network] for network in order if network in read}, output, force=force)
    return {network: sum(values.size for name, values in read[network].items()
                         if name.rpartition(".")[2] not in (*_STATISTICS, "filt"))
            for network in order if network in read}  # fmt: skip


def _found(source: Path, epoch: str) -> dict[str, Path]:
    """The file of each network of a source, by the name that it has there."""
    if source.is_file():
        return {"G": source}
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist")
    every = [(match, path) for path in sorted(source.iterdir())
             if (match := _FILE.fullmatch(path.name))]  # fmt: skip
    if not every:
        kind = "deepi2i" if any(source.glob("E1*.pth")) else "biggan"
        known = any(source.glob("G*.pth"))
        other = f"; `soup i2i import {kind}` reads G.pth" if known else ""
        raise CheckpointError(
            f"{source} has no file of the official layout, such as latest_net_G_A.pth{other}"
        )
    files = {m["network"]: path for m, path in every if m["when"] == epoch}
    if not files:
        times = sorted({match["when"] for match, _ in every})
        raise CheckpointError(f"{source} has no networks of {epoch!r} (it has {', '.join(times)})")
    others = [path.name for network, path in files.items() if len(network) > 1]
    if "G" in files and others:
        raise CheckpointError(
            f"{source} has both {epoch}_net_G.pth, a model for one direction, and {others[-1]}: "
            f"name the one file that is meant"
        )
    if not {"G", *GENERATORS} & set(files):
        raise CheckpointError(f"{source} has no generator of {epoch!r} (such as {epoch}_net_G.pth)")
    return files


def _plain(tensors: Tensors) -> Tensors:
    """The statistics that norms have now, whichever version wrote them."""
    for name in _stale(tensors):
        del tensors[name]
    for name in [name for name in tensors if name.endswith(".running_mean")]:
        # Batch norms of versions before 0.4.1 did not count.
        count = f"{name.rpartition('.')[0]}.num_batches_tracked"
        tensors.setdefault(count, np.zeros((), np.int64))
    return tensors


def _must_blur(network: str, own: Tensors, sizes: Mapping[str, int]) -> None:
    """Check that filters are those that the network computes with, whatever its file says."""
    kind = {"G": antialiaseds.GENERATOR, "D": antialiaseds.DISCRIMINATOR}.get(network)
    wanted = {} if kind is None else Network(kind, sizes).build().state_dict()
    for name, values in own.items():
        if name.endswith(".filt") and not np.allclose(values, wanted[name].numpy()):
            raise MismatchError(f"{name} is another filter than CUT's")


def _stale(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Statistics that old versions saved for InstanceNorm, which has none: no weight is beside."""
    return [
        name for name in tensors
        if name.rpartition(".")[2] in _STATISTICS
        and f"{name.rpartition('.')[0]}.weight" not in tensors
    ]  # fmt: skip


def _must_agree(told: Mapping[str, Any]) -> None:
    for kind in (GENERATORS, DISCRIMINATORS):
        own = {network: sizes for network, sizes in told.items() if network in kind}
        if any(sizes != next(iter(own.values())) for sizes in own.values()):
            said = " and ".join(f"{network} {sizes}" for network, sizes in own.items())
            raise MismatchError(f"the networks do not belong to one model: {said}")
    sizes = told.get("G", {})
    channels = sizes.get("channels", 0)
    wanted = {"D": {"channels": channels}, "F": {"channels": channels, "of": sizes.get("width")}}
    if "norm" in sizes:  # pix2pix's discriminator sees a picture and its translation together
        wanted = {"D": {"channels": 2 * channels, "norm": sizes["norm"]}}
    for network, own in wanted.items():
        if network in told and not own.items() <= told[network].items():
            raise MismatchError(
                f"the networks do not belong to one model: G {dict(sizes)} and {network} "
                f"{dict(told[network])}"
            )
