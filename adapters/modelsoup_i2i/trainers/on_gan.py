"""What the trainers on a GAN's networks share: sizes, rates, and how D judges. Without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from modelsoup import MismatchError

from ..networks.described import AVERAGED
from ..pictures.draws import Classes, Draw, Noise
from ..pictures.picture import Images
from ..pictures.transforms import Transform
from ..training.options import ClassOptions
from ..training.players import Player
from ..training.ranges import Count, Number, Rate, Weight, annotated
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Loss
from ..use.classes import classes_in
from .family import Family
from .on_biggan import BigGan
from .on_stylegan import StyleGan

if TYPE_CHECKING:
    import torch

    from ..training.session import Session

FAMILIES: Mapping[str, Family] = {"biggan": BigGan(), "stylegan": StyleGan()}
DEEPEST = 4  # pixels: the side of the maps that all generators begin with


OWN: Any = None  # a default that depends on the network, and is filled in


@dataclass(frozen=True)
class Usually:
    """An annotation: what an option is with each network where nothing is said."""

    biggan: Any
    stylegan: Any


@dataclass(frozen=True)
class Only:
    """An annotation: an option that one network has; with the other it stays as it is."""

    network: str


BIGGAN, STYLEGAN = Only("biggan"), Only("stylegan")


@dataclass(frozen=True)
class NetworkOptions(ClassOptions):
    """Sizes of a GAN's networks, and how they are updated.

    Attributes:
        network: `biggan`, of classes; or `stylegan`, each of one domain.
        size: pixels of a side. BigGAN: 32, 64, 128 or 256; `32s` and `64s` have smaller networks;
            128. StyleGAN: 64 to 1024; 256.
        ch: of BigGAN, as the next five: the width that all others are multiples of.
        rows: of the embeddings of classes; None is as many as there are classes.
        class_rows: of a start with other classes: `keep` wants as many rows as it has, of which the
            first are the data's; `resize` draws new ones about their mean, as far apart as they.
        chunk: numbers of noise for each block of the generator.
        shared: the width of the generator's embedding.
        attention: the side of the maps that attention follows; 0 is none.
        width: of StyleGAN, as the next four: channels of maps up to 32 × 32; of larger ones half as
            many with each doubling.
        code: how many numbers noise and styles have.
        depth: layers of the mapping network, which learns at a hundredth of the rate.
        mixing: how often the later blocks follow another style.
        rgb_activation: whether LeakyReLU follows the layer that sees the picture: older checkpoints
            have none there.
        batch: of each pass; the published runs sum 8 passes of 4 images.
        lr: the generator's rate; 1e-4, on StyleGAN 1e-3.
        d_lr: the discriminator's; 4e-4, on StyleGAN 1e-3.
        beta2: Adam's second decay, of which the first is 0; 0.999, on StyleGAN 0.99.
        ema: the share of the old average of weights that a step keeps; None for no average.
        average: the checkpoint has averages `beside` the last weights, as `G_ema`; or `instead` of
            them, as what begins with it expects.
        gan: the GAN loss: `hinge`, on StyleGAN `wgan-gp`, which brings the gradient penalty; with
            `softplus`, the non-saturating one, goes R1.
        lambda_penalty: the gradient penalty's weight.
        lambda_drift: with `wgan-gp`, the weight of D's squared verdict on real pictures; 0, on
            StyleGAN 0.001.
        lambda_r1: the weight of R1, half the squared slope of D at real pictures; 0 is none.
        r1_every: steps between those in which R1 is taken, at so many times its weight.
    """

    network: Literal["biggan", "stylegan"] = "biggan"
    size: Annotated[Literal[32, 64, 128, 256, 512, 1024, "32s", "64s"], Usually(128, 256)] = OWN
    ch: Annotated[int, Ge(8), BIGGAN] = 96
    rows: Annotated[Count | None, BIGGAN] = None
    class_rows: Annotated[Literal["keep", "resize"], BIGGAN] = "keep"
    chunk: Annotated[Count, BIGGAN] = 20
    shared: Annotated[Count, BIGGAN] = 128
    attention: Annotated[Number, BIGGAN] = 64
    width: Annotated[Count, STYLEGAN] = 512
    code: Annotated[Count, STYLEGAN] = 512
    depth: Annotated[Count, STYLEGAN] = 8
    mixing: Annotated[float, Ge(0), Le(1), STYLEGAN] = 0.9
    rgb_activation: Annotated[bool, STYLEGAN] = True
    flip: bool = False
    batch: Count = 4
    lr: Annotated[Rate, Usually(1e-4, 1e-3)] = OWN
    d_lr: Annotated[Rate, Usually(4e-4, 1e-3)] = OWN
    beta2: Annotated[float, Ge(0), Lt(1), Usually(0.999, 0.99)] = OWN
    ema: Annotated[float, Ge(0), Lt(1)] | None = None
    average: Literal["beside", "instead"] = "beside"
    gan: Annotated[Literal["hinge", "softplus", "wgan-gp"], Usually("hinge", "wgan-gp")] = OWN
    lambda_penalty: Weight = 10.0
    lambda_drift: Annotated[Weight, Usually(0.0, 1e-3)] = OWN
    lambda_r1: Weight = 0.0
    r1_every: Count = 1

    def __post_init__(self) -> None:
        for name, usual in self._of(Usually):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(usual, self.network))
        super().__post_init__()

    def must_fit(self) -> None:
        """See `Options`."""
        usual = {option.name: option.default for option in dataclasses.fields(self)}
        for name, of in self._of(Only):
            value = getattr(self, name)
            if of.network != self.network and value != usual[name]:
                raise ValueError(
                    f"{name} is {value}, but {self.network} has no such option: {of.network} has"
                )
        self.family.must_fit(self)
        super().must_fit()
        if self.evaluate and (not self.family.conditional or self.class_count < 2):
            raise ValueError(
                "evaluate measures what is made of two classes or more, and these networks know "
                "fewer"
            )
        if self.average == "instead" and self.ema is None:
            raise ValueError("average is instead, but there is none without ema")

    def decisive(self) -> dict[str, Any]:
        """See `Options`; without those that the network does not have."""
        others = [name for name, of in self._of(Only) if of.network != self.network]
        return {n: value for n, value in super().decisive().items() if n not in others}

    def _of(self, kind: type) -> list[tuple[str, Any]]:
        """The options that are annotated by such, and how."""
        return [(name, own) for name, said in annotated(type(self)).items()
                for own in said if isinstance(own, kind)]  # fmt: skip

    @property
    def family(self) -> Family:
        """What is the network's."""
        return FAMILIES[self.network]

    def transform(self) -> Transform:
        """The middle of a picture, at the networks' size."""
        side = (self.family.side(self),) * 2
        return Transform("centre_crop", side, side, self.flip)

    @property
    def count(self) -> int:
        """Rows of the embeddings."""
        return self.rows or self.class_count

    @property
    def least(self) -> int:
        """The side of the encoder's deepest maps."""
        return DEEPEST

    @property
    def first(self) -> int:
        """The side of the generator's first maps."""
        return DEEPEST

    def given(self, turn: str) -> tuple[Draw, ...]:
        """What a generator makes a picture of: `z` and `c`, or `z_d` and `c_d` in the turn `d`.

        The class is the only one, 0, where the networks are told none.
        """
        z, c = (f"{name}_{turn}" if turn else name for name in "zc")
        classes = (self.class_count or self.count) if self.family.conditional else 1
        return Noise(z, (self.family.noise(self),)), Classes(c, classes)

    def takes(self) -> tuple[Draw, ...]:
        """The same in use, `z` and `c`, without a class that would say nothing."""
        own = self.given("")
        return own if self.family.conditional else own[:1]

    def player(self, *networks: str, averaged: bool = False) -> Player:
        """By Adam: generators at their own rate, all others at the discriminator's."""
        rate = self.lr if networks[0] in ("G", "X") else self.d_lr
        settings = {"betas": (0.0, self.beta2), "eps": self.family.eps}
        ema = self.ema if averaged else None
        return Player(networks, rate, settings=settings, ema=ema, shares=self.family.shares)


class OnGan(ImageTrainer):
    """A trainer whose networks are a GAN's, with what these have in common."""

    def classes(self, o: Any) -> Sequence[str]:
        """None where the networks are told none."""
        return super().classes(o) if o.family.conditional else ()

    def written(self, o: Any) -> dict[str, str]:
        """Averages beside the last weights, or instead."""
        own = super().written(o)
        if o.average == "beside":
            return own
        names = [name for name in own if not name.endswith(AVERAGED)]
        return {n: f"{n}{AVERAGED}" if f"{n}{AVERAGED}" in own else n for n in names}

    def knows_more(self, o: Any) -> bool:
        """Where it is told how many rows there are."""
        return o.rows is not None

    def must_start(self, o: Any, start: Path) -> None:
        """See `ImageTrainer`; where classes are others, what may be done about it."""
        try:
            super().must_start(o, start)
        except MismatchError as error:
            known = classes_in(start)
            if o.class_rows == "resize" or known in (None, tuple(self.classes(o))):
                raise
            raise MismatchError(
                f"{error}: class_rows: resize draws their rows anew, and rows: {len(known or ())} "
                f"keeps all of them, where the first are the data's"
            ) from None

    def reshapes(self, o: Any) -> dict[str, str]:
        """See `ImageTrainer`; and what has it do so."""
        if o.class_rows == "resize":
            return super().reshapes(o)
        again = dataclasses.replace(o, class_rows="resize") if o.family.conditional else o
        return dict.fromkeys(super().reshapes(again), "class_rows: resize")

    def rows(self, o: Any) -> dict[str, int]:
        """The embeddings', where those of a start are to be re-made."""
        if o.class_rows == "keep":
            return {}
        of = o.family.rows(o)
        averaged = {} if o.ema is None else {f"G{AVERAGED}": of["G"]}
        return {f"{network}.{name}": o.count for network, name in {**of, **averaged}.items()}

    def estimates(self, o: Any) -> Sequence[str]:
        """Those of its networks."""
        found: Sequence[str] = o.family.estimates
        return found

    def weights(self, o: Any, images: Images) -> dict[str, float]:
        """Of what the discriminator's loss has beside its verdicts."""
        return {
            "penalty": o.lambda_penalty, "drift": o.lambda_drift, "r1": o.lambda_r1 * o.r1_every,
        }  # fmt: skip

    def judging(self, o: Any, step: int) -> tuple[Loss, ...]:
        """The discriminator's losses: `judge`, and R1 in each `r1_every`-th step."""
        return (self.judge, self.slope) if o.lambda_r1 and step % o.r1_every == 0 else (self.judge,)

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss; what calls `judged`."""
        raise NotImplementedError

    def real(self, s: Session, b: Batch) -> torch.Tensor:
        """What the discriminator is shown as real."""
        return b.y

    def judged(self, s: Session, b: Batch, fake: torch.Tensor) -> dict[str, torch.Tensor]:
        """The discriminator's loss on real pictures and on those made for its turn."""
        import torch

        from ..training.losses import gradient_penalty, judge, wide

        real, o = self.real(s, b), s.options
        of_fake, of_real = s.both("D", fake, real, (b.c_d, b.c_y))
        s.said(of_real)
        losses = {"judge": judge(of_real, of_fake, o.gan)}
        if o.gan == "wgan-gp":
            share = torch.rand(len(real), device=real.device)
            losses["penalty"] = gradient_penalty(lambda x: s["D"](x, b.c_y), real, fake, share)
            if o.lambda_drift:
                losses["drift"] = wide(of_real).square().mean()
        return losses

    def slope(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """R1 at the real pictures."""
        from ..training.losses import slope_penalty

        return {"r1": slope_penalty(lambda images: s["D"](images, b.c_y), self.real(s, b))}


def family_in(shapes: Mapping[str, Sequence[int]]) -> Family:
    """Whose networks a checkpoint has, by the generator's names."""
    styled = any(name.startswith(("G.style.", "G.generator.")) for name in shapes)
    return FAMILIES["stylegan" if styled else "biggan"]
