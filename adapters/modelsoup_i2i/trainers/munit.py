"""MUNIT: Huang, Liu, Belongie and Kautz, ECCV 2018. Importable without torch.

`G_A` takes pictures of A apart into content and style and puts such together, `G_B` those of B; a
translation is the content of one and the decoder of the other, in a style of N(0, 1) or of a
picture. `D_A` judges pictures of A, `D_B` those of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..networks.described import Joined, Network
from ..pictures.draws import Draw, Noise, Unpaired
from ..pictures.picture import Images
from ..training.data import Side
from ..training.options import UnpairedOptions
from ..training.players import Player
from ..training.ranges import Count, Rate, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Style, Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session

_ROOM = "modelsoup_i2i.networks.munit"
GENERATORS, DISCRIMINATORS = ("G_A", "G_B"), ("D_A", "D_B")
WAYS = {"a": ("A", "B"), "b": ("B", "A")}  # of a picture of the first one
SETS = ("X", "Y"), ("Y", "X")
LEAST = 16  # pixels of a side that a style encoder halves four times


@dataclass(frozen=True)
class MUNITOptions(UnpairedOptions):
    """What a plan may say to the trainer, beside what all trainers of two domains share.

    Attributes:
        weight_decay: of all weights.
        lambda_gan: weight of the GAN loss in the generators' objective.
        lambda_image: of the distance of a picture and what is made of its own content and style.
        lambda_style: of that of a style drawn and the one found in the translation.
        lambda_content: of that of a picture's content and its translation's.
        lambda_cycle: of that of a picture and its translation's way back in its own style, the
            paper's style-augmented cycle loss; the paper has 10 for summer and winter at 256².
        width: channels after each encoder's first layer.
        blocks: residual blocks, of each content encoder and each decoder.
        style: numbers of a style.
        mlp: width of the network that makes the decoder's norms of a style.
        d_width: channels after the discriminators' first layer.
        d_layers: their layers of stride 2.
        d_scales: how many sizes of a picture are judged, each half the one before.
    """

    steps: Count | None = 1_000_000
    halve_every: Count | None = 100_000
    lr: Rate = 1e-4
    load_size: Side = 256
    weight_decay: Weight = 1e-4
    lambda_gan: Weight = 1.0
    lambda_image: Weight = 10.0
    lambda_style: Weight = 1.0
    lambda_content: Weight = 1.0
    lambda_cycle: Weight = 0.0
    width: Count = 64
    blocks: Count = 4
    style: Count = 8
    mlp: Count = 256
    d_width: Count = 64
    d_layers: Count = 4
    d_scales: Count = 3

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        small = min(self.transform().crop)
        if self.transform().crops and small < LEAST:
            raise ValueError(f"crop_size is {small}, but the style encoders need {LEAST} at least")
        # Each layer pads by reflection, for which it needs two pixels.
        smallest = -(-small // 2 ** (self.d_scales - 1))
        if self.transform().crops and smallest >> (self.d_layers - 1) < 2:
            raise ValueError(
                f"crop_size {small} is too small for discriminators of {self.d_layers} layers at "
                f"{self.d_scales} scales (fewer d_layers or d_scales see smaller images)"
            )


class MUNIT(ImageTrainer):
    """Trains an auto-encoder and a discriminator for each of two folders of unpaired images."""

    name, options = "munit", MUNITOptions

    def networks(self, o: MUNITOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        sizes = {"width": o.width, "blocks": o.blocks, "style": o.style, "mlp": o.mlp}
        generator = Network(f"{_ROOM}:AutoEncoder", sizes | {"channels": o.channels})
        sizes = {"width": o.d_width, "layers": o.d_layers, "scales": o.d_scales}
        judge = Network(f"{_ROOM}:Discriminator", sizes | {"channels": o.channels})
        return dict.fromkeys(GENERATORS, generator) | dict.fromkeys(DISCRIMINATORS, judge)

    def joined(self, o: MUNITOptions) -> dict[str, Joined]:
        """Both translations; and of each domain the decoder `R` and the style encoder `S`."""
        made = {}
        for own, other in WAYS.values():
            sizes = {"source": f"G_{own}", "target": f"G_{other}"}
            made[f"T_{own}{other}"] = Joined(f"{_ROOM}:Translation", GENERATORS, sizes)
            made[f"R_{own}"] = Joined(f"{_ROOM}:Decoding", (f"G_{own}",))
            made[f"S_{own}"] = Joined(f"{_ROOM}:Styling", (f"G_{own}",))
        return made

    def groups(self, o: MUNITOptions) -> dict[str, list[str]]:
        """The parts of the auto-encoders, the discriminators, and what is of one domain."""
        parts = {part: [f"G_?.{part}.*"] for part in ("content", "style", "mlp", "decoder")}
        domains = {domain: [f"?_{domain}.*"] for domain in "AB"}
        return {"generator": ["G_*"], "discriminator": ["D_*"], **parts, **domains}

    def translators(self, o: MUNITOptions) -> dict[str, Translator]:
        """Both ways, in a style that is drawn or a picture's; there is no one way back."""
        return {
            f"T_{own}{other}": Translator(
                source, target, f"{own} to {other}",
                takes=(Style(o.style, of_pictures=f"S_{other}", noise=o.style),),
            )
            for (own, other), (source, target) in zip(WAYS.values(), SETS, strict=True)
        }  # fmt: skip

    def players(self, o: MUNITOptions) -> dict[str, Player]:
        """Both auto-encoders together, and both discriminators."""
        settings = {"betas": (0.5, 0.999), "weight_decay": o.weight_decay}
        every = {"G": GENERATORS, "D": DISCRIMINATORS}
        return {name: Player(own, o.lr, settings=settings) for name, own in every.items()}

    def draws(self, o: MUNITOptions) -> tuple[Draw, ...]:
        """`a` of X and `b` of Y, and a style of each domain for a picture of the other."""
        return (Unpaired(("a", "b")), Noise("s_a", (o.style,)), Noise("s_b", (o.style,)))

    def weights(self, o: MUNITOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        each = {"gan": o.lambda_gan, "image": o.lambda_image, "style": o.lambda_style,
                "content": o.lambda_content, "cycle": o.lambda_cycle}  # fmt: skip
        return {f"{term}_{way}": weight for term, weight in each.items() for way in WAYS}

    def turns(self, o: MUNITOptions, step: int) -> tuple[Turn, ...]:
        """The discriminators' step, then the auto-encoders'."""
        judges, makers = ([partial(own, way=way) for way in WAYS]
                          for own in (self.judge, self.translate))  # fmt: skip
        return Turn("judge", ("D",), tuple(judges)), Turn("generator", ("G",), tuple(makers))

    def judge(self, s: Session, b: Batch, *, way: str) -> dict[str, torch.Tensor]:
        """Of D in the other domain: the plain LSGAN terms, without halves, of all scales."""
        import torch

        from ..training.losses import judge

        own, other, images, style = self.seen(b, way)
        with torch.no_grad():
            fake = s[f"T_{own}{other}"](images, style)
        real = self.seen(b, other.lower())[2]
        of_real, of_fake = s[f"D_{other}"](real), s[f"D_{other}"](fake)
        terms = [2 * judge(*each) for each in zip(of_real, of_fake, strict=True)]
        return {f"judge_{way}": torch.stack(terms).sum()}

    def translate(self, s: Session, b: Batch, *, way: str) -> dict[str, torch.Tensor]:
        """What a picture becomes in its own style and in one drawn; no target is detached."""
        import torch

        from ..training.losses import deceive, distance

        own, other, images, drawn = self.seen(b, way)
        content, style = s[f"G_{own}"](images)
        fake = s[f"R_{other}"](content, drawn)
        content_found, style_found = s[f"G_{other}"](fake)
        with s.fixed(f"D_{other}"):
            verdicts = s[f"D_{other}"](fake)
        losses = {
            f"gan_{way}": torch.stack([deceive(each) for each in verdicts]).sum(),
            f"image_{way}": distance(s[f"R_{own}"](content, style), images),
            f"style_{way}": distance(style_found, drawn),
            f"content_{way}": distance(content_found, content),
        }
        if s.weights[f"cycle_{way}"]:
            losses[f"cycle_{way}"] = distance(s[f"R_{own}"](content_found, style), images)
        return losses

    def seen(self, b: Batch, way: str) -> tuple[str, str, torch.Tensor, torch.Tensor]:
        """Two domains, pictures of the first, and the style that they get in the second.

        Pictures whose sides are no multiples of what the encoder halves are continued first, so
        that all that is compared has one size.
        """
        from ..networks.layers import padded

        own, other = WAYS[way]
        return own, other, padded(getattr(b, way)), getattr(b, f"s_{other.lower()}")

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Widths, blocks, styles, layers, scales and channels of the networks that there are."""
        from ..networks.munit import discriminator_in, generator_in

        present = {name.partition(".")[0] for name in shapes}
        found: dict[str, Any] = {}
        for name in [n for n in DISCRIMINATORS if n in present][:1]:
            sizes = discriminator_in(shapes, f"{name}.")
            found = {f"d_{size}": sizes[size] for size in ("width", "layers", "scales")}
        name = next((n for n in GENERATORS if n in present), GENERATORS[0])
        return {**generator_in(shapes, f"{name}."), **found}
