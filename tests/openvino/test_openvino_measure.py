"""Figures: against values by hand; and how a network is quantised, by NNCF's names."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from modelsoup_i2i.use.generators import load_generator
from modelsoup_openvino import measure
from modelsoup_openvino.quantise import Quantisation, quantised
from modelsoup_openvino.report import as_pixels, sheet


def test_psnr_has_the_range_of_images_as_its_peak():
    zeros = np.zeros((1, 3, 4, 4), np.float32)
    assert measure.psnr(zeros, zeros) == math.inf
    assert measure.psnr(zeros + 2, zeros) == pytest.approx(0)
    assert measure.psnr(zeros + 0.2, zeros) == pytest.approx(20, abs=1e-4)
    assert measure.mean_psnr([zeros, zeros + 2], [zeros, zeros]) == pytest.approx(50)


def test_ssim_is_that_of_its_equation():
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, 3, 11, 11)).astype(np.float32)
    assert measure.ssim([image], [image]) == pytest.approx(1)
    # On 11 × 11 there is one window: weighted moments by hand.
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weights = np.outer(line, line) / line.sum() ** 2
    other = (image * 0.5 + rng.normal(0, 0.1, image.shape)).astype(np.float32)
    expected = []
    for x, y in zip(image[0].astype(float), other[0].astype(float), strict=True):
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        both = (weights * (x - mx) * (y - my)).sum()
        c1, c2 = 0.02**2, 0.06**2
        expected.append(
            (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        )
    assert measure.ssim([image], [other]) == pytest.approx(np.mean(expected))
    assert measure.ssim([image[..., :10]], [other[..., :10]]) is None


@pytest.mark.parametrize(
    ("flags", "cut"),
    [("sse4_2 avx2", True), ("avx2 avx_vnni", False), ("avx2 avx512_vnni", False), ("neon", False)],
)
def test_an_x86_without_vnni_may_cut_sums_off(flags, cut, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(measure, "CPU_INFO", tmp_path / "cpuinfo")
    assert measure.saturates() == cut


def test_calls_take_turns_and_the_first_rounds_do_not_count():
    seen = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    times = measure.takes_turns(calls, 3, warm_up=2)
    assert seen == list("ab" * 5)
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_pixels_are_rounded_and_clamped():
    values = np.array([-2, -1, 0, 1, 2], np.float32)
    image = np.broadcast_to(values, (1, 3, 1, 5))
    assert as_pixels(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    levels = np.arange(256, dtype=np.float32) / 127.5 - 1
    assert as_pixels(np.broadcast_to(levels, (1, 3, 1, 256)))[0, :, 0].tolist() == list(range(256))


def test_a_sheet_has_the_papers_epochs_the_kept_one_and_the_last():
    tiny = np.zeros((8, 8, 3), np.uint8)
    pictures = dict.fromkeys(range(8), (tiny,))
    page = sheet([tiny], [tiny], pictures, 3)
    assert page.shape == (12 + 16, 7 * 100 + 4, 3)  # input, float, 0, 2, 3, 5, 7


@pytest.mark.parametrize(
    ("how", "weights", "activations", "scales"),
    [
        (Quantisation(), "SymmetricQuantizer", {"SymmetricQuantizer"}, 8),
        (Quantisation(preset="mixed"), "SymmetricQuantizer", {"AsymmetricQuantizer"}, 8),
        (
            Quantisation(activations="asymmetric", per_channel=False),
            "SymmetricQuantizer", {"AsymmetricQuantizer"}, 1,
        ),
    ],
)  # fmt: skip
def test_modes_and_scales_are_nncfs(how, weights, activations, scales, start):
    network = load_generator(start, "x2y")
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1]
    own = quantised(network, images, how, say=print)
    kinds = {
        name: module for name, module in own.named_modules() if "Quantizer" in type(module).__name__
    }
    first = next(m for n, m in kinds.items() if "pre_hooks" in n and "model/1/" in n)
    assert type(first).__name__ == weights
    assert first.scale.numel() == scales
    after = {type(m).__name__ for n, m in kinds.items() if "post_hooks" in n and "add" in n}
    assert after == activations
    with torch.no_grad():
        assert not torch.equal(own(images[0]), network(images[0]))
