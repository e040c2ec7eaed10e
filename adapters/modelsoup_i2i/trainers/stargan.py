"""StarGAN: Choi, Choi, Kim, Ha, Kim and Choo, CVPR 2018. Importable without torch.

`G` makes of a picture one of any class that it is told; `D` judges, and tells the class of what it
sees. In place of a class there may be attributes, of which a picture has several, as CelebA's do in
the paper. Names are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..networks import stargans
from ..networks.described import Network
from ..pictures.draws import Attributes, Classes, Draw, Labelled, Uniform, WithAttributes
from ..pictures.picture import Images
from ..training.attributed import AttributedImages
from ..training.options import SquareOptions
from ..training.players import Player
from ..training.ranges import Count, Rate, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class StarGANOptions(SquareOptions, AttributedImages):
    """What a plan may say to the trainer, beside what all trainers of classes share.

    Attributes:
        steps: the discriminator's.
        rate: `linear`: in the second half of all steps, or epochs, it falls to nearly 0; `constant`
            leaves it to the other options.
        n_critic: the discriminator's steps for each of the generator's.
        lambda_class: the weight of the classes' cross-entropy, in both objectives; of attributes,
            of the binary one, which is summed over them.
        lambda_rec: that of the L1 distance of a picture and what is made of its translation, in its
            own class, or with its own attributes.
        lambda_penalty: that of the gradient penalty.
        width: channels after the generator's first layer.
        blocks: its residual blocks.
        d_width: channels after the discriminator's first layer.
        d_layers: its layers of stride 2; None is as many as leave 2 × 2, at most 6.
    """

    batch: Count = 16
    lr: Rate = 1e-4
    steps: Count | None = 200_000
    rate: Literal["linear", "constant"] = "linear"
    n_critic: Count = 5
    lambda_class: Weight = 1.0
    lambda_rec: Weight = 10.0
    lambda_penalty: Weight = 10.0
    width: Count = 64
    blocks: Count = 6
    d_width: Count = 64
    d_layers: Count | None = None

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.has_attributes and self.evaluate:
            raise ValueError(
                "evaluate measures by class, and these pictures have attributes, of which each may "
                "have several: translate pictures of a result, and measure those"
            )
        if self.size >> self.judging < 1:
            raise ValueError(f"d_layers is {self.judging}, but {self.size} pixels are halved to "
                             f"one in {self.size.bit_length() - 1}")  # fmt: skip
        for name in ("decay_epochs", "decay_steps", "halve_every"):
            if self.rate == "linear" and getattr(self, name):
                raise ValueError(
                    f"rate is linear, and {name} says otherwise: rate: constant leaves it to that"
                )

    @property
    def judging(self) -> int:
        """Layers of stride 2 in the discriminator."""
        return self.d_layers or stargans.layers_for(self.size)

    def pace(self, epoch: int, step: int = 0) -> float:
        """See `Steps`."""
        if self.rate == "constant":
            return super().pace(epoch, step)
        place, total = (epoch, self.epochs) if self.steps is None else (step, self.steps)
        return min(1.0, max(0.0, (total - place) / (total - total // 2)))


class StarGAN(ImageTrainer):
    """Trains one generator for all pairs of classes."""

    name, options = "stargan", StarGANOptions

    def networks(self, o: StarGANOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        of_both = {"classes": o.class_count, "channels": o.channels}
        judge = {"size": o.size, "width": o.d_width, "layers": o.judging, **of_both}
        return {
            "G": Network(stargans.GENERATOR, {"width": o.width, "blocks": o.blocks, **of_both}),
            "D": Network(stargans.DISCRIMINATOR, judge),
        }

    def groups(self, o: StarGANOptions) -> dict[str, list[str]]:
        """As CycleGAN's: low-level are the encoder and the discriminator's first three layers."""
        encoder = [f"G.main.{place}.*" for place in (0, 1, 3, 4, 6, 7)]
        early = [f"D.main.{2 * layer}.*" for layer in range(min(3, o.judging))]
        late = [f"D.main.{2 * layer}.*" for layer in range(len(early), o.judging)]
        last = 9 + o.blocks
        return {
            "generator": ["G.*"], "discriminator": ["D.*"],
            "low-level": [*encoder, *early],
            "encoder": encoder,
            "middle": [f"G.main.{place}.*" for place in range(9, last)],
            "decoder": [f"G.main.{last + n}.*" for n in (0, 1, 3, 4, 6)],
            "discriminator-low": early, "discriminator-high": [*late, "D.conv?.*"],
        }  # fmt: skip

    def translators(self, o: StarGANOptions) -> dict[str, Translator]:
        """The generator."""
        told = (Attributes if o.has_attributes else Classes)("c", o.class_count)
        return {"G": Translator("data", "data", "translated", takes=(told,))}

    def has_attributes(self, o: StarGANOptions) -> bool:
        """Where a file tells them."""
        return o.has_attributes

    def players(self, o: StarGANOptions) -> dict[str, Player]:
        """Each network by itself."""
        return {n: Player((n,), o.lr, settings={"betas": (0.5, 0.999)}) for n in ("G", "D")}

    def draws(self, o: StarGANOptions) -> Sequence[Draw]:
        """A picture; by `order` its batch's classes are exchanged, `share` is the penalty's."""
        pictures = WithAttributes if o.has_attributes else Labelled
        return pictures(("x", "c")), Uniform(("order", "share"))

    def weights(self, o: StarGANOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        return {
            "penalty": o.lambda_penalty, "class": o.lambda_class, "class_real": o.lambda_class,
            "rec": o.lambda_rec,
        }  # fmt: skip

    def turns(self, o: StarGANOptions, step: int) -> list[Turn]:
        """The discriminator's step and, in each `n_critic`-th, the generator's, on one batch."""
        found = [Turn("discriminator", ("D",), (self.judge, self.penalty))]
        if (step + 1) % o.n_critic == 0:
            found.append(Turn("generator", ("G",), (self.translate,)))
        return found

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """What the discriminator tells of pictures, and of what they become in another's class."""
        import torch

        from ..training.losses import judge

        b.target = b.c[b.order.argsort()]
        with torch.no_grad():
            b.fake = s["G"](b.x, b.target)
        verdicts, logits = s["D"](torch.cat([b.x, b.fake]))
        real, fake = verdicts.chunk(2)
        return {
            "judge": judge(real, fake, "wgan-gp"),
            "class_real": _told_apart(logits[: len(b.x)], b.c),
        }

    def penalty(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """Of the sum of its verdicts on mixtures of both."""
        from ..training.losses import gradient_penalty

        return {"penalty": gradient_penalty(lambda x: s["D"](x)[0], b.x, b.fake, b.share)}

    def translate(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The generator's loss: deceive, be of the class, and lead back."""
        from ..training.losses import deceive, distance

        with s.fixed("D"):
            made = s["G"](b.x, b.target)
            verdicts, logits = s["D"](made)
        return {
            "gan": deceive(verdicts, "wgan-gp"),
            "class": _told_apart(logits, b.target),
            "rec": distance(s["G"](made, b.c), b.x),
        }

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Sizes of both networks, and how many classes they know."""
        found: dict[str, Any] = dict(stargans.generator_in(shapes))
        if any(name.startswith("D.") for name in shapes):
            judge = stargans.discriminator_in(shapes)
            found |= {"size": judge["size"], "d_width": judge["width"],
                      "d_layers": judge["layers"]}  # fmt: skip
        return found


def _told_apart(logits: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """How badly logits tell classes, the mean over a batch.

    Of attributes, of which each is there or not by itself, it is the sum over them.

    Args:
        logits: N × classes.
        c: int64 N, or float32 N × attributes, 0 or 1.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    from ..training.losses import wide

    if c.is_floating_point():
        return binary_cross_entropy_with_logits(wide(logits), c, reduction="sum") / len(c)
    return cross_entropy(wide(logits), c)
