"""Official checkpoints of StarGAN (yunjey's), made into one safetensors file.

A folder holds `200000-G.ckpt` and `200000-D.ckpt`, and those of other steps. They are read as
weights alone. Statistics that the code keeps for its instance norms are left out: it always uses
those of each picture.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from modelsoup import MismatchError, ParameterError, counted

from ..networks import stargans
from ..pictures.attributes import must_be_names
from .classes import classes_told
from .official import Say, Tensors, must_be_free, of_step, tensors_of, write

_FILE = re.compile(r"(?P<step>\d+)-(?P<network>[GD])\.ckpt")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
LICENCE = (
    "licence: the files say nothing. StarGAN's code is MIT; CelebA, which its published weights "
    "were trained on, is for research that is not commercial"
)


def import_stargan(
    source: str | Path, output: str | Path, *, force: bool = False, step: int | None = None,
    attributes: Sequence[str] = (), say: Say = print,
) -> dict[str, int]:  # fmt: skip
    """Write the networks of an official folder to one safetensors file: G, and D where it is.

    Args:
        source: the folder.
        output: a path that ends in `.safetensors`.
        force: replace an existing output.
        step: whose files; None is the last one that has a generator.
        attributes: the names, in their order, of those that the networks were trained on, such as
            CelebA's: the files do not tell. Without, each is a class without a name.
        say: is told which step it is, what is lacking, and what the licence is.

    Returns:
        how many parameters each network has.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, or asks for code to be run.
        MismatchError: a network is of another kind, or they do not belong together.
        ParameterError: there are more attributes, or fewer, or two of a name.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    source, output = Path(source), Path(output)
    must_be_free(output, force=force)
    if attributes:
        must_be_names(attributes, "attributes")
    found, steps = of_step(source, _FILE, step, "G", "200000-G.ckpt")
    if len(steps) > 1 and step is None:
        say(f"the networks are those of step {steps[-1]}, the last of {len(steps)}")
    if "D" not in found:
        say(f"{source} has no D: a training that starts from this makes one anew")
    order = [network for network in "GD" if network in found]
    files = {network: found[network] for network in order}
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
    if attributes and told["G"]["classes"] != len(attributes):
        raise ParameterError(
            f"{counted(len(attributes), 'attribute')} are named, but {files['G']} knows "
            f"{told['G']['classes']}"
        )
    write(read, output, force=force, metadata=classes_told(attributes, attributes=True))
    say(LICENCE)
    return {network: sum(v.size for v in own.values()) for network, own in read.items()}


def _plain(tensors: Tensors) -> Tensors:
    return {n: v for n, v in tensors.items() if n.rpartition(".")[2] not in _STATISTICS}
