"""The modalities of a rich domain that nobody labelled: Patashnik et al., BalaGAN, CVPRW 2021, §3.

`M` embeds pictures, by SimCLR (Chen et al. 2020) or a VAE, and has the centroids of the embeddings'
clusters, which are found after the last step: see `training/modalities.py`. Importable without
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from modelsoup import Job, ParameterError

from ..networks import modalities
from ..networks.described import Joined, Network
from ..pictures.augmentation import must_be_known
from ..pictures.draws import Draw, Noise, Single, Views
from ..pictures.picture import Images
from ..pictures.transforms import Transform, zoomed
from ..pictures.views import JITTER, NUMBERS, TILES, view
from ..training.modalities import Split, find_modalities
from ..training.options import Shared
from ..training.players import Player
from ..training.ranges import Count, Number, Rate, Weight
from ..training.sorting import split_in
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session

MOST_JITTER = (1.0, 1.0, 1.0, 0.5)


@dataclass(frozen=True)
class ModalityOptions(Shared, Split):
    """What a plan may say to the trainer, beside what all trainers of images share.

    Attributes:
        encoder: `resnet18` and `small` are trained by contrast; `vae` to make pictures again.
        size: the side of what is seen: a crop of a picture whose shorter side is 140/128 of that;
            its middle, once pictures are clustered. Of `vae` 64.
        augment: what views of a picture may differ by, see `modelsoup_i2i.pictures.views`.
        jitter: of `color`: how far brightness, contrast, saturation and hue go.
        temperature: τ of NT-Xent.
        weight_decay: Adam's.
        beta: the weight of the VAE's KL divergence; None is batch / number of images.
        gamma: the share of its rate that each epoch leaves.
        flip: of `vae`: mirror half of the pictures.
        recluster: the start's encoder stays as it is, and is clustered anew; with `steps: 1`.
    """

    encoder: Literal["resnet18", "small", "vae"] = "resnet18"
    size: Annotated[int, Ge(8)] = 128
    augment: tuple[str, ...] = ("crop", "flip", "color", "gray", "blur")
    jitter: tuple[float, float, float, float] = JITTER
    temperature: Rate = 0.5
    weight_decay: Weight = 1e-6
    beta: Weight | None = None
    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    recluster: bool = False
    batch: Count = 256
    lr: Rate = 3e-4
    epochs: Number = 600

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.evaluate:
            raise ValueError("evaluate measures translators; modalities tell their own figures")
        if self.batch < 2:
            raise ValueError("batch is 1, but batch norm needs two pictures")
        must_be_known(self.augment, NUMBERS)
        if any(not 0 <= own <= most for own, most in zip(self.jitter, MOST_JITTER, strict=True)):
            raise ValueError(
                f"jitter is {list(self.jitter)}, but must be between 0 and {list(MOST_JITTER)}"
            )
        if self.encoder == "vae":
            if self.size != modalities.VAE_SIDE:
                raise ValueError(
                    f"size is {self.size}, but the VAE sees {modalities.VAE_SIDE} pixels a side"
                )
            if self.embedding == "z":
                raise ValueError("embedding is z, which a contrastive head makes; of vae it is h")
            return
        colours = [name for name in ("color", "gray") if name in self.augment]
        if colours and self.channels != 3:
            raise ValueError(
                f"augment has {' and '.join(colours)}, for pictures of 3 channels, but channels is "
                f"{self.channels}"
            )
        if "shuffle" in self.augment and self.size % TILES:
            raise ValueError(
                f"augment has shuffle, of {TILES} × {TILES} tiles, but size is {self.size}"
            )

    def pace(self, epoch: int, step: int = 0) -> float:
        """See `Steps`."""
        return super().pace(epoch, step) * self.gamma**epoch

    def transform(self) -> Transform:
        """See `Pixels`. Views are mirrored by `augment`."""
        return zoomed(self.size, flip=self.flip and self.encoder == "vae")


class Modality(ImageTrainer):
    """Trains an encoder, and finds the modalities of its pictures."""

    name, options = "modality", ModalityOptions

    def networks(self, o: ModalityOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        k = sum(o.clusters())
        return {"M": modalities.labeller(o.encoder, o.size, k, o.channels, o.embedding)}

    def joined(self, o: ModalityOptions) -> dict[str, Joined]:
        """`P` projects views; `R` makes pictures again."""
        if o.encoder == "vae":
            return {"R": modalities.RECONSTRUCTION}
        return {"P": modalities.PROJECTION}

    def translators(self, o: ModalityOptions) -> dict[str, Translator]:
        """None: it makes no pictures."""
        return {}

    def players(self, o: ModalityOptions) -> dict[str, Player]:
        """The one."""
        return {"M": Player(("M",), o.lr, settings={"weight_decay": o.weight_decay})}

    def fixed(self, o: ModalityOptions) -> Sequence[str]:
        """All that is trained, where only clusters are to be found."""
        return [f"M.{part}.*" for part in ("encoder", "head", "decoder")] if o.recluster else ()

    def rows(self, o: ModalityOptions) -> Mapping[str, int]:
        """The clusters', of which a start may have other ones: they are found anew."""
        k = sum(o.clusters())
        return {"M.centroids": k, "M.belongs": k}

    def images(self, o: ModalityOptions) -> Images:
        """X, and Y where it is looked at."""
        o.clusters()
        return {name: own for name, own in super().images(o).items() if name in o.sets}

    def identity(self, o: ModalityOptions) -> dict[str, Any]:
        """With `k` as it is found from the data."""
        return {**super().identity(o), "k": o.clusters()[0]}

    def draws(self, o: ModalityOptions) -> tuple[Draw, ...]:
        """`x`, a picture of A or B; and the numbers of two views, or noise."""
        more: Draw = Noise("z", (modalities.LATENT,)) if o.encoder == "vae" else Views()
        return Single("x", o.sets), more

    def turns(self, o: ModalityOptions, step: int) -> tuple[Turn, ...]:
        """One."""
        loss = self.reconstruct if o.encoder == "vae" else self.contrast
        return (Turn("encode", ("M",), (loss,)),)

    def weights(self, o: ModalityOptions, images: Images) -> dict[str, float]:
        """β of the divergence."""
        return {"kl": o.batch / sum(map(len, images.values())) if o.beta is None else o.beta}

    def contrast(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """NT-Xent of two views of each picture, which are embedded in one pass."""
        import torch

        from ..training.losses import nt_xent

        o = s.options
        views = [view(b.x, o.augment, numbers, o.jitter) for numbers in (b.first, b.second)]
        first, second = s["P"](torch.cat(views)).chunk(2)
        return {"nt_xent": nt_xent(first, second, o.temperature)}

    def reconstruct(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The mean squared error, and the KL divergence of the codes from N(0, 1)."""
        from ..training.losses import divergence, wide

        made, mean, log_variance = s["R"](b.x, b.z)
        return {"mse": (wide(made) - b.x).square().mean(), "kl": divergence(mean, log_variance)}

    def opening(self, o: ModalityOptions, images: Images) -> list[str]:
        """How many modalities, and what may be wrong with that."""
        return o.split_told()

    def train(self, job: Job) -> None:
        """See `ImageTrainer`. What would fail after hours of training is told before it."""
        kept = [name for name in job.frozen if name in ("M.centroids", "M.belongs", "M.side")]
        if kept:
            raise ParameterError(
                f"{kept[0]} is frozen, but the trainer modality finds it anew: freeze M.encoder.* "
                f"and M.head.*, or say recluster: true"
            )
        job.options.known()
        super().train(job)

    def session(self, options: ModalityOptions, *given: Any, **named: Any) -> Session:
        """See `ImageTrainer`. A start's encoder that is trained at another size is of that one."""
        made = super().session(options, *given, **named)
        if not options.recluster:
            made.networks["M"].side.fill_(options.size)
        return made

    def finish(self, s: Session, log: Callable[[str], None]) -> dict[str, float]:
        """The modalities."""
        return find_modalities(s, log)

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The encoder, its channels, what is clustered, and into how many."""
        sizes = modalities.labeller_in(shapes).sizes
        return {name: own for name, own in sizes.items() if name != "size"}

    def options_of(self, checkpoint: Path) -> dict[str, Any]:
        """See `ImageTrainer`; and whose the clusters are."""
        return super().options_of(checkpoint) | split_in(checkpoint)
