"""CUT and FastCUT: networks, counts, losses, draws, what is refused, and official checkpoints."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from i2i_domains import make_domains
from modelsoup_i2i.networks import antialiaseds as known
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.pictures.draws import Places, Spot
from modelsoup_i2i.trainers.cut import CUT, CUTOptions, FastCUT, FastCUTOptions
from modelsoup_i2i.training.losses import patch_nce
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.use.generators import load_generator
from modelsoup_i2i.use.official_cyclegan import import_folder
from torch.nn import functional as F

import modelsoup
from modelsoup.terminal.cli import main

ROOT = Path(__file__).parents[2]
SMALL = {"width": 4, "blocks": 5, "d_width": 4, "d_layers": 1, "f_width": 8, "patches": 20}
OWN = SMALL | {"load_size": 18, "crop_size": 16, "sheet_every": 0, "device": "cpu", "threads": 0}

torch.set_num_threads(1)


def load_reference():
    path = ROOT / "benchmarks" / "cut_reference.py"
    spec = importlib.util.spec_from_file_location("cut_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cut_reference"] = module
    spec.loader.exec_module(module)
    return module


reference = load_reference()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))


def begun(data: Path, trainer=None, **options) -> Session:
    trainer = trainer or CUT()
    return trainer.session(trainer.options(data=data, **(OWN | options)), None, seed=1)


# Networks.


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (11_378_179, 2_764_737, 560_384)),
        ({"width": 64, "blocks": 6}, (7_837_699, 2_764_737, 560_384)),
        ({"width": 16, "blocks": 6, "d_width": 16, "f_width": 64}, (494_083, 175_089, 35_648)),
    ],
)
def test_there_are_as_many_parameters_as_in_the_official_networks(sizes, expected):
    networks = CUT().networks(CUTOptions(**sizes))
    counted = []
    for name in "GDF":
        buffers = networks[name].buffers()
        shapes = networks[name].shapes().items()
        counted.append(sum(math.prod(shape) for n, shape in shapes if n not in buffers))
    assert tuple(counted) == expected


@pytest.mark.parametrize("sizes", [{}, SMALL, {"blocks": 6, "d_layers": 2}])
def test_the_plain_networks_have_the_names_and_shapes_of_ours(sizes):
    o = CUTOptions(**{n: value for n, value in sizes.items() if n != "patches"})
    with torch.device("meta"):
        sizes = (o.width, o.blocks, o.d_width, o.d_layers, o.f_width)
        theirs = reference.Original(*sizes, device="meta")
    for name, network in CUT().networks(o).items():
        plain = {n: tuple(v.shape) for n, v in theirs.networks()[name].state_dict().items()}
        assert plain == network.shapes()


def test_names_are_the_official_ones():
    shapes = {n: told[1] for n, told in CUT().tensors(CUTOptions()).items()}
    for name, shape in {
        "G.model.1.weight": (64, 3, 7, 7), "G.model.7.filt": (128, 1, 3, 3),
        "G.model.8.weight": (256, 128, 3, 3), "G.model.12.conv_block.5.bias": (256,),
        "G.model.21.filt": (256, 1, 4, 4), "G.model.30.bias": (3,),
        "D.model.10.filt": (256, 1, 3, 3), "D.model.14.weight": (1, 512, 4, 4),
        "F.mlp_0.0.weight": (256, 3), "F.mlp_4.2.weight": (256, 256),
    }.items():  # fmt: skip
        assert shapes[name] == shape, name
    assert CUT().buffers(CUTOptions()) == {n for n in shapes if n.endswith(".filt")}


def test_an_image_is_blurred_where_it_is_halved_and_where_it_is_doubled():
    network = Network(known.GENERATOR, {"width": 1, "blocks": 5}).build().double()
    down, up = network.model[7], network.model[17]
    point = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    point[..., 1, 2] = 16
    # Its column is 2: half of it is left there. Its row is 1, a quarter of which is in row 2, and
    # twice as much in row 0: by reflection it is row −1, too.
    expected = torch.tensor([[0.0, 4], [0, 2]], dtype=torch.float64)
    assert torch.equal(down(point)[0, 0], expected)
    images = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    around = F.pad(images, (1, 1, 1, 1), mode="replicate")
    wanted = F.conv_transpose2d(around, up.filt, stride=2, padding=2, groups=4)[..., 1:-1, 1:-1]
    assert up(images).shape == (2, 4, 10, 12)
    torch.testing.assert_close(up(images), wanted)
    assert up.filt.sum() == 4 * 4 and down.filt.sum() == 2  # 1 for each output, of all channels


@pytest.mark.parametrize(("side", "layers"), [(256, 3), (64, 3), (33, 2), (24, 3), (16, 1)])
def test_how_many_verdicts_there_are_is_known_before_a_discriminator_is(side: int, layers: int):
    network = Network(known.DISCRIMINATOR, {"width": 1, "layers": layers}).build()
    made = network(torch.zeros(1, 3, side, side))
    assert made.shape[2:] == (known.verdicts(side, layers),) * 2
    assert known.verdicts(256, 3) == 30 and known.verdicts(16, 3) < 1


@pytest.mark.parametrize("side", [(16, 16), (20, 33), (7, 16)])
def test_the_maps_are_as_large_as_places_are_drawn_in_them(side: tuple[int, int]):
    o = CUTOptions(**SMALL)
    networks = {name: network.build() for name, network in CUT().networks(o).items()}
    tapped = CUT().joined(o)["tapped"].build(networks)
    images = torch.rand(2, 3, *side)
    *maps, made = tapped(images)
    assert made.shape == images.shape
    assert tuple(own.shape[2] * own.shape[3] for own in maps) == known.tapped_sizes(*side)
    assert tuple(own.shape[1] for own in maps) == known.tapped_widths(4, 3)
    for own, again in zip(maps, tapped(images, to_the_end=False), strict=True):
        assert torch.equal(own, again)


def test_what_a_start_lacks_is_xaviers_normal_with_a_gain_of_2_percent(data: Path):
    own = begun(data, width=16)
    state = own.networks["G"].state_dict()
    for name, into, out, kernel in (("model.4", 16, 32, 9), ("model.12.conv_block.1", 64, 64, 9)):
        spread = 0.02 * math.sqrt(2 / (kernel * (into + out)))
        assert state[f"{name}.weight"].std().item() == pytest.approx(spread, rel=0.1)
        assert not state[f"{name}.bias"].any()
    linear = own.networks["F"].state_dict()["mlp_3.0.weight"]
    assert linear.std().item() == pytest.approx(0.02 * math.sqrt(2 / (64 + 8)), rel=0.15)


# Draws and losses.


def test_places_are_drawn_once_in_each_map_and_again_alike():
    draw = Places("p", (5, 1000, 20_000), 64)
    assert draw.counts == [5, 64, 64]
    spot = Spot(3, 1, 7, np.arange(9))
    (own,) = draw.at(None, spot)
    assert own.dtype == np.int64
    for part, size in zip(np.split(own, [5, 69]), draw.maps, strict=True):
        assert len(set(part.tolist())) == len(part) and 0 <= part.min() <= part.max() < size
    assert sorted(own[:5]) == [0, 1, 2, 3, 4]
    assert np.array_equal(own, draw.at(None, spot)[0])
    assert not np.array_equal(own, draw.at(None, Spot(3, 1, 8, np.arange(9)))[0])
    assert not np.array_equal(own, Places("q", draw.maps, 64).at(None, spot)[0])


def test_patch_nce_finds_a_places_own_key_among_those_of_its_image():
    queries = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [1, 0]]])
    keys = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])
    right, wrong = (math.log(1 + math.exp(sign / 0.5)) for sign in (-1, 1))
    expected = torch.tensor([right, (wrong + right) / 2])
    torch.testing.assert_close(patch_nce([queries], [keys], 0.5), expected)
    alike = torch.ones(2, 4, 2)  # a map in which nothing tells places apart
    of_both = patch_nce([queries, alike], [keys, alike], 0.5)
    torch.testing.assert_close(of_both, (expected + math.log(4)) / 2)


def test_the_rate_is_the_official_one():
    cut, fast = CUTOptions(), FastCUTOptions()
    assert [cut.pace(n) for n in (0, 199, 200, 399)] == [1, 1, 1 - 1 / 201, 1 - 200 / 201]
    assert [fast.pace(n) for n in (149, 150, 199)] == [1, 1 - 1 / 51, 1 - 50 / 51]
    assert (cut.epochs + cut.decay_epochs, fast.epochs + fast.decay_epochs) == (400, 200)
    # Steps take the place of both, and need not be told so; other words contradict them.
    assert [CUTOptions(steps=4).pace(9, n) for n in (0, 9)] == [1, 1]
    with pytest.raises(ValueError, match="beside them decay_epochs is 0"):
        CUTOptions(steps=4, decay_epochs=7)


def test_fastcut_is_cut_with_other_options(data: Path):
    weights = CUT().weights(CUTOptions(), {}), FastCUT().weights(FastCUTOptions(), {})
    assert [(own["gan"], own["nce"]) for own in weights] == [(1, 0.5), (1, 10)]
    assert weights[0]["nce_identity"] == 0.5
    drawn = next(begun(data, FastCUT()).batches())[0]
    assert set(drawn) == {"x", "y", "in_x"}
    assert set(next(begun(data).batches())[0]) == {"x", "y", "in_x", "in_y"}


# Beside a plain step.


def beside(data: Path, trainer, **options) -> tuple[Session, object]:
    own = begun(data, trainer, **options)
    theirs = reference.Original(
        4, 5, 4, 1, 8, nce=own.options.lambda_nce, identity=own.options.identity,
        lr=own.options.lr,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, value in own.networks["F"].named_parameters():
        if name.endswith("bias"):  # narrow ones give a vector of length 0, whose slope is NaN there
            torch.nn.init.normal_(value)
    for name in "GDF":
        theirs.networks()[name].load_state_dict(own.networks[name].state_dict())
        own.networks[name].double()
    theirs.networks().double()
    return own, theirs


def drawn_for(own: Session, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    maps = known.tapped_sizes(16, 16)
    made = {n: torch.rand(2, 3, 16, 16).double() * 2 - 1 for n in "xy"}
    for name in ("in_x", "in_y"):
        made[name] = torch.stack([
            torch.cat([torch.randperm(size)[:20] for size in maps]) for _ in range(2)
        ])  # fmt: skip
    return {n: made[n] for draw in own.trainer.draws(own.options) for n in draw.names}


def plain_step(theirs, drawn: dict[str, torch.Tensor], mirror: bool) -> dict[str, torch.Tensor]:
    """The places of a batch are those of its first item."""
    counts = [min(20, size) for size in known.tapped_sizes(16, 16)]
    places = [list(drawn[n][0].split(counts)) for n in ("in_x", "in_y") if n in drawn]
    return theirs.step(drawn["x"], drawn["y"], *places, flip=mirror)


def mirrors(own: Session, step: int) -> bool:
    return own.trainer.turns(own.options, step)[0].losses[0].keywords["mirror"]


def test_fastcut_mirrors_half_of_all_steps_and_cut_none(data: Path):
    fast, cut = begun(data, FastCUT()), begun(data)
    assert 450 < sum(mirrors(fast, step) for step in range(1000)) < 550
    assert not any(mirrors(cut, step) for step in range(50))


@pytest.mark.parametrize("switches", ["", "recompute", "winograd", "channels_last"])
@pytest.mark.parametrize(
    ("trainer", "mirror"), [(CUT(), False), (FastCUT(), False), (FastCUT(), True)]
)
def test_a_step_and_its_gradients_are_the_plain_ones(data: Path, trainer, mirror, switches):
    own, theirs = beside(data, trainer, lr=1e-30, channels_last=switches == "channels_last")
    if switches in ("recompute", "winograd"):
        setattr(own.networks["G"], switches, True)
    caught: dict[str, torch.Tensor] = {}
    for updates in own.updates.values():
        for name, parameter in updates.parameters.items():
            parameter.register_hook(lambda g, name=name: caught.__setitem__(name, g.clone()))
    own.steps = next(n for n in range(99) if mirrors(own, n) == mirror)
    drawn = drawn_for(own, 0)
    made, wanted = own.optimise([drawn]), plain_step(theirs, drawn, mirror)
    assert made["judge"] == pytest.approx(wanted["D"].item(), rel=1e-9)
    assert made["gan"] == pytest.approx(wanted["G_GAN"].item(), rel=1e-9)
    scale = own.options.lambda_nce
    assert made["nce"] == pytest.approx(wanted["NCE"].item() / scale, rel=1e-9)
    if own.options.identity:
        assert made["nce_identity"] == pytest.approx(wanted["NCE_Y"].item(), rel=1e-9)
    named = dict(theirs.networks().named_parameters())
    assert caught.keys() == named.keys()
    for name, parameter in named.items():
        assert torch.allclose(caught[name], parameter.grad, rtol=1e-6, atol=1e-10), name


def test_after_some_steps_the_images_are_the_plain_ones(data: Path):
    own, theirs = beside(data, CUT(), lr=1e-3)
    for seed in range(4):
        drawn = drawn_for(own, seed)
        own.optimise([drawn])
        plain_step(theirs, drawn, mirror=False)
    images = torch.rand(1, 3, 16, 16).double()
    with torch.no_grad():
        assert (own.networks["G"](images) - theirs.G(images)).abs().max() < 1e-6
        assert (own.networks["D"](images) - theirs.D(images)).abs().max() < 1e-6


# What is refused.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "none"}, "mode none leaves images of many sizes, but places are drawn in maps "
                           "of one: use a mode that crops"),
        ({"blocks": 4}, "blocks is 4, but must be at least 5"),
        ({"crop_size": 16, "load_size": 16}, "crop_size 16 is too small for a discriminator of 3 "
                                             "layers (fewer d_layers see smaller images)"),
        ({"patches": 1}, "patches is 1, but must be at least 2"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be positive"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, said: str):
    with pytest.raises(ValueError) as error:
        CUTOptions(**options)
    assert said in str(error.value)


# Official checkpoints.


def weights(network: Network, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = network.build().state_dict()
    return {
        name: value if name.endswith(".filt") else torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }


def official(folder: Path, networks: str = "GDF", **sizes: int) -> dict[str, dict]:
    folder.mkdir()
    told = CUT().networks(CUTOptions(**(SMALL | {"d_layers": 3} | sizes)))
    made = {name: weights(told[name], seed) for seed, name in enumerate(networks)}
    for name, own in made.items():
        torch.save(own, folder / f"latest_net_{name}.pth")
    return made


def test_an_official_folder_becomes_one_file_that_translates_and_goes_on(data, tmp_path: Path):
    made, output = official(tmp_path / "run"), tmp_path / "out.safetensors"
    arguments = ["i2i", "import", "cut", str(tmp_path / "run"), str(output)]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 0, told.output
    read = modelsoup.open_checkpoint(output)
    wanted = {f"{n}.{name}": value for n, own in made.items() for name, value in own.items()}
    assert list(read.tensors) and set(read.tensors) == set(wanted)
    for name, value in wanted.items():
        assert np.array_equal(read[name], value.numpy())
    parameters = sum(v.numel() for n, v in made["G"].items() if not n.endswith("filt"))
    assert told.output.splitlines()[0] == f"G: {parameters:,} parameters"
    found = CUT().options_of(output)
    assert found == {n: SMALL[n] for n in ("width", "blocks", "d_width", "f_width")} | {
        "d_layers": 3, "channels": 3,
    }  # fmt: skip
    network = Network(known.GENERATOR, {"width": 4, "blocks": 5}).build()
    network.load_state_dict(made["G"])
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_generator(output)(image), network.eval()(image))
    o = CUTOptions(data=data, **(OWN | {"d_layers": 3, "load_size": 26, "crop_size": 24}))
    assert CUT().session(o, output, seed=0).missing == ()


def test_a_generator_alone_is_read_and_its_training_makes_the_rest(data: Path, tmp_path: Path):
    official(tmp_path / "run", "G")
    output = tmp_path / "out.safetensors"
    import_folder(tmp_path / "run" / "latest_net_G.pth", output)
    o = CUTOptions(data=data, **OWN)
    missing = CUT().session(o, output, seed=0).missing
    assert {name[:2] for name in missing} == {"D.", "F."}


def test_filters_of_another_kind_are_refused(tmp_path: Path):
    made = official(tmp_path / "run")
    made["D"]["model.2.filt"] = torch.full((4, 1, 3, 3), 1 / 9)
    torch.save(made["D"], tmp_path / "run" / "latest_net_D.pth")
    with pytest.raises(modelsoup.MismatchError, match=r"net_D\.pth: model\.2\.filt is another"):
        import_folder(tmp_path / "run", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_networks_of_two_models_are_refused(tmp_path: Path):
    official(tmp_path / "run")
    other = CUT().networks(CUTOptions(**(SMALL | {"width": 8})))["F"]
    torch.save(weights(other, 0), tmp_path / "run" / "latest_net_F.pth")
    with pytest.raises(modelsoup.MismatchError, match=r"one model: G .* and F .*'of': 8"):
        import_folder(tmp_path / "run", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("network", "change", "said"),
    [
        ("G", {"model.7.filt": None}, "the generator lacks model.7.filt"),
        ("G", {"model.16.conv_block.1.weight": None}, "lacks model.16.conv_block.1.weight"),
        ("D", {"model.3.weight": None}, "the discriminator lacks model."),
        ("F", {"mlp_0.0.weight": None}, "has no mlp_0.0.weight of two dimensions"),
        ("F", {"mlp_5.0.weight": torch.zeros(8, 16)}, "has mlp_5.0.weight [8, 16], which such"),
    ],
)
def test_a_network_that_is_not_whole_is_refused(tmp_path: Path, network, change, said: str):
    own = official(tmp_path / "run")[network]
    changed = {name: value for name, value in (own | change).items() if value is not None}
    torch.save(changed, tmp_path / "run" / f"latest_net_{network}.pth")
    with pytest.raises(modelsoup.MismatchError) as error:
        import_folder(tmp_path / "run", tmp_path / "out.safetensors")
    assert said in str(error.value) and f"latest_net_{network}.pth" in str(error.value)


def test_a_generator_of_few_blocks_has_no_fifth_one_to_compare(tmp_path: Path):
    shapes = Network(known.GENERATOR, {"width": 4, "blocks": 4}).shapes()
    with pytest.raises(modelsoup.MismatchError, match="has 4 residual blocks, of which the fifth"):
        CUT().options_in({f"G.{name}": shape for name, shape in shapes.items()})
