"""A collapse is told from distances of features: few outputs, repeats, classes alike."""

import numpy as np
import pytest
from modelsoup_i2i.measuring.collapse import collapse, source_rank

import modelsoup


def features(count: int, seed: int, dimension: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension))


def test_outputs_that_are_as_the_real_pictures_are_sound():
    real = features(64, 0)
    found = collapse({"": real}, {"": real})
    assert found.verdict == "ok" and found.diversity == 1 and found.duplicates < 0.07
    assert found.effective == pytest.approx(64) and found.spread is found.source_use is None
    other = collapse({"": features(64, 1)}, {"": real})
    assert other.verdict == "ok" and 0.9 < other.diversity < 1.1


def test_one_picture_for_all_inputs_is_a_collapse():
    noise = 1e-3 * features(64, 1)
    found = collapse({"": features(1, 0) + noise}, {"": features(64, 2)})
    assert found.verdict == "collapsed" and found.diversity < 0.01 and found.duplicates == 1
    assert found.effective == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16])
def test_some_real_pictures_equally_often_have_the_ratio_that_is_known(m: int):
    """Of N orthogonal unit vectors, m of them N/m times each: (1 − 1/m) · N / (N − 1)."""
    real = np.eye(32)
    found = collapse({"": np.repeat(real[:m], 32 // m, axis=0)}, {"": real})
    assert found.diversity == pytest.approx((1 - 1 / m) * 32 / 31)
    if m <= 8:
        assert found.effective == pytest.approx(m, rel=0.3)
    assert found.verdict == "collapsed"  # as repeats, all of them
    assert found.duplicates == 1


def test_classes_that_all_look_alike_are_a_collapse():
    real = {name: features(20, n) + 10 * n for n, name in enumerate("abc")}
    alike = dict.fromkeys(real, real["a"])
    found = collapse(alike, real)
    assert found.spread == 0 and found.verdict == "collapsed"
    assert found.diversity == pytest.approx(1, abs=0.2)
    sound = collapse(real, real)
    assert sound.spread == 1 and sound.verdict == "ok"


def test_grey_is_dead_and_outputs_that_ignore_their_input_are_warned_of():
    real = features(20, 0)
    assert collapse({"": real}, {"": real}, deviation=2.5).verdict == "dead"
    assert collapse({"": real}, {"": real}, deviation=2.6).verdict == "ok"
    ignored = collapse({"": real}, {"": real}, same_noise={"": [np.ones((16, 8))]})
    assert ignored.source_use == 0 and ignored.verdict == "warning"
    used = collapse({"": real}, {"": real}, same_noise={"": [real[:16], real[4:]]})
    assert used.source_use == pytest.approx(1, abs=0.2) and used.verdict == "ok"


def test_the_use_of_source_and_noise_is_told_by_class():
    """Of each group the distance over that of the real pictures of its own class."""
    real = {"near": features(16, 0), "far": 10 * features(16, 1)}
    half = {"near": [0.5 * real["near"]], "far": [0.5 * real["far"], np.ones((4, 8))]}
    found = collapse(real, real, same_noise=half, same_source={"far": [real["far"]]})
    assert found.source_use == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found.noise_use == pytest.approx(1)
    ignored = collapse(real, real, same_noise=half, same_source={"near": [np.ones((4, 8))]})
    assert ignored.noise_use == 0 and ignored.verdict == "ok"  # that is no collapse
    assert set(ignored.figures()) >= {"source_use", "noise_use"}


def drawn(count: int, seed: int, side: int = 24) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8))


def test_a_rank_is_1_where_each_output_is_nearest_to_its_own_input():
    inputs = drawn(30, 0)
    assert source_rank(inputs, inputs) == 1
    assert source_rank(inputs, [(0.9 * one).astype(np.uint8) for one in inputs]) > 0.8
    # Of another size, and colour: only where there is light is looked at.
    light = [one.repeat(2, axis=0).mean(axis=2, keepdims=True) for one in inputs]
    assert source_rank(inputs, [one.repeat(3, axis=2).astype(np.uint8) for one in light]) > 0.85


def test_a_rank_is_a_half_by_chance_and_where_all_outputs_are_alike():
    inputs = drawn(100, 0)
    assert source_rank(inputs, drawn(100, 1)) == pytest.approx(0.5, abs=0.06)
    assert source_rank([inputs[0]] * 10, drawn(10, 1)) == 0.5  # no input is nearer than another
    alike = source_rank(inputs, [drawn(1, 2)[0]] * 100)
    assert alike == pytest.approx(0.5)


def test_a_rank_is_the_share_of_inputs_that_are_farther():
    greys = [np.full((8, 8, 3), level, np.uint8) for level in (0, 40, 100, 200)]
    made = [greys[1], greys[1], greys[1], greys[1]]
    # Distances to 40: 40, 0, 60, 160. Farther than the own one: 2, 3, 1, 0 of three.
    assert source_rank(greys, made) == pytest.approx((2 + 3 + 1 + 0) / 12)


def test_a_rank_is_among_a_hundred_inputs_at_most():
    inputs = drawn(230, 0, 8)
    shuffled = [inputs[(n + 115) % 230] for n in range(230)]  # its own output is in no block
    assert source_rank(inputs, inputs) == 1
    assert 0.4 < source_rank(inputs, shuffled) < 0.6
    with pytest.raises(modelsoup.ParameterError, match="not of 1 and 1"):
        source_rank(inputs[:1], inputs[:1])


def test_on_the_way_to_a_collapse_there_is_a_warning():
    real = features(64, 0, 2)
    half = collapse({"": 0.6 * real}, {"": real})
    assert half.diversity == pytest.approx(0.6) and half.duplicates < 0.5
    assert half.verdict == "warning"
    # A quarter of the classes is enough.
    several = {str(n): features(20, n, 2) + n for n in range(4)}
    poor = {**several, "0": 0.4 * several["0"]}
    assert collapse(poor, several).verdict == "warning"
    assert collapse(several, several).verdict == "ok"


def test_what_a_table_gets_are_numbers():
    found = collapse({"": features(64, 0)}, {"": features(64, 1)}).figures()
    assert set(found) == {"collapse", "diversity", "duplicates"} and found["collapse"] == 0
    assert all(isinstance(value, float) for value in found.values())


def test_too_few_pictures_are_told_by_their_class():
    with pytest.raises(modelsoup.ParameterError, match="cats has 1 and 9"):
        collapse({"cats": features(1, 0)}, {"cats": features(9, 1)})


def test_real_pictures_that_are_all_alike_are_no_reason_to_divide_by_nothing():
    alike = np.ones((5, 3))
    assert collapse({"": alike}, {"": alike}).diversity == 1
    assert collapse({"": features(5, 0, 3)}, {"": alike}).diversity == float("inf")
