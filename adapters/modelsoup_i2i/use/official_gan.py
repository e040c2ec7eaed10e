"""Official checkpoints of BigGAN, StyleGAN and DeepI2I, made into one safetensors file.

Of BigGAN (ajbrock's BigGAN-PyTorch) a folder holds `G.pth`, `G_ema.pth` and `D.pth`, or with a
suffix `G_best0.pth`, `G_copy1.pth`, …; DeepI2I (yaxingwang's) has its encoder and adaptor beside
them, `E1.pth` and `A1.pth`. Of StyleGAN (rosinality's) one file holds all, and so does DeepI2I's
variant for two classes. They are read as weights alone; optimisers' files are not.

The encoder of a translation begins as the discriminator: where there is none of its own, its
weights are written as `E.*` too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelsoup import (
    CheckpointError,
    MismatchError,
    ParameterError,
    listed,
    nearest,
)

from ..networks import biggans, stylegans
from .official import Say, Tensors, must_be_free, tensors_of, write

ClassRows = Literal["keep", "resize"]
IMAGENET = (
    "licence: the files say nothing. BigGAN-PyTorch's code is MIT; ImageNet, which its published "
    "weights were trained on, is for research that is not commercial"
)
FFHQ = (
    "licence: the file says nothing. The code of that layout is MIT; FFHQ, which its published "
    "weights were trained on, is CC BY-NC-SA 4.0, and NVIDIA's own weights are CC BY-NC 4.0: "
    "not for commercial use"
)
NO_LICENCE = (
    "licence: DeepI2I's repository has none, so that its weights may not be used, let alone "
    "commercially, but as its authors allow"
)

_FILE = re.compile(r"(?P<network>G_ema|G|D|E1|A1)(?:_(?P<suffix>[A-Za-z]+\d+))?\.pth")
_NETWORKS = {"G_ema": "G", "E1": "E", "A1": "A"}  # what a file holds, where it has another name
_DEAD = re.compile(r"(linear|embed)\.")  # of encoder and adaptor, which nothing goes through
_CONSTANT = ("u0", "sv0", "stored_mean", "stored_var", "strength", "weight_flip")
_ITERATIONS = 30  # of the power method, for rows that are new


def import_biggan(
    source: str | Path, output: str | Path, *, force: bool = False, suffix: str = "",
    class_rows: ClassRows = "keep", classes: int | None = None, seed: int = 0, say: Say = print,
) -> dict[str, int]:  # fmt: skip
    """Write an experiment folder of BigGAN-PyTorch to one safetensors file: G, D, and D as E.

    Args:
        source: the folder.
        output: a path that ends in `.safetensors`.
        force: replace an existing output.
        suffix: which files: `best0` takes `G_ema_best0.pth` and so on.
        class_rows: `keep` the rows of classes; or `resize` them: `classes` new ones are drawn, each
            from N(mean row, the rows' standard deviation), since other data have other classes.
        classes: how many, with `resize`.
        seed: of what is drawn.
        say: is told what was left aside, and what the licence is.

    Returns:
        how many parameters each network has.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, or asks for code to be run.
        MismatchError: a network is of another kind, or they do not belong together.
        ParameterError: `classes` without `resize`, or the other way round.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    output = Path(output)
    must_be_free(output, force=force)
    _must_resize(class_rows, classes, seed)
    files = _found(Path(source), suffix, ("G", "D"), say)
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        read = {n: tensors_of(file, Path(work) / "one.safetensors") for n, file in files.items()}
    _must_belong(read, files)
    if classes is not None:
        read = {name: _resized(own, classes, seed) for name, own in read.items()}
    if "D" in read:
        read["E"] = {n: values for n, values in read["D"].items() if not _DEAD.match(n)}
    return _finish(read, output, IMAGENET, force=force, say=say)


def import_deepi2i(
    source: str | Path, output: str | Path, *, force: bool = False, suffix: str = "",
    class_rows: ClassRows = "keep", classes: int | None = None, seed: int = 0,
    from_scratch: bool = False, size: int | None = None, say: Say = print,
) -> dict[str, int]:  # fmt: skip
    """Write what DeepI2I's code saved to one safetensors file: G, D, E and A.

    Layers of E and A that nothing goes through are left out.

    Args:
        source: a folder with `G.pth`, `D.pth`, `E1.pth` and `A1.pth`; or the one file of the
            variant for two classes, on StyleGAN.
        output: a path that ends in `.safetensors`.
        force: as `import_biggan` takes it, as it does what follows.
        suffix: which files.
        class_rows: `keep` or `resize`.
        classes: how many, with `resize`.
        seed: of what is drawn.
        from_scratch: it was trained without pre-trained networks. The code then adds what the
            adaptor makes with the strengths 1, 1, 1 and, at 32 × 32, 0.1; otherwise 0.1 at all.
        size: of StyleGAN's pictures, as `import_stylegan` takes it.
        say: is told what was left aside, and what the licence is.

    Raises:
        as `import_biggan`.
    """
    source, output = Path(source), Path(output)
    must_be_free(output, force=force)
    _must_resize(class_rows, classes, seed)
    if source.is_file():
        if classes is not None or suffix or from_scratch:
            raise ParameterError(
                f"{source} is one file, of StyleGAN: it has no classes, no suffix and one strength"
            )
        read = _of_one_file(source, size, ("encoder", "align"), say)
        return _finish(read, output, NO_LICENCE, force=force, say=say)
    if size is not None:
        raise ParameterError(f"{source} is no file of StyleGAN, which alone needs a size")
    files = _found(source, suffix, ("G", "D", "E", "A"), say)
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        read = {n: tensors_of(file, Path(work) / "one.safetensors") for n, file in files.items()}
    for name in ("E", "A"):
        if name in read:
            read[name] = {n: values for n, values in read[name].items() if not _DEAD.match(n)}
    if "A" in read:
        # Official code has the strengths in its forward pass. The first is the largest maps'.
        others = sum(name.endswith(".0.conv1.weight") for name in read["A"]) - 1
        strengths = [0.1, *[1.0 if from_scratch else 0.1] * others]
        read["A"]["strength"] = np.array(strengths, np.float32)
    _must_belong(read, files)
    if classes is not None:
        read = {name: _resized(own, classes, seed) for name, own in read.items()}
    return _finish(read, output, NO_LICENCE, force=force, say=say)


def import_stylegan(
    source: str | Path, output: str | Path, *, force: bool = False, size: int | None = None,
    say: Say = print,
) -> dict[str, int]:  # fmt: skip
    """Write a checkpoint of style-based-gan-pytorch to one safetensors file: G, D, and D as E.

    Such a file has layers for pictures of up to 1024 × 1024, whatever it was trained with: those
    that pictures of one size go through are kept.

    Args:
        source: the file; or that of a generator alone.
        output: a path that ends in `.safetensors`.
        force: replace an existing output.
        size: of its pictures; None is the largest whose layers were trained: before, their noise
            has the weight 0.
        say: is told what was taken, and what the licence is.

    Returns:
        how many parameters each network has.

    Raises:
        CheckpointError, MismatchError, OutputError: as `import_biggan`.
        ParameterError: there is no such size, or nothing in the file tells it.
    """
    source, output = Path(source), Path(output)
    must_be_free(output, force=force)
    return _finish(_of_one_file(source, size, (), say), output, FFHQ, force=force, say=say)


def _finish(
    read: Mapping[str, Tensors], output: Path, licence: str, *, force: bool, say: Say
) -> dict[str, int]:
    networks = {name: read[name] for name in ("E", "A", "G", "D") if name in read}
    write(networks, output, force=force)
    say(licence)
    return {
        network: sum(v.size for n, v in own.items() if not _is_constant(n, own))
        for network, own in networks.items()
    }


def _is_constant(name: str, among: Collection[str]) -> bool:
    return name.rpartition(".")[2] in _CONSTANT or f"{name}_flip" in among


def _must_resize(class_rows: ClassRows, classes: int | None, seed: int) -> None:
    if class_rows not in ("keep", "resize"):
        raise ParameterError(f"class_rows is {class_rows!r}, but must be keep or resize")
    if (class_rows == "resize") != (classes is not None):
        raise ParameterError(
            "classes says how many rows there are after class_rows resize: both are given or none"
        )
    if classes is not None and classes < 1:
        raise ParameterError(f"classes is {classes}, but must be at least 1")
    if seed < 0:
        raise ParameterError(f"seed is {seed}, but must be at least 0")


# BigGAN and what is built on it.


def _found(source: Path, suffix: str, networks: Collection[str], say: Say) -> dict[str, Path]:
    """The file of each network that there is; averages over steps go before what they follow."""
    if not source.is_dir():
        what = "is a file" if source.is_file() else "does not exist"
        raise CheckpointError(f"{source} {what}, where a folder with G.pth and D.pth is expected")
    every = [(match, path) for path in sorted(source.iterdir())
             if (match := _FILE.fullmatch(path.name))]  # fmt: skip
    if not every:
        raise CheckpointError(f"{source} has no file of the official layout, such as G_ema.pth")
    files = {m["network"]: path for m, path in every if (m["suffix"] or "") == suffix}
    if not {"G", "G_ema"} & files.keys():
        have = sorted({m["suffix"] for m, _ in every if m["suffix"]})
        wanted = f"G{f'_{suffix}' if suffix else ''}.pth"
        hint = nearest(suffix, have) if suffix else ""
        choice = hint or (f" (it has files with the suffix {listed(have)})" if have else "")
        raise CheckpointError(f"{source} has no generator, {wanted} or its average{choice}")
    if "G_ema" in files and "G" in files:
        say(
            f"G is the average over steps, {files['G_ema'].name}; {files.pop('G').name} is not read"
        )
    found = {_NETWORKS.get(name, name): path for name, path in files.items()}
    for name in networks:
        if name not in found:
            say(f"{source} has no {name}: a training that starts from this makes one anew")
    return {name: found[name] for name in networks if name in found}


def _must_belong(read: Mapping[str, Tensors], files: Mapping[str, Path]) -> biggans.Arch:
    """Check that networks are BigGAN's and one another's, and tell their plan."""
    if any(name.startswith("style.") for name in read["G"]):
        raise MismatchError(
            f"{files['G']} is a StyleGAN, where a BigGAN is expected: `soup i2i import stylegan` "
            f"reads it"
        )
    shapes = {network: _shapes(own) for network, own in read.items()}
    network = "G"
    try:
        sizes = biggans.generator_in(shapes["G"])
        if (network := "D") in read:
            biggans.must_agree(sizes, biggans.discriminator_in(shapes["D"]))
        encoder = {**sizes, "least": biggans.DEEPEST}
        if (network := "E") in read:
            encoder = biggans.encoder_in(shapes["E"], sizes)
        if (network := "A") in read:
            biggans.adaptor_in(shapes["A"], encoder)
    except MismatchError as error:
        raise MismatchError(f"{files[network]}: {error}") from None
    arch: biggans.Arch = sizes["arch"]
    return arch


def _resized(own: Tensors, classes: int, seed: int) -> Tensors:
    """A network with so many rows for classes, drawn as those that it had are spread."""
    changed = dict(own)
    for name in ("shared", "embed"):
        rows = own.get(f"{name}.weight")
        if rows is None:
            continue
        made = changed[f"{name}.weight"] = biggans.remade(rows, classes, seed)
        if f"{name}.u0" in own:
            left = np.ones((1, classes), np.float32)
            for _ in range(_ITERATIONS):
                right = _unit(left @ made)
                left = _unit(right @ made.T)
            changed[f"{name}.u0"] = left
            changed[f"{name}.sv0"] = (right @ made.T @ left.T).reshape(1)
    return changed


def _unit(vector: np.ndarray) -> np.ndarray:
    made: np.ndarray = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return made


# StyleGAN and what is built on it.


def _of_one_file(
    source: Path, size: int | None, others: Collection[str], say: Say
) -> dict[str, Tensors]:
    """The networks of a file, of pictures of one size."""
    if not source.is_file():
        raise CheckpointError(f"{source} is no file, in which a StyleGAN's networks are")
    if size is not None:
        stylegans.must_be_a_size(size)
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        at = Path(work) / "one.safetensors"
        whole = {key: _under(source, at, key) for key in ("g_running", "discriminator", *others)}
        if whole["g_running"]:
            say("G is the average over steps, g_running; generator is not read")
        else:
            whole["g_running"] = _under(source, at, "generator") or tensors_of(source, at)
    generator = whole["g_running"]
    if "shared.weight" in generator:
        raise MismatchError(
            f"{source} is a BigGAN, where a StyleGAN is expected: `soup i2i import biggan` reads it"
        )
    size = _size_of(source, generator, size, say)
    read = {"G": _of_size(generator, size)}
    for key, name in (("discriminator", "D"), ("encoder", "E"), ("align", "A")):
        if whole.get(key):
            read[name] = _of_size(whole[key], size, judges=name == "D")
        elif key in ("discriminator", *others):
            say(f"{source} has no {key}: a training that starts from this makes one anew")
    if "D" in read and not others:
        read["E"] = _of_size(whole["discriminator"], size, judges=False)
    if "A" in read:
        read["A"] = {n: v for n, v in whole["align"].items() if not n.startswith("progression.0.")}
        read["A"]["strength"] = np.full(len(stylegans.TAPS), 0.1, np.float32)
    _must_agree(read, source)
    return read


def _under(source: Path, work: Path, key: str) -> Tensors:
    try:
        return tensors_of(source, work, key)
    except ParameterError:  # there is nothing under it
        return {}


def _size_of(source: Path, generator: Tensors, size: int | None, say: Say) -> int:
    """The size that is asked for, or that a generator was trained with."""
    learnt = [
        side for side in stylegans.sides(stylegans.MOST)
        for noise in ("noise1", "noise2")
        if np.any(generator.get(
            f"generator.progression.{stylegans.draws(side)}.{noise}.weight_orig", 0
        ))
    ]  # fmt: skip
    trained = max(learnt, default=None)
    if size is None:
        if trained is None:
            raise ParameterError(
                f"{source} does not tell the size of its pictures, as all of its noise has the "
                f"weight 0: name it (size 256, say)"
            )
        stylegans.must_be_a_size(trained)
        say(f"its pictures are {trained} × {trained}: larger layers were not trained")
        return trained
    if trained is not None and size > trained:
        raise ParameterError(
            f"size is {size}, but {source} was trained up to {trained}: beyond, all of its noise "
            f"has the weight 0"
        )
    return size


def _of_size(own: Tensors, size: int, *, judges: bool = True) -> Tensors:
    """What of a network pictures of a size go through."""
    deepest, first = int(stylegans.draws(size)), int(stylegans.judges(size))
    last = int(stylegans.judges(stylegans.DEEPEST))

    def kept(name: str) -> bool:
        room, _, rest = name.removeprefix("generator.").partition(".")
        place = rest.partition(".")[0]
        if not place.isdigit():
            return judges or room != "linear"
        of_generator = name.startswith("generator.")
        if room in ("to_rgb", "from_rgb"):
            return int(place) == (deepest if of_generator else first)
        if room == "progression" and not of_generator:
            return first <= int(place) and (judges or int(place) < last)
        return room != "progression" or int(place) <= deepest

    return {name: values for name, values in own.items() if kept(name)}


def _must_agree(read: Mapping[str, Tensors], source: Path) -> None:
    told: dict[str, dict[str, Any]] = {}
    try:
        for name, find in (
            ("G", stylegans.generator_in), ("D", stylegans.discriminator_in),
            ("E", stylegans.encoder_in), ("A", stylegans.adaptor_in),
        ):  # fmt: skip
            if name in read:
                told[name] = find(_shapes(read[name]))
    except MismatchError as error:
        raise MismatchError(f"{source}: {error}") from None
    for name, sizes in told.items():
        for what in ("width", "channels"):
            if what in sizes and sizes[what] != told["G"][what]:
                raise MismatchError(
                    f"{source}: the networks do not belong to one model: G has the {what} "
                    f"{told['G'][what]}, and {name} {sizes[what]}"
                )


def _shapes(own: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in own.items()}
