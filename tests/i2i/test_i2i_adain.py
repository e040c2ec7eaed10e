"""Content and style, which MUNIT's and FUNIT's networks share: counts, and norms by hand."""

import pytest

pytest.importorskip("torch")

import torch
from modelsoup_i2i.networks.adain import (
    AdaptiveNorm,
    ContentEncoder,
    Decoder,
    LayerNorm,
    ResidualBlocks,
)
from modelsoup_i2i.networks.described import Network, parameters
from modelsoup_i2i.networks.layers import InstanceNorm

ROOM = "modelsoup_i2i.networks.adain"
WHOLE = [
    ("ContentEncoder", {}, 12_202_112),
    ("StyleEncoder", {}, 2_779_328),
    ("MLP", {"style": 64, "outs": 4096}, 1_135_104),
    ("Decoder", {}, 13_749_891),
    ("ContentEncoder", {"downs": 2, "blocks": 4}, 5_385_856),  # MUNIT's, as the next two
    ("StyleEncoder", {"style": 8}, 2_764_936),
    ("MLP", {"style": 8, "outs": 4096}, 1_120_768),
]


@pytest.mark.parametrize(("name", "sizes", "count"), WHOLE)
def test_a_part_has_as_many_parameters_as_the_papers(name, sizes, count):
    assert parameters(Network(f"{ROOM}:{name}", sizes).tensors()) == count


def test_munits_decoder_has_a_gain_and_a_bias_after_each_doubling():
    decoder = Decoder(ups=2, blocks=4, norm=LayerNorm)
    assert sum(own.numel() for own in decoder.parameters()) == 5_754_627
    assert decoder.given == 4096


def test_an_adaptive_norm_is_given_biases_before_scales():
    maps = torch.tensor([[[[1.0, 3.0]], [[0.0, 8.0]]]], dtype=torch.float64)  # two channels
    given = torch.tensor([[10.0, 20.0, 2.0, -3.0]], dtype=torch.float64)
    made = AdaptiveNorm(2)(maps, given)
    # Normalised: -1 and 1, by the biased variance.
    expected = torch.tensor([[[[8.0, 12.0]], [[23.0, 17.0]]]], dtype=torch.float64)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_a_layer_norm_goes_by_the_spread_of_a_sample():
    norm = LayerNorm(2).double()
    norm.gamma.data.copy_(torch.tensor([1.0, 2.0]))
    norm.beta.data.copy_(torch.tensor([0.0, 5.0]))
    maps = torch.tensor([[[[0.0, 2.0]], [[4.0, 6.0]]]], dtype=torch.float64)
    spread = (20 / 3) ** 0.5  # of n - 1
    expected = torch.tensor([[[[-3.0, -1.0]], [[1.0, 3.0]]]], dtype=torch.float64) / spread
    expected[:, 1] = 2 * expected[:, 1] + 5
    torch.testing.assert_close(norm(maps), expected, atol=1e-4, rtol=0)


def test_a_layer_norms_gain_begins_between_0_and_1():
    gain = LayerNorm(1000).gamma.detach()
    assert gain.min() >= 0 and gain.max() < 1 and abs(float(gain.mean()) - 0.5) < 0.05


def test_each_adaptive_norm_of_a_decoder_has_its_own_part_of_the_numbers():
    blocks = ResidualBlocks(2, 3, AdaptiveNorm)
    maps, parts = torch.randn(2, 3, 4, 4), list(torch.randn(4, 2, 6).unbind())
    by_hand = maps
    for n, block in enumerate(blocks.model):
        one, two = block.model
        inner = torch.relu(one.norm(one.conv(by_hand), parts[2 * n]))
        by_hand = by_hand + two.norm(two.conv(inner), parts[2 * n + 1])
    torch.testing.assert_close(blocks(maps, *parts), by_hand)


def test_content_is_pictures_three_times_halved():
    assert ContentEncoder(width=4)(torch.zeros(2, 3, 32, 32)).shape == (2, 32, 4, 4)
    made = Decoder(width=4, norm=InstanceNorm)
    assert made(torch.zeros(2, 32, 4, 4), torch.zeros(2, made.given)).shape == (2, 3, 32, 32)
