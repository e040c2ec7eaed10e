"""BigGAN, and the encoder and adaptor that DeepI2I adds: counts, names, features, norms."""

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from modelsoup_i2i.networks import biggans
from modelsoup_i2i.networks.biggan import ConditionalNorm
from modelsoup_i2i.networks.described import Network
from torch.nn import functional as F

from modelsoup import ParameterError

BUFFERS = {"u0", "sv0", "stored_mean", "stored_var", "strength"}


def parameters(network: Network) -> int:
    shapes = network.shapes().items()
    return sum(math.prod(s) for name, s in shapes if name.rpartition(".")[2] not in BUFFERS)


def networks(arch="32s", ch=8, classes=4, chunk=20, shared=128, attention=0, **others):
    own, known = {"arch": arch, "ch": ch, "attention": attention}, {"classes": classes}
    return {
        "G": Network(biggans.GENERATOR, own | known | {"chunk": chunk, "shared": shared}),
        "D": Network(biggans.DISCRIMINATOR, own | known),
        "E": Network(biggans.ENCODER, own),
        "A": Network(biggans.ADAPTOR, {"arch": arch, "ch": ch, **others}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        (("128", 96, 1000, 20, 128, 64), (70_433_988, 87_982_370, 86_444_833, 85_830_528)),
        (("64", 64, 9, 20, 128, 32), (31_739_268, 19_557_058, 19_546_817, 33_954_304)),
        (("64", 32, 9, 20, 128, 32), (8_374_532, 4_893_794, 4_888_673, 8_490_240)),
        (("64", 8, 4, 20, 128, 64), (687_460, 306_841, 306_200, 531_264)),
        (("64s", 64, 9, 20, 128, 32), (13_547_396, 9_588_418, 9_583_297, 11_407_360)),
        (("64s", 32, 9, 16, 64, 32), (3_434_948, 2_399_842, 2_397_281, 2_852_864)),
        (("32s", 32, 10, 16, 64, 0), (2_086_659, 1_218_657, 1_215_840, 1_934_592)),
        (("32s", 16, 10, 16, 64, 0), (583_875, 305_969, 304_560, 483_968)),
        (("32s", 12, 10, 16, 64, 0), (351_859, 172_597, 171_540, 272_352)),
        (("32s", 8, 4, 20, 128, 0), (218_275, 76_761, 76_440, 121_152)),
    ],
)  # fmt: skip
def test_networks_have_as_many_parameters_as_the_published_ones(sizes, counts):
    assert tuple(map(parameters, networks(*sizes).values())) == counts


@pytest.mark.parametrize(
    ("downs", "encoder", "adaptor", "generator"),
    [
        (2, 614_305, 2_065_536, 9_899_332), (3, 2_679_841, 10_325_376, 10_388_932),
        (4, 10_939_681, 43_360_128, 26_113_732), (5, 86_444_833, 85_830_528, 70_305_988),
    ],
)  # fmt: skip
def test_fewer_halvings_leave_smaller_networks(downs, encoder, adaptor, generator):
    least = biggans.deepest("128", downs)
    own = {"arch": "128", "ch": 96, "least": least}
    assert parameters(Network(biggans.ENCODER, own)) == encoder
    assert parameters(Network(biggans.ADAPTOR, own)) == adaptor
    assert parameters(Network(biggans.GENERATOR, {**own, "classes": 0})) == generator


@pytest.mark.parametrize("arch", ["32s", "64", "64s", "128", "256"])
def test_a_network_is_told_as_it_is_built(arch):
    for network in networks(arch, 8, 3, attention=16).values():
        built = {name: tuple(tensor.shape) for name, tensor in network.build().state_dict().items()}
        assert built == network.shapes()


def test_the_network_of_32_pixels_has_nothing_to_translate_with():
    with pytest.raises(ParameterError, match="no features of 4 × 4: 32s have"):
        biggans.taps("32")
    with pytest.raises(ParameterError, match="n_down is 4, but must be 2 to 3 for 32 pixels"):
        biggans.deepest("32s", 4)


def built(**sizes):
    torch.manual_seed(0)
    return {name: network.build().eval() for name, network in networks(**sizes).items()}


def test_features_are_taken_and_added_once_also_where_attention_is():
    own = built(attention=8)
    images, z, c = torch.randn(2, 3, 32, 32), torch.randn(2, 80), torch.tensor([1, 3])
    features = own["E"](images)
    assert {side: tuple(maps.shape[1:]) for side, maps in features.items()} == {
        4: (64, 4, 4), 8: (16, 8, 8),
    }  # fmt: skip
    assert features[4].min() == 0  # as the official code's
    assert features[8].min() < 0
    added = {side: torch.full((2, 64, side, side), 0.5) for side in (4, 8)}
    plain, changed = own["G"].walk(z, c), own["G"].walk(z, c, {8: added[8]})
    assert torch.equal(changed[4], plain[4])
    torch.testing.assert_close(changed[8], plain[8] + added[8])
    assert not torch.equal(changed[16], plain[16])


def test_an_identity_repeats_the_encoders_maps_and_has_no_weights():
    own = built(identity=True, strength={4: 1.0, 8: 0.5})
    assert list(own["A"].state_dict()) == ["strength"]
    features = own["E"](torch.randn(1, 3, 32, 32))
    made = own["A"](features)
    torch.testing.assert_close(made[4], features[4])  # 64 wide, as the generator's
    torch.testing.assert_close(made[8], 0.5 * torch.cat([features[8]] * 4, 1))


def test_a_class_may_be_a_mixture_of_two():
    own = built()["G"]
    z = torch.randn(1, own.noise)
    rows = own.shared(torch.tensor([0, 1]))
    torch.testing.assert_close(own(z, rows[:1]), own(z, torch.tensor([0])))
    assert not torch.equal(own(z, rows.mean(0, keepdim=True)), own(z, rows[:1]))


def test_a_pass_in_training_moves_the_singular_vector_and_one_in_use_does_not():
    layer = built()["D"].blocks[0][0].conv1
    before = layer.u0.clone()
    layer(torch.randn(1, 3, 8, 8))
    assert torch.equal(layer.u0, before)
    layer.train()
    for _ in range(200):
        layer(torch.randn(1, 3, 8, 8))
    largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    torch.testing.assert_close(layer.sv0, largest[None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(layer.divided().flatten(1), 2), torch.ones(()),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_a_block_is_the_sum_of_its_ways_as_published():
    """Ours halves before a convolution of one pixel, and doubles after one."""
    own = built()
    down, up = own["D"].blocks[1][0], own["G"].blocks[0][0]
    images = torch.randn(2, 8, 16, 16)
    inner = down.conv2(F.relu(down.conv1(F.relu(images))))
    expected = F.avg_pool2d(inner, 2) + F.avg_pool2d(down.conv_sc(images), 2)
    torch.testing.assert_close(down(images), expected, atol=1e-5, rtol=1e-4)
    maps, y = torch.randn(2, 64, 4, 4), torch.randn(2, 148)
    inner = up.conv1(F.interpolate(up.bn1(maps, y), scale_factor=2))
    inner = up.conv2(up.bn2(inner, y))
    expected = inner + up.conv_sc(F.interpolate(maps, scale_factor=2))
    torch.testing.assert_close(up(maps, y), expected, atol=1e-5, rtol=1e-4)


def test_a_norm_that_keeps_less_has_the_gradients_of_torchs_own():
    torch.manual_seed(1)
    norm = ConditionalNorm(5, 4).double().train()
    images = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def plain() -> torch.Tensor:
        own = norm.gain, norm.bias
        gain, bias = 1 + own[0](condition), own[1](condition)
        normal = F.batch_norm(images, None, None, training=True, eps=1e-5)
        return F.relu(normal * gain[:, :, None, None] + bias[:, :, None, None])

    weights = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    given = (images, condition, norm.gain.weight, norm.bias.weight)
    norm.gain.eval(), norm.bias.eval()  # whose own vectors stay
    expected = torch.autograd.grad((plain() * weights).sum(), given)
    made = norm(images, condition)
    torch.testing.assert_close(made, plain())
    for own, other in zip(
        torch.autograd.grad((made * weights).sum(), given), expected, strict=True
    ):
        torch.testing.assert_close(own, other)
    mean, var = images.mean((0, 2, 3)), images.var((0, 2, 3))
    torch.testing.assert_close(norm.stored_mean, 0.1 * mean)
    torch.testing.assert_close(norm.stored_var, 0.9 + 0.1 * var)
    norm.eval()
    normal = F.batch_norm(images, norm.stored_mean, norm.stored_var, eps=1e-5)
    gain, bias = 1 + norm.gain(condition), norm.bias(condition)
    expected = F.relu(normal * gain[:, :, None, None] + bias[:, :, None, None])
    torch.testing.assert_close(norm(images, condition), expected)
