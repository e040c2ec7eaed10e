"""Losses against values computed by hand, and the weights of the imbalance-aware objective."""

import dataclasses

import pytest
import torch
from modelsoup_i2i.losses import (
    PRESETS,
    LossWeights,
    deceive,
    distance,
    imbalance_degree,
    judge,
    loss_weights,
)

import modelsoup


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
    assert loss_weights(1, 10, 5) == LossWeights(1, 1, 10, 10, 5, 5, 1, 1)


def test_a_balance_of_a_half_gives_half_of_every_weight():
    plain, half = loss_weights(1, 10, 5), loss_weights(1, 10, 5, balance=0.5)
    for name in ("gan", "cycle", "identity"):
        for side in "ab":
            assert getattr(half, f"{name}_{side}") == getattr(plain, f"{name}_{side}") / 2
    assert (half.judge_a, half.judge_b) == (1, 1)


def test_the_balance_weighs_what_is_done_to_images_of_x():
    weights = loss_weights(1, 5, 10, balance=0.75)
    assert (weights.gan_a, weights.gan_b) == (0.75, 0.25)
    assert (weights.cycle_a, weights.cycle_b) == (3.75, 1.25)
    # |G_B(a) − a| is of an image of X, though G_B is the generator of Y → X.
    assert (weights.identity_b, weights.identity_a) == (7.5, 2.5)


def test_identity_may_be_grouped_by_generator():
    weights = loss_weights(1, 5, 10, balance=0.75, grouping="by_generator")
    assert (weights.identity_a, weights.identity_b) == (7.5, 2.5)


def test_the_balance_may_be_inverted_and_doubled():
    plain = loss_weights(1, 5, 10, balance=0.75)
    assert loss_weights(1, 5, 10, balance=0.25, invert=True) == plain
    doubled = loss_weights(1, 5, 10, balance=0.75, doubled=True)
    for field in ("gan_a", "gan_b", "cycle_a", "cycle_b", "identity_a", "identity_b"):
        assert getattr(doubled, field) == 2 * getattr(plain, field)


def test_discriminators_are_weighed_when_asked():
    weights = loss_weights(1, 5, 10, balance=0.75, discriminators=True)
    assert (weights.judge_a, weights.judge_b) == (0.75, 0.25)
    only = dataclasses.replace(weights, judge_a=1.0, judge_b=1.0)
    assert only == loss_weights(1, 5, 10, balance=0.75)


@pytest.mark.parametrize("balance", [-0.1, 1.01, float("nan")])
def test_a_balance_out_of_range_is_refused(balance: float):
    with pytest.raises(modelsoup.ParameterError, match=r"not in \[0, 1\]"):
        loss_weights(1, 5, 10, balance=balance)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_out_of_range_is_refused(weight: float):
    with pytest.raises(modelsoup.ParameterError, match="cycle loss"):
        loss_weights(1, weight, 10)


def test_the_degree_of_imbalance_comes_from_the_data():
    assert imbalance_degree(1000, 50) == 0.95
    assert imbalance_degree(7, 7) == 0
    with pytest.raises(modelsoup.ParameterError, match="X must be the rich domain"):
        imbalance_degree(5, 6)
