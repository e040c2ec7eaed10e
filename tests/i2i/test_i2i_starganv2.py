"""StarGAN v2: its networks, styles, losses and turns, and what a checkpoint tells."""

from collections import Counter
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from i2i_domains import make_classes
from i2i_states import first_batch, flat, moved, numbers
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.networks import starganv2
from modelsoup_i2i.networks.described import parameters
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.trainers.starganv2 import KINDS, StarGANv2, StarGANv2Options
from modelsoup_i2i.training.losses import slope_penalty
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.turns import Batch, Turn
from modelsoup_i2i.use.official_starganv2 import import_starganv2
from torch import nn
from torch.nn import functional as F

import modelsoup
from modelsoup import MismatchError

SMALL = {"size": 16, "width": 4, "most": 8, "style": 6, "hidden": 8, "noise": 5}
TINY = {**SMALL, "batch": 3, "steps": 8, "device": "cpu", "threads": 0, "sheet_every": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "trees"
    return make_classes(root, {"ash": 6, "oak": 3, "yew": 2}, size=20)


def session(data: Path, trainer: StarGANv2 | None = None, **more) -> Session:
    trainer = trainer or StarGANv2()
    return trainer.session(StarGANv2Options(data=data, **{**TINY, **more}), None, seed=0)


def begun(data: Path, **more) -> tuple[Session, Batch]:
    """A session, and the batch of its first step."""
    own = session(data, **more)
    return own, first_batch(own)


# --- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"classes": 2}, (33_892_995, 2_438_272, 20_851_264 + 65_664, 20_851_264 + 1026)),
        ({"classes": 3}, (33_892_995, 3_259_072, 20_851_264 + 98_496, 20_851_264 + 1539)),
        ({"classes": 60}, (33_892_995, 50_044_672, 20_851_264 + 1_969_920, 20_851_264 + 30_780)),
        (
            {"classes": 2, "size": 128},
            (33_632_003, 2_438_272, 20_734_080 + 65_664, 20_734_080 + 1026),
        ),
        (
            {"classes": 3, "size": 64, "width": 16, "most": 128, "style": 16, "hidden": 128},
            (384_739, 206_512, 720_320, 714_515),
        ),
    ],
)
def test_the_networks_have_the_papers_parameters(
    options: dict[str, int], expected: tuple[int, ...]
):
    networks = StarGANv2().networks(StarGANv2Options(**options))
    counts = {name: parameters(own.tensors()) for name, own in networks.items()}
    assert counts == dict(zip("GFED", expected, strict=True))


def test_each_vector_goes_through_the_rows_of_its_own_class():
    layer = starganv2.OfClasses(4, 5, 3)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(12).view(4, 3))
    vectors, classes = torch.randn(6, 5), torch.tensor([2, 0, 2, 3, 0, 2])
    made = layer(vectors, classes)
    for n, label in enumerate(classes.tolist()):
        expected = F.linear(vectors[n], layer.weight[label], layer.bias[label])
        torch.testing.assert_close(made[n], expected)
    made.sum().backward()
    used = [bool(own.abs().sum() > 0) for own in layer.weight.grad]
    assert used == [True, False, True, True]


def test_verdicts_and_styles_of_a_class_are_what_that_class_alone_says(data: Path):
    own, b = begun(data)
    for name, seen in (("F", b.z), ("E", b.x), ("D", b.x)):
        network = own.networks[name]
        with torch.no_grad():
            of_each = [network(seen, torch.full((3,), label)) for label in range(3)]
            chosen = network(seen, torch.tensor([2, 0, 1]))
        for n, label in enumerate((2, 0, 1)):
            torch.testing.assert_close(chosen[n], of_each[label][n])
        assert float((of_each[0] - of_each[1]).abs().min()) > 0


def test_a_block_halves_beside_what_it_is_added_to():
    """In the order of the paper's code, and with the 1 × 1 convolution before the halving."""
    block = starganv2.Block(3, 5, halves=True, normed=True)
    maps = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        block.norm1.weight.copy_(torch.tensor([2.0, 0.5, 1.0]))
        block.norm2.bias.copy_(torch.tensor([0.1, -0.3, 0.2]))
    made = F.instance_norm(maps) * block.norm1.weight.view(3, 1, 1)
    made = F.avg_pool2d(block.conv1(F.leaky_relu(made, 0.2)), 2)
    made = F.instance_norm(made) + block.norm2.bias.view(3, 1, 1)
    made = block.conv2(F.leaky_relu(made, 0.2))
    beside = F.avg_pool2d(F.conv2d(maps, block.beside.weight), 2)
    torch.testing.assert_close(block(maps), (made + beside) / 2**0.5, rtol=1e-4, atol=1e-5)
    plain = starganv2.Block(3, 3)
    expected = plain.conv2(F.leaky_relu(plain.conv1(F.leaky_relu(maps, 0.2)), 0.2)) + maps
    torch.testing.assert_close(plain(maps), expected / 2**0.5)


def test_a_styled_block_doubles_after_its_first_norm():
    block = starganv2.StyledBlock(4, 3, 6, doubles=True)
    maps, styles = torch.randn(2, 4, 5, 5), torch.randn(2, 6)

    def normed(norm: starganv2.AdaptiveNorm, maps: torch.Tensor) -> torch.Tensor:
        scale, bias = norm.fc(styles).unflatten(1, (2, -1))[..., None, None].unbind(1)
        return F.leaky_relu((1 + scale) * F.instance_norm(maps) + bias, 0.2)

    made = block.conv1(normed(block.norm1, maps).repeat_interleave(2, 2).repeat_interleave(2, 3))
    made = block.conv2(normed(block.norm2, made))
    beside = F.conv2d(maps.repeat_interleave(2, 2).repeat_interleave(2, 3), block.beside.weight)
    torch.testing.assert_close(block(maps, styles), (made + beside) / 2**0.5, rtol=1e-4, atol=1e-5)


def test_weights_begin_by_hes_rule_and_averages_begin_as_they_are(data: Path):
    own = session(data, width=16, most=64, hidden=64)
    state = own._module.state_dict()
    checked = 0
    for name, values in state.items():
        if name.endswith("bias") or values.ndim == 1:
            norm = ".norm" in name and name.endswith("weight") and values.ndim == 1
            assert torch.equal(values, torch.full_like(values, float(norm))), name
        elif values.numel() > 2000:
            fan_in = values.shape[2] if values.ndim == 3 else values[0].numel()
            assert float(values.std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.1), name
            checked += 1
    assert checked > 20
    for network in "GFE":
        assert torch.equal(
            *(torch.cat([v.flatten() for n, v in state.items() if n.startswith(f"{begins}.")])
              for begins in (network, f"{network}_ema"))
        )  # fmt: skip
    assert not any(name.startswith("D_ema") for name in state)


def test_nothing_holds_what_is_made_in_a_range(data: Path):
    own, b = begun(data)
    with torch.no_grad():
        own.networks["G"].last.bias.add_(5)
        assert float(own.networks["G"](b.x, torch.zeros(3, 6)).mean()) > 3


# --- losses and turns --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminators_loss_is_the_papers(data: Path, kind):
    own, b = begun(data)
    nets = own.networks
    told = {**StarGANv2().real(own, b, kind), **StarGANv2().fake(own, b, kind)}
    style = nets["F"](b.z, b.c_r) if kind == "latent" else nets["E"](b.r, b.c_r)
    verdicts = nets["D"](nets["G"](b.x, style), b.c_r)
    slopes = []
    for picture, label in zip(b.x, b.c, strict=True):
        one = picture[None].clone().requires_grad_()
        (slope,) = torch.autograd.grad(nets["D"](one, label[None]).sum(), one)
        slopes.append(0.5 * slope.square().sum())
    expected = {
        f"real_{kind}": -torch.log(torch.sigmoid(nets["D"](b.x, b.c))).mean(),
        f"fake_{kind}": -torch.log(1 - torch.sigmoid(verdicts)).mean(),
        f"r1_{kind}": torch.stack(slopes).mean(),
    }
    assert numbers(told) == pytest.approx(numbers(expected), rel=1e-4)
    alone = slope_penalty(lambda images: nets["D"](images, b.c), b.x)
    torch.testing.assert_close(alone, told[f"r1_{kind}"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_what_translates_is_the_papers(data: Path, kind):
    own, b = begun(data, lambda_ds=2, lambda_cycle=3)
    nets = own.networks
    told = StarGANv2().translate(own, b, kind, 0.25)
    if kind == "latent":
        style, second = (nets["F"](z, b.c_r) for z in (b.z, b.z2))
    else:
        style, second = (nets["E"](r, b.c_r) for r in (b.r, b.r2))
    made = nets["G"](b.x, style)
    back = nets["G"](made, nets["E"](b.x, b.c))
    expected = {
        f"gan_{kind}": -torch.log(torch.sigmoid(nets["D"](made, b.c_r))).mean(),
        f"style_{kind}": (nets["E"](made, b.c_r) - style).abs().mean(),
        f"cycle_{kind}": (back - b.x).abs().mean(),
        f"spread_{kind}": -0.25 * (made - nets["G"](b.x, second)).abs().mean(),
    }
    assert numbers(told) == pytest.approx(numbers(expected), rel=1e-4)
    assert {name.split("_")[0]: weight for name, weight in own.weights.items()} == {
        "r1": 1, "style": 1, "spread": 2, "cycle": 3,
    }  # fmt: skip


def test_pictures_of_a_second_style_are_compared_with_and_have_no_gradient(data: Path):
    """What makes the first one is moved away from the second, which is as it is."""
    own, b = begun(data)
    told = StarGANv2().translate(own, b, "latent", 1.0)
    weight = own.networks["F"].last.weight
    (found,) = torch.autograd.grad(told["spread_latent"], weight)
    first = own.networks["G"](b.x, own.networks["F"](b.z, b.c_r))
    with torch.no_grad():
        second = own.networks["G"](b.x, own.networks["F"](b.z2, b.c_r))
    (expected,) = torch.autograd.grad(-(first - second).abs().mean(), weight)
    torch.testing.assert_close(found, expected)


class Only(StarGANv2):
    """One of the turns."""

    def __init__(self, place: int) -> None:
        self.place = place

    def turns(self, o: StarGANv2Options, step: int) -> list[Turn]:
        return [super().turns(o, step)[self.place]]


def test_each_turn_moves_whom_the_paper_moves(data: Path):
    found = [moved(session(data, Only(place), ema=None)) for place in range(4)]
    assert found == [{"D"}, {"D"}, {"G", "F", "E"}, {"G"}]


def test_averages_move_once_in_a_step_though_the_generator_moves_twice(data: Path):
    own = session(data, ema=0.75)
    before = flat(own)
    own.optimise(next(own.batches()))
    after = flat(own)
    for name, values in after.items():
        network, _, rest = name.partition(".")
        if network.endswith("_ema"):
            new = after[f"{network.removesuffix('_ema')}.{rest}"]
            torch.testing.assert_close(values, 0.75 * before[name] + 0.25 * new)
            assert not torch.equal(values, before[name]), name


def test_the_mapping_network_learns_a_hundred_times_more_slowly(data: Path):
    own = session(data, Only(2))
    before = flat(own)
    own.optimise(next(own.batches()))
    # Adam's first step is as long as the rate.
    longest = {
        network: max(float((values - before[name]).abs().max())
                     for name, values in flat(own).items() if name.startswith(f"{network}."))
        for network in "GFE"
    }  # fmt: skip
    assert longest == pytest.approx({"G": 1e-4, "F": 1e-6, "E": 1e-4}, rel=0.15)
    players = StarGANv2().players(own.options)
    for name, player in players.items():
        assert player.settings == {"betas": (0.0, 0.99), "weight_decay": 1e-4}
        assert player.ema == (None if name == "D" else 0.999)


def test_how_much_pictures_are_to_differ_falls_in_a_line_to_nothing(data: Path):
    def shares(options: StarGANv2Options, *steps: int) -> list[float]:
        found = []
        for step in steps:
            both = {turn.losses[0].keywords["share"]  # of what translates, in both turns
                    for turn in StarGANv2().turns(options, step)[2:]}  # fmt: skip
            found += both
            assert len(both) == 1
        return found

    assert shares(StarGANv2Options(classes=2), 0, 25_000, 99_999) == pytest.approx([1, 0.75, 1e-5])
    short = StarGANv2Options(classes=2, ds_steps=4)
    assert shares(short, 0, 1, 3, 4, 50) == [1, 0.75, 0.25, 0, 0]
    assert shares(StarGANv2Options(classes=2, lambda_ds=0), 0, 9) == [0, 0]
    of_epochs = StarGANv2Options(classes=2, steps=None, epochs=3)
    assert shares(of_epochs, 25_000) == [0.75]
    own = session(data, ds_steps=1)
    first, second = (own.optimise(next(own.batches())) for _ in range(2))
    assert "spread_latent" in first and "spread_latent" not in second


def test_sources_and_references_are_of_all_classes_equally_often(data: Path):
    own = session(data, batch=6)
    drawn = [group[0] for _, group in zip(range(4), own.batches(), strict=False)]
    for name in ("c", "c_r"):
        counts = Counter(label for b in drawn for label in b[name].tolist())
        assert counts == {0: 8, 1: 8, 2: 8}
    # A square of a shade of its own tells the class of both references.
    for b in drawn:
        for name in ("r", "r2"):
            assert b[name].amax((2, 3)).argmax(1).tolist() == b["c_r"].tolist()
    assert any(not torch.equal(b["r"], b["r2"]) for b in drawn)
    assert any(not torch.equal(b["c"], b["c_r"]) for b in drawn)


# --- pictures ----------------------------------------------------------------------------------


def test_a_part_has_most_of_the_area_and_nearly_the_ratio_of_sides():
    side = 100
    rows, columns = np.mgrid[:side, :side]
    picture = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    transform = Transform("centre_crop", (side, side), (side, side), flip=False, parts=1.0)
    shares, ratios, corners = [], [], set()
    for seed in range(200):
        made = transform.draw(transform.prepare(picture, ""), np.random.default_rng(seed))
        assert made.shape == (side, side, 3)
        high, wide = (int(made[..., n].max()) - int(made[..., n].min()) + 1 for n in (0, 1))
        shares.append(high * wide / side**2)
        ratios.append(wide / high)
        corners.add((int(made[..., 0].min()), int(made[..., 1].min())))
    assert 0.77 < min(shares) < 0.83 and 0.97 < max(shares) <= 1
    assert 0.87 < min(ratios) < 0.93 and 1.07 < max(ratios) < 1.13
    assert len(corners) > 50


def test_a_part_is_shown_as_often_as_is_said_and_tests_are_whole():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    size = (16, 16)
    transform = Transform("centre_crop", size, size, flip=False, parts=0.5)
    ready = transform.prepare(picture, "")
    assert ready.shape == (32, 32, 3)  # of many pixels, twice as many as are shown
    assert transform.prepare(picture[:20, :20], "").shape == (20, 20, 3)
    whole = Transform("centre_crop", size, size, flip=False, parts=1e-9).draw(ready, rng)
    drawn = [transform.draw(ready, np.random.default_rng(seed)) for seed in range(200)]
    shown = sum(np.array_equal(one, whole) for one in drawn)
    assert 75 < shown < 125
    plain = Transform("centre_crop", size, size, flip=False)
    assert np.array_equal(transform.for_test(picture), plain.for_test(picture))
    assert np.array_equal(plain.for_test(picture), plain.prepare(picture, ""))


# --- checkpoints -------------------------------------------------------------------------------


def shapes_of(options: StarGANv2Options) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in StarGANv2().tensors(options).items()}


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_checkpoint_tells_the_options_that_it_decides(size: int):
    given = {**SMALL, "size": size, "classes": 3, "channels": 1, "most": 12}
    shapes = shapes_of(StarGANv2Options(**given))
    assert StarGANv2().options_in(shapes) == given
    without = {name: own for name, own in shapes.items() if name[0] in "GE" and "_" not in name}
    told = ("size", "width", "channels", "style", "most", "classes")
    assert StarGANv2().options_in(without) == {name: given[name] for name in told}


def test_what_is_none_of_its_networks_is_told_by_a_tensor():
    shapes = shapes_of(StarGANv2Options(**SMALL, classes=3))
    for changed, said in (
        ({}, "'G' has no first.weight and decode.0.norm1.fc.weight"),
        ({**shapes, "G.encode.0.conv1.bias": (5,)}, r"conv1.bias has the shape \[5\], where \[4\]"),
        (
            {**shapes, "F.last.bias": (4, 6)},
            r"'F': last.bias has the shape \[4, 6\], where \[3, 6\]",
        ),
        ({**shapes, "G.first.weight": (0, 3, 3, 3)}, "none of StarGAN v2's: width is 0"),
    ):
        with pytest.raises(MismatchError, match=said):
            StarGANv2().options_in(changed)


def test_what_makes_a_style_is_called_as_its_translator_says(data: Path):
    own, b = begun(data)
    translator = StarGANv2().translators(own.options)["G"]
    style = translator.style
    assert (style.size, style.noise, style.classes, translator.classes) == (6, 5, 3, 3)
    for name, seen in ((style.of_noise, b.z), (style.of_pictures, b.r)):
        assert own.networks[name](seen, b.c_r).shape == (3, style.size)


def test_groups_divide_the_generator():
    options = StarGANv2Options(**SMALL, classes=3)
    groups = StarGANv2().groups(options)
    for name in shapes_of(options):
        if name.startswith("G."):
            halves = [half for half in ("encoder", "decoder")
                      if any(fnmatchcase(name, pattern) for pattern in groups[half])]  # fmt: skip
            assert len(halves) == 1, name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": ("oak",)}, "one class: there is none to translate into"),
        ({"size": 48}, "size is 48, but must be a power of two"),
        ({"size": 8}, "size is 8, but must be at least 16"),
        ({"steps": 100_000, "epochs": 3}, "epochs is 3, but steps, 100000, go before it: with"),
        ({"parts": 1.5}, "parts is 1.5, but must be at most 1"),
        ({"ema": 1.0}, "ema is 1.0, but must be less than 1"),
    ],
)
def test_options_that_fit_nothing_are_told(data: Path, options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        StarGANv2Options(data=data, **{**TINY, **options})


# --- official files ----------------------------------------------------------------------------


class Residual(nn.Module):
    """The official blocks by their names; what a style gives is `fc`'s."""

    def __init__(self, ins: int, outs: int, *, norms: bool, side: float, style: int = 0) -> None:
        super().__init__()
        middle = outs if style else ins
        self.conv1, self.conv2 = nn.Conv2d(ins, middle, 3, 1, 1), nn.Conv2d(middle, outs, 3, 1, 1)
        if style:
            self.norm1, self.norm2 = (nn.ModuleDict({"fc": nn.Linear(style, 2 * n)})
                                      for n in (ins, outs))  # fmt: skip
        elif norms:
            self.norm1, self.norm2 = (nn.InstanceNorm2d(ins, affine=True) for _ in range(2))
        if ins != outs:
            self.conv1x1 = nn.Conv2d(ins, outs, 1, bias=False)
        self.side = side

    def normed(self, name: str, maps: torch.Tensor, style: torch.Tensor | None) -> torch.Tensor:
        own = getattr(self, name, None)
        if isinstance(own, nn.ModuleDict):
            gamma, beta = own["fc"](style)[:, :, None, None].chunk(2, 1)
            maps = (1 + gamma) * F.instance_norm(maps) + beta
        elif own is not None:
            maps = own(maps)
        return F.leaky_relu(maps, 0.2)

    def forward(self, maps: torch.Tensor, style: torch.Tensor | None = None) -> torch.Tensor:
        def resized(x: torch.Tensor) -> torch.Tensor:
            if self.side == 1:
                return x
            return F.avg_pool2d(x, 2) if self.side < 1 else F.interpolate(x, scale_factor=2)

        beside = getattr(self, "conv1x1", nn.Identity())
        made = self.normed("norm1", maps, style)
        made = resized(self.conv1(made)) if self.side <= 1 else self.conv1(resized(made))
        made = self.conv2(self.normed("norm2", made, style))
        return (made + resized(beside(maps))) / 2**0.5


class OfficialGenerator(nn.Module):
    def __init__(self, width: int, style: int, downs: int) -> None:
        super().__init__()
        wide = [width << n for n in range(downs + 1)]
        pairs = list(pairwise(wide))
        self.from_rgb = nn.Conv2d(3, width, 3, 1, 1)
        self.encode = nn.ModuleList(
            [Residual(i, o, norms=True, side=0.5) for i, o in pairs]
            + [Residual(wide[-1], wide[-1], norms=True, side=1) for _ in range(2)]
        )
        self.decode = nn.ModuleList(
            [Residual(wide[-1], wide[-1], norms=True, side=1, style=style) for _ in range(2)]
            + [Residual(o, i, norms=True, side=2, style=style) for i, o in reversed(pairs)]
        )
        self.to_rgb = nn.Sequential(
            nn.InstanceNorm2d(width, affine=True), nn.LeakyReLU(0.2), nn.Conv2d(width, 3, 1)
        )

    def forward(self, maps: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        maps = self.from_rgb(maps)
        for block in self.encode:
            maps = block(maps)
        for block in self.decode:
            maps = block(maps, style)
        return self.to_rgb(maps)


def official_trunk(width: int, most: int, downs: int) -> list[nn.Module]:
    wide = [min(width << n, most) for n in range(downs + 1)]
    blocks = [Residual(i, o, norms=False, side=0.5) for i, o in pairwise(wide)]
    last = nn.Conv2d(wide[-1], wide[-1], 4)
    return [nn.Conv2d(3, width, 3, 1, 1), *blocks, nn.LeakyReLU(0.2), last, nn.LeakyReLU(0.2)]


def official(*, classes: int = 3, downs: int = 1, seed: int = 0) -> dict[str, nn.Module]:
    """The official networks, for pictures of 32 pixels."""
    torch.manual_seed(seed)

    def layers(first: int, last: int) -> nn.Sequential:
        sizes = [first, 8, 8, 8, last]
        made = [own for i, o in pairwise(sizes)
                for own in (nn.Linear(i, o), nn.ReLU())]  # fmt: skip
        return nn.Sequential(*made)

    mapping, encoder, judge = nn.Module(), nn.Module(), nn.Module()
    mapping.shared = layers(5, 8)
    mapping.unshared = nn.ModuleList([layers(8, 6)[:-1] for _ in range(classes)])
    encoder.shared = nn.Sequential(*official_trunk(4, 16, 3))
    encoder.unshared = nn.ModuleList([nn.Linear(16, 6) for _ in range(classes)])
    judge.main = nn.Sequential(*official_trunk(4, 16, 3), nn.Conv2d(16, classes, 1))
    return {"generator": OfficialGenerator(4, 6, downs), "mapping_network": mapping,
            "style_encoder": encoder, "discriminator": judge}  # fmt: skip


def saved(folder: Path, networks: dict[str, nn.Module], step: int = 100000, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    states = {name: own.state_dict() for name, own in networks.items()} | more
    ema = {name: own for name, own in states.items() if name != "discriminator"}
    torch.save(ema, folder / f"{step:06d}_nets_ema.ckpt")
    if "discriminator" in states:
        torch.save(states, folder / f"{step:06d}_nets.ckpt")
    return folder


def test_an_official_folder_computes_what_the_official_networks_do(tmp_path: Path):
    networks = official()
    folder, output = saved(tmp_path / "afhq", networks), tmp_path / "out.safetensors"
    done = CliRunner().invoke(i2i, ["import", "starganv2", str(folder), str(output)])
    assert done.exit_code == 0, done.output
    assert "CC BY-NC 4.0: not for commercial use" in done.output
    assert [line.partition(":")[0] for line in done.output.splitlines()[-4:]] == list("GFED")
    opened = modelsoup.open_checkpoint(output)
    trainer = StarGANv2()
    given = trainer.options_in({n: i.shape for n, i in opened.tensors.items()})
    assert given == {"size": 32, "width": 4, "channels": 3, "style": 6, "most": 16, "hidden": 8,
                     "noise": 5, "classes": 3}  # fmt: skip
    made = {name: own.build() for name, own in trainer.networks(StarGANv2Options(**given)).items()}
    for name, own in made.items():
        own.load_state_dict({
            n.partition(".")[2]: torch.from_numpy(np.array(opened[n]))
            for n in opened.tensors if n.startswith(f"{name}.")
        })  # fmt: skip
    images, noise, style = torch.randn(3, 3, 32, 32), torch.randn(3, 5), torch.randn(3, 6)
    classes = torch.tensor([2, 0, 1])
    shared = networks["mapping_network"].shared(noise)
    seen = networks["style_encoder"].shared(images).flatten(1)
    verdicts = networks["discriminator"].main(images).flatten(1)
    for n, label in enumerate(classes.tolist()):
        mapped = networks["mapping_network"].unshared[label](shared[n])
        encoded = networks["style_encoder"].unshared[label](seen[n])
        torch.testing.assert_close(made["F"](noise, classes)[n], mapped, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made["E"](images, classes)[n], encoded, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            made["D"](images, classes)[n], verdicts[n, label], atol=1e-5, rtol=1e-4
        )
    torch.testing.assert_close(
        made["G"](images, style), networks["generator"](images, style), atol=1e-4, rtol=1e-4
    )


def test_the_averages_are_read_and_a_missing_discriminator_is_told(tmp_path: Path):
    early, late = official(), official(seed=1)
    folder = saved(tmp_path / "afhq", early, 20000)
    del late["discriminator"]
    saved(folder, late, 100000)
    output, said = tmp_path / "out.safetensors", []
    assert list(import_starganv2(folder, output, say=said.append)) == ["G", "F", "E"]
    assert "step 100000, the last of 2" in said[0]
    assert any("has no 100000_nets.ckpt: a training that starts" in line for line in said)
    taken = modelsoup.open_checkpoint(output)["G.first.weight"]
    assert np.array_equal(taken, late["generator"].from_rgb.weight.detach().numpy())
    assert list(import_starganv2(folder, output, step=20000, force=True, say=said.append)) == list(
        "GFED"
    )


@pytest.mark.parametrize("kind", ["more halvings", "landmarks"])
def test_the_variant_for_faces_is_refused_by_name(kind: str, tmp_path: Path):
    more = {"fan": {"conv1.weight": torch.zeros(2, 2)}} if kind == "landmarks" else {}
    folder = saved(tmp_path / "celeba", official(downs=1 if more else 2), **more)
    with pytest.raises(MismatchError, match=r"100000_nets_ema\.ckpt: it is the variant for faces"):
        import_starganv2(folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_are_no_networks_of_one_stargan_v2_is_told(tmp_path: Path):
    output = tmp_path / "out.safetensors"
    networks, other = official(), official(classes=2)
    folder = saved(tmp_path / "one", {**networks, "style_encoder": other["style_encoder"]})
    with pytest.raises(MismatchError, match=r"the style_encoder lacks unshared\.2\.weight"):
        import_starganv2(folder, output)
    folder = saved(tmp_path / "two", {**networks, "mapping_network": other["mapping_network"]})
    with pytest.raises(MismatchError, match=r"style_encoder has unshared\.2\.bias, unshared"):
        import_starganv2(folder, output)
    folder = saved(tmp_path / "three", {**networks, "discriminator": other["discriminator"]})
    with pytest.raises(
        MismatchError, match=r"discriminator does not fit the others: main\.7\.weight"
    ):
        import_starganv2(folder, output)
    del networks["mapping_network"]
    with pytest.raises(modelsoup.CheckpointError, match="has no mapping_network, a network of"):
        import_starganv2(saved(tmp_path / "four", networks), output)
    assert not output.exists()
