"""DeepI2I: Wang, Yu and van de Weijer, NeurIPS 2020. Importable without torch.

`E` sees a picture, `A` turns what it sees into what is added to the maps of `G`, which makes a
picture of another class of it; `D` judges both. Three of them begin with a GAN's (see `gan`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelsoup import ParameterError

from ..networks.described import Joined, Network
from ..pictures.draws import Draw, Labelled
from ..pictures.folders import find_classes
from ..pictures.picture import Images, Picture
from ..training.players import Player
from ..training.ranges import FREE, Number, Weight
from ..training.turns import Batch, Turn
from ..use.translator import Translator
from .on_gan import (
    BIGGAN,
    DEEPEST,
    OWN,
    STYLEGAN,
    NetworkOptions,
    OnGan,
    Usually,
    family_in,
)

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class DeepI2IOptions(NetworkOptions):
    """What a plan may say to the trainer.

    Attributes:
        source: on StyleGAN, the class of the pictures that are translated …
        target: … and that of those which they become.
        d_data: on BigGAN, like data, of more pictures of the same classes, which D learns from
            beside data's; they are not translated.
        lambda_gan: the GAN loss's weight in the objective of what translates.
        lambda_rec: that of the reconstruction: how far D's maps of a picture are from its
            translation's.
        lambda_ssim: that of 1 − SSIM of a picture and its translation.
        rec: the distance of maps.
        rec_pairs: which maps are compared: of each picture and its translation; `official`: of a
            batch's first two translations, as the published code for BigGAN does where a batch has
            two.
        alpha: the weight of each size of maps in the reconstruction …
        alpha_first: … but for the largest: 0.01, on StyleGAN 0.1.
        scratch: nothing is pretrained: E is trained, there is no first phase, and what A makes is
            added at full strength.
        phase1: steps in which A and D move alone; None is 500, or 0 from scratch.
        train_encoder: whether E is trained; None is whether it begins from scratch.
        strength: by which what A makes is multiplied; None is 0.1; from scratch 1, but 0.1 for
            the largest maps.
        adaptor: `all`, or the sides of the maps that it has a block for; `identity` or `none`: maps
            are repeated until they are as wide as G's.
        blocks: on StyleGAN, what it has for each side: `deepi2i`, two convolutions with LeakyReLU
            after both; `single`, one, as TransferI2I has it.
        n_down: on BigGAN, how often a picture is halved; None is down to 4 × 4.
        n_down_mode: `taps`: E alone ends there; `bottleneck`: G begins there, too.
    """

    source: Annotated[str | None, STYLEGAN] = None
    target: Annotated[str | None, STYLEGAN] = None
    d_data: Annotated[Path | None, FREE, BIGGAN] = None
    lambda_gan: Weight = 1.0
    lambda_rec: Weight = 1.0
    lambda_ssim: Weight = 0.0
    rec: Literal["l1", "mse"] = "l1"
    rec_pairs: Annotated[Literal["all", "official"], BIGGAN] = "all"
    alpha: Weight = 0.1
    alpha_first: Annotated[Weight, Usually(0.01, 0.1)] = OWN
    scratch: bool = False
    phase1: Number | None = None
    train_encoder: bool | None = None
    strength: Weight | None = None
    adaptor: Literal["all", "identity", "none"] | tuple[int, ...] = "all"
    blocks: Annotated[Literal["deepi2i", "single"], STYLEGAN] = "deepi2i"
    n_down: Annotated[int | None, BIGGAN] = None
    n_down_mode: Annotated[Literal["taps", "bottleneck"], BIGGAN] = "taps"

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        there = self.family.taps(self, self.least)
        if self.family.conditional and self.class_count == 1:
            raise ValueError("one class: there is none to translate into from another one")
        if not self.adaptor:
            raise ValueError("adaptor names no side: it is all, none, or some of them")
        for side in self.adapted:
            if side not in there:
                raise ValueError(
                    f"adaptor has {side}, but there are maps of {', '.join(map(str, there))}"
                )
        if self.rec_pairs == "official" and self.batch < 2:
            raise ValueError("rec_pairs: official compares the first two of a batch, which is 1")
        if self.source is not None and self.source == self.target:
            raise ValueError(f"source and target are both {self.source!r}")
        for name in ("classes", "exclude"):
            if self.source is not None and getattr(self, name):
                raise ValueError(f"source and target say which classes are used, not {name}")

    def images(self, part: str = "train") -> Images:
        """Of networks that are told no class, those of the source and those of the target."""
        if self.family.conditional:
            there = dict(super().images(part))
            return there | self._more() if part == "train" else there
        found = {}
        for role, name in (("source", self.source), ("target", self.target)):
            if name is None:
                raise ParameterError(f"{role} is missing: the class of the {role}'s pictures")
            own = self.class_set(part, (name,))
            found[name] = () if own is None else own.pictures
        return found

    def _more(self) -> dict[str, Sequence[Picture]]:
        """The discriminator's own pictures, whose classes have the indices of the data's."""
        if self.d_data is None:
            return {}
        names = self.class_names()
        found = find_classes(self.d_data, only=names, channels=self.channels)
        return {"d_data": found.in_order(names).pictures}

    def read(self) -> list[Path]:
        """See `Data`."""
        more = self.d_data
        return [*super().read(), *([more] if more is not None and more.is_dir() else [])]

    @property
    def domains(self) -> tuple[str, str]:
        """The sets of pictures that are translated, and that these are to be like."""
        if self.family.conditional:
            return "data", "data"
        return self.source or "source", self.target or "target"

    @property
    def least(self) -> int:
        """The side of the deepest maps."""
        return self.family.deepest(self, self.n_down)

    @property
    def first(self) -> int:
        """The side of the generator's first maps."""
        return self.least if self.n_down_mode == "bottleneck" else DEEPEST

    @property
    def adapted(self) -> tuple[int, ...]:
        """The sides that the adaptor is for, where it is not for all."""
        return () if isinstance(self.adaptor, str) else self.adaptor

    @property
    def repeats(self) -> bool:
        """Whether the adaptor has no weights."""
        return self.adaptor in ("identity", "none")

    @property
    def trains_encoder(self) -> bool:
        """Whether E moves."""
        return self.scratch if self.train_encoder is None else self.train_encoder

    @property
    def alone(self) -> int:
        """Steps of the first phase."""
        return (0 if self.scratch else 500) if self.phase1 is None else self.phase1

    def strengths(self) -> dict[int, float]:
        """Of what is added to the maps of each side."""
        there = self.family.taps(self, self.least)
        if self.strength is not None:
            return dict.fromkeys(there, self.strength)
        return {side: 1.0 if self.scratch and side < max(there) else 0.1 for side in there}

    def alphas(self) -> dict[int, float]:
        """Of the distance of the maps of each side."""
        there = self.family.taps(self, DEEPEST)
        return {side: self.alpha_first if side == max(there) else self.alpha for side in there}


class DeepI2I(OnGan):
    """Trains a translator between classes, or from one to another."""

    name, options = "deepi2i", DeepI2IOptions

    def networks(self, o: DeepI2IOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        of = o.family
        return {
            "E": of.encoder(o), "A": of.adaptor(o), "G": of.generator(o), "D": of.discriminator(o),
        }  # fmt: skip

    def joined(self, o: DeepI2IOptions) -> dict[str, Joined]:
        """The translator."""
        return {"T": Joined(o.family.translation, ("E", "A", "G"))}

    def begin_as(self, o: DeepI2IOptions) -> dict[str, str]:
        """The encoder begins as the pretrained discriminator."""
        return {} if o.scratch else {"E": "D"}

    def groups(self, o: DeepI2IOptions) -> dict[str, list[str]]:
        """Networks by their words, what all blocks share, and blocks by their depth."""
        return {
            "encoder": ["E.*"], "adaptor": ["A.*"], "generator": ["G.*"], "discriminator": ["D.*"],
            "shared": o.family.shared(),
            **{f"generator-{n + 1}": [block] for n, block in enumerate(o.family.makes(o))},
        }  # fmt: skip

    def translators(self, o: DeepI2IOptions) -> dict[str, Translator]:
        """All three together."""
        source, target = o.domains
        label = "translated" if source == target else f"{source} to {target}"
        return {"T": Translator(source, target, label, takes=o.takes(), alone="G")}

    def players(self, o: DeepI2IOptions) -> dict[str, Player]:
        """Each network by itself; E where it is trained, A where it has weights."""
        own = {"D": o.player("D"), "G": o.player("G", averaged=True)}
        if not o.repeats:
            own["A"] = o.player("A", averaged=True)
        return own | ({"E": o.player("E")} if o.trains_encoder else {})

    def draws(self, o: DeepI2IOptions) -> Sequence[Draw]:
        """A picture `x` to translate, a real one `y`; noise and a class for each turn."""
        (x, y), given = o.domains, (*o.given("d"), *o.given("g"))
        real = (y,) if o.d_data is None else (y, "d_data")
        return (Labelled(("x", "c_x"), (x,)), Labelled(("y", "c_y"), real), *given)

    def weights(self, o: DeepI2IOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        own = {"gan": o.lambda_gan, "rec": o.lambda_rec, "ssim": o.lambda_ssim}
        return super().weights(o, images) | own

    def turns(self, o: DeepI2IOptions, step: int) -> list[Turn]:
        """The discriminator's step, then that of what translates, of which G waits at first."""
        alone = step < o.alone
        moving = [n for n in self.players(o) if n != "D" and not (alone and n == "G")]
        found = [Turn("discriminator", ("D",), self.judging(o, step))]
        if moving:
            loss = self.adapt if alone else self.translate
            found.append(Turn("translator", tuple(moving), (loss,)))
        return found

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss."""
        import torch

        with torch.no_grad():
            b.seen = s["E"](b.x)
            fake = s["G"](b.z_d, b.c_d, s["A"](b.seen))
        return self.judged(s, b, fake)

    def adapt(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """`translate` in the first phase."""
        with s.fixed("G"):
            return self.translate(s, b)

    def translate(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The loss of what translates: it deceives D, and keeps what D sees in the picture."""
        import torch

        from ..training.losses import deceive

        o = s.options
        # What a frozen encoder saw for the discriminator's step is what it sees now.
        seen = s["E"](b.x) if o.trains_encoder else b.seen
        with s.fixed("D"):
            made = s["G"](b.z_g, b.c_g, s["A"](seen))
            verdicts, maps = s["D"](made, b.c_g, taps=True)
            losses = {"gan": deceive(verdicts, o.gan)}
            if o.lambda_rec:
                with torch.no_grad():
                    _, wanted = s["D"](b.x, b.c_x, taps=True)
                losses["rec"] = _distance(maps, wanted, o)
        if o.lambda_ssim:
            from torchmetrics.functional.image import structural_similarity_index_measure as ssim

            losses["ssim"] = 1 - ssim(made, b.x, data_range=2.0, kernel_size=11, sigma=1.5)
        return losses

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Which networks there are, their sizes, and which blocks the adaptor has."""
        own = {name: tuple(shape) for name, shape in shapes.items()}
        return family_in(own).translator_in(own)


def _distance(
    maps: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor], o: DeepI2IOptions
) -> torch.Tensor:
    """Σ α · the mean distance of the maps of each side (the paper's eq. 3)."""
    from torch.nn import functional as F  # noqa: N812

    from ..training.losses import wide

    total: Any = 0
    for side, alpha in o.alphas().items():
        first, second = wide(maps[side]), wide(wanted[side])
        if o.rec_pairs == "official":
            first, second = first[:1], first[1:2]
        apart = F.l1_loss(first, second) if o.rec == "l1" else F.mse_loss(first, second)
        total = total + alpha * apart
    result: torch.Tensor = total
    return result
