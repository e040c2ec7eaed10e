"""What the trainers of BigGAN's networks share: sizes, rates, networks. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from ..networks import biggans
from ..networks.described import Network
from ..pictures.draws import Classes, Noise
from ..pictures.transforms import Transform
from ..training.options import ClassOptions
from ..training.players import Player
from ..training.ranges import Count, Number, Rate


@dataclass(frozen=True)
class BigGanOptions(ClassOptions):
    """Sizes of BigGAN's networks, and how they are updated.

    Attributes:
        size: pixels of a side: 32, 64, 128 or 256; `32s` and `64s` have smaller networks.
        ch: the width that all others are multiples of.
        rows: of the embeddings of classes; None is as many as there are classes.
        class_rows: of a start with other classes: `keep` wants as many rows as it has, of which the
            first are the data's; `resize` draws new ones about their mean, as far apart as they.
        chunk: numbers of noise for each block of the generator.
        shared: the width of the generator's embedding.
        attention: the side of the maps that attention follows; 0 is none.
        batch: of each pass; the published runs sum 8 passes of 4 images.
        lr: the generator's rate.
        d_lr: the discriminator's.
        beta2: Adam's second decay; the first is 0.
        ema: the share of the old average of weights that a step keeps; None for no average.
    """

    size: Literal[32, 64, 128, 256, "32s", "64s"] = 128
    ch: Annotated[int, Ge(8)] = 96
    rows: Count | None = None
    class_rows: Literal["keep", "resize"] = "keep"
    chunk: Count = 20
    shared: Count = 128
    attention: Number = 64
    flip: bool = False
    batch: Count = 4
    lr: Rate = 1e-4
    d_lr: Rate = 4e-4
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    ema: Annotated[float, Ge(0), Lt(1)] | None = None

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.rows is not None and self.rows < self.class_count:
            raise ValueError(f"rows is {self.rows}, fewer than the {self.class_count} classes")

    @property
    def arch(self) -> biggans.Arch:
        """The networks' plan."""
        arch: biggans.Arch = str(self.size)  # type: ignore[assignment]
        return arch

    def transform(self) -> Transform:
        """The middle of a picture, at the networks' size."""
        side = (biggans.side(self.arch),) * 2
        return Transform("centre_crop", side, side, self.flip)

    @property
    def count(self) -> int:
        """Rows of the embeddings."""
        return self.rows or self.class_count

    def of_both(self) -> dict[str, Any]:
        """The sizes that all networks share."""
        return {
            "arch": self.arch, "ch": self.ch, "attention": self.attention,
            "channels": self.channels,
        }  # fmt: skip

    def generator(self, least: int = biggans.DEEPEST) -> Network:
        """Of these sizes."""
        own = {"classes": self.count, "chunk": self.chunk, "shared": self.shared, "least": least}
        return Network(biggans.GENERATOR, self.of_both() | own)

    def discriminator(self) -> Network:
        """Of these sizes."""
        return Network(biggans.DISCRIMINATOR, self.of_both() | {"classes": self.count})

    def noise(self, name: str, least: int = biggans.DEEPEST) -> Noise:
        """The generator's."""
        return Noise(name, (biggans.noise(self.arch, self.chunk, least),))

    def labels(self, name: str) -> Classes:
        """A class that a picture is to be of."""
        return Classes(name, self.class_count or self.count)

    def player(self, *networks: str, averaged: bool = False) -> Player:
        """By Adam: the generator at its own rate, all others at the discriminator's."""
        rate = self.lr if networks == ("G",) else self.d_lr
        settings = {"betas": (0.0, self.beta2), "eps": 1e-6}
        return Player(networks, rate, settings=settings, ema=self.ema if averaged else None)

    def remade(self, averaged: Sequence[str] = ()) -> dict[str, int]:
        """Tensors with a row for each class, where those of a start are to be re-made."""
        if self.class_rows == "keep":
            return {}
        names = {"G": "shared.weight", "D": "embed.weight"}
        return {f"{n}.{names[n.partition('_')[0]]}": self.count for n in ("G", "D", *averaged)}


def sizes_in(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The options that a checkpoint's generator decides, and its discriminator agrees to.

    Raises:
        MismatchError: there is no such generator, or the two are of different sizes.
    """
    own = {name: tuple(shape) for name, shape in shapes.items()}
    sizes = biggans.generator_in(own, "G.")
    if any(name.startswith("D.") for name in own):
        biggans.must_agree(sizes, biggans.discriminator_in(own, "D."))
    arch = sizes["arch"]
    return {
        "size": int(arch) if arch.isdigit() else arch, "rows": sizes["classes"],
        **{name: sizes[name] for name in ("ch", "chunk", "shared", "attention", "channels")},
    }  # fmt: skip
