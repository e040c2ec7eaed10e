"""BalaGAN: Patashnik, Danon, Zhang and Cohen-Or 2020; and FUNIT, on which it is built.

Liu et al., "Few-Shot Unsupervised Image-to-Image Translation", ICCV 2019. `G` gives a picture the
style of another one, `D` judges pictures of each modality, `M` found the modalities. Importable
without torch. Names are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Lt

from ..networks import funits
from ..networks.described import Joined, Network
from ..networks.modalities import labeller, labeller_in
from ..pictures.draws import Labelled
from ..pictures.picture import Images
from ..pictures.transforms import Transform, zoomed
from ..training.options import Shared
from ..training.players import Player
from ..training.ranges import Count, Number, Rate, Weight
from ..training.sorting import ModalDomains, find_labels, remarks, split_in
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Style, Translator

if TYPE_CHECKING:
    import torch

    from ..training.cast import Cast
    from ..training.session import Session


@dataclass(frozen=True)
class BalaGANOptions(Shared, ModalDomains):
    """What a plan may say to the trainer, beside what all trainers of two domains share.

    Attributes:
        encoder: of the start's M, as `modality` made it: `resnet18`, `small` or `vae`.
        embedding: of M too: `h` or `z`.
        size: pixels of a side. Pictures are resized until their shorter side is 140/128 of it, and
            cropped at random.
        width: channels after the first layer of each network.
        downs: how often the content is halved.
        blocks: residual blocks at that size, of the content encoder and of the decoder.
        style_downs: how often a reference is halved.
        latent: numbers of a style.
        mlp: width of what makes the decoder's scales and biases of a style.
        d_halvings: how often the discriminator halves.
        d_most: its channels at most.
        heads: 2: one judges, one tells modalities apart; 1: it judges alone, as FUNIT's.
        head_depth: layers that a head has for itself: 1, the code's; 2, the paper's.
        cls_weight: of the cross-entropy of modalities.
        r1: how R1 is meant: `funit`, the slope of the mean verdict of a batch, with which
            lambda_r1 was tuned; or `per_sample`, as papers write it, the batch's square as strong.
        lambda_r1: its weight.
        lambda_rec: that of the L1 distance between a picture and itself in its own style.
        lambda_features: that of the distance between the discriminator's features.
        class_balanced: draw each modality equally often, however many pictures it has.
        ema: the share of the old average of G's weights that a step keeps.
        batch: pictures that are translated in a pass, and as many references.
    """

    encoder: Literal["resnet18", "small", "vae"] = "resnet18"
    embedding: Literal["h", "z"] = "h"
    size: Annotated[int, Ge(16)] = 128
    width: Count = 64
    downs: Count = 3
    blocks: Count = 2
    style_downs: Count = 4
    latent: Count = 64
    mlp: Count = 256
    d_halvings: Count = 4
    d_most: Count = 1024
    heads: Literal[1, 2] = 2
    head_depth: Literal[1, 2] = 1
    cls_weight: Weight = 1.0
    r1: Literal["funit", "per_sample"] = "funit"
    lambda_r1: Weight = 10.0
    lambda_rec: Weight = 0.1
    lambda_features: Weight = 1.0
    class_balanced: bool = False
    ema: Annotated[float, Ge(0), Lt(1)] = 0.999
    batch: Count = 10
    lr: Rate = 1e-4
    epochs: Number = 100  # of A and B: of the paper's 11,000 dogs 110,000 steps; it makes 100,000

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        funits.must_see(self.size, self.downs, max(self.style_downs, self.d_halvings))

    def transform(self) -> Transform:
        """See `Pixels`."""
        return zoomed(self.size, flip=self.flip)


class BalaGAN(ImageTrainer):
    """Trains a translator that takes its style from a reference, among modalities."""

    name, options = "balagan", BalaGANOptions
    of_two = "BalaGAN without modalities, of which k makes several"

    def networks(self, o: BalaGANOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        judge = {size: getattr(o, option) for size, option in funits.JUDGES.items()}
        own = {
            "G": Network(funits.GENERATOR, {name: getattr(o, name) for name in funits.SIZES}),
            "D": Network(funits.DISCRIMINATOR, {"classes": sum(o.split), **judge}),
        }
        if o.found_by == "start":
            k = o.split[0] + (o.k_b or 0)
            own["M"] = labeller(o.encoder, o.size, k, o.channels, o.embedding)
        return own

    def joined(self, o: BalaGANOptions) -> dict[str, Joined]:
        """`S` makes styles of pictures."""
        return {"S": funits.STYLES}

    def groups(self, o: BalaGANOptions) -> dict[str, list[str]]:
        """As the generator is made, and its average, which is what is used."""
        return {"discriminator": ["D.*"]} | funits.groups("G", "G_ema")

    def translators(self, o: BalaGANOptions) -> dict[str, Translator]:
        """The generator, which is told a style."""
        return {"G": Translator("X", "Y", "A to B", takes=(Style(o.latent, "S"),))}

    def players(self, o: BalaGANOptions) -> dict[str, Player]:
        """Each network by itself."""
        settings = {"alpha": 0.99, "eps": 1e-8, "weight_decay": 1e-4}
        averages = {"G": o.ema, "D": None}
        return {n: Player((n,), o.lr, "RMSprop", settings, ema) for n, ema in averages.items()}

    def draws(self, o: BalaGANOptions) -> tuple[Labelled, ...]:
        """`x`, which is translated, and `y`, its reference, of any two classes."""
        sets = ("X",) if o.exclude_target else ("X", "Y")
        return tuple(Labelled((n, f"c_{n}"), sets, balanced=o.class_balanced) for n in "xy")

    def sorting(self, o: BalaGANOptions, s: Cast) -> dict[str, list[int]]:
        """By the start's M."""
        return find_labels(s) if o.found_by == "start" else {}

    def remarks(self, o: BalaGANOptions) -> list[str]:
        """That there are no modalities."""
        if max(o.split) > 1:
            return []
        return [f"A and B are not split: this is {self.of_two} (docs/i2i_balagan.md)"]

    def opening(self, o: BalaGANOptions, images: Images) -> list[str]:
        """What modalities are too small, and which domain is."""
        return remarks(self.classes(o), images, o.batch)

    def weights(self, o: BalaGANOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        return {
            "classes": o.cls_weight, "r1": o.lambda_r1, "rec": o.lambda_rec,
            "features": o.lambda_features,
        }  # fmt: skip

    def turns(self, o: BalaGANOptions, step: int) -> tuple[Turn, ...]:
        """The discriminator's step, then the generator's."""
        return (
            Turn("discriminator", ("D",), (self.judge_made, self.judge_real)),
            Turn("generator", ("G",), (self.translate,)),
        )

    def judge_made(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss on translations, of which G is trained after this turn.

        `b.made` is x in the style of y, and then x in its own.
        """
        import torch

        from ..training.losses import unmask

        b.made = s["G"](b.x, s["S"](torch.cat([b.y, b.x])))
        return {"made": unmask(s["D"](b.made[: len(b.x)].detach(), b.c_y).verdicts)}

    def judge_real(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """That on references, with R1 and the cross-entropy of modalities, of one pass."""
        import torch
        from torch.nn import functional as F  # noqa: N812

        from ..training.losses import wide

        real = b.y.detach().requires_grad_()
        said = s["D"](real, b.c_y)
        verdicts = wide(said.verdicts)
        losses = {"real": F.relu(1 - verdicts).mean()}
        if said.logits is not None:
            losses["classes"] = F.cross_entropy(wide(said.logits), b.c_y)
        if s.options.lambda_r1:
            # No layer mixes the pictures of a batch: this is each one's slope of its mean verdict.
            whole = verdicts.mean((1, 2)).sum()
            (slope,) = torch.autograd.grad(whole, real, create_graph=True)
            penalty = slope.square().sum() / len(real)
            funit = s.options.r1 == "funit"  # of the mean over the batch too, of which it is a part
            losses["r1"] = penalty / len(real) ** 2 if funit else penalty
        return losses

    def translate(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The generator's loss: what is made is judged as its reference's class, x̂ as that of x."""
        import torch

        from ..training.losses import deceive, distance

        with torch.no_grad():
            wanted = s["D"](torch.cat([b.y, b.x]), torch.cat([b.c_y, b.c_x])).features
        with s.fixed("D"):
            said = s["D"](b.made, torch.cat([b.c_y, b.c_x]))
        return {
            "gan": deceive(said.verdicts, "hinge"),  # the mean over both is half of their sum
            "features": 2 * distance(said.features, wanted),
            "rec": distance(b.made[len(b.x) :], b.x),
        }

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Sizes of the networks that there are, and how many classes: see `options_of`."""
        found = funits.both_in(shapes)
        if any(name.startswith("M.") for name in shapes):
            sizes = labeller_in(shapes).sizes
            found |= {name: sizes[name] for name in ("encoder", "embedding", "channels")}
            if found.get("classes", sizes["k"] + 1) == sizes["k"] + 1:
                # B is one class; in M alone, too, or else `find_labels` says how many are B's.
                found["k"] = sizes["k"]
        return found

    def options_of(self, checkpoint: Path) -> dict[str, Any]:
        """See `ImageTrainer`; and which of the classes are A's, where the checkpoint tells."""
        return super().options_of(checkpoint) | split_in(checkpoint)


@dataclass(frozen=True)
class FUNITOptions(BalaGANOptions):
    """What a plan may say to the trainer: BalaGAN's, with FUNIT's defaults."""

    heads: Literal[1, 2] = 1
    batch: Count = 64
    steps: Count | None = 100_000


class FUNIT(BalaGAN):
    """Trains a translator that takes its style from a reference, among given classes."""

    name, options = "funit", FUNITOptions
    of_two = "FUNIT of two classes, where modalities: labels has one for each folder in A"
