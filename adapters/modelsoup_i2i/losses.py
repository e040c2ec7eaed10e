"""What CycleGAN minimises: least-squares GAN, cycle and identity losses, and their weights.

A is the domain X, B the domain Y; `G_A` makes images of B, and `D_A` judges them. Zhu et al. 2017,
section 3; the weights of the tree paper are its eq. 4, those for imbalanced domains its eq. 3.
The functions take tensors and need nothing but their methods; weights are plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from modelsoup import ParameterError

if TYPE_CHECKING:
    import torch

Preset = Literal["cyclegan", "tree-paper"]
Grouping = Literal["by_image", "by_generator"]

PRESETS: dict[str, tuple[float, float, float]] = {
    "cyclegan": (1.0, 10.0, 5.0),
    "tree-paper": (1.0, 5.0, 10.0),
}
"""Weights of the GAN, cycle and identity losses. The tree paper's are the usual ones swapped."""


@dataclass(frozen=True)
class LossWeights:
    """The weight of each term.

    Attributes:
        gan_a: of ‖D_A(G_A(a)) − 1‖², with which G_A deceives D_A.
        gan_b: of ‖D_B(G_B(b)) − 1‖².
        cycle_a: of |G_B(G_A(a)) − a|.
        cycle_b: of |G_A(G_B(b)) − b|.
        identity_a: of |G_A(b) − b|, the identity loss of G_A.
        identity_b: of |G_B(a) − a|, the identity loss of G_B.
        judge_a: of D_A's own loss.
        judge_b: of D_B's own loss.
    """

    gan_a: float
    gan_b: float
    cycle_a: float
    cycle_b: float
    identity_a: float
    identity_b: float
    judge_a: float = 1.0
    judge_b: float = 1.0


def loss_weights(
    gan: float, cycle: float, identity: float, *, balance: float | None = None,
    invert: bool = False, grouping: Grouping = "by_image", discriminators: bool = False,
    doubled: bool = False,
) -> LossWeights:  # fmt: skip
    """The weights of all terms, for imbalanced domains too.

    With a balance λ the objective is λ · L(X→Y) + (1 − λ) · L(Y→X) (the tree paper's eq. 3), so
    that 0.5 gives half the plain objective.

    Args:
        gan: weight of both GAN losses, in [0, ∞), as the next two.
        cycle: weight of both cycle losses.
        identity: weight of both identity losses.
        balance: λ in [0, 1], or None for the plain sum of both directions.
        invert: give λ to Y→X instead.
        grouping: which identity loss belongs to X→Y: `by_image` the one on images of X, |G_B(a) −
            a|; `by_generator` the one of the generator X→Y, |G_A(b) − b|.
        discriminators: weigh the discriminators' losses too. Adam makes nearly nothing of it.
        doubled: twice both, so that their sum is that of the plain objective.

    Raises:
        ParameterError: a weight is negative or not finite, or λ lies outside [0, 1].
    """
    for name, value in (("gan", gan), ("cycle", cycle), ("identity", identity)):
        if not 0 <= value < float("inf"):
            raise ParameterError(f"the weight of the {name} loss is {value}, but must be ≥ 0")
    forth = back = 1.0
    if balance is not None:
        if not 0 <= balance <= 1:
            raise ParameterError(f"λ of the imbalance-aware loss is {balance}, not in [0, 1]")
        forth, back = (1 - balance, balance) if invert else (balance, 1 - balance)
        if doubled:
            forth, back = 2 * forth, 2 * back
    of_g_a, of_g_b = (back, forth) if grouping == "by_image" else (forth, back)
    return LossWeights(
        gan_a=gan * forth, gan_b=gan * back,
        cycle_a=cycle * forth, cycle_b=cycle * back,
        identity_a=identity * of_g_a, identity_b=identity * of_g_b,
        judge_a=forth if discriminators else 1.0, judge_b=back if discriminators else 1.0,
    )  # fmt: skip


def imbalance_degree(rich: int, poor: int) -> float:
    """(|X| − |Y|) / |X| in [0, 1): the λ of eq. 3 that the data themselves give.

    Raises:
        ParameterError: Y is the larger one.
    """
    if poor > rich:
        raise ParameterError(
            f"λ is to be taken from the data, but Y has {poor} images and X only {rich}: X must be "
            f"the rich domain (give a number, or exchange the folders)"
        )
    return (rich - poor) / rich


def deceive(verdicts: torch.Tensor) -> torch.Tensor:
    """A generator's GAN loss: the mean of (verdict − 1)² over its own images' patches."""
    return (_wide(verdicts) - 1).square().mean()


def judge(of_real: torch.Tensor, of_fake: torch.Tensor) -> torch.Tensor:
    """A discriminator's loss: half of mean (verdict − 1)² of real, plus mean verdict² of fake."""
    return 0.5 * (deceive(of_real) + _wide(of_fake).square().mean())


def distance(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference over all elements: cycle and identity losses."""
    import torch

    return torch.nn.functional.l1_loss(_wide(made), wanted)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float32 where autocast gave less: a sum over many patches needs the digits."""
    return values.float() if values.element_size() < 4 else values
