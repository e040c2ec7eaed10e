"""Official checkpoints of StarGAN v2 (clovaai's), made into one safetensors file.

A folder holds `100000_nets_ema.ckpt`, with the averages of three networks under `generator`,
`mapping_network` and `style_encoder`, and `100000_nets.ckpt` with `discriminator` beside them. They
are read as weights alone; optimisers' files are not. Names are facts that such files have; what
they name is written from the paper. The variant for faces has a branch that wants another network's
landmarks, and is refused.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import CheckpointError, MismatchError, ParameterError, get_trainer, listed

from .official import Say, Tensors, must_be_free, of_step, tensors_of, write

KEYS = {"G": "generator", "F": "mapping_network", "E": "style_encoder", "D": "discriminator"}
LICENCE = (
    "licence: StarGAN v2's code and its published weights are CC BY-NC 4.0: not for commercial use"
)
_FILE = re.compile(r"(?P<step>\d+)_(?P<network>nets_ema|nets)\.ckpt")
_ENDS = {"first": "from_rgb", "norm": "to_rgb.0", "last": "to_rgb.2"}  # of the generator
_FACES = (
    "it is the variant for faces (w_hpf), whose generator takes the heat maps of a network that "
    "finds landmarks (fan): only the one without that branch is known here"
)


def import_starganv2(
    source: str | Path, output: str | Path, *, force: bool = False, step: int | None = None,
    say: Say = print,
) -> dict[str, int]:  # fmt: skip
    """Write the networks of an official folder to one file: G, F and E, and D where it is.

    Args:
        source: the folder.
        output: a path that ends in `.safetensors`.
        force: replace an existing output.
        step: whose files; None is the last one that has averages.
        say: is told which step it is, what is lacking, and what the licence is.

    Returns:
        how many parameters each network has.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, or asks for code to be run.
        MismatchError: a network is of another kind, such as that for faces, or they do not belong
            together.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
    """
    source, output = Path(source), Path(output)
    must_be_free(output, force=force)
    found, steps = of_step(source, _FILE, step, "nets_ema", "100000_nets_ema.ckpt")
    if len(steps) > 1 and step is None:
        say(f"the networks are those of step {steps[-1]}, the last of {len(steps)}")
    file, judged = found["nets_ema"], found.get("nets")
    with tempfile.TemporaryDirectory(prefix="modelsoup-import-") as work:
        at = Path(work) / "one.safetensors"
        if _under(file, at, "fan") is not None:
            raise MismatchError(f"{file}: {_FACES}")
        files = {"G": file, "F": file, "E": file} | ({} if judged is None else {"D": judged})
        read = {}
        for network, of in files.items():
            own = _under(of, at, KEYS[network])
            if own is None:
                raise CheckpointError(f"{of} has no {KEYS[network]}, a network of StarGAN v2's")
            read[network] = own
    try:
        named = _named(read)
    except MismatchError as error:
        raise MismatchError(f"{file}: {error}") from None
    write(named, output, force=force)
    say(f"G, F and E are the averages over steps, of {file.name}")
    if judged is None:
        say(f"{source} has no {file.name.replace('_ema', '')}: a training that starts from this "
            f"makes D anew")  # fmt: skip
    say(LICENCE)
    return {network: sum(v.size for v in own.values()) for network, own in named.items()}


def _under(file: Path, work: Path, key: str) -> Tensors | None:
    """What a file has under a key; None where there is nothing."""
    try:
        return tensors_of(file, work, key)
    except ParameterError:
        return None


def _named(read: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The networks' tensors by our names; those of all classes together, with a row for each.

    Raises:
        MismatchError: a network lacks a tensor or has others, or they belong to several models.
    """
    sizes = _sizes(read)
    trainer: Any = get_trainer("starganv2")
    wanted = trainer.networks(trainer.options(**sizes))
    named: dict[str, Tensors] = {}
    for network, own in read.items():
        left, said, found = dict(own), f"the {KEYS[network]}", {}
        for name, shape in wanted[network].shapes().items():
            names = _official(network, name, sizes)
            if lacking := [one for one in names if one not in left]:
                raise MismatchError(f"{said} lacks {lacking[0]}")
            values = np.stack([left.pop(one) for one in names])
            if values.size != np.prod(shape):
                has = list(own[names[0]].shape)
                raise MismatchError(f"{said} does not fit the others: {names[0]} is {has}")
            found[name] = values.reshape(shape)
        if left:
            raise MismatchError(f"{said} has {listed(list(left))}, which such a network lacks")
        named[network] = found
    return named


def _sizes(read: Mapping[str, Tensors]) -> dict[str, Any]:
    """The trainer's options, by some tensors of each network."""
    first = _shape(read, "G", "from_rgb.weight", 4)
    hidden, noise = _shape(read, "F", "shared.0.weight", 2)
    style = _shape(read, "G", "decode.0.norm1.fc.weight", 2)[1]
    halved = len({n.split(".")[1] for n in read["G"] if n.startswith("encode.")}) - 2
    places = {int(n.split(".")[1]) for n in read["E"] if n.startswith("shared.")}
    deepest = max(places) - 2 if places else 0
    if halved == deepest - 1:  # one more than without the branch
        raise MismatchError(_FACES)
    if deepest < 2 or halved != deepest - 2:
        raise MismatchError(
            f"the generator halves a picture {halved} times, and the style encoder {deepest}: "
            f"two more are expected"
        )
    return {
        "size": 4 << deepest, "width": first[0], "channels": first[1], "style": style,
        "most": _shape(read, "E", f"shared.{deepest + 2}.weight", 4)[0], "hidden": hidden,
        "noise": noise,
        "classes": len({n.split(".")[1] for n in read["F"] if n.startswith("unshared.")}),
    }  # fmt: skip


def _shape(read: Mapping[str, Tensors], network: str, name: str, axes: int) -> tuple[int, ...]:
    found = read[network].get(name)
    if found is None or found.ndim != axes:
        raise MismatchError(f"the {KEYS[network]} has no {name} of {axes} dimensions")
    shape: tuple[int, ...] = found.shape
    return shape


def _official(network: str, name: str, sizes: Mapping[str, Any]) -> list[str]:
    """The official names of one of our tensors: several where it has a row for each class."""
    part, _, rest = name.partition(".")
    place, _, inner = rest.partition(".")
    inner = inner.replace("beside", "conv1x1")
    deepest = int(sizes["size"]).bit_length() - 3  # the last halving block of a trunk
    trunk = "main" if network == "D" else "shared"
    if network == "G":
        return [f"{_ENDS[part]}.{rest}" if part in _ENDS else f"{part}.{place}.{inner}"]
    if part == "shared":  # a ReLU follows each layer
        return [f"shared.{2 * int(place)}.{inner}"]
    if part in ("own", "last") and network == "F":
        layer = 2 * int(place) if part == "own" else 6
        last = inner if part == "own" else rest
        return [f"unshared.{n}.{layer}.{last}" for n in range(sizes["classes"])]
    if part == "style":
        return [f"unshared.{n}.{rest}" for n in range(sizes["classes"])]
    if part == "blocks":
        return [f"{trunk}.{int(place) + 1}.{inner}"]
    behind = {"first": 0, "last": deepest + 2, "verdict": deepest + 4}  # each after a LeakyReLU
    return [f"{trunk}.{behind[part]}.{rest}"]
