"""Official checkpoints of FUNIT (NVlabs) and BalaGAN (orpatashnik), made into one safetensors file.

A folder holds `gen_00100000.pt`, with the generator and its average over steps under `gen` and
`gen_test`, and `dis_00100000.pt` with the discriminator under `dis`, for each step that was kept.
They are read as weights alone; optimisers' files and BalaGAN's encoder are not.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Literal

from modelsoup import CheckpointError, MismatchError, ParameterError

from ..networks.funits import discriminator_in, generator_in
from .official import Say, Tensors, must_be_free, of_step, tensors_of, write

Kind = Literal["balagan", "funit"]
LICENCES = {
    "funit": (
        "licence: FUNIT's code and its published weights are CC BY-NC-SA 4.0: not for commercial "
        "use, and what is made of them is to be shared alike"
    ),
    "balagan": (
        "licence: BalaGAN's repository says MIT, but its networks are FUNIT's, which are CC "
        "BY-NC-SA 4.0: take them as not for commercial use"
    ),
}
_FILE = re.compile(r"(?P<network>gen|dis)_(?P<step>\d+)\.pt")
_DUMMIES = re.compile(r"dec\..*\.norm\.running_(mean|var)")  # of AdaIN, which has no statistics


def import_funit(
    source: str | Path, output: str | Path, kind: Kind = "funit", *, force: bool = False,
    step: int | None = None, say: Say = print,
) -> dict[str, int]:  # fmt: skip
    """Write the networks of a folder to one safetensors file: G, by its average, and D.

    Args:
        source: the folder.
        output: a path that ends in `.safetensors`.
        kind: whose it is: BalaGAN's discriminator has two heads.
        force: replace an existing output.
        step: which files; None is the last.
        say: is told what was left aside, and what the licence is.

    Returns:
        how many parameters each network has.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, or asks for code to be run.
        MismatchError: a network is of another kind.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    source, output = Path(source), Path(output)
    must_be_free(output, force=force)
    files, _ = of_step(source, _FILE, step, "gen", "gen_00100000.pt")
    read: dict[str, Tensors] = {}
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        at = Path(work) / "one.safetensors"
        key, read["G"] = _generator(files["gen"], at)
        if "dis" in files:
            read["D"] = tensors_of(files["dis"], at, "dis")
    shapes = {n: {t: tuple(v.shape) for t, v in own.items()} for n, own in read.items()}
    try:
        file = files["gen"]
        generator_in(shapes["G"], "")
        if "D" in read:
            file = files["dis"]
            heads = discriminator_in(shapes["D"], "")["heads"]
            if (heads == 2) != (kind == "balagan"):
                has, other = ("two heads", "balagan") if heads == 2 else ("one head", "funit")
                raise MismatchError(
                    f"the discriminator has {has}: `soup i2i import {other}` reads such"
                )
    except MismatchError as error:
        raise MismatchError(f"{file}: {error}") from None
    write(read, output, force=force)
    if key == "gen_test":
        say(f"G is the average over steps, gen_test of {files['gen'].name}; gen is not read")
    if "D" not in read:
        say(f"{source} has no {files['gen'].name.replace('gen', 'dis')}: a training that starts "
            f"from this makes D anew")  # fmt: skip
    say(LICENCES[kind])
    return {name: sum(values.size for values in own.values()) for name, own in read.items()}


def _generator(file: Path, work: Path) -> tuple[str, Tensors]:
    """Under which key it was found, and its tensors."""
    for key in ("gen_test", "gen"):
        try:
            own = tensors_of(file, work, key)
        except ParameterError:  # there is nothing under it
            continue
        return key, {name: values for name, values in own.items() if not _DUMMIES.fullmatch(name)}
    raise CheckpointError(f"{file} has neither gen_test nor gen, a generator of the official code")
