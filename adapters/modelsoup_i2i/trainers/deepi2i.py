"""DeepI2I: Wang, Yu and van de Weijer, NeurIPS 2020. Importable without torch.

`E` sees a picture, `A` turns what it sees into what is added to the maps of `G`, which makes a
picture of another class of it; `D` judges both. Three of them begin with a GAN's (see `gan`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..networks import biggans
from ..networks.described import Joined, Network
from ..pictures.draws import Draw, Labelled
from ..pictures.picture import Images
from ..training.players import Player
from ..training.ranges import Number, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator
from .biggan_options import BigGanOptions, sizes_in

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class DeepI2IOptions(BigGanOptions):
    """What a plan may say to the trainer.

    Attributes:
        gan: the GAN loss.
        lambda_gan: its weight in the objective of what translates.
        lambda_rec: that of the reconstruction: how far D's maps of a picture are from its
            translation's.
        lambda_ssim: that of 1 − SSIM of a picture and its translation.
        rec: the distance of maps.
        rec_pairs: which maps are compared: of each picture and its translation; `official`: of a
            batch's first two translations, as the published code does where a batch has two.
        alpha: the weight of each size of maps in the reconstruction …
        alpha_first: … but for the largest, a quarter of the picture's side.
        scratch: nothing is pretrained: E is trained, there is no first phase, and what A makes is
            added at full strength.
        phase1: steps in which A and D move alone; None is 500, or 0 from scratch.
        train_encoder: whether E is trained; None is whether it begins from scratch.
        strength: by which what A makes is multiplied; None is 0.1; from scratch 1, but 0.1 for
            the largest maps.
        adaptor: `all`, or the sides of the maps that it has a block for; `identity` or `none`: maps
            are repeated until they are as wide as G's.
        n_down: how often a picture is halved; None is down to 4 × 4.
        n_down_mode: `taps`: E alone ends there; `bottleneck`: G begins there, too.
    """

    gan: Literal["hinge", "softplus"] = "hinge"
    lambda_gan: Weight = 1.0
    lambda_rec: Weight = 1.0
    lambda_ssim: Weight = 0.0
    rec: Literal["l1", "mse"] = "l1"
    rec_pairs: Literal["all", "official"] = "all"
    alpha: Weight = 0.1
    alpha_first: Weight = 0.01
    scratch: bool = False
    phase1: Number | None = None
    train_encoder: bool | None = None
    strength: Weight | None = None
    adaptor: Literal["all", "identity", "none"] | tuple[int, ...] = "all"
    n_down: int | None = None
    n_down_mode: Literal["taps", "bottleneck"] = "taps"

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        there = biggans.taps(self.arch, self.least)
        wanted = () if isinstance(self.adaptor, str) else self.adaptor
        for side in wanted:
            if side not in there:
                raise ValueError(
                    f"adaptor has {side}, but there are maps of {', '.join(map(str, there))}"
                )
        if self.rec_pairs == "official" and self.batch < 2:
            raise ValueError("rec_pairs: official compares the first two of a batch, which is 1")

    @property
    def least(self) -> int:
        """The side of the deepest maps."""
        return biggans.deepest(self.arch, self.n_down)

    @property
    def first(self) -> int:
        """The side of the generator's first maps."""
        return self.least if self.n_down_mode == "bottleneck" else biggans.DEEPEST

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
        there = biggans.taps(self.arch, self.least)
        if self.strength is not None:
            return dict.fromkeys(there, self.strength)
        return {side: 1.0 if self.scratch and side < max(there) else 0.1 for side in there}

    def alphas(self) -> dict[int, float]:
        """Of the distance of the maps of each side."""
        there = biggans.taps(self.arch)
        return {side: self.alpha_first if side == max(there) else self.alpha for side in there}


class DeepI2I(ImageTrainer):
    """Trains a translator between classes."""

    name, options = "deepi2i", DeepI2IOptions

    def networks(self, o: DeepI2IOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        only = () if isinstance(o.adaptor, str) else o.adaptor
        adaptor = {
            "arch": o.arch, "ch": o.ch, "only": only, "least": o.least,
            "identity": o.adaptor in ("identity", "none"), "strength": o.strengths(),
        }  # fmt: skip
        return {
            "E": Network(biggans.ENCODER, o.of_both() | {"least": o.least}),
            "A": Network(biggans.ADAPTOR, adaptor),
            "G": o.generator(o.first),
            "D": o.discriminator(),
        }

    def joined(self, o: DeepI2IOptions) -> dict[str, Joined]:
        """The translator."""
        return {"T": Joined(biggans.TRANSLATION, ("E", "A", "G"))}

    def begin_as(self, o: DeepI2IOptions) -> dict[str, str]:
        """The encoder begins as the pretrained discriminator."""
        return {} if o.scratch else {"E": "D"}

    def written(self, o: DeepI2IOptions) -> dict[str, str]:
        """Averages beside the last weights, or instead."""
        return o.written(super().written(o))

    def rows(self, o: DeepI2IOptions) -> dict[str, int]:
        """The embeddings'."""
        return o.remade([] if o.ema is None else ["G_ema"])

    def groups(self, o: DeepI2IOptions) -> dict[str, list[str]]:
        """Networks by their words, what all classes share, and blocks by their depth."""
        deep = len(biggans.made(o.arch)) - 1
        return {
            "encoder": ["E.*"], "adaptor": ["A.*"], "generator": ["G.*"], "discriminator": ["D.*"],
            "shared": ["G.shared.*", "D.embed.*"],
            **{f"generator-{n + 1}": [f"G.blocks.{n}.*"] for n in range(deep)},
        }  # fmt: skip

    def translators(self, o: DeepI2IOptions) -> dict[str, Translator]:
        """All three together."""
        takes = (o.noise("z", o.first), o.labels("c"))
        return {"T": Translator("data", "data", "translated", takes=takes, alone="G")}

    def players(self, o: DeepI2IOptions) -> dict[str, Player]:
        """Each network by itself; E where it is trained, A where it has weights."""
        own = {"D": o.player("D"), "G": o.player("G", averaged=True)}
        if o.adaptor not in ("identity", "none"):
            own["A"] = o.player("A", averaged=True)
        return own | ({"E": o.player("E")} if o.trains_encoder else {})

    def draws(self, o: DeepI2IOptions) -> Sequence[Draw]:
        """A picture `x` to translate, another one `y`; noise and a class for each turn."""
        given = [d for t in ("d", "g") for d in (o.noise(f"z_{t}", o.first), o.labels(f"c_{t}"))]
        return (Labelled(("x", "c_x")), Labelled(("y", "c_y")), *given)

    def weights(self, o: DeepI2IOptions, images: Images) -> dict[str, float]:
        """Of each term."""
        return {"gan": o.lambda_gan, "rec": o.lambda_rec, "ssim": o.lambda_ssim}

    def turns(self, o: DeepI2IOptions, step: int) -> list[Turn]:
        """The discriminator's step, then that of what translates, of which G waits at first."""
        alone = step < o.alone
        moving = [n for n in self.players(o) if n != "D" and not (alone and n == "G")]
        found = [Turn("discriminator", ("D",), (self.judge,))]
        if moving:
            loss = self.adapt if alone else self.translate
            found.append(Turn("translator", tuple(moving), (loss,)))
        return found

    def judge(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss: real and made pictures in one pass."""
        import torch

        from ..training.losses import judge

        with torch.no_grad():
            b.seen = s["E"](b.x)
            fake = s["G"](b.z_d, b.c_d, s["A"](b.seen))
        verdicts = s["D"](torch.cat([fake, b.y]), torch.cat([b.c_d, b.c_y]))
        return {"judge": judge(verdicts[len(fake) :], verdicts[: len(fake)], s.options.gan)}

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
        """Sizes of the networks that there are, and which blocks the adaptor has."""
        own = {name: tuple(shape) for name, shape in shapes.items()}
        sizes = biggans.generator_in(own, "G.")
        encoder = biggans.encoder_in(own, sizes, "E.")
        adaptor = biggans.adaptor_in(own, encoder, "A.")
        found = sizes_in(shapes)
        if encoder["least"] > biggans.DEEPEST:
            side = biggans.side(sizes["arch"])
            found["n_down"] = (side // encoder["least"]).bit_length() - 1
        if sizes["least"] > biggans.DEEPEST:
            found["n_down_mode"] = "bottleneck"
        if adaptor.get("identity"):
            found["adaptor"] = "identity"
        elif "only" in adaptor:
            found["adaptor"] = adaptor["only"]
        return found


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
