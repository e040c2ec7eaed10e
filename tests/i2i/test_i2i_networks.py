"""Networks: the official names and counts, sizes, initial values, and what does not fit."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.networks import patch, resnet
from modelsoup_i2i.networks.described import Network, _read, parameters
from modelsoup_i2i.networks.layers import at_any_size
from modelsoup_i2i.networks.patch import PatchDiscriminator, patch_in
from modelsoup_i2i.networks.patches import verdicts
from modelsoup_i2i.networks.resnet import ResnetGenerator, resnet_in
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.use.generators import load_generator
from safetensors.numpy import save_file

import modelsoup

# Names and shapes of the official code's networks, read off instances of them.
OFFICIAL = {
    network: {name: tuple(shape) for name, shape in tensors.items()}
    for network, tensors in json.loads(
        (Path(__file__).parent / "data" / "official_names.json").read_text()
    ).items()
}
SMALL = {"width": 4, "blocks": 2, "channels": 3}


def generator(**sizes: int) -> Network:
    return Network(resnet.MADE_BY, sizes)


def discriminator(**sizes: int) -> Network:
    return Network(patch.MADE_BY, sizes)


def shapes(network) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("blocks", "key", "count"), [(9, "G9", 11_378_179), (6, "G6", 7_837_699)])
def test_the_generator_has_the_official_names_and_count(blocks: int, key: str, count: int):
    network, told = ResnetGenerator(64, blocks), generator(blocks=blocks)
    assert shapes(network) == OFFICIAL[key] == told.shapes()
    assert list(network.state_dict()) == list(told.tensors())
    assert parameters(told.tensors()) == count
    assert sum(p.numel() for p in network.parameters()) == count


def test_the_discriminator_has_the_official_names_and_count():
    network = PatchDiscriminator()
    assert shapes(network) == OFFICIAL["D"] == discriminator().shapes()
    assert sum(p.numel() for p in network.parameters()) == 2_764_737


def test_a_checkpoint_of_four_networks_has_28_million_parameters():
    tensors = CycleGAN().tensors(CycleGANOptions())
    assert parameters(tensors) == 28_285_832


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("depth", [1, 2, 4, 5])
def test_any_width_and_depth_has_the_names_that_are_told(width: int, depth: int):
    sizes = {"width": width, "blocks": depth, "channels": 1}
    assert shapes(ResnetGenerator(**sizes)) == generator(**sizes).shapes()
    assert resnet_in(generator(**sizes).shapes(), "") == sizes
    sizes = {"width": width, "layers": depth, "channels": 1}
    assert shapes(PatchDiscriminator(**sizes)) == discriminator(**sizes).shapes()
    assert patch_in(discriminator(**sizes).shapes(), "") == sizes


@pytest.mark.parametrize(("size", "side"), [(256, 30), (128, 14), (64, 6)])
def test_the_map_of_verdicts_has_the_official_size(size: int, side: int):
    network = PatchDiscriminator(width=2)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 1, side, side)
    assert verdicts(size, 3) == side


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_that_is_judged_is_the_one_told(layers: int):
    smallest = next(size for size in range(1, 200) if verdicts(size, layers) >= 1)
    network = PatchDiscriminator(2, layers)
    side = network(torch.randn(1, 3, smallest, smallest)).shape[-1]
    assert side == verdicts(smallest, layers)
    with pytest.raises((RuntimeError, ValueError)):
        network(torch.randn(1, 3, smallest - 1, smallest - 1))


def test_a_translation_has_the_size_of_its_image():
    network = ResnetGenerator(**SMALL)
    with torch.no_grad():
        for height, width in ((16, 24), (17, 30), (5, 7), (32, 33)):
            image = torch.rand(1, 3, height, width) * 2 - 1
            made = at_any_size(network, image)
            assert made.shape == image.shape
            assert made.abs().max() <= 1
        image = torch.rand(1, 3, 16, 24)
        assert torch.equal(at_any_size(network, image), network(image))


def test_initial_weights_have_the_official_spread():
    torch.manual_seed(0)
    for name, tensor in ResnetGenerator(16, 2).state_dict().items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif tensor.numel() > 1000:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(tensor.mean().item()) < 0.003, name


def test_groups_cover_what_they_are_called():
    names = list(CycleGAN().tensors(CycleGANOptions()))
    groups = CycleGAN().groups(CycleGANOptions())

    def taken(group: str) -> set[str]:
        from fnmatch import fnmatchcase

        return {n for n in names if any(fnmatchcase(n, p) for p in groups[group])}

    assert taken("generator") | taken("discriminator") == set(names)
    assert taken("x2y") | taken("y2x") == set(names)
    assert not taken("x2y") & taken("y2x")
    assert taken("encoder") | taken("middle") | taken("decoder") == taken("generator")
    assert len(taken("encoder")) + len(taken("middle")) + len(taken("decoder")) == 2 * 48
    stems = {name.rsplit(".", 1)[0] for name in taken("low-level")}
    assert stems == {f"G_{g}.model.{n}" for g in "AB" for n in (1, 4, 7)} | {
        f"D_{g}.model.{n}" for g in "AB" for n in (0, 2, 5)
    }
    high = {name.rsplit(".", 1)[0] for name in taken("discriminator-high")}
    assert high == {f"D_{g}.model.{n}" for g in "AB" for n in (8, 11)}


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_every_group_has_layers_in_any_discriminator(layers: int):
    groups = CycleGAN().groups(CycleGANOptions(width=4, blocks=2, d_layers=layers))
    assert groups["discriminator-low"] and groups["discriminator-high"]
    assert not set(groups["discriminator-low"]) & set(groups["discriminator-high"])


@pytest.mark.parametrize(
    ("kind", "said"), [("G9_dropout", "has dropout"), ("G9_batch", "has batch normalisation")]
)
def test_other_kinds_of_generator_are_refused(kind: str, said: str):
    with pytest.raises(modelsoup.MismatchError, match=said):
        resnet_in(OFFICIAL[kind], "")


def test_an_anti_aliased_generator_is_refused():
    tensors = generator(**SMALL).shapes() | {"model.7.filt": (1, 3, 3)}
    with pytest.raises(modelsoup.MismatchError, match="anti-aliasing"):
        resnet_in(tensors, "")


OF_A_START = CycleGANOptions(width=4, blocks=2, d_width=4)


def start_of(path: Path, **other: int) -> Path:
    """A checkpoint of a training with other options."""
    tensors = CycleGAN().tensors(replace(OF_A_START, **other))
    save_file({name: np.zeros(shape, np.float32) for name, (_, shape) in tensors.items()}, path)
    return path


def test_a_start_of_another_width_is_named_with_both_shapes(tmp_path: Path):
    start = start_of(tmp_path / "start.safetensors", width=8)
    said = (
        r"'G_A.model.1.weight' has the shape \[8, 3, 7, 7\], but with width 4, blocks 2, "
        r"channels 3 it has the shape \[4, 3, 7, 7\] \(the start has width: 8\)$"
    )
    with pytest.raises(modelsoup.MismatchError, match=said):
        CycleGAN().must_start(OF_A_START, start)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_start_of_another_block_count_is_named(blocks: int, tmp_path: Path):
    start = start_of(tmp_path / "start.safetensors", blocks=blocks)
    said = rf"tensor 'G_A\.model\.1.*blocks 2, .*\(the start has blocks: {blocks}\)$"
    with pytest.raises(modelsoup.MismatchError, match=said):
        CycleGAN().must_start(OF_A_START, start)


def test_a_part_of_a_model_fits(tmp_path: Path):
    start = {name: shape for name, (_, shape) in CycleGAN().tensors(OF_A_START).items()}
    part = {n: s for n, s in start.items() if n.startswith("D_") or ".model.4." in n}

    def fits(shapes: dict[str, tuple[int, ...]]) -> bool:
        path = tmp_path / "start.safetensors"
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
        try:
            CycleGAN().must_start(OF_A_START, path)
        except modelsoup.MismatchError:
            return False
        return True

    assert fits(part) and fits({}) and fits(start)
    assert not fits(part | {"G_A.model.4.bias": (9,)})
    assert not fits(part | {"G_C.model.4.bias": (8,)})


def test_a_generator_is_loaded_in_its_direction(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    networks = {"G_A": ResnetGenerator(**SMALL), "G_B": ResnetGenerator(**SMALL)}
    save_file(
        {f"{k}.{n}": t.numpy() for k, net in networks.items() for n, t in net.state_dict().items()},
        path,
    )
    image = torch.rand(1, 3, 16, 16)
    for direction, key in (("x2y", "G_A"), ("y2x", "G_B")):
        loaded = load_generator(path, direction)
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(image), networks[key](image))
    with pytest.raises(modelsoup.ParameterError, match="x2y or y2x"):
        load_generator(path, "a2b")


def test_a_checkpoint_without_that_generator_is_named(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(modelsoup.MismatchError, match=r"model.safetensors.*'G_B'"):
        load_generator(path, "y2x")


OWN = """
import torch
from torch import nn
from torch.nn import functional as F

class Own(nn.Module):
    def __init__(self, width=4, layer="plain"):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, width))
        self.register_buffer("count", torch.zeros(width))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.blocks = nn.ModuleList([nn.Linear(width, 2 * width, bias=False), nn.GELU()])
        self.blocks.append(nn.Embedding(5, width))
        self.named = nn.ModuleDict({"norm": nn.BatchNorm2d(width), "flat": nn.Flatten()})
        self.tail = nn.Sequential(nn.ConvTranspose2d(width, 2, (3, 1), bias=False), nn.Dropout(0.1))
        if layer == "recurrent":
            self.recurrent = nn.GRU(width, width)
        if layer == "divided":
            self.divided = nn.utils.spectral_norm(nn.Conv2d(width, 5, 3))
            self.back = nn.utils.spectral_norm(nn.ConvTranspose2d(width, 5, 3))
            self.rows = nn.Linear(width, width)
            self.rows.rows = nn.Parameter(torch.ones(2, 7))
            nn.utils.spectral_norm(self.rows, "rows")
        if layer == "normed":
            self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))

    def forward(self, images):
        return F.relu(images) * self.scale
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda **sizes: Network("own_network:Own", sizes)
    sys.modules.pop("own_network", None)
    _read.cache_clear()


def test_a_network_of_ones_own_is_described_as_torch_has_it(own):
    told = own(width=6)
    built = told.build().state_dict()
    assert list(built) == list(told.tensors())
    dtypes = {torch.float32: "F32", torch.int64: "I64"}
    assert told.tensors() == {n: (dtypes[t.dtype], tuple(t.shape)) for n, t in built.items()}


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("recurrent", "torch.nn.GRU"),
        ("normed", "torch.nn.utils.parametrizations.spectral_norm"),
    ],
)
def test_a_layer_that_is_not_known_is_told_and_never_left_out(own, layer: str, said: str):
    with pytest.raises(modelsoup.ParameterError, match=f"^{said} is not known to networks/descr"):
        own(layer=layer).tensors()
    assert any(layer in name for name in own(layer=layer).build().state_dict())


def test_torchs_spectral_norm_is_known_of_any_weight(own):
    divided = own(layer="divided")
    assert divided.shapes() == {n: tuple(t.shape) for n, t in divided.build().state_dict().items()}
    assert {"divided.weight_u", "back.weight_v", "rows.rows_u"} <= divided.buffers()


def test_a_file_of_networks_that_is_not_there_is_told():
    with pytest.raises(ModuleNotFoundError, match=r"modelsoup_i2i\.networks\.nowhere"):
        Network("modelsoup_i2i.networks.nowhere:X").tensors()
