"""CycleGAN: Zhu, Park, Isola and Efros, ICCV 2017; with the tree paper's loss weights.

A translates X to Y, B back; a discriminator has the letter of the generator that it opposes: `D_A`
judges images of Y. The names are those of the official code, so that its checkpoints load.
Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from modelsoup import ParameterError

from ..networks.described import Network
from ..networks.patches import places, verdicts
from ..pictures.draws import Unpaired
from ..pictures.picture import Images, files_of
from ..training.options import UnpairedOptions
from ..training.players import Player
from ..training.ranges import Count, Number, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session

Balance = Literal["by_image", "by_generator"]

GENERATORS = ("G_A", "G_B")
DISCRIMINATORS = ("D_A", "D_B")
PRESETS = {"cyclegan": (1.0, 10.0, 5.0), "tree-paper": (1.0, 5.0, 10.0)}
"""Weights of GAN, cycle and identity loss. The tree paper's (eq. 4) are the usual ones swapped."""


@dataclass(frozen=True)
class CycleGANOptions(UnpairedOptions):
    """What a plan may say to the trainer, beside what all trainers of two domains share.

    Attributes:
        loss: weights of GAN, cycle and identity loss: `cyclegan` 1, 10, 5; `tree-paper` 1, 5, 10.
        lambda_gan: in place of the preset's weight, as the next two.
        lambda_cycle: of the cycle loss.
        lambda_identity: of the identity loss.
        balance: λ of the imbalance-aware loss (eq. 3 of the tree paper) in [0, 1]: λ · L(X→Y) +
            (1 − λ) · L(Y→X); `auto` is (|X| − |Y|) / |X|; None is the plain sum of both.
        balance_invert: give λ to Y→X.
        balance_identity: which identity loss belongs to X→Y: that on images of X, |G_B(a) − a|, or
            that of its generator, |G_A(b) − b|.
        balance_discriminators: weigh the discriminators' losses too; Adam makes little of it.
        balance_doubled: weights 2λ and 2(1 − λ), whose sum is that of the plain objective.
        width: channels after the generators' first layer.
        blocks: residual blocks; by convention 6 for 128 × 128, 9 for larger images.
        d_width: channels after the discriminators' first layer.
        d_layers: their layers of stride 2; 3 see patches of 70 × 70.
        pool_size: images that are kept for each discriminator; 0 for none.
    """

    loss: Literal["cyclegan", "tree-paper"] = "cyclegan"
    lambda_gan: Weight | None = None
    lambda_cycle: Weight | None = None
    lambda_identity: Weight | None = None
    balance: float | Literal["auto"] | None = None
    balance_invert: bool = False
    balance_identity: Balance = "by_image"
    balance_discriminators: bool = False
    balance_doubled: bool = False
    width: Count = 64
    blocks: Count = 9
    d_width: Count = 64
    d_layers: Count = 3
    pool_size: Number = 50

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if isinstance(self.balance, float | int) and not 0 <= self.balance <= 1:
            raise ValueError(f"balance, λ of the imbalance-aware loss, is {self.balance}, "
                             f"not in [0, 1]")  # fmt: skip
        small = min(self.transform().crop)
        if self.transform().crops and verdicts(small, self.d_layers) < 1:
            raise ValueError(
                f"crop_size {small} is too small for discriminators of {self.d_layers} layers "
                f"(fewer d_layers see smaller images)"
            )

    def degree(self, rich: int, poor: int) -> float | None:
        """λ of the imbalance-aware loss for so many images of X and of Y.

        Raises:
            ParameterError: it is to be taken from the data, and Y is the larger domain.
        """
        if self.balance != "auto":
            return self.balance
        if poor > rich:
            raise ParameterError(
                f"λ is to be taken from the data, but Y has {poor} images and X only {rich}: X "
                f"must be the rich domain (give a number, or exchange the folders)"
            )
        return (rich - poor) / rich


class CycleGAN(ImageTrainer):
    """Trains four networks on two folders of unpaired images."""

    name = "cyclegan"
    options = CycleGANOptions
    version = "2"
    called = ("modelsoup_i2i:CycleGAN", "modelsoup_i2i.cyclegan:CycleGAN")

    def networks(self, o: CycleGANOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        room = "modelsoup_i2i.networks"
        sizes = {"width": o.width, "blocks": o.blocks, "channels": o.channels}
        generator = Network(f"{room}.resnet:ResnetGenerator", sizes)
        sizes = {"width": o.d_width, "layers": o.d_layers, "channels": o.channels}
        discriminator = Network(f"{room}.patch:PatchDiscriminator", sizes)
        return dict.fromkeys(GENERATORS, generator) | dict.fromkeys(DISCRIMINATORS, discriminator)

    def groups(self, o: CycleGANOptions) -> dict[str, list[str]]:
        """For the strategies of the tree paper, which does not say which layers are low-level.

        Here: the generators' encoders and the discriminators' first three convolutions, as FreezeD
        freezes them.
        """
        last, stand = 10 + o.blocks, places(o.d_layers)
        encoder = [f"G_?.model.{index}.*" for index in (1, 4, 7)]
        early = [f"D_?.model.{index}.*" for index in stand[:-2][:3]]
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
            "discriminator-high": [f"D_?.model.{index}.*" for index in stand[len(early) :]],
        }

    def translators(self, o: CycleGANOptions) -> dict[str, Translator]:
        """Both generators."""
        return {
            "G_A": Translator("X", "Y", "A to B", back="G_B"),
            "G_B": Translator("Y", "X", "B to A", back="G_A"),
        }

    def players(self, o: CycleGANOptions) -> dict[str, Player]:
        """Both generators together, and each discriminator."""
        every = {"G": GENERATORS, "D_A": ("D_A",), "D_B": ("D_B",)}
        return {n: Player(of, o.lr, settings={"betas": (0.5, 0.999)}) for n, of in every.items()}

    def draws(self, o: CycleGANOptions) -> tuple[Unpaired, ...]:
        """`a` of X, and `b` of Y."""
        return (Unpaired(("a", "b"), ("X", "Y")),)

    def pools(self, o: CycleGANOptions) -> dict[str, int]:
        """Images of X and of Y that were made, for the discriminators."""
        return {"A": o.pool_size, "B": o.pool_size}

    def weights(self, o: CycleGANOptions, images: Images) -> dict[str, float]:
        """Of each term: the objective and, with a balance, the tree paper's eq. 3."""
        own = (o.lambda_gan, o.lambda_cycle, o.lambda_identity)
        gan, cycle, identity = (
            preset if given is None else given
            for given, preset in zip(own, PRESETS[o.loss], strict=True)
        )
        forth = back = 1.0
        degree = o.degree(len(images["X"]), len(images["Y"]))
        if degree is not None:
            forth, back = (1 - degree, degree) if o.balance_invert else (degree, 1 - degree)
            if o.balance_doubled:
                forth, back = 2 * forth, 2 * back
        same_a, same_b = (back, forth) if o.balance_identity == "by_image" else (forth, back)
        judged = (forth, back) if o.balance_discriminators else (1.0, 1.0)
        return {
            "gan_a": gan * forth, "gan_b": gan * back, "cycle_a": cycle * forth,
            "cycle_b": cycle * back, "identity_a": identity * same_a,
            "identity_b": identity * same_b, "judge_a": judged[0], "judge_b": judged[1],
        }  # fmt: skip

    def turns(self, o: CycleGANOptions, step: int) -> tuple[Turn, ...]:
        """Both ways' generators, then each discriminator."""
        ways = (partial(self.translate, way="a"), partial(self.translate, way="b"))
        return (
            Turn("generator", ("G",), ways),
            Turn("judge_a", ("D_A",), (partial(self.judge, way="a"),)),
            Turn("judge_b", ("D_B",), (partial(self.judge, way="b"),)),
        )

    def translate(self, s: Session, b: Batch, *, way: str) -> dict[str, torch.Tensor]:
        """The generators' losses of one way, from X to Y (`a`) or back (`b`).

        The generator sees images of both domains in one pass: InstanceNorm treats each alone.
        """
        from ..training.losses import deceive, distance

        forth, back = GENERATORS if way == "a" else GENERATORS[::-1]
        source, target = (b.a, b.b) if way == "a" else (b.b, b.a)
        losses = {}
        if s.weights["identity_a"] or s.weights["identity_b"]:
            fake, same = s.both(forth, source, target)
            losses[f"identity_{way}"] = distance(same, target)
        else:
            fake = s[forth](source)
        losses[f"cycle_{way}"] = distance(s[back](fake), source)
        losses[f"gan_{way}"] = deceive(s[f"D_{way.upper()}"](fake))
        setattr(b, f"fake_{way}", fake.detach())
        return losses

    def judge(self, s: Session, b: Batch, *, way: str) -> dict[str, torch.Tensor]:
        """A discriminator's loss; `D_A` judges images of Y, those of now and of before."""
        from ..training.losses import judge

        real, fake, pool = (b.b, b.fake_a, "B") if way == "a" else (b.a, b.fake_b, "A")
        of_real, of_fake = s.both(f"D_{way.upper()}", real, s.pools[pool].query(fake))
        return {f"judge_{way}": judge(of_real, of_fake)}

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Widths, blocks, layers and channels of the networks that there are."""
        from ..networks.patch import patch_in
        from ..networks.resnet import resnet_in

        present = {name.partition(".")[0] for name in shapes}
        found: dict[str, Any] = {}
        for name in [n for n in DISCRIMINATORS if n in present][:1]:
            sizes = patch_in(shapes, f"{name}.")
            found |= {"d_width": sizes["width"], "d_layers": sizes["layers"]}
        name = next((n for n in GENERATORS if n in present), GENERATORS[0])
        return {**resnet_in(shapes, f"{name}."), **found}

    def notes(self, o: CycleGANOptions, images: Images) -> dict[str, Any]:
        """λ of the imbalance-aware loss, as it was used."""
        return {"balance": o.degree(len(images["X"]), len(images["Y"]))}

    def opening(self, o: CycleGANOptions, images: Images) -> Iterator[str]:
        """Which images of Y a subset has."""
        if o.imbalance is not None or o.count_b is not None:
            yield "images of Y: " + ", ".join(path.name for path in files_of(images["Y"]))
