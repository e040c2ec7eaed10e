"""CUT and FastCUT: Park, Efros, Zhang and Zhu, ECCV 2020.

One generator `G` and one discriminator `D`. What a place of the translation looks like to `G`'s own
encoder is to be told, among other places, as what its source looks like there; `F` makes of both
the vectors that are compared. The names are those of the official code, so that its checkpoints
load. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from zlib import crc32

import numpy as np
from annotated_types import Ge

from ..networks import antialiaseds as known
from ..networks.described import Joined, Network
from ..pictures.draws import Draw, Places, Unpaired
from ..pictures.picture import Images
from ..training.options import UnpairedOptions
from ..training.players import Player
from ..training.ranges import Count, Number, Rate, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class CUTOptions(UnpairedOptions):
    """What a plan may say to the trainer, beside what all trainers of two domains share.

    Attributes:
        lambda_gan: weight of the GAN loss.
        lambda_nce: weight of PatchNCE.
        identity: compare images of Y with what is made of them, too; each has half the weight.
        mirrored: in half of all steps, translate images mirrored, and compare with them as they
            are: FastCUT's flip equivariance.
        temperature: τ of PatchNCE.
        patches: places that are compared in each of the five maps.
        width: channels after the generator's first layer.
        blocks: residual blocks, of whose maps the first and the fifth are compared.
        d_width: channels after the discriminator's first layer.
        d_layers: its layers that halve; 3 see patches of 84 × 84, by the blur.
        f_width: numbers of the vectors that are compared.
    """

    epochs: Number = 200
    decay_epochs: Number = 200
    lambda_gan: Weight = 1.0
    lambda_nce: Weight = 1.0
    identity: bool = True
    mirrored: bool = False
    temperature: Rate = 0.07
    patches: Annotated[int, Ge(2)] = 256
    width: Count = 64
    blocks: Annotated[int, Ge(known.BLOCKS)] = 9
    d_width: Count = 64
    d_layers: Count = 3
    f_width: Count = 256

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        transform = self.transform()
        if not transform.crops:
            raise ValueError(
                f"mode {self.mode} leaves images of many sizes, but places are drawn in maps of "
                f"one: use a mode that crops, such as scale_width_and_crop"
            )
        small = min(transform.crop)
        if known.verdicts(small, self.d_layers) < 1:
            raise ValueError(
                f"crop_size {small} is too small for a discriminator of {self.d_layers} layers "
                f"(fewer d_layers see smaller images)"
            )


@dataclass(frozen=True)
class FastCUTOptions(CUTOptions):
    """The same with FastCUT's defaults."""

    epochs: Number = 150
    decay_epochs: Number = 50
    lambda_nce: Weight = 10.0
    identity: bool = False
    mirrored: bool = True


class CUT(ImageTrainer):
    """Trains a generator, a discriminator and a projection on two folders of unpaired images."""

    name = "cut"
    options: type = CUTOptions

    def networks(self, o: CUTOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        sizes = {"width": o.width, "blocks": o.blocks, "channels": o.channels}
        judge = {"width": o.d_width, "layers": o.d_layers, "channels": o.channels}
        projection = {"width": o.f_width, "of": o.width, "channels": o.channels}
        return {
            "G": Network(known.GENERATOR, sizes), "D": Network(known.DISCRIMINATOR, judge),
            "F": Network(known.PROJECTION, projection),
        }  # fmt: skip

    def joined(self, o: CUTOptions) -> dict[str, Joined]:
        """The generator with the maps within it."""
        return {"tapped": Joined(known.TAPPED, ("G",))}

    def groups(self, o: CUTOptions) -> dict[str, list[str]]:
        """As CycleGAN's; low-level are the generator's encoder and `D`'s first convolutions."""
        stand = known.places(o.d_layers)
        encoder = [f"G.model.{n}.*" for n in (1, 4, 8)]
        early = [f"D.model.{n}.*" for n in stand[:-2][:3]]
        return {
            "generator": ["G.*"], "discriminator": ["D.*"], "projection": ["F.*"],
            "low-level": [*encoder, *early],
            "encoder": encoder, "middle": ["G.model.*.conv_block.*"],
            "decoder": [f"G.model.{n}.*" for n in known.decoder(o.blocks)],
            "discriminator-low": early,
            "discriminator-high": [f"D.model.{n}.*" for n in stand[len(early) :]],
        }  # fmt: skip

    def translators(self, o: CUTOptions) -> dict[str, Translator]:
        """The generator, of one direction."""
        return {"G": Translator("X", "Y", "A to B")}

    def players(self, o: CUTOptions) -> dict[str, Player]:
        """The generator with the projection, which see one loss, and the discriminator."""
        every = {"G": ("G", "F"), "D": ("D",)}
        return {n: Player(of, o.lr, settings={"betas": (0.5, 0.999)}) for n, of in every.items()}

    def draws(self, o: CUTOptions) -> tuple[Draw, ...]:
        """`x`, which is translated, `y`, and places in the maps of those that are compared."""
        maps = known.tapped_sizes(*o.transform().crop)
        compared = ("in_x", "in_y") if o.identity else ("in_x",)
        return Unpaired(("x", "y")), *(Places(name, maps, o.patches) for name in compared)

    def weights(self, o: CUTOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        nce = o.lambda_nce / 2 if o.identity else o.lambda_nce
        return {"gan": o.lambda_gan, "nce": nce, "nce_identity": nce}

    def turns(self, o: CUTOptions, step: int) -> tuple[Turn, ...]:
        """The discriminator's step, then the generator's, on what was translated before both.

        Which steps mirror depends on their number alone, so that the host knows and no device asks.
        """
        mirror = o.mirrored and bool(np.random.default_rng((crc32(b"mirror"), step)).integers(2))
        return (
            Turn("discriminator", ("D",), (partial(self.judge, mirror=mirror),)),
            Turn("generator", ("G",), (partial(self.translate, mirror=mirror),)),
        )

    def judge(self, s: Session, b: Batch, *, mirror: bool) -> dict[str, torch.Tensor]:
        """The discriminator's loss on a translation that the generator's turn goes on with.

        Images of Y go through the generator with those of X: InstanceNorm treats each alone. The
        maps of both are the keys, since the generator has not moved when its turn comes.
        """
        import torch

        from ..training.losses import judge

        o = s.options
        seen = torch.cat([b.x, b.y]) if o.identity else b.x
        *maps, b.made = s["tapped"](seen.flip(3) if mirror else seen)
        with torch.no_grad():
            if mirror:
                maps = s["tapped"](seen, False)
            keys = s["F"]([own.detach() for own in maps], _places(o, b))
        b.keys = torch.cat(keys, 1)
        of_real, of_fake = s.both("D", b.y, b.made[: len(b.x)].detach())
        return {"judge": judge(of_real, of_fake)}

    def translate(self, s: Session, b: Batch, *, mirror: bool) -> dict[str, torch.Tensor]:
        """The generator's and the projection's loss."""
        from ..training.losses import deceive, patch_nce

        o, count = s.options, len(b.x)
        with s.fixed("D"):
            losses = {"gan": deceive(s["D"](b.made[:count]))}
        maps, places = s["tapped"](b.made, False), _places(o, b)
        if mirror:  # the places instead of the maps
            wide = [own.shape[3] for own in maps]
            places = [at + n - 1 - 2 * (at % n) for at, n in zip(places, wide, strict=True)]
        queries = s["F"](maps, places)
        keys = b.keys.split([own.shape[1] for own in queries], 1)
        nce = patch_nce(queries, keys, o.temperature)
        losses["nce"] = nce[:count].mean()
        if o.identity:
            losses["nce_identity"] = nce[count:].mean()
        return losses

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Widths, blocks, layers and channels of the networks that there are."""
        from ..networks.antialiased import discriminator_in, generator_in, projection_in

        found: dict[str, Any] = dict(generator_in(shapes))
        if any(name.startswith("D.") for name in shapes):
            sizes = discriminator_in(shapes)
            found |= {"d_width": sizes["width"], "d_layers": sizes["layers"]}
        if any(name.startswith("F.") for name in shapes):
            found["f_width"] = projection_in(shapes)["width"]
        return found


class FastCUT(CUT):
    """CUT without the identity's comparison: half the passes, and mirrored images in its place."""

    name = "fastcut"
    options = FastCUTOptions


def _places(o: CUTOptions, b: Batch) -> list[torch.Tensor]:
    """Those of a batch's first image, for all its images: for each map N × S."""
    import torch

    counts = Places("", known.tapped_sizes(*o.transform().crop), o.patches).counts
    drawn = [b.in_x, b.in_y] if o.identity else [b.in_x]
    of_all = torch.cat([own[:1].expand(len(b.x), -1) for own in drawn])
    return list(of_all.split(counts, 1))
