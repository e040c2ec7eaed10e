"""StarGAN v2: Choi, Uh, Yoo and Ha, CVPR 2020, without what is for faces alone.

`G` makes of a picture one of a style. `F` makes styles of noise, `E` of pictures, both for each
class; `D` judges pictures as of a class. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from modelsoup import MismatchError

from ..networks.described import Network
from ..networks.shapes import must_match, part_of
from ..pictures.draws import Draw, Labelled, Noise
from ..pictures.picture import Images
from ..pictures.transforms import Transform
from ..training.options import SquareOptions
from ..training.players import Player
from ..training.ranges import Count, Rate, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Style, Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session

ROOM = "modelsoup_i2i.networks.starganv2"
STEPS = 100_000  # of the paper
WIDE = 2**14  # channels after the first layer, times pixels of a side
Kind = Literal["latent", "reference"]
"""Where a style is from: of noise, or of another picture."""
KINDS: tuple[Kind, ...] = ("latent", "reference")


@dataclass(frozen=True)
class StarGANv2Options(SquareOptions):
    """What a plan may say to the trainer, beside what all trainers of classes share.

    Attributes:
        size: pixels of a side: a power of two.
        parts: how often, in place of a picture's whole middle, a random part of it is shown.
        f_lr: the rate of the network that makes styles of noise.
        weight_decay: of all networks.
        ema: the share of the old average of weights that a step keeps; None for no average.
        lambda_style: the weight of how far the style that is seen in a picture is from its own.
        lambda_ds: that of how much pictures of two styles differ, at first …
        ds_steps: … which falls to 0 in so many steps; None is `steps`, or 100,000.
        lambda_cycle: that of the L1 distance of a picture and what is made of its translation.
        lambda_r1: that of R1 in the discriminator's objective.
        width: channels after the first layer, of which each halving makes twice as many; None is
            16,384 / size.
        most: channels at most.
        style: numbers of a style.
        noise: numbers that one is made of.
        hidden: numbers of each layer between.
    """

    size: Annotated[int, Ge(16)] = 256
    parts: Annotated[float, Ge(0), Le(1)] = 0.5
    batch: Count = 8
    lr: Rate = 1e-4
    f_lr: Rate = 1e-6
    weight_decay: Weight = 1e-4
    steps: Count | None = STEPS
    ema: Annotated[float, Ge(0), Lt(1)] | None = 0.999
    lambda_style: Weight = 1.0
    lambda_ds: Weight = 1.0
    ds_steps: Count | None = None
    lambda_cycle: Weight = 1.0
    lambda_r1: Weight = 1.0
    width: Count | None = None
    most: Count = 512
    style: Count = 64
    noise: Count = 16
    hidden: Count = 512

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.size & (self.size - 1):
            raise ValueError(f"size is {self.size}, but must be a power of two")

    def transform(self) -> Transform:
        """The middle of a picture, or often a part of it."""
        return replace(super().transform(), parts=self.parts)

    def spread(self, step: int) -> float:
        """The share of `lambda_ds` in a step, counted from 0."""
        return max(0.0, 1 - step / (self.ds_steps or self.steps or STEPS))


class StarGANv2(ImageTrainer):
    """Trains one generator for all pairs of classes, with styles."""

    name, options = "starganv2", StarGANv2Options

    def networks(self, o: StarGANv2Options) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        sees = {"size": o.size, "width": o.width or WIDE // o.size, "most": o.most,
                "channels": o.channels}  # fmt: skip
        style, classes = {"style": o.style}, {"classes": o.class_count}
        maps = {"noise": o.noise, "hidden": o.hidden, **style, **classes}
        return {
            "G": Network(f"{ROOM}:Generator", {**sees, **style}),
            "F": Network(f"{ROOM}:Mapping", maps),
            "E": Network(f"{ROOM}:StyleEncoder", {**sees, **style, **classes}),
            "D": Network(f"{ROOM}:Discriminator", {**sees, **classes}),
        }

    def groups(self, o: StarGANv2Options) -> dict[str, list[str]]:
        """Networks by their words, and the generator's two halves."""
        return {
            "generator": ["G.*"], "mapping": ["F.*"], "style-encoder": ["E.*"],
            "discriminator": ["D.*"],
            "encoder": ["G.first.*", "G.encode.*"],
            "decoder": ["G.decode.*", "G.norm.*", "G.last.*"],
        }  # fmt: skip

    def translators(self, o: StarGANv2Options) -> dict[str, Translator]:
        """The generator, with a style of either kind."""
        style = Style(o.style, of_pictures="E", of_noise="F", noise=o.noise, classes=o.class_count)
        return {"G": Translator("data", "data", "translated", takes=(style,))}

    def players(self, o: StarGANv2Options) -> dict[str, Player]:
        """Each network by itself; the discriminator has no average."""
        how = {"betas": (0.0, 0.99), "weight_decay": o.weight_decay}
        return {
            name: Player(
                (name,), o.f_lr if name == "F" else o.lr, settings=how,
                ema=None if name == "D" else o.ema,
            )
            for name in ("G", "F", "E", "D")
        }  # fmt: skip

    def draws(self, o: StarGANv2Options) -> Sequence[Draw]:
        """A picture of any class, two of one that is aimed at, and noise for two styles of that."""
        return (
            Labelled(("x", "c"), balanced=True), Labelled(("r", "r2", "c_r"), balanced=True),
            Noise("z", (o.noise,)), Noise("z2", (o.noise,)),
        )  # fmt: skip

    def weights(self, o: StarGANv2Options, images: Images) -> dict[str, float]:
        """Of each term, in both turns of each side."""
        own = {"r1": o.lambda_r1, "style": o.lambda_style, "spread": o.lambda_ds,
               "cycle": o.lambda_cycle}  # fmt: skip
        return {f"{name}_{kind}": weight for name, weight in own.items() for kind in KINDS}

    def turns(self, o: StarGANv2Options, step: int) -> list[Turn]:
        """Two of the discriminator, then one of all that translates, and one of G alone."""
        judging = [
            Turn(f"judge_{kind}", ("D",), (partial(self.real, kind=kind),
                                           partial(self.fake, kind=kind)))
            for kind in KINDS
        ]  # fmt: skip
        share = o.spread(step) if o.lambda_ds else 0.0
        return judging + [
            Turn(kind, players, (partial(self.translate, kind=kind, share=share),))
            for kind, players in zip(KINDS, (("G", "F", "E"), ("G",)), strict=True)
        ]

    def style(self, s: Session, b: Batch, kind: Kind, *, second: bool = False) -> torch.Tensor:
        """A style of the class that is aimed at."""
        noise, picture = (b.z2, b.r2) if second else (b.z, b.r)
        made: torch.Tensor = s["F"](noise, b.c_r) if kind == "latent" else s["E"](picture, b.c_r)
        return made

    def real(self, s: Session, b: Batch, kind: Kind) -> dict[str, torch.Tensor]:
        """The discriminator's loss on real pictures, and R1 at them."""
        from ..training.losses import deceive, steepness

        real = b.x.detach().requires_grad_()
        verdicts = s["D"](real, b.c)
        losses = {f"real_{kind}": deceive(verdicts, "softplus")}
        return losses | {f"r1_{kind}": steepness(verdicts, real)}

    def fake(self, s: Session, b: Batch, kind: Kind) -> dict[str, torch.Tensor]:
        """Its loss on what is made of them."""
        import torch

        from ..training.losses import unmask

        with torch.no_grad():
            made = s["G"](b.x, self.style(s, b, kind))
        return {f"fake_{kind}": unmask(s["D"](made, b.c_r), "softplus")}

    def translate(self, s: Session, b: Batch, kind: Kind, share: float) -> dict[str, torch.Tensor]:
        """What translates deceives, is of its style, differs with it, and leads back."""
        import torch

        from ..training.losses import deceive, distance

        with s.fixed("D", *([] if kind == "latent" else ["F", "E"])):
            style = self.style(s, b, kind)
            made = s["G"](b.x, style)
            losses = {
                f"gan_{kind}": deceive(s["D"](made, b.c_r), "softplus"),
                f"style_{kind}": distance(s["E"](made, b.c_r), style),
                f"cycle_{kind}": distance(s["G"](made, s["E"](b.x, b.c)), b.x),
            }
            if share:
                with torch.no_grad():
                    other = s["G"](b.x, self.style(s, b, kind, second=True))
                # What it is told as is what is minimised.
                losses[f"spread_{kind}"] = -share * distance(made, other)
        return losses

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Sizes of the networks that there are, and how many classes they know."""
        own, said = part_of(shapes, "G.", "generator")
        first, norm = own.get("first.weight", ()), own.get("decode.0.norm1.fc.weight", ())
        if len(first) != 4 or len(norm) != 2:
            raise MismatchError(f"{said} has no first.weight and decode.0.norm1.fc.weight")
        halvings = len({n.split(".")[1] for n in own if n.startswith("encode.")}) - 2
        found: dict[str, Any] = {
            "size": 16 << max(halvings, 0), "width": first[0], "channels": first[1],
            "style": norm[1], "most": norm[0] // 2,
        }  # fmt: skip
        for name, decides in _DECIDE.items():
            found |= dict(zip(decides, shapes.get(name, ()), strict=False))
        try:
            networks = self.networks(StarGANv2Options(**found))
        except ValueError as error:
            raise MismatchError(f"{said} is none of StarGAN v2's: {error}") from None
        for name, network in networks.items():
            own, said = part_of(shapes, f"{name}.", "network")
            if own:
                must_match(own, network.shapes(), said)
        return found


_DECIDE = {
    "F.shared.0.weight": ("hidden", "noise"), "F.last.bias": ("classes",),
    "E.style.bias": ("classes",), "D.verdict.bias": ("classes",),
    # Both see smaller maps than the generator has, which may be wider than its.
    "E.last.bias": ("most",), "D.last.bias": ("most",),
}  # fmt: skip
