"""Names and shapes of CycleGAN's networks, and the layer groups that plans name; without torch.

The names are those of the official code (`G_A.model.1.weight`, …), so that its checkpoints load.
A translates X to Y (`G_A`), B back (`G_B`); a discriminator has the letter of the generator that it
opposes: `D_A` judges images of Y.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelsoup import MismatchError, ParameterError

GENERATORS = ("G_A", "G_B")
DISCRIMINATORS = ("D_A", "D_B")
NETWORKS = (*GENERATORS, *DISCRIMINATORS)
DIRECTIONS = {"x2y": "G_A", "y2x": "G_B"}

MULTIPLE = 4  # the generator halves an image twice, and doubles it as often
MAX_GROWTH = 8  # a discriminator has at most this many times its width

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GeneratorShape:
    """A ResNet generator (Zhu et al. 2017, appendix 7.2).

    Attributes:
        width: channels after the first layer, `ngf`.
        blocks: residual blocks: by convention 6 for 128 × 128, 9 for larger images.
        channels: of the images, both in and out.
    """

    width: int = 64
    blocks: int = 9
    channels: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 1 or self.channels < 1:
            raise ParameterError(
                f"a generator's width, blocks and channels must be at least 1, not {self.width}, "
                f"{self.blocks} and {self.channels}"
            )


@dataclass(frozen=True)
class DiscriminatorShape:
    """A PatchGAN discriminator.

    Attributes:
        width: channels after the first layer, `ndf`.
        layers: of stride 2; 3 see patches of 70 × 70.
        channels: of the images.
    """

    width: int = 64
    layers: int = 3
    channels: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.layers < 1 or self.channels < 1:
            raise ParameterError(
                f"a discriminator's width, layers and channels must be at least 1, not "
                f"{self.width}, {self.layers} and {self.channels}"
            )

    def output_size(self, size: int) -> int:
        """The side of the map of verdicts for an image's side; below 1 if that is too small."""
        for _ in range(self.layers):
            size //= 2  # kernel 4, stride 2, padding 1
        # Two more layers of stride 1 take one off each; the first of them is normalised over its
        # map, which must have more than one element.
        return size - 2 if size > 2 else 0


def generator_tensors(shape: GeneratorShape) -> dict[str, Shape]:
    """Name and shape of each tensor, in the order of the state dict."""
    width, deep = shape.width, 4 * shape.width
    last = 10 + shape.blocks
    convolutions = {
        "model.1": (width, shape.channels, 7, 7),
        "model.4": (2 * width, width, 3, 3),
        "model.7": (deep, 2 * width, 3, 3),
    }
    for block in range(10, last):
        for index in (1, 5):
            convolutions[f"model.{block}.conv_block.{index}"] = (deep, deep, 3, 3)
    # Transposed: the channels that go in come first.
    convolutions[f"model.{last}"] = (deep, 2 * width, 3, 3)
    convolutions[f"model.{last + 3}"] = (2 * width, width, 3, 3)
    convolutions[f"model.{last + 7}"] = (shape.channels, width, 7, 7)
    transposed = (f"model.{last}", f"model.{last + 3}")
    return _with_biases(convolutions, transposed)


def discriminator_tensors(shape: DiscriminatorShape) -> dict[str, Shape]:
    """Name and shape of each tensor, in the order of the state dict."""
    convolutions = {}
    channels = shape.channels
    for index, wide in zip(_places(shape), [*discriminator_widths(shape), 1], strict=True):
        convolutions[f"model.{index}"] = (wide, channels, 4, 4)
        channels = wide
    return _with_biases(convolutions, ())


def discriminator_widths(shape: DiscriminatorShape) -> list[int]:
    """Channels after each layer but the last: doubled by each, up to eight times."""
    return [shape.width * min(2**n, MAX_GROWTH) for n in range(shape.layers + 1)]


def model_tensors(
    generator: GeneratorShape, discriminator: DiscriminatorShape
) -> dict[str, tuple[str, Shape]]:
    """All four networks of a checkpoint: name → (safetensors dtype, shape)."""
    parts = {name: generator_tensors(generator) for name in GENERATORS}
    parts |= {name: discriminator_tensors(discriminator) for name in DISCRIMINATORS}
    return {
        f"{network}.{name}": ("F32", shape)
        for network, tensors in parts.items()
        for name, shape in tensors.items()
    }


def layer_groups(
    generator: GeneratorShape, discriminator: DiscriminatorShape
) -> dict[str, list[str]]:
    """Groups of layers for the rules of a plan: name → patterns over tensor names.

    The tree paper does not say which layers are low-level. Here: the generators' encoders and the
    discriminators' first three convolutions (as FreezeD freezes them), without the last two.
    """
    last = 10 + generator.blocks
    encoder = ["G_?.model.1.*", "G_?.model.4.*", "G_?.model.7.*"]
    early = [f"D_?.model.{index}.*" for index in _places(discriminator)[:-2][:3]]
    late = [f"D_?.model.{index}.*" for index in _places(discriminator)[len(early) :]]
    return {
        "generator": ["G_*"],
        "discriminator": ["D_*"],
        "x2y": ["G_A.*", "D_A.*"],
        "y2x": ["G_B.*", "D_B.*"],
        "low-level": [*encoder, *early],
        "encoder": encoder,
        "middle": ["G_?.model.*.conv_block.*"],
        "decoder": [f"G_?.model.{index}.*" for index in (last, last + 3, last + 7)],
        "discriminator-low": early,
        "discriminator-high": late,
    }


def generator_shape_of(
    tensors: Mapping[str, Sequence[int]], prefix: str = "G_A."
) -> GeneratorShape:
    """A generator's shape from the names and shapes in a checkpoint.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the generator's names begin with; may be empty.

    Raises:
        MismatchError: there is no such generator, or it is of another kind: with dropout, batch
            normalisation or anti-aliasing, or with other layers.
    """
    own = {n.removeprefix(prefix): tuple(s) for n, s in tensors.items() if n.startswith(prefix)}
    said = f"the generator {prefix.rstrip('.')!r}" if prefix else "the generator"
    if not own:
        raise MismatchError(f"there is no tensor of {said} (names that begin with {prefix!r})")
    _must_be_plain(own, said)
    first = own.get("model.1.weight")
    if first is None or len(first) != 4:
        raise MismatchError(f"{said} has no model.1.weight of four dimensions, its first layer")
    blocks = {match[1] for name in own if (match := re.match(r"model\.(\d+)\.conv_block\.", name))}
    if not blocks:
        raise MismatchError(f"{said} has no residual block (model.10.conv_block.1.weight, …)")
    shape = GeneratorShape(first[0], len(blocks), first[1])
    must_match(own, generator_tensors(shape), said)
    return shape


def discriminator_shape_of(
    tensors: Mapping[str, Sequence[int]], prefix: str = "D_A."
) -> DiscriminatorShape:
    """A discriminator's shape from the names and shapes in a checkpoint.

    Raises:
        MismatchError: there is no such discriminator, or it is of another kind.
    """
    own = {n.removeprefix(prefix): tuple(s) for n, s in tensors.items() if n.startswith(prefix)}
    said = f"the discriminator {prefix.rstrip('.')!r}" if prefix else "the discriminator"
    if any(name.startswith("net.") for name in own):
        raise MismatchError(f"{said} is a pixel discriminator, where a PatchGAN is expected")
    first = own.get("model.0.weight")
    if first is None or len(first) != 4:
        raise MismatchError(f"{said} has no model.0.weight of four dimensions, its first layer")
    if "model.3.weight" in own:
        raise MismatchError(f"{said} has batch normalisation, where instance norm is expected")
    weights = [name for name in own if name.endswith(".weight")]
    shape = DiscriminatorShape(first[0], max(len(weights) - 2, 1), first[1])
    must_match(own, discriminator_tensors(shape), said)
    return shape


def must_match(own: Mapping[str, Shape], expected: Mapping[str, Shape], said: str) -> None:
    """Check names and shapes of a network against what they must be.

    Raises:
        MismatchError: a name is missing, unknown or of another shape; the message names it.
    """
    for name, shape in expected.items():
        if name not in own:
            raise MismatchError(f"{said} lacks {name} {list(shape)}")
        if own[name] != shape:
            raise MismatchError(
                f"{said}: {name} has the shape {list(own[name])}, where {list(shape)} is expected"
            )
    for name, shape in own.items():
        if name not in expected:
            raise MismatchError(f"{said} has {name} {list(shape)}, which such a network lacks")


def must_fit(
    start: Mapping[str, Shape], generator: GeneratorShape, discriminator: DiscriminatorShape,
    said: str,
) -> None:  # fmt: skip
    """Check that what a start checkpoint holds, which may be a part, fits the options.

    Raises:
        MismatchError: a tensor of another shape, or of a network with more blocks or layers; the
            message names the tensor and both shapes.
    """
    expected = {name: shape for name, (_, shape) in model_tensors(generator, discriminator).items()}
    options = {
        "G": f"width {generator.width}, {generator.blocks} blocks and {_said(generator)}",
        "D": f"d_width {discriminator.width}, {discriminator.layers} d_layers and "
        f"{_said(discriminator)}",
    }
    # In the order of layers, so that the first that is told is the one that tells most.
    order = {name: place for place, name in enumerate(expected)}
    for name in sorted(start, key=lambda name: order.get(name, len(order))):
        shape = start[name]
        network, _, rest = name.partition(".")
        if network not in NETWORKS:
            raise MismatchError(
                f"{said} has the tensor {name!r} {list(shape)}, which belongs to none of "
                f"{', '.join(NETWORKS)}"
            )
        if name in expected and tuple(shape) == expected[name]:
            continue
        here = f"the shape {list(expected[name])}" if name in expected else "no such tensor"
        blocks = {m[1] for n in start if (m := re.match(rf"{network}\.model\.(\d+)\.conv_b", n))}
        of_start = f", and the start has {len(blocks)} blocks" if ".conv_block." in rest else ""
        raise MismatchError(
            f"{said}: tensor {name!r} has the shape {list(shape)}, but with {options[network[0]]} "
            f"{'it has ' if name in expected else 'there is '}{here}{of_start}"
        )


def _said(shape: GeneratorShape | DiscriminatorShape) -> str:
    return f"{shape.channels} channel{'s' * (shape.channels > 1)}"


def _must_be_plain(own: Mapping[str, Shape], said: str) -> None:
    if any(".conv_block.6.weight" in name and len(shape) == 4 for name, shape in own.items()):
        raise MismatchError(
            f"{said} has dropout (conv_block.6.weight), where one without is expected"
        )
    if len(own.get("model.2.weight", ())) == 1 or "model.2.running_mean" in own:
        raise MismatchError(
            f"{said} has batch normalisation (model.2), where instance norm is expected"
        )
    if any(name.endswith(".filt") for name in own):
        raise MismatchError(
            f"{said} has anti-aliasing filters, as those of CUT, where strided convolutions are "
            f"expected"
        )


def _places(shape: DiscriminatorShape) -> list[int]:
    """Where the convolutions stand: 0, 2, 5, 8, …; between them are norms and activations."""
    return [0, *(3 * n - 1 for n in range(1, shape.layers + 2))]


def _with_biases(convolutions: Mapping[str, Shape], transposed: Sequence[str]) -> dict[str, Shape]:
    tensors: dict[str, Shape] = {}
    for name, shape in convolutions.items():
        tensors[f"{name}.weight"] = shape
        tensors[f"{name}.bias"] = (shape[1] if name in transposed else shape[0],)
    return tensors
