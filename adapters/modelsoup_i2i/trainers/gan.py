"""A GAN of classes or of one domain, from scratch or from another one. Importable without torch.

`G` makes pictures out of noise, `D` judges them: BigGAN's networks (Brock, Donahue and Simonyan,
ICLR 2019), or StyleGAN's (Karras, Laine and Aila, CVPR 2019), which see all pictures as of one
domain. It is what DeepI2I and TransferI2I begin with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..networks.described import Network
from ..pictures.draws import Augmentation, Draw, Labelled
from ..training.options import Augmented
from ..training.players import Player
from ..training.ranges import Count, Number
from ..training.turns import Batch, Turn
from ..use.translator import Translator
from .on_gan import NetworkOptions, OnGan, family_in

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class GanOptions(NetworkOptions, Augmented):
    """What a plan may say to the trainer.

    Attributes:
        n_critic: the discriminator's steps for each of the generator's.
        freeze_d: the discriminator's first blocks, so many, stay as they begin (FreezeD).
        encoder: have the discriminator's blocks as `E` too, with which DeepI2I begins.
    """

    n_critic: Count = 1
    freeze_d: Number = 0
    encoder: bool = False

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        most = len(self.family.judges(self))
        if self.freeze_d > most:
            raise ValueError(f"freeze_d is {self.freeze_d}, but D has {most} blocks")
        if self.ada is not None and self.gan == "wgan-gp":
            raise ValueError(
                "ada follows the signs of D's verdicts, which say nothing with gan wgan-gp: hinge "
                "or softplus is expected"
            )


class Gan(OnGan):
    """Trains a generator and a discriminator, of classes or of one domain."""

    name, options = "gan", GanOptions

    def networks(self, o: GanOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        own = {"G": o.family.generator(o), "D": o.family.discriminator(o)}
        return own | ({"E": o.family.encoder(o)} if o.encoder else {})

    def averages(self, o: GanOptions) -> dict[str, tuple[str, float]]:
        """Of the generator; and `E`, which is always what `D` is."""
        return super().averages(o) | ({"E": ("D", 0.0)} if o.encoder else {})

    def fixed(self, o: GanOptions) -> list[str]:
        """The discriminator's first blocks."""
        return [pattern for block in o.family.judges(o)[: o.freeze_d] for pattern in block]

    def translators(self, o: GanOptions) -> dict[str, Translator]:
        """The generator, which sees no picture."""
        return {"G": Translator(None, "data", "made", takes=o.takes())}

    def players(self, o: GanOptions) -> dict[str, Player]:
        """Each network by itself."""
        return {"G": o.player("G", averaged=True), "D": o.player("D")}

    def draws(self, o: GanOptions) -> Sequence[Draw]:
        """A picture `y` of a class; noise and a class for each of the two turns."""
        augmentation = Augmentation(("t_y", "t_d", "t_g"))
        return (Labelled(("y", "c_y")), *o.given("d"), *o.given("g"), augmentation)

    def turns(self, o: GanOptions, step: int) -> list[Turn]:
        """The discriminator's step, then, in each `n_critic`-th, the generator's."""
        found = [Turn("discriminator", ("D",), self.judging(o, step))]
        if (step + 1) % o.n_critic == 0:
            found.append(Turn("generator", ("G",), (self.make,)))
        return found

    def real(self, s: Session, b: Batch) -> torch.Tensor:
        """Pictures that are augmented, as what is made is."""
        return s.augmented(b.y, b.t_y)

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss."""
        import torch

        with torch.no_grad():
            made = s["G"](b.z_d, b.c_d)
        return self.judged(s, b, s.augmented(made, b.t_d))

    def make(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The generator's loss."""
        from ..training.losses import deceive

        with s.fixed("D"):
            fake = s.augmented(s["G"](b.z_g, b.c_g), b.t_g)
            return {"gan": deceive(s["D"](fake, b.c_g), s.options.gan)}

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Which networks there are, and their sizes."""
        own = {name: tuple(shape) for name, shape in shapes.items()}
        return family_in(own).pair_in(own)
