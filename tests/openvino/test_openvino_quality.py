"""Metrics in the report: of which pictures they are."""

from __future__ import annotations

import numpy as np
import pytest
from modelsoup_i2i.pictures.images import read_image, save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_openvino.measure import PEAK, mean_psnr

from conftest import SHAPE, SIZES  # isort: skip

PEAK_OF_TWO = 20 * np.log10(PEAK)
"""dB that `measure` counts more than a metric of values in [0, 1]."""


def pictures(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        squares = rng.integers(0, 256, (6, 6, 3))
        save_png(np.kron(squares, np.ones((6, 6, 1))).astype(np.uint8), path)


@pytest.mark.parametrize(("calibrated", "first"), [(2, 2), (300, 3)])
def test_without_test_images_the_metrics_are_of_those_that_were_held_out(
    quantise, tmp_path, calibrated, first
):
    data = tmp_path / "data"
    for seed, letter in enumerate("AB"):
        pictures(data / f"train{letter}", range(5), seed)
    run = quantise(
        tmp_path, epochs=0, held_out=2, quality=("psnr",), pictures=True,
        quantisation={"subset_size": calibrated}, training={"data": str(data)},
    )  # fmt: skip
    assert run.told["held_out"] == {"images": 2, "from_test": False, "first": first}
    transform = CycleGANOptions(data=data, **SIZES, **SHAPE).transform()
    own, other = (
        [transform.for_test(read_image(data / f"train{letter}/{first + n}.png")) for n in range(2)]
        for letter in "AB"
    )
    shown = sorted((run.out / "pictures/input").iterdir())
    assert np.array_equal([read_image(file) for file in shown], own)
    for which, folder in (("float", "float32"), ("calibrated", "int8-0"), ("kept", "int8")):
        outputs = [read_image(file) for file in sorted((run.out / "pictures" / folder).iterdir())]
        expected = mean_psnr([made / 255 for made in outputs], [true / 255 for true in other])
        assert run.told["quality"]["psnr"][which] == pytest.approx(expected - PEAK_OF_TWO, abs=1e-6)


def test_truth_is_found_in_folders_within_folders(tmp_path):
    for seed, letter in enumerate("AB"):
        pictures(tmp_path / f"train{letter}", range(2), seed)
        pictures(tmp_path / f"test{letter}", ("x/1", "y/2"), seed)
    options = CycleGANOptions(data=tmp_path, **SIZES, **SHAPE)
    true = [options.transform().for_test(read_image(tmp_path / f"testB/{name}.png"))
            for name in ("x/1", "y/2")]  # fmt: skip
    got = CycleGAN().quality(options, "G_A", true, ["psnr"], part="test", first=0)
    assert got["psnr"] == np.inf
    got = CycleGAN().quality(options, "G_A", true[1:], ["psnr"], part="test", first=1)
    assert got["psnr"] == np.inf
    got = CycleGAN().quality(options, "G_A", true[:1], ["psnr"], part="test", first=1)
    assert got["psnr"] < 20
