"""NICE-GAN, the light version: Chen, Huang, Huang and Sun, CVPR 2020. Importable without torch.

`D_A` judges images of X, and its first layers are their encoder: `G_B` makes images of Y out of
their codes. So a translator is a discriminator and a generator. Encoders learn to judge, in the
discriminators' step alone. Names are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from ..networks import cams
from ..networks.cams import NICE
from ..networks.described import Joined, Network
from ..pictures.draws import Unpaired
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

GENERATORS, DISCRIMINATORS = ("G_A", "G_B"), ("D_A", "D_B")
ADAM = {"betas": (0.5, 0.999), "weight_decay": 1e-4}


@dataclass(frozen=True)
class NiceGanOptions(UnpairedOptions):
    """What a plan may say to the trainer, beside what all trainers of two domains share.

    Attributes:
        lr: the learning rate.
        lambda_gan: the weight of the GAN loss.
        lambda_cycle: of the cycle loss.
        lambda_reconstruction: of the distance of an image to what is made of its own code.
        width: channels before the generators' last layer, and after the discriminators' first.
        blocks: residual blocks of the generators.
        d_layers: layers of the discriminators' global verdicts; the local ones have two fewer.
    """

    lr: Rate = 1e-4
    steps: Count | None = 150_000
    decay_steps: Number = 150_000
    lambda_gan: Weight = 1.0
    lambda_cycle: Weight = 10.0
    lambda_reconstruction: Weight = 10.0
    width: Count = 64
    blocks: Count = 6
    d_layers: Annotated[int, Ge(cams.FEWEST[NICE])] = 7

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.transform().crops:
            self.must_see(self.transform().crop)

    def must_see(self, sides: Sequence[int]) -> None:
        """Raise a ParameterError for images that are too small for the discriminators."""
        cams.must_see(NICE, sides, self.d_layers, "d_layers")


class NiceGan(ImageTrainer):
    """Trains discriminators that encode, on two folders of unpaired images."""

    name = "nice-gan"
    options = NiceGanOptions

    def networks(self, o: NiceGanOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        sizes = {"width": o.width, "channels": o.channels}
        generator = cams.network(NICE, "Generator", blocks=o.blocks, **sizes)
        discriminator = cams.network(NICE, "Discriminator", layers=o.d_layers, **sizes)
        return dict.fromkeys(GENERATORS, generator) | dict.fromkeys(DISCRIMINATORS, discriminator)

    def joined(self, o: NiceGanOptions) -> dict[str, Joined]:
        """Both ways: the encoder of one domain and the generator of the other."""
        return {
            "T_AB": Joined(cams.TRANSLATION, ("D_A", "G_B")),
            "T_BA": Joined(cams.TRANSLATION, ("D_B", "G_A")),
        }

    def estimates(self, o: NiceGanOptions) -> Sequence[str]:
        """The discriminators' singular vectors."""
        return cams.ESTIMATES

    def groups(self, o: NiceGanOptions) -> dict[str, list[str]]:
        """As CycleGAN's; encoders are the part of discriminators that codes are made by."""
        parts = ("model.*", "fc.*", "conv1x1.*", "lamda")
        return {
            "generator": ["G_*"], "discriminator": ["D_*"],
            "x2y": ["G_B.*", "D_A.*"], "y2x": ["G_A.*", "D_B.*"],
            "low-level": ["D_?.model.*"],
            "encoder": [f"D_?.{part}" for part in parts], "decoder": ["G_?.*"],
            "discriminator-low": ["D_?.model.*"],
            "discriminator-high": ["D_?.Dis?_?.*", "D_?.conv0.*", "D_?.conv1.*"],
        }  # fmt: skip

    def translators(self, o: NiceGanOptions) -> dict[str, Translator]:
        """Both ways."""
        return {
            "T_AB": Translator("X", "Y", "A to B", back="T_BA"),
            "T_BA": Translator("Y", "X", "B to A", back="T_AB"),
        }

    def players(self, o: NiceGanOptions) -> dict[str, Player]:
        """Both generators together, and both discriminators, encoders with them."""
        return {
            "G": Player(GENERATORS, o.lr, settings=ADAM),
            "D": Player(DISCRIMINATORS, o.lr, settings=ADAM),
        }

    def draws(self, o: NiceGanOptions) -> tuple[Unpaired, ...]:
        """`a` of X, and `b` of Y."""
        return (Unpaired(("a", "b"), ("X", "Y")),)

    def weights(self, o: NiceGanOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        own = {"gan": o.lambda_gan, "cycle": o.lambda_cycle,
               "reconstruction": o.lambda_reconstruction}  # fmt: skip
        return {f"{name}_{way}": weight for name, weight in own.items() for way in "ab"}

    def turns(self, o: NiceGanOptions, step: int) -> tuple[Turn, ...]:
        """Both discriminators, then both ways' generators."""
        ways = (partial(self.translate, way="a"), partial(self.translate, way="b"))
        return Turn("discriminator", ("D",), (self.judge,)), Turn("generator", ("G",), ways)

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminators' loss, by which encoders learn; codes pass no gradient on."""
        import torch

        from ..networks.layers import padded
        from ..training.losses import judge

        b.a, b.b = padded(b.a), padded(b.b)  # to sides that the generators want
        for images in (b.a, b.b):
            s.options.must_see(images.shape[-2:])
        *real_a, code_a = s["D_A"](b.a)
        *real_b, code_b = s["D_B"](b.b)
        with torch.no_grad():
            fake_a, fake_b = s["G_A"](code_b), s["G_B"](code_a)
        losses = {}
        for way, real, fake in (("a", real_a, fake_a), ("b", real_b, fake_b)):
            *made, _ = s[f"D_{way.upper()}"](fake)
            own = [judge(of_real, of_fake) for of_real, of_fake in zip(real, made, strict=True)]
            losses[f"judge_{way}"] = 2 * sum(own[1:], own[0])  # the official code halves nothing
        return losses

    def translate(self, s: Session, b: Batch, *, way: str) -> dict[str, torch.Tensor]:
        """The generators' losses of one way, from X to Y (`a`) or back (`b`).

        Gradients go through encoders, and do not move them.
        """
        import torch

        from ..training.losses import deceive, distance

        if not hasattr(b, "code_a"):  # both ways see codes by the encoders that have just learnt
            with torch.no_grad():
                b.code_a, b.code_b = s["D_A"](b.a, True), s["D_B"](b.b, True)
        forth, back = ("G_B", "G_A") if way == "a" else ("G_A", "G_B")
        source, target = (b.a, b.b) if way == "a" else (b.b, b.a)
        codes = (b.code_a, b.code_b) if way == "a" else (b.code_b, b.code_a)
        fake, same = s.both(forth, *codes)
        judge = f"D_{forth[-1]}"
        with s.fixed(judge):
            *verdicts, code = s[judge](fake)
        gan = [deceive(own) for own in verdicts]
        return {
            f"gan_{way}": sum(gan[1:], gan[0]),
            f"cycle_{way}": distance(s[back](code), source),
            f"reconstruction_{way}": distance(same, target),
        }

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Width, blocks, layers and channels of the networks that there are."""
        present = {name.partition(".")[0] for name in shapes}
        found: dict[str, Any] = {}
        for name in [n for n in DISCRIMINATORS if n in present][:1]:
            found = cams.discriminator_in(NICE, shapes, f"{name}.")
            found["d_layers"] = found.pop("layers")
        name = next((n for n in GENERATORS if n in present), GENERATORS[0])
        return {**found, **cams.generator_in(NICE, shapes, f"{name}.")}
