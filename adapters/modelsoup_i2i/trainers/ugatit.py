"""U-GAT-IT, the light version: Kim, Kim, Kang and Lee, ICLR 2020. Importable without torch.

`G_A2B` translates X to Y, `G_B2A` back, both guided by the weights of a classifier that tells the
domains apart; `D_GB` and `D_LB` judge images of Y, globally and locally. Names are the official
ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from ..networks import cams
from ..networks.cams import UGATIT
from ..networks.described import Network
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

GENERATORS = ("G_A2B", "G_B2A")
GLOBAL, LOCAL = ("D_GA", "D_GB"), ("D_LA", "D_LB")
ADAM = {"betas": (0.5, 0.999), "weight_decay": 1e-4}
SHARES = {"*.rho": (0.0, 1.0)}  # of instance norm in a mixture


@dataclass(frozen=True)
class UGatItOptions(UnpairedOptions):
    """What a plan may say to the trainer, beside what all trainers of two domains share.

    Attributes:
        lr: the learning rate.
        lambda_gan: the weight of the GAN loss.
        lambda_cycle: of the cycle loss.
        lambda_identity: of the identity loss.
        lambda_cam: of the generators' classification of domains.
        width: channels after the generators' first layer.
        blocks: residual blocks before the attention, and as many after it.
        d_width: channels after the discriminators' first layer.
        d_layers: layers of the global discriminators.
        d_layers_local: of the local ones.
    """

    lr: Rate = 1e-4
    steps: Count | None = 500_000
    decay_steps: Number = 500_000
    lambda_gan: Weight = 1.0
    lambda_cycle: Weight = 10.0
    lambda_identity: Weight = 10.0
    lambda_cam: Weight = 1000.0
    width: Count = 64
    blocks: Count = 4
    d_width: Count = 64
    d_layers: Annotated[int, Ge(cams.FEWEST[UGATIT])] = 7
    d_layers_local: Annotated[int, Ge(cams.FEWEST[UGATIT])] = 5

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.transform().crops:
            self.must_see(self.transform().crop)

    def must_see(self, sides: Sequence[int]) -> None:
        """Raise a ParameterError for images that are too small for the discriminators."""
        for name in ("d_layers", "d_layers_local"):
            cams.must_see(UGATIT, sides, getattr(self, name), name)


class UGatIt(ImageTrainer):
    """Trains generators that attend, on two folders of unpaired images."""

    name = "ugatit"
    options = UGatItOptions

    def networks(self, o: UGatItOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        judges = partial(cams.network, UGATIT, "Discriminator", width=o.d_width)
        generator = cams.network(
            UGATIT, "Generator", width=o.width, blocks=o.blocks, channels=o.channels
        )
        return {
            **dict.fromkeys(GENERATORS, generator),
            **dict.fromkeys(GLOBAL, judges(layers=o.d_layers, channels=o.channels)),
            **dict.fromkeys(LOCAL, judges(layers=o.d_layers_local, channels=o.channels)),
        }

    def estimates(self, o: UGatItOptions) -> Sequence[str]:
        """The discriminators' singular vectors."""
        return cams.ESTIMATES

    def groups(self, o: UGatItOptions) -> dict[str, list[str]]:
        """As CycleGAN's; low-level are the convolutions down, and the discriminators' first two."""
        down = [f"G_*.DownBlock.{place}.*" for place in (1, 5, 9)]
        low = [f"D_*.model.{place}.*" for place in (1, 4)]
        parts = ("gap_fc", "gmp_fc", "conv1x1", "FC", "gamma", "beta", "UpBlock*")
        return {
            "generator": ["G_*"], "discriminator": ["D_*"],
            "x2y": ["G_A2B.*", "D_?B.*"], "y2x": ["G_B2A.*", "D_?A.*"],
            "low-level": [*down, *low],
            "encoder": ["G_*.DownBlock.*"], "decoder": [f"G_*.{part}.*" for part in parts[3:]],
            "attention": [f"?_*.{part}.*" for part in parts[:3]],
            "discriminator-low": low,
        }  # fmt: skip

    def translators(self, o: UGatItOptions) -> dict[str, Translator]:
        """Both generators."""
        return {
            "G_A2B": Translator("X", "Y", "A to B", back="G_B2A"),
            "G_B2A": Translator("Y", "X", "B to A", back="G_A2B"),
        }

    def players(self, o: UGatItOptions) -> dict[str, Player]:
        """Both generators together, and all discriminators."""
        return {
            "G": Player(GENERATORS, o.lr, settings=ADAM, within=SHARES),
            "D": Player((*GLOBAL, *LOCAL), o.lr, settings=ADAM),
        }

    def draws(self, o: UGatItOptions) -> tuple[Unpaired, ...]:
        """`a` of X, and `b` of Y."""
        return (Unpaired(("a", "b"), ("X", "Y")),)

    def weights(self, o: UGatItOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        own = {"gan": o.lambda_gan, "cycle": o.lambda_cycle, "identity": o.lambda_identity,
               "cam": o.lambda_cam}  # fmt: skip
        return {f"{name}_{way}": weight for name, weight in own.items() for way in "ab"}

    def turns(self, o: UGatItOptions, step: int) -> tuple[Turn, ...]:
        """All discriminators, then both ways' generators."""
        ways = ("a", "b")
        return (
            Turn("discriminator", ("D",), tuple(partial(self.judge, way=way) for way in ways)),
            Turn("generator", ("G",), tuple(partial(self.translate, way=way) for way in ways)),
        )

    def judge(self, s: Session, b: Batch, *, way: str) -> dict[str, torch.Tensor]:
        """The discriminators' loss of one way, from X to Y (`a`) or back (`b`)."""
        import torch

        from ..training.losses import judge

        source, target = _images(s, b, way)
        with torch.no_grad():
            fake = s[GENERATORS[way == "b"]](source)
        losses = []
        for name in _judges(way):
            real, made = _both(s[name], target, fake)
            losses += [judge(of_real, of_fake) for of_real, of_fake in zip(real, made, strict=True)]
        return {f"judge_{way}": 2 * sum(losses[1:], losses[0])}  # the official code halves nothing

    def translate(self, s: Session, b: Batch, *, way: str) -> dict[str, torch.Tensor]:
        """The generators' losses of one way; one sees images of both domains in one pass."""
        from ..training.losses import deceive, distance, judge

        source, target = _images(s, b, way)
        forth, back = GENERATORS if way == "a" else GENERATORS[::-1]
        (fake, of_source, _), (same, of_target, _) = _both(s[forth], source, target, True)
        with s.fixed(*_judges(way)):
            gan = [deceive(verdicts) for name in _judges(way) for verdicts in s[name](fake)]
        return {
            f"identity_{way}": distance(same, target),
            f"cycle_{way}": distance(s[back](fake), source),
            f"cam_{way}": judge(of_source, of_target, "softplus"),
            f"gan_{way}": sum(gan[1:], gan[0]),
        }

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Widths, blocks, layers and channels of the networks that there are."""
        present = {name.partition(".")[0] for name in shapes}
        found: dict[str, Any] = {}
        for every, layers in ((LOCAL, "d_layers_local"), (GLOBAL, "d_layers")):
            for name in [n for n in every if n in present][:1]:
                sizes = cams.discriminator_in(UGATIT, shapes, f"{name}.")
                found |= {"d_width": sizes["width"], layers: sizes["layers"]}
        name = next((n for n in GENERATORS if n in present), GENERATORS[0])
        return {**cams.generator_in(UGATIT, shapes, f"{name}."), **found}


def _images(s: Session, b: Batch, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the source and of the target, continued to sides that the generators want."""
    from ..networks.layers import padded

    a, other = padded(b.a), padded(b.b)
    for images in (a, other):
        s.options.must_see(images.shape[-2:])
    return (a, other) if way == "a" else (other, a)


def _judges(way: str) -> tuple[str, str]:
    """The discriminators of images of the target."""
    return ("D_GB", "D_LB") if way == "a" else ("D_GA", "D_LA")


def _both(
    network: Any, first: torch.Tensor, second: torch.Tensor, *given: Any
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """All results of a network for two sets of images, in one pass if they have one size."""
    import torch

    if first.shape != second.shape:
        return network(first, *given), network(second, *given)
    halves = [made.chunk(2) for made in network(torch.cat([first, second]), *given)]
    return [one for one, _ in halves], [other for _, other in halves]
