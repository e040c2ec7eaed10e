"""TransferI2I: Wang, Laria, van de Weijer, Lopez-Fuentes and Raducanu, ICCV 2021.

DeepI2I's networks, which begin with a GAN of the data (`gan`) and an adaptor that fits it
(`self-init`), and an auxiliary generator: it sees no picture, has its first blocks in common with
`G`, and so keeps them what they were. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..networks.described import Joined, Network
from ..pictures.draws import Draw
from ..pictures.picture import Images
from ..training.players import Player
from ..training.ranges import Number, Weight
from ..training.turns import Batch, Turn
from .deepi2i import DeepI2I, DeepI2IOptions
from .on_gan import OWN, STYLEGAN

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class TransferI2IOptions(DeepI2IOptions):
    """What a plan may say to the trainer, beside what DeepI2I's takes.

    Attributes:
        lambda_aux: the weight of the auxiliary generator's pictures, for both sides; 0: there is
            none.
        common: how many of G's first blocks are the auxiliary's too; None is 4, or all of fewer.
    """

    alpha: Weight = OWN
    alpha_first: Weight = OWN
    phase1: Number | None = 0
    lambda_aux: Weight = 0.01
    common: Number | None = None
    blocks: Annotated[Literal["deepi2i", "single"], STYLEGAN] = "single"

    def __post_init__(self) -> None:
        # From scratch it is DeepI2I with an auxiliary generator.
        first = 0.01 if self.network == "biggan" else 0.1
        for name, scratch in (("alpha", 0.1), ("alpha_first", first)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, scratch if self.scratch else 1.0)
        super().__post_init__()

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        there = len(self.family.makes(self))
        if self.common is not None and self.common > there:
            raise ValueError(f"common is {self.common}, but G has {there} blocks")

    @property
    def kept(self) -> int:
        """Blocks in common."""
        there = len(self.family.makes(self))
        return min(4, there) if self.common is None else self.common


class TransferI2I(DeepI2I):
    """Trains a translator between classes, from a GAN of them and an adaptor that fits it."""

    name, options = "transferi2i", TransferI2IOptions

    def networks(self, o: Any) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        own = super().networks(o)
        if o.lambda_aux:
            own["X"] = o.family.own_blocks(o, o.kept)
        return own

    def joined(self, o: Any) -> dict[str, Joined]:
        """The translator, and the auxiliary generator."""
        auxiliary = {"auxiliary": Joined(o.family.auxiliary, ("G", "X"))}
        return super().joined(o) | (auxiliary if o.lambda_aux else {})

    def begin_as(self, o: Any) -> dict[str, str]:
        """The auxiliary's own blocks begin as G's."""
        return super().begin_as(o) | ({"X": "G"} if o.lambda_aux and not o.scratch else {})

    def written(self, o: Any) -> dict[str, str]:
        """All but the auxiliary's own blocks, which translate nothing."""
        return {name: of for name, of in super().written(o).items() if name != "X"}

    def players(self, o: Any) -> dict[str, Player]:
        """Each network by itself."""
        return super().players(o) | ({"X": o.player("X")} if o.lambda_aux else {})

    def draws(self, o: Any) -> Sequence[Draw]:
        """Noise and classes for the auxiliary's pictures too."""
        given = (*o.given("e"), *o.given("h")) if o.lambda_aux else ()
        return (*super().draws(o), *given)

    def weights(self, o: Any, images: Images) -> dict[str, float]:
        """Of each term."""
        return {**super().weights(o, images), "aux_judge": o.lambda_aux, "aux": o.lambda_aux}

    def turns(self, o: Any, step: int) -> list[Turn]:
        """DeepI2I's, with the auxiliary's losses where it takes part."""
        judges, *others = super().turns(o, step)
        if not o.lambda_aux or step < o.alone:
            return [judges, *others]
        return [
            Turn(judges.name, judges.players, (*judges.losses, self.unmask)),
            *(Turn(turn.name, turn.players, (*turn.losses, self.assist)) for turn in others),
        ]

    def unmask(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The discriminator's loss on the auxiliary's pictures."""
        import torch

        from ..training.losses import unmask

        with torch.no_grad():
            made = s["auxiliary"](b.z_e, b.c_e)
        return {"aux_judge": unmask(s["D"](made, b.c_e), s.options.gan)}

    def assist(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """The auxiliary's loss, whose gradients reach what it has in common with G."""
        from ..training.losses import deceive

        with s.fixed("D"):
            verdicts = s["D"](s["auxiliary"](b.z_h, b.c_h), b.c_h)
        return {"aux": deceive(verdicts, s.options.gan)}
