"""StyleGAN, and the encoder and adaptors for it: counts, official names, layers, noise, styles."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from modelsoup_i2i.networks import stylegans
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.networks.stylegan import (
    Adaptor,
    Auxiliary,
    Blur,
    Convolution,
    Discriminator,
    Encoder,
    Fused,
    Generator,
    OwnBlocks,
    Translation,
)
from modelsoup_i2i.networks.stylegans import (
    adaptor_in,
    discriminator_in,
    encoder_in,
    generator_in,
)
from torch.nn import functional as F

from modelsoup import MismatchError, ParameterError

G, D, E, A = stylegans.GENERATOR, stylegans.DISCRIMINATOR, stylegans.ENCODER, stylegans.ADAPTOR
SMALL = {"size": 64, "width": 16}
# Names and shapes of the code that others' checkpoints were made with, up to 1024.
OFFICIAL = {
    network: {name: tuple(shape) for name, shape in tensors.items()}
    for network, tensors in json.loads(
        (Path(__file__).parent / "data" / "stylegan_names.json").read_text()
    ).items()
}


def trained(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What of it is no constant."""
    flips = {name.removesuffix("_flip") for name in shapes if name.endswith("_flip")}
    constant = flips | {f"{name}_flip" for name in flips} | {"strength"}
    return {name: shape for name, shape in shapes.items() if name not in constant}


def parameters(network: Network, without: tuple[str, ...] = ()) -> int:
    own = trained(network.shapes()).items()
    return sum(math.prod(s) for name, s in own if not name.startswith(without or ("nothing",)))


@pytest.mark.parametrize(
    ("network", "sizes", "count"),
    [
        (G, {"official_layout": True}, 26_219_115),
        (D, {"official_layout": True}, 25_444_737),
        (G, {"size": 256}, 26_078_403),
        (D, {"size": 256}, 25_365_505),
        (E, {"size": 256}, 18_805_760),
        (A, {"kind": "deepi2i", "official_layout": True}, 20_058_624),
        (A, {}, 9_439_232),
    ],
)
def test_networks_have_as_many_parameters_as_the_published_ones(network, sizes, count):
    told = Network(network, sizes)
    assert parameters(told) == count
    built = told.build()
    assert sum(p.numel() for p in built.parameters()) == count
    state = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    assert state == told.shapes() and list(state) == list(told.tensors())


@pytest.mark.parametrize(
    ("blocks", "count"),
    [(0, 23_977_155), (1, 20_557_507), (2, 14_786_243), (3, 9_014_979), (4, 3_243_715),
     (5, 947_907)],
)  # fmt: skip
def test_an_auxiliary_generator_owns_what_it_does_not_share(blocks, count):
    sizes = {"kept": blocks, "size": 256, "width": 512, "code": 512}
    assert parameters(Network(stylegans.OWN_BLOCKS, sizes)) == count


def test_an_auxiliary_generator_is_the_other_one_with_its_first_blocks_and_mapping_network():
    generator = built().eval()
    own = OwnBlocks(3, size=64, width=16, code=8, depth=2)
    names = {n: v for n, v in generator.state_dict().items() if n in own.state_dict()}
    assert len(names) == len(own.state_dict())
    own.load_state_dict(names)
    auxiliary, z = Auxiliary(generator, own).eval(), torch.randn(2, 8)
    same = [a is b for a, b in zip(
        auxiliary.blocks, generator.generator.progression.values(), strict=True)]  # fmt: skip
    assert same == [True, True, True, False, False]
    assert own.generator.to_rgb is not generator.generator.to_rgb
    assert torch.equal(auxiliary(z), generator(z))


@pytest.mark.parametrize(
    ("network", "key", "sizes"),
    [(G, "G", {}), (D, "D", {}), (A, "A", {"kind": "deepi2i"})],
)
def test_the_official_layout_has_the_official_names(network, key, sizes):
    told = Network(network, {**sizes, "official_layout": True}).shapes()
    told.pop("strength", None)
    assert told == OFFICIAL[key]


@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024])
def test_what_is_built_for_a_size_has_its_names_among_the_official_ones(size):
    deepest = {64: 4, 128: 5, 256: 6, 512: 7, 1024: 8}[size]
    for network, key, places in (
        (G, "G", range(deepest + 1)), (D, "D", range(8 - deepest, 9)),
        (E, "D", range(8 - deepest, 8)),
    ):  # fmt: skip
        own = Network(network, {"size": size}).shapes()
        assert own.items() <= OFFICIAL[key].items()
        rooms = {tuple(name.removeprefix("generator.").split(".")[:2]) for name in own}
        found = {int(place) for room, place in rooms if room == "progression"}
        assert found == set(places)
        rgb = [place for room, place in rooms if room in ("to_rgb", "from_rgb")]
        assert rgb == [str(deepest if key == "G" else 8 - deepest)]


def test_sizes_are_told_by_names_and_shapes():
    sizes = {"size": 128, "width": 16, "code": 24, "depth": 3, "channels": 1}
    own = {f"G.{n}": s for n, s in Network(G, sizes).shapes().items()}
    assert generator_in(own, "G.") == sizes
    for network, find in ((D, discriminator_in), (E, encoder_in)):
        for activated in (True, False):
            sizes = {"size": 512, "width": 48, "channels": 4, "rgb_activation": activated}
            shapes = Network(network, sizes).shapes()
            assert find(shapes) == sizes
    for sizes in (
        {"width": 16, "kind": "single"}, {"width": 8, "kind": "deepi2i"},
        {"width": 8, "kind": "deepi2i", "only": (8, 32)}, {"kind": "identity"},
    ):  # fmt: skip
        assert adaptor_in(Network(A, sizes).shapes(), "") == sizes


def told(network: str, **sizes) -> dict[str, tuple[int, ...]]:
    return Network(network, sizes).shapes()


@pytest.mark.parametrize(
    ("find", "shapes", "said"),
    [
        (generator_in, {}, "there is no tensor of the StyleGAN generator"),
        (generator_in, {"linear.weight": (24576, 20)}, r"has no generator\.progression\.0\.conv"),
        (generator_in, told(G, official_layout=True), "9 sizes, as official checkpoints have:"),
        (generator_in, {n: s for n, s in told(G, **SMALL).items() if "4.conv2" not in n},
         r"lacks generator\.progression\.4\.conv2\.conv\.bias \[8\]"),
        (generator_in, {n: s for n, s in told(G, **SMALL).items() if "to_rgb" not in n},
         r"has no generator\.to_rgb\.N, a StyleGAN's"),
        (generator_in, told(G, **SMALL) | {"generator.progression.2.conv2.conv.bias": (17,)},
         r"2\.conv2\.conv\.bias has the shape \[17\], where \[16\] is expected"),
        (discriminator_in, {"blocks.0.0.conv1.weight": (8, 3, 3, 3)}, r"has no from_rgb\.N, a St"),
        (discriminator_in, told(E, **SMALL), r"lacks progression\.8\.conv1\.0\.conv\.bias \[16\]"),
        (adaptor_in, {"blocks.0.0.conv1.weight": (8, 3, 3, 3)}, "has no block for any of 4, 8, 16"),
        (adaptor_in, told(A, width=8) | {"progression.2.conv.bias": (7,)}, r"2\.conv\.bias has"),
    ],
)  # fmt: skip
def test_what_is_no_such_network_is_told_by_a_tensors_name(find, shapes, said):
    with pytest.raises(MismatchError, match=said):
        find(shapes, "")


def test_a_size_that_there_is_none_of_is_refused():
    for size in (32, 96, 2048):
        with pytest.raises(ParameterError, match=f"size is {size}, but a StyleGAN's is 64, 128"):
            Generator(size=size, width=8)


def built(seed: int = 0, **sizes):
    torch.manual_seed(seed)
    own = Generator(64, 16, code=8, depth=2, **sizes)
    with torch.no_grad():
        for name, tensor in own.named_parameters():
            if ".noise" in name:
                tensor.normal_()
    return own


def test_weights_are_scaled_when_they_are_used():
    torch.manual_seed(0)
    layer = Convolution(8, 4)
    images = torch.randn(1, 8, 5, 5)
    assert layer.conv.weight_orig.std().item() == pytest.approx(1, rel=0.1)
    expected = F.conv2d(images, layer.conv.weight_orig * math.sqrt(2 / 72), padding=1)
    torch.testing.assert_close(layer(images), expected)


def test_a_fused_layer_is_a_convolution_and_a_change_of_size():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    down = Fused(3, 5, up=False)
    # The mean of what a convolution makes at 2 × 2 places, those beyond the edge among them.
    expected = F.avg_pool2d(F.conv2d(images, down.weight * math.sqrt(2 / 27), padding=1), 2)
    assert down(images).shape == (2, 5, 4, 4)
    torch.testing.assert_close(down(images), expected)
    up = Fused(3, 5, up=True)
    doubled = F.interpolate(images, scale_factor=2, mode="nearest")
    kernel = (up.weight * math.sqrt(2 / 27)).transpose(0, 1).flip(2, 3)
    whole = F.conv2d(doubled, kernel, padding=1) / 4
    assert up(images).shape == (2, 5, 16, 16)
    torch.testing.assert_close(up(images), whole, atol=1e-5, rtol=1e-4)


def test_a_blur_keeps_what_is_flat_and_spreads_what_is_not():
    point = torch.zeros(1, 2, 5, 5)
    point[0, 1, 2, 2] = 16
    made = Blur(2)(point)
    assert made[0, 1, 1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert not made[0, 0].any() and Blur(2)(torch.ones(1, 2, 5, 5))[0, 0, 2, 2] == 1


def test_a_style_gives_each_channel_its_mean_and_spread():
    torch.manual_seed(0)
    own = built()
    norm = own.generator.progression["0"].adain1
    images, style = torch.randn(2, 16, 6, 6) * 3 + 1, torch.randn(2, 8)
    made, told = norm(images, style), norm.style(style)
    torch.testing.assert_close(made.mean((2, 3)), told[:, 16:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        made.std((2, 3), unbiased=False), told[:, :16].abs(), atol=1e-4, rtol=1e-3
    )
    assert norm.style.linear.bias.tolist() == [1] * 16 + [0] * 16


def test_a_block_is_noise_then_leaky_relu_then_the_style():
    own = built().eval()
    block, z = own.generator.progression["0"], torch.randn(3, 8)
    style, noise = own.style(z), own.generator.noise(4, 3)
    maps = block.conv1.input.repeat(3, 1, 1, 1)
    for number, conv in ((1, None), (2, block.conv2)):
        maps = maps if conv is None else conv(maps)
        weight = getattr(block, f"noise{number}").weight_orig
        maps = F.leaky_relu(maps + weight * math.sqrt(2 / 16) * noise, 0.2)
        maps = getattr(block, f"adain{number}")(maps, style)
    torch.testing.assert_close(own.walk(z)[4], maps)


def test_what_is_mapped_has_length_one_first():
    own = built().eval()
    z = torch.randn(2, 8)
    torch.testing.assert_close(own.style(z), own.style(10 * z))


def test_a_picture_in_use_depends_on_its_vector_alone():
    own = built().eval()
    z = torch.randn(3, 8)
    whole = own(z)
    assert whole.shape == (3, 3, 64, 64)
    torch.testing.assert_close(own(z[1:2]), whole[1:2], atol=1e-3, rtol=1e-3)
    assert torch.equal(own(z), whole)
    assert torch.equal(built(1).generator.noise64, own.generator.noise64)
    assert not any("noise64" in name for name in own.state_dict())


def test_noise_in_training_is_drawn_by_torchs_generator_for_each_picture():
    own = built(mixing=0.0)
    z = torch.randn(1, 8).expand(2, -1)
    torch.manual_seed(7)
    first = own(z)
    torch.manual_seed(7)
    assert torch.equal(own(z), first)
    assert not torch.equal(own(z), first)
    assert not torch.equal(first[0], first[1])


def test_styles_are_mixed_as_often_as_is_said_and_in_training_only():
    own = built(mixing=0.9)
    z = torch.randn(4, 8)
    places = []
    for _ in range(300):
        styles = own.styles(z)
        torch.testing.assert_close(styles[0], own.style(z))
        places.append(sum(torch.equal(style, styles[0]) for style in styles))
    mixed = [place for place in places if place < len(styles)]
    assert len(styles) == 5 and set(mixed) == {1, 2, 3, 4}
    assert len(mixed) / 300 == pytest.approx(0.9, abs=0.06)
    for quiet in (built(mixing=0.0), own.eval()):
        assert all(torch.equal(style, quiet.style(z)) for style in quiet.styles(z))


def test_features_are_added_after_the_blocks_of_their_side():
    own = built().eval()
    z = torch.randn(2, 8)
    added = torch.full((2, 16, 16, 16), 0.5)
    plain, changed = own.walk(z), own.walk(z, None, {16: added})
    assert sorted(plain) == [4, 8, 16, 32, 64]
    assert torch.equal(changed[8], plain[8])
    torch.testing.assert_close(changed[16], plain[16] + added)
    assert not torch.allclose(changed[32], plain[32])
    torch.testing.assert_close(own(z, features={16: added}), changed[64])


def test_a_verdict_knows_how_much_a_batch_varies():
    torch.manual_seed(0)
    judge = Discriminator(**SMALL)
    images = torch.randn(2, 3, 64, 64)
    verdicts, found = judge(images, taps=True)
    assert verdicts.shape == (2, 1) and list(found) == [32, 16, 8, 4]
    torch.testing.assert_close(judge(images), verdicts)
    assert not torch.allclose(judge(images[:1]), verdicts[:1])
    spread = found[4].var(0, unbiased=False).add(1e-8).sqrt().mean()
    seen = torch.cat([found[4], spread.expand(2, 1, 4, 4)], 1)
    torch.testing.assert_close(judge.linear(judge.progression["8"](seen).flatten(1)), verdicts)


def test_gradients_of_gradients_reach_all_weights_of_a_judge():
    judge = Discriminator(128, 16)
    images = torch.randn(2, 3, 128, 128, requires_grad=True)
    (slope,) = torch.autograd.grad(judge(images).sum(), images, create_graph=True)
    slope.square().sum().backward()
    for name, parameter in judge.named_parameters():
        assert name.endswith("bias") or parameter.grad.abs().max() > 0, name


def test_an_encoder_is_a_discriminator_without_its_end():
    torch.manual_seed(0)
    judge, encoder = Discriminator(**SMALL), Encoder(**SMALL)
    own = {name: judge.state_dict()[name] for name in encoder.state_dict()}
    encoder.load_state_dict(own)
    images = torch.randn(2, 3, 64, 64)
    features = encoder(images)
    assert list(features) == [4, 8, 16, 32]
    for side, maps in features.items():
        assert torch.equal(maps, judge.walk(images)[side]) and maps.shape[1:] == (16, side, side)


@pytest.mark.parametrize("kind", ["single", "deepi2i", "identity"])
def test_a_translation_is_made_of_three_networks(kind):
    torch.manual_seed(0)
    strength = {4: 1.0, 8: 0.1, 16: 0.5, 32: 0.0}
    encoder, adaptor = Encoder(**SMALL).eval(), Adaptor(16, kind, strength=strength)
    whole = Translation(encoder, adaptor, built().eval())
    images, z = torch.randn(2, 3, 64, 64), torch.randn(2, 8)
    added = adaptor(encoder(images))
    for side, maps in encoder(images).items():
        made = maps if kind == "identity" else adaptor.progression[stylegans.adapts(side)](maps)
        torch.testing.assert_close(added[side], strength[side] * made)
    torch.testing.assert_close(whole(images, z), whole.G(z, None, added))
    assert not torch.allclose(whole(images, z), whole(images.flip(0), z))
    assert not torch.allclose(whole(images, z), whole(images, z.flip(0)))


def test_an_adaptor_may_leave_sides_out():
    adaptor = Adaptor(16, only=(8,), strength={8: 0.7})
    assert [name.split(".")[1] for name in adaptor.state_dict() if "." in name] == ["3", "3"]
    features = {side: torch.randn(1, 16, side, side) for side in (4, 8, 16, 32)}
    assert list(adaptor(features)) == [8]
    adaptor.strength.fill_(0)  # as a start might have it
    adaptor.prepare_for(plain=True)
    torch.testing.assert_close(adaptor.strength, torch.tensor([0.7]))


def test_what_is_missing_begins_as_the_constructor_makes_it(tmp_path):
    from modelsoup.running.torch_bridge import load_into

    own = Generator(64, 16, code=8, depth=2)
    missing = load_into(own, None, seed=3)
    assert set(missing) == set(own.state_dict())
    state = own.state_dict()
    assert state["generator.progression.1.adain1.style.linear.bias"].tolist() == [1] * 16 + [0] * 16
    assert not state["generator.progression.1.noise1.weight_orig"].any()
    assert state["generator.progression.0.conv1.input"].std().item() == pytest.approx(1, rel=0.2)
    assert torch.equal(state["generator.progression.1.conv1.2.weight"], Blur(16).weight)


def test_a_translation_in_bfloat16_and_channels_last_is_nearly_the_same():
    torch.manual_seed(0)
    whole = Translation(Encoder(128, 32), Adaptor(32), Generator(128, 32, 16, 2)).eval()
    images, z = torch.randn(2, 3, 128, 128), torch.randn(2, 16)
    plain = whole(images, z)
    last = whole.to(memory_format=torch.channels_last)(
        images.to(memory_format=torch.channels_last), z
    )
    torch.testing.assert_close(last, plain, atol=1e-3, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        halved = whole(images, z)
    assert halved.dtype == torch.bfloat16
    assert (halved.float() - plain).abs().mean() < 0.05 * plain.abs().mean()
