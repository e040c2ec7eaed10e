"""What `soup average` promises: weights by formula, natural order, one merge, clear errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from modelsoup.errors import ParameterError
from modelsoup.merging.snapshots import (
    ema_weights,
    exponent,
    found,
    post_hoc_weights,
    profile_product,
)
from modelsoup.terminal.cli import main


def stored(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Snapshots of those names, in that order."""
    generator = np.random.default_rng(len(names))
    folder.mkdir(exist_ok=True)
    arrays = [generator.normal(size=(7, 5)).astype(np.float32) for _ in names]
    for name, array in zip(names, arrays, strict=True):
        save_file({"w": array}, folder / f"{name}.safetensors")
    return arrays


def soup(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["average", *map(str, arguments)])


def averaged(folder: Path, *options: str) -> np.ndarray:
    """All snapshots of a folder, by a pattern that no shell expanded."""
    output = folder.parent / "out.safetensors"
    result = soup(folder / "*.safetensors", *options, "-o", output, "--force")
    assert result.exit_code == 0, result.output
    return load_file(output)["w"]


def test_snapshots_count_the_same_unless_an_average_is_named(tmp_path: Path) -> None:
    arrays = stored(tmp_path / "run", ["a", "b", "c"])
    mean = np.mean(arrays, axis=0)
    np.testing.assert_allclose(averaged(tmp_path / "run"), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(averaged(tmp_path / "run", "--swa"), mean, rtol=1e-5, atol=1e-6)


def test_an_ema_goes_over_snapshots_in_the_natural_order_of_their_names(tmp_path: Path) -> None:
    names = ["step-2", "step-10", "step-100", "step-1000"]
    arrays = stored(tmp_path / "run", names)
    running = arrays[0].astype(np.float64)
    for array in arrays[1:]:
        running = 0.7 * running + 0.3 * array
    found_by_command = averaged(tmp_path / "run", "--ema", "0.7")
    np.testing.assert_allclose(found_by_command, running, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 60), decay=st.floats(0.01, 0.9999))
def test_the_weights_of_an_ema_sum_to_one(count: int, decay: float) -> None:
    weights = ema_weights(count, decay)
    assert math.isclose(sum(weights), 1, rel_tol=1e-12)
    assert math.isclose(weights[-1], 1 - decay, rel_tol=1e-12)
    assert math.isclose(weights[0], decay ** (count - 1), rel_tol=1e-12)


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.93)])
def test_the_exponent_of_a_width_is_the_papers(std: float, gamma: float) -> None:
    found_here = exponent(std)
    assert abs(found_here - gamma) < 0.35
    width = math.sqrt((found_here + 1) / ((found_here + 2) ** 2 * (found_here + 3)))
    assert math.isclose(width, std, rel_tol=1e-9)


def test_the_product_of_two_profiles_is_its_integral() -> None:
    a, b = (3.0, 1.5), (5.0, 4.0)
    t = np.linspace(0, 3, 200_001)  # beyond the first's end it is zero
    values = (2.5 * t**1.5 / 3**2.5) * (5 * t**4 / 5**5)
    integral = np.trapezoid(values, t)
    assert math.isclose(profile_product(a, b), integral, rel_tol=1e-8)
    assert profile_product(a, b) == profile_product(b, a)


def test_a_stored_average_is_found_again_post_hoc() -> None:
    names = [f"ema-{step:04}-{std:.3f}" for step in (100, 200, 300) for std in (0.05, 0.1)]
    weights, apart = post_hoc_weights(names, 0.1)
    np.testing.assert_allclose(weights, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert apart < 1e-6


def test_averages_of_other_widths_are_made_of_stored_ones_post_hoc(tmp_path: Path) -> None:
    """A training whose weights are known at every step, averaged while it runs and afterwards."""
    steps, widths = 400, (0.05, 0.1)
    generator = np.random.default_rng(0)
    path = np.cumsum(generator.normal(size=(steps, 7, 5)), axis=0) + 50

    def at_once(last: int, std: float) -> np.ndarray:
        edges = np.arange(last + 1) ** (exponent(std) + 1)
        share = np.diff(edges) / edges[-1]
        return np.tensordot(share, path[:last], axes=1)

    (tmp_path / "run").mkdir()
    for last in range(50, steps + 1, 50):
        for std in widths:
            place = tmp_path / "run" / f"ema-{last:07}-{std:.3f}.safetensors"
            save_file({"w": at_once(last, std).astype(np.float32)}, place)
    wanted = at_once(steps, 0.07)
    made = averaged(tmp_path / "run", "--post-hoc", "0.07")
    wrong = np.abs(at_once(steps, 0.05) - wanted).max()
    assert np.abs(made - wanted).max() < 0.03 * wrong


def test_how_far_a_post_hoc_average_is_from_its_profile_is_said(tmp_path: Path) -> None:
    stored(tmp_path / "run", ["e-100-0.05", "e-100-0.10"])
    pattern, output = tmp_path / "run" / "*", tmp_path / "out.safetensors"
    result = soup(pattern, "--post-hoc", 0.07, "-o", output)
    assert result.exit_code == 0, result.output
    _, apart = post_hoc_weights(["e-100-0.05", "e-100-0.10"], 0.07)
    assert f"the average of width 0.07 is met up to {apart:.2%} of its profile" in result.stderr


def test_folders_and_crossing_patterns_are_found(tmp_path: Path) -> None:
    for name in ("r/step-9", "r/step-10"):
        (tmp_path / name).mkdir(parents=True)
        save_file({"w": np.zeros(3, np.float32)}, tmp_path / name / "model.safetensors")
    assert found([f"{tmp_path}/r/*"]) == [tmp_path / "r/step-9", tmp_path / "r/step-10"]
    inside = found([f"{tmp_path}/**/*.safetensors"])
    assert [path.parent.name for path in inside] == ["step-9", "step-10"]


def test_a_name_with_the_characters_of_a_pattern_is_a_name_where_it_exists(tmp_path: Path) -> None:
    for name in ("a[1]", "a1"):
        save_file({"w": np.zeros(3, np.float32)}, tmp_path / f"{name}.safetensors")
    paths = [f"{tmp_path}/a[1].safetensors", f"{tmp_path}/a1.safetensors"]
    assert sorted(map(str, found(paths))) == sorted(paths)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["none*.safetensors"], "no file or folder matches"),
        (["a.safetensors", "a.safetensors"], "given twice:"),
        (["a.safetensors"], "an average is of several checkpoints, but there is"),
        (["*.safetensors", "--ema", "1"], "the decay of an EMA is 1, but must be between 0 and 1"),
        (["*.safetensors", "--post-hoc", "0.1"], "a does not end in a step and a width"),
        (["e-*", "--post-hoc", "0.3"], "must be between 0 and 0.289"),
        (["z-*", "--post-hoc", "0.1"], "the averages are all of step 0"),
        (["t/*", "--post-hoc", "0.1"], "two of the averages have the same step and the same"),
    ],
)  # fmt: skip
def test_what_cannot_be_averaged_is_said_in_a_sentence(
    options: list[str], sentence: str, tmp_path: Path
) -> None:
    stored(tmp_path, ["a", "b", "e-1-0.05", "e-2-0.05", "z-0-0.05", "z-0-0.10"])
    stored(tmp_path / "t", ["a-1-0.05", "b-1-0.05"])
    given_paths = [o if o.startswith("-") or o[0].isdigit() else str(tmp_path / o) for o in options]
    result = soup(*given_paths, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert sentence in " ".join(result.stderr.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_two_kinds_of_average_at_once_are_wrong_usage(tmp_path: Path) -> None:
    result = soup("a", "b", "--ema", "0.9", "--swa", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2
    assert "give one of --swa, --ema and --post-hoc" in result.stderr


def test_an_average_of_a_width_that_is_no_number_is_refused() -> None:
    with pytest.raises(ParameterError, match="the width of an average is 0, but must be between"):
        exponent(0)
