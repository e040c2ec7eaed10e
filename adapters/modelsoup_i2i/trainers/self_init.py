"""The adaptor's first weights, without data (TransferI2I, eq. 3). Importable without torch.

What `A` makes of what the encoder sees of a generated picture is to be what the generator had when
it made it. Only `A` moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelsoup import ParameterError

from ..pictures.draws import Draw
from ..pictures.picture import Images
from ..training.players import Player
from ..training.ranges import Count, Rate
from ..training.turns import Batch, Turn
from .deepi2i import DeepI2I, DeepI2IOptions
from .on_gan import OWN, STYLEGAN, Usually

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class SelfInitOptions(DeepI2IOptions):
    """What a plan may say to the trainer: sizes as DeepI2I's; its losses are not used.

    Attributes:
        reduction: the absolute differences of each side's maps are averaged, or summed.
        d_lr: the adaptor's rate: 1e-4, on StyleGAN 1e-3.
    """

    batch: Count = 16
    steps: Count | None = 2000
    d_lr: Annotated[Rate, Usually(1e-4, 1e-3)] = OWN
    blocks: Annotated[Literal["deepi2i", "single"], STYLEGAN] = "single"
    reduction: Literal["mean", "sum"] = "mean"

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.repeats:
            raise ValueError(f"adaptor is {self.adaptor}, which has no weights to begin with")


class SelfInit(DeepI2I):
    """Trains an adaptor on what a generator and an encoder say of each other."""

    name, options = "self-init", SelfInitOptions

    def images(self, o: Any) -> Images:
        """None."""
        if o.family.conditional and not o.count:
            raise ParameterError("how many classes G knows is missing: classes, or rows")
        return {}

    def classes(self, o: Any) -> tuple[str, ...]:
        """Those of the start."""
        return ()

    def players(self, o: Any) -> dict[str, Player]:
        """The adaptor."""
        return {"A": o.player("A", averaged=True)}

    def draws(self, o: Any) -> Sequence[Draw]:
        """Noise and a class."""
        draws: Sequence[Draw] = o.given("")
        return draws

    def turns(self, o: Any, step: int) -> list[Turn]:
        """The adaptor's step."""
        return [Turn("adaptor", ("A",), (self.align,))]

    def align(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """How far what A makes is from what G had: a sum over sides."""
        import torch
        from torch.nn import functional as F  # noqa: N812

        from ..training.losses import wide

        with torch.no_grad():
            had = s["G"](b.z, b.c, taps=True)
            seen = s["E"](had[max(had)])
        made = s["A"](seen, plain=True)
        apart = [F.l1_loss(wide(own), wide(had[side]), reduction=s.options.reduction)
                 for side, own in made.items()]  # fmt: skip
        return {"align": torch.stack(apart).sum()}
