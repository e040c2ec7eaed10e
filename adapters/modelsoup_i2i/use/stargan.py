"""Official checkpoints of StarGAN (yunjey's), made into one safetensors file.

A folder holds `200000-G.ckpt` and `200000-D.ckpt`, and those of other steps. They are read as
weights alone. Statistics that the code keeps for its instance norms are left out: it always uses
those of each picture.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from modelsoup import CheckpointError, MismatchError, listed

from ..networks import stargans
from .official import Tensors, must_be_free, tensors_of, write

_FILE = re.compile(r"(?P<step>\d+)-(?P<network>[GD])\.ckpt")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
LICENCE = (
    "licence: the files say nothing. StarGAN's code is MIT; CelebA, which its published weights "
    "were trained on, is for research that is not commercial"
)


def import_stargan(
    source: str | Path, output: str | Path, *, force: bool = False, step: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, int]:  # fmt: skip
    """Write the networks of an official folder to one safetensors file: G, and D where it is.

    Args:
        source: the folder.
        output: a path that ends in `.safetensors`.
        force: replace an existing output.
        step: whose files; None is the last one that has a generator.
        say: is told which step it is, what is lacking, and what the licence is.

    Returns:
        how many parameters each network has.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, or asks for code to be run.
        MismatchError: a network is of another kind, or they do not belong together.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    source, output = Path(source), Path(output)
    must_be_free(output, force=force)
    files = _found(source, step, say)
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        read = {n: _plain(tensors_of(f, Path(work) / "one.safetensors")) for n, f in files.items()}
    told = {}
    for network, kind in (("G", stargans.generator_in), ("D", stargans.discriminator_in)):
        shapes = {name: values.shape for name, values in read.get(network, {}).items()}
        try:
            if network in read:
                told[network] = kind(shapes, "")
        except MismatchError as error:
            raise MismatchError(f"{files[network]}: {error}") from None
    for name in ("classes", "channels"):
        if len({sizes[name] for sizes in told.values()}) > 1:
            raise MismatchError(
                f"the networks do not belong to one model: {name} {told['G'][name]} of G, "
                f"{told['D'][name]} of D"
            )
    write(read, output, force=force)
    say(LICENCE)
    return {network: sum(v.size for v in own.values()) for network, own in read.items()}


def _found(source: Path, step: int | None, say: Callable[[str], None]) -> dict[str, Path]:
    """The file of each network that there is of a step."""
    if not source.is_dir():
        what = "is a file" if source.is_file() else "does not exist"
        raise CheckpointError(f"{source} {what}, where a folder with 200000-G.ckpt is expected")
    every = [(match, path) for path in sorted(source.iterdir())
             if (match := _FILE.fullmatch(path.name))]  # fmt: skip
    steps = sorted({int(match["step"]) for match, _ in every if match["network"] == "G"})
    if not steps:
        raise CheckpointError(f"{source} has no generator, such as 200000-G.ckpt")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(
            f"{source} has no generator of step {chosen} (it has those of "
            f"{listed(list(map(str, steps)))})"
        )
    if len(steps) > 1 and step is None:
        say(f"the networks are those of step {chosen}, the last of {len(steps)}")
    found = {match["network"]: path for match, path in every if int(match["step"]) == chosen}
    if "D" not in found:
        say(f"{source} has no D: a training that starts from this makes one anew")
    return {network: found[network] for network in ("G", "D") if network in found}


def _plain(tensors: Tensors) -> Tensors:
    return {n: v for n, v in tensors.items() if n.rpartition(".")[2] not in _STATISTICS}
