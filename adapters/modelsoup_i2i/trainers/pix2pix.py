"""pix2pix: Isola, Zhu, Zhou and Efros, CVPR 2017. Importable without torch.

`G` translates a picture of a pair into the other one, `D` judges both. Names are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..networks import patches, unets
from ..networks.described import Network
from ..pictures.draws import Paired
from ..pictures.picture import Images
from ..training.options import PairedOptions
from ..training.players import Player
from ..training.ranges import Count, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class Pix2PixOptions(PairedOptions):
    """What a plan may say to the trainer, beside what all trainers of pairs share.

    Attributes:
        gan: the GAN loss; `wgan-gp` brings the gradient penalty.
        lambda_gan: its weight in the generator's objective.
        lambda_l1: that of the L1 distance to the truth.
        lambda_penalty: that of the gradient penalty in the discriminator's.
        width: channels after the generator's first layer.
        downs: how often it halves an image; None is as often as `crop_size` allows, at most 8.
        norm: in both networks.
        dropout: in the generator's decoder, the paper's noise.
        d_width: channels after the discriminator's first layer.
        patch: the side of what each of its verdicts sees; 1 is a pixel.
    """

    gan: Literal["vanilla", "lsgan", "wgan-gp"] = "vanilla"
    lambda_gan: Weight = 1.0
    lambda_l1: Weight = 100.0
    lambda_penalty: Weight = 10.0
    width: Count = 64
    downs: Literal[2, 3, 4, 5, 6, 7, 8] | None = None
    norm: Literal["batch", "instance"] = "batch"
    dropout: bool = True
    d_width: Count = 64
    patch: Literal[1, 16, 34, 70, 142, 286] = 70

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.transform().crops:
            patches.must_see(min(self.transform().crop), self.patch)


class Pix2Pix(ImageTrainer):
    """Trains two networks on pairs of images."""

    name, options = "pix2pix", Pix2PixOptions

    def networks(self, o: Pix2PixOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        downs = o.downs or unets.downs_for(*o.transform().crop)
        return {
            "G": unets.generator(o.width, downs, o.channels, o.norm, dropout=o.dropout),
            "D": patches.discriminator(o.patch, o.d_width, 2 * o.channels, o.norm),
        }

    def groups(self, o: Pix2PixOptions) -> dict[str, list[str]]:
        """As CycleGAN's; low-level are the first three layers of both, with their norms."""
        downs, batch_norm = self.networks(o)["G"].sizes["downs"], o.norm == "batch"
        down, up = unets.stand(downs, batch_norm=batch_norm)
        judge = patches.stand(o.patch, batch_norm=batch_norm)
        early = min(len(judge) - 2, 3)
        low, high = _of("D", judge[:early]), _of("D", judge[early:])
        return {
            "generator": ["G.*"], "discriminator": ["D.*"],
            "encoder": _of("G", down), "decoder": _of("G", up),
            "low-level": _of("G", down[:3]) + low,
            "discriminator-low": low, "discriminator-high": high,
        }  # fmt: skip

    def translators(self, o: Pix2PixOptions) -> dict[str, Translator]:
        """The generator."""
        return {"G": Translator("X", "Y", o.direction.replace("to", " to "))}

    def players(self, o: Pix2PixOptions) -> dict[str, Player]:
        """Each network by itself."""
        return {n: Player((n,), o.lr, settings={"betas": (0.5, 0.999)}) for n in ("G", "D")}

    def draws(self, o: Pix2PixOptions) -> tuple[Paired, ...]:
        """`x`, which is translated, and `y`, its truth."""
        return (Paired(("x", "y")),)

    def weights(self, o: Pix2PixOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        return {"gan": o.lambda_gan, "l1": o.lambda_l1, "penalty": o.lambda_penalty}

    def turns(self, o: Pix2PixOptions, step: int) -> tuple[Turn, ...]:
        """The discriminator's step, then the generator's."""
        return (
            Turn("discriminator", ("D",), (self.judge,)),
            Turn("generator", ("G",), (self.translate,)),
        )

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss; what is real goes alone, since batch norm would mix the two."""
        import torch

        from ..training.losses import gradient_penalty, judge

        b.made = s["G"](b.x)
        real, fake = (torch.cat([b.x, y], 1) for y in (b.y, b.made.detach()))
        losses = {"judge": judge(s["D"](real), s["D"](fake), s.options.gan)}
        if s.options.gan == "wgan-gp":
            share = torch.rand(len(real), device=real.device)
            losses["penalty"] = gradient_penalty(s["D"], real, fake, share)
        return losses

    def translate(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The generator's loss on the image that the discriminator has just judged."""
        import torch

        from ..training.losses import deceive, distance

        verdicts = s["D"](torch.cat([b.x, b.made], 1))
        return {"gan": deceive(verdicts, s.options.gan), "l1": distance(b.made, b.y)}

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Widths, halvings, channels, norm and patch of the networks that there are."""
        from ..networks.patch import discriminator_in
        from ..networks.unet import unet_in

        found: dict[str, Any] = dict(unet_in(shapes, "G."))
        if any(name.startswith("D.") for name in shapes):
            sizes = discriminator_in(shapes, "D.").sizes
            found |= {"d_width": sizes["width"], "patch": patches.patch(sizes.get("layers", 0))}
        return found


def _of(network: str, layers: list[list[str]]) -> list[str]:
    return [f"{network}.{place}.*" for layer in layers for place in layer]
