"""Losses against values computed by hand, and the weights of the imbalance-aware objective."""

from pathlib import Path

import pytest
import torch
from modelsoup_i2i.trainers.cyclegan import PRESETS, CycleGAN, CycleGANOptions
from modelsoup_i2i.training.losses import deceive, distance, gradient_penalty, judge

import modelsoup

TERMS = ("gan", "cycle", "identity")


def weights(gan=1.0, cycle=5.0, identity=10.0, rich=7, poor=7, **options) -> dict[str, float]:
    """Of a training with so many images of X and of Y."""
    named = {"lambda_gan": gan, "lambda_cycle": cycle, "lambda_identity": identity}
    images = {"X": [Path()] * rich, "Y": [Path()] * poor}
    return CycleGAN().weights(CycleGANOptions(**named, **options), images)


def test_the_gan_losses_are_the_squares_that_one_computes_by_hand():
    fake = torch.tensor([[0.5, 2.0], [1.0, -1.0]])
    real = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    # (0.5² + 1² + 0² + 2²) / 4
    assert deceive(fake).item() == pytest.approx(5.25 / 4)
    # ½ · ((0 + 1 + 1 + 0) / 4 + (0.25 + 4 + 1 + 1) / 4)
    assert judge(real, fake).item() == pytest.approx(0.5 * (2 / 4 + 6.25 / 4))


def test_the_distance_is_the_mean_over_all_elements():
    made = torch.tensor([[[1.0, -1.0], [0.5, 0.0]]])
    wanted = torch.tensor([[[0.0, -1.0], [-0.5, 0.25]]])
    assert distance(made, wanted).item() == pytest.approx((1 + 0 + 1 + 0.25) / 4)


def test_presets_are_those_of_the_papers():
    assert PRESETS == {"cyclegan": (1, 10, 5), "tree-paper": (1, 5, 10)}


def test_without_a_balance_both_directions_weigh_the_same():
    assert list(weights(1, 10, 5).values()) == [1, 1, 10, 10, 5, 5, 1, 1]
    assert weights(None, None, None) == weights(1, 10, 5)
    assert weights(None, None, None, loss="tree-paper") == weights(1, 5, 10)


def test_a_balance_of_a_half_gives_half_of_every_weight():
    plain, half = weights(1, 10, 5), weights(1, 10, 5, balance=0.5)
    for name in TERMS:
        for side in "ab":
            assert half[f"{name}_{side}"] == plain[f"{name}_{side}"] / 2
    assert (half["judge_a"], half["judge_b"]) == (1, 1)


def test_the_balance_weighs_what_is_done_to_images_of_x():
    own = weights(balance=0.75)
    assert (own["gan_a"], own["gan_b"]) == (0.75, 0.25)
    assert (own["cycle_a"], own["cycle_b"]) == (3.75, 1.25)
    # |G_B(a) − a| is of an image of X, though G_B is the generator of Y → X.
    assert (own["identity_b"], own["identity_a"]) == (7.5, 2.5)


def test_identity_may_be_grouped_by_generator():
    own = weights(balance=0.75, balance_identity="by_generator")
    assert (own["identity_a"], own["identity_b"]) == (7.5, 2.5)


def test_the_balance_may_be_inverted_and_doubled():
    plain = weights(balance=0.75)
    assert weights(balance=0.25, balance_invert=True) == plain
    doubled = weights(balance=0.75, balance_doubled=True)
    for name in TERMS:
        for side in "ab":
            assert doubled[f"{name}_{side}"] == 2 * plain[f"{name}_{side}"]


def test_discriminators_are_weighed_when_asked():
    own = weights(balance=0.75, balance_discriminators=True)
    assert (own["judge_a"], own["judge_b"]) == (0.75, 0.25)
    assert {**own, "judge_a": 1.0, "judge_b": 1.0} == weights(balance=0.75)


@pytest.mark.parametrize("balance", [-0.1, 1.01, float("nan")])
def test_a_balance_out_of_range_is_refused(balance: float):
    with pytest.raises(ValueError, match=r"balance, λ of .*, not in \[0, 1\]"):
        weights(balance=balance)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_out_of_range_is_refused(weight: float):
    for name in TERMS:
        with pytest.raises(ValueError, match=f"lambda_{name} is .*, but must be (at least 0|fini)"):
            weights(**{name: weight})


def test_the_degree_of_imbalance_comes_from_the_data():
    options = CycleGANOptions(balance="auto")
    assert options.degree(1000, 50) == 0.95
    assert options.degree(7, 7) == 0
    with pytest.raises(modelsoup.ParameterError, match="X must be the rich domain"):
        options.degree(5, 6)
    assert weights(rich=8, poor=2, balance="auto") == weights(balance=0.75)


def test_every_gan_loss_is_what_one_computes_by_hand():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 1.0])
    log = torch.nn.functional.logsigmoid
    assert deceive(fake, "vanilla") == pytest.approx(-log(fake).mean().item())
    both = -log(real).mean() - log(-fake).mean()
    assert judge(real, fake, "vanilla").item() == pytest.approx(both.item() / 2)
    assert deceive(fake, "hinge").item() == deceive(fake, "wgan-gp").item() == 0.5
    assert judge(real, fake, "hinge").item() == pytest.approx((0.5 + 0) / 2 + (0 + 2) / 2)
    assert judge(real, fake, "wgan-gp").item() == pytest.approx(-0.5 - 1.25)


def test_the_gradient_penalty_is_that_of_a_slope_that_is_known():
    """D(x) = 3 · sum(x) has the slope 3 in each of 4 pixels: its norm is 6."""
    real, fake = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    seen = []

    def judged(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return 3 * images.sum(dim=(1, 2, 3))

    penalty = gradient_penalty(judged, real, fake, torch.tensor([0.25, 1.0]))
    assert penalty.item() == pytest.approx(25)
    assert torch.equal(seen[0].detach()[:, 0, 0, 0], torch.tensor([0.75, 0.0]))
