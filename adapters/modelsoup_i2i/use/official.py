"""What reading official checkpoints has in common, and writing what was read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from modelsoup import (
    CheckpointError,
    OutputError,
    check_output,
    convert,
    listed,
    open_checkpoint,
    placed,
)

Tensors = dict[str, np.ndarray]
Say = Callable[[str], None]
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


def must_be_free(output: Path, *, force: bool) -> None:
    """Check that a file can be written where an import is to be.

    Raises:
        OutputError: it has another suffix, or something is there and `force` is not given.
    """
    if output.suffix != ".safetensors":
        raise OutputError(f"the output {output} must end in .safetensors")
    check_output(output, force=force)


def write(
    networks: Mapping[str, Tensors], output: Path, *, force: bool,
    metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write networks to one safetensors file, all or nothing, with what else it is to say.

    Raises:
        OutputError: it cannot be written, or something is there and `force` is not given.
    """
    tensors = {f"{network}.{name}": values for network, own in networks.items()
               for name, values in own.items()}  # fmt: skip
    with placed(output, force=force) as partial:
        partial.write_bytes(save(tensors, {"format": "pt", **(metadata or {})}))


def of_step(
    source: Path, file: re.Pattern[str], step: int | None, generator: str, such: str
) -> tuple[dict[str, Path], list[int]]:
    """The files of a step in a folder that has some of several.

    Args:
        source: the folder.
        file: what its files are called, with the groups `network` and `step`.
        step: which; None is the last one that has a generator.
        generator: what the generator is called there.
        such: the name of a generator's file, for errors.

    Returns:
        the file of each network, and the steps that have a generator.

    Raises:
        CheckpointError: it is no folder, or has no generator, or none of that step.
    """
    if not source.is_dir():
        what = "is a file" if source.is_file() else "does not exist"
        raise CheckpointError(f"{source} {what}, where a folder with {such} is expected")
    every: dict[int, dict[str, Path]] = {}
    for path in sorted(source.iterdir()):
        if match := file.fullmatch(path.name):
            every.setdefault(int(match["step"]), {})[match["network"]] = path
    steps = sorted(n for n, files in every.items() if generator in files)
    if not steps:
        raise CheckpointError(f"{source} has no generator, such as {such}")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(
            f"{source} has no generator of step {chosen} (it has those of "
            f"{listed(list(map(str, steps)))})"
        )
    return every[chosen], steps


def tensors_of(path: Path, work: Path, key: str | None = None) -> Tensors:
    """A network's tensors under their plain names, read by torch's weights-only loader.

    Args:
        path: what `torch.save` wrote.
        work: a file for the tensors, which is replaced.
        key: where they are, in a file with several networks.

    Raises:
        CheckpointError: it is missing or damaged, asks for code to be run, or has a name twice.
        ParameterError: it has nothing under the key.
    """
    convert(path, work, key=key, force=True)
    opened = open_checkpoint(work)
    tensors: Tensors = {}
    for name in opened.tensors:
        plain = name
        while plain.startswith(WRAPPERS):
            plain = plain.partition(".")[2]
        if plain in tensors:
            raise CheckpointError(f"{path} has {plain} twice, with and without a wrapper's prefix")
        counted = plain.endswith(".num_batches_tracked")
        tensors[plain] = np.array(opened[name], np.int64 if counted else np.float32)
    return tensors
