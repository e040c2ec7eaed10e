"""Checkpoints of the official codes of U-GAT-IT and NICE-GAN, made into one safetensors file.

Of both one file holds all networks: `genA2B`, `disGA`, … of U-GAT-IT (znxlwm's), `gen2B`, `disA`, …
of NICE-GAN (alpc91's), of which optimisers are not read. Both were published in a full version too,
whose generators see images of one size: it is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from modelsoup import CheckpointError, MismatchError, ParameterError, listed

from ..networks import cams
from .official import Say, Tensors, must_be_free, tensors_of, write

KEYS = {
    cams.UGATIT: {
        "genA2B": "G_A2B", "genB2A": "G_B2A", "disGA": "D_GA", "disGB": "D_GB", "disLA": "D_LA",
        "disLB": "D_LB",
    },
    cams.NICE: {"gen2A": "G_A", "gen2B": "G_B", "disA": "D_A", "disB": "D_B"},
}  # fmt: skip
"""Where a file has which network."""

_CALLED = {cams.UGATIT: "ugatit", cams.NICE: "nice-gan"}
_LICENCE = "licence: the file says nothing. The code of that layout is MIT"
_VECTORS = (".weight_u", ".weight_v")


def import_ugatit(
    source: str | Path, output: str | Path, *, force: bool = False, say: Say = print
) -> dict[str, int]:  # fmt: skip
    """Write the networks of a file of U-GAT-IT's code to one safetensors file.

    Args:
        source: such as `horse2zebra_params_latest.pt`, of the light version.
        output: a path that ends in `.safetensors`.
        force: replace an existing output.
        say: is told what is missing, and what the licence is.

    Returns:
        how many parameters each network has.

    Raises:
        CheckpointError: the file is missing or damaged, asks for code to be run, or has no
            generator.
        MismatchError: a network is of another kind or of the full version, or they do not belong
            together.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    return _imported(Path(source), Path(output), cams.UGATIT, force=force, say=say)


def import_nice_gan(
    source: str | Path, output: str | Path, *, force: bool = False, say: Say = print
) -> dict[str, int]:  # fmt: skip
    """The same for a file of NICE-GAN's code, whose discriminators encode.

    Raises:
        as `import_ugatit`.
    """
    return _imported(Path(source), Path(output), cams.NICE, force=force, say=say)


def _imported(
    source: Path, output: Path, room: str, *, force: bool, say: Say
) -> dict[str, int]:  # fmt: skip
    must_be_free(output, force=force)
    read = _read(source, KEYS[room])
    if not any(name.startswith("G_") for name in read):
        other = next(one for one in KEYS if one != room)
        hint = ""
        if any(name.startswith("G_") for name in _read(source, KEYS[other])):
            hint = f"; `soup i2i import {_CALLED[other]}` reads it"
        first, second, *_ = KEYS[room]
        raise CheckpointError(f"{source} has no generator, {first} or {second}{hint}")
    _must_belong(source, room, read)
    lacking = [key for key, name in KEYS[room].items() if name not in read]
    if lacking:
        say(f"{source} has no {listed(lacking)}: a training that starts from this makes them anew")
    write(read, output, force=force)
    say(_LICENCE)
    return {
        network: sum(v.size for name, v in own.items() if not name.endswith(_VECTORS))
        for network, own in read.items()
    }


def _read(source: Path, keys: Mapping[str, str]) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        for key, name in keys.items():
            try:
                found[name] = tensors_of(source, Path(work) / "one.safetensors", key)
            except ParameterError:  # there is nothing under it
                continue
    return found


def _must_belong(source: Path, room: str, read: Mapping[str, Tensors]) -> None:
    """Check that networks are what they are called, and of one model."""
    told: dict[str, dict[str, int]] = {}
    try:
        for name, own in read.items():
            find = cams.generator_in if name.startswith("G_") else cams.discriminator_in
            shapes = {f"{name}.{tensor}": values.shape for tensor, values in own.items()}
            told[name] = find(room, shapes, f"{name}.")
    except MismatchError as error:
        raise MismatchError(f"{source}: {error}") from None
    for one, other in combinations(told, 2):
        of_kind = _kind(one) == _kind(other)
        judges = one.startswith("D_") and other.startswith("D_")
        # In NICE-GAN a generator sees what a discriminator makes, as wide as that is.
        alike = {"channels"} | ({"width"} if judges or room == cams.NICE else set())
        for what in sorted(told[one]) if of_kind else sorted(alike):
            if told[one][what] != told[other][what]:
                raise MismatchError(
                    f"{source}: the networks do not belong to one model: {one} has the {what} "
                    f"{told[one][what]}, and {other} {told[other][what]}"
                )


def _kind(network: str) -> str:
    return network.rstrip("A2B")
