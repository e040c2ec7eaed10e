"""A GAN of classes, from scratch or from another one. Importable without torch.

`G` makes pictures of classes out of noise, `D` judges them: BigGAN's networks (Brock, Donahue and
Simonyan, ICLR 2019). It is what DeepI2I and TransferI2I begin with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..networks import biggans
from ..networks.described import Network
from ..pictures.augmentation import augmented
from ..pictures.draws import Augmentation, Draw, Labelled
from ..pictures.picture import Images
from ..training.options import Augmented
from ..training.players import Player
from ..training.ranges import Count, Number, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator
from .biggan_options import BigGanOptions, sizes_in

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class GanOptions(BigGanOptions, Augmented):
    """What a plan may say to the trainer.

    Attributes:
        gan: the GAN loss; `wgan-gp` brings the gradient penalty.
        lambda_penalty: its weight.
        lambda_r1: the weight of R1, half the squared slope of D at real pictures; 0 is none.
        r1_every: steps between those in which R1 is taken, at so many times its weight.
        n_critic: the discriminator's steps for each of the generator's.
        freeze_d: the discriminator's first blocks, so many, stay as they begin (FreezeD).
        encoder: have the discriminator's blocks as `E` too, with which DeepI2I begins.
    """

    gan: Literal["hinge", "softplus", "wgan-gp"] = "hinge"
    lambda_penalty: Weight = 10.0
    lambda_r1: Weight = 0.0
    r1_every: Count = 1
    n_critic: Count = 1
    freeze_d: Number = 0
    encoder: bool = False

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        most = len(biggans.seen(self.arch))
        if self.freeze_d > most:
            raise ValueError(f"freeze_d is {self.freeze_d}, but D has {most} blocks")


class Gan(ImageTrainer):
    """Trains a generator and a discriminator of classes."""

    name, options = "gan", GanOptions

    def networks(self, o: GanOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        own = {"G": o.generator(), "D": o.discriminator()}
        return own | ({"E": Network(biggans.ENCODER, o.of_both())} if o.encoder else {})

    def averages(self, o: GanOptions) -> dict[str, tuple[str, float]]:
        """Of the generator; and `E`, which is always what `D` is."""
        return super().averages(o) | ({"E": ("D", 0.0)} if o.encoder else {})

    def fixed(self, o: GanOptions) -> list[str]:
        """The discriminator's first blocks."""
        return [f"D.blocks.{n}.*" for n in range(o.freeze_d)]

    def written(self, o: GanOptions) -> dict[str, str]:
        """Averages beside the last weights, or instead."""
        return o.written(super().written(o))

    def rows(self, o: GanOptions) -> dict[str, int]:
        """The embeddings'."""
        return o.remade([] if o.ema is None else ["G_ema"])

    def translators(self, o: GanOptions) -> dict[str, Translator]:
        """The generator, which sees no picture."""
        return {"G": Translator(None, "data", "made", takes=(o.noise("z"), o.labels("c")))}

    def players(self, o: GanOptions) -> dict[str, Player]:
        """Each network by itself."""
        return {"G": o.player("G", averaged=True), "D": o.player("D")}

    def draws(self, o: GanOptions) -> Sequence[Draw]:
        """A picture `y` of a class; noise and a class for each of the two turns."""
        given = [d for turn in "dg" for d in (o.noise(f"z_{turn}"), o.labels(f"c_{turn}"))]
        return (Labelled(("y", "c_y")), *given, Augmentation(("t_y", "t_d", "t_g")))

    def weights(self, o: GanOptions, images: Images) -> dict[str, float]:
        """Of the penalties."""
        return {"penalty": o.lambda_penalty, "r1": o.lambda_r1 * o.r1_every}

    def turns(self, o: GanOptions, step: int) -> list[Turn]:
        """The discriminator's step, then, in each `n_critic`-th, the generator's."""
        lazy = [self.slope] if o.lambda_r1 and step % o.r1_every == 0 else []
        found = [Turn("discriminator", ("D",), (self.judge, *lazy))]
        if (step + 1) % o.n_critic == 0:
            found.append(Turn("generator", ("G",), (self.make,)))
        return found

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss: real and made pictures in one pass."""
        import torch

        from ..training.losses import gradient_penalty, judge

        with torch.no_grad():
            made = s["G"](b.z_d, b.c_d)
        o = s.options
        real, fake = augmented(b.y, o.augment, b.t_y), augmented(made, o.augment, b.t_d)
        verdicts = s["D"](torch.cat([fake, real]), torch.cat([b.c_d, b.c_y]))
        losses = {"judge": judge(verdicts[len(fake) :], verdicts[: len(fake)], o.gan)}
        if o.gan == "wgan-gp":
            share = torch.rand(len(real), device=real.device)
            losses["penalty"] = gradient_penalty(lambda x: s["D"](x, b.c_y), real, fake, share)
        return losses

    def slope(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """R1 at the real pictures."""
        from ..training.losses import slope_penalty

        real = augmented(b.y, s.options.augment, b.t_y)
        return {"r1": slope_penalty(lambda images: s["D"](images, b.c_y), real)}

    def make(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The generator's loss."""
        from ..training.losses import deceive

        with s.fixed("D"):
            fake = augmented(s["G"](b.z_g, b.c_g), s.options.augment, b.t_g)
            return {"gan": deceive(s["D"](fake, b.c_g), s.options.gan)}

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Sizes of the networks that there are."""
        return sizes_in(shapes)
