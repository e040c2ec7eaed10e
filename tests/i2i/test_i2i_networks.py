"""Networks: the official names and counts, sizes, initial values, and what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.networks import (
    PatchDiscriminator,
    ResnetGenerator,
    at_any_size,
    load_generator,
)
from modelsoup_i2i.shapes import (
    DiscriminatorShape,
    GeneratorShape,
    discriminator_shape_of,
    discriminator_tensors,
    generator_shape_of,
    generator_tensors,
    layer_groups,
    model_tensors,
    must_fit,
)
from safetensors.numpy import save_file

import modelsoup

# Names and shapes of the official code's networks, read off instances of them.
OFFICIAL = {
    network: {name: tuple(shape) for name, shape in tensors.items()}
    for network, tensors in json.loads(
        (Path(__file__).parent / "data" / "official_names.json").read_text()
    ).items()
}
SMALL = GeneratorShape(width=4, blocks=2)


def shapes(network) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("blocks", "key", "count"), [(9, "G9", 11_378_179), (6, "G6", 7_837_699)])
def test_the_generator_has_the_official_names_and_count(blocks: int, key: str, count: int):
    network = ResnetGenerator(GeneratorShape(64, blocks))
    assert shapes(network) == OFFICIAL[key] == generator_tensors(network.shape)
    assert list(network.state_dict()) == list(generator_tensors(network.shape))
    assert sum(p.numel() for p in network.parameters()) == count


def test_the_discriminator_has_the_official_names_and_count():
    network = PatchDiscriminator()
    assert shapes(network) == OFFICIAL["D"] == discriminator_tensors(network.shape)
    assert sum(p.numel() for p in network.parameters()) == 2_764_737


def test_a_checkpoint_of_four_networks_has_28_million_parameters():
    tensors = model_tensors(GeneratorShape(), DiscriminatorShape())
    assert sum(int(np.prod(shape)) for _, shape in tensors.values()) == 28_285_832


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("depth", [1, 2, 4, 5])
def test_any_width_and_depth_has_the_names_that_are_told(width: int, depth: int):
    generator = GeneratorShape(width, depth, channels=1)
    discriminator = DiscriminatorShape(width, depth, channels=1)
    assert shapes(ResnetGenerator(generator)) == generator_tensors(generator)
    assert shapes(PatchDiscriminator(discriminator)) == discriminator_tensors(discriminator)
    assert generator_shape_of(generator_tensors(generator), "") == generator
    assert discriminator_shape_of(discriminator_tensors(discriminator), "") == discriminator


@pytest.mark.parametrize(("size", "side"), [(256, 30), (128, 14), (64, 6)])
def test_the_map_of_verdicts_has_the_official_size(size: int, side: int):
    network = PatchDiscriminator(DiscriminatorShape(width=2))
    with torch.no_grad():
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 1, side, side)
    assert network.shape.output_size(size) == side


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_that_is_judged_is_the_one_told(layers: int):
    shape = DiscriminatorShape(2, layers)
    smallest = next(size for size in range(1, 200) if shape.output_size(size) >= 1)
    network = PatchDiscriminator(shape)
    side = network(torch.randn(1, 3, smallest, smallest)).shape[-1]
    assert side == shape.output_size(smallest)
    with pytest.raises((RuntimeError, ValueError)):
        network(torch.randn(1, 3, smallest - 1, smallest - 1))


def test_a_translation_has_the_size_of_its_image():
    network = ResnetGenerator(SMALL)
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
    for name, tensor in ResnetGenerator(GeneratorShape(16, 2)).state_dict().items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif tensor.numel() > 1000:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(tensor.mean().item()) < 0.003, name


def test_groups_cover_what_they_are_called():
    generator, discriminator = GeneratorShape(), DiscriminatorShape()
    names = list(model_tensors(generator, discriminator))
    groups = layer_groups(generator, discriminator)

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
    groups = layer_groups(SMALL, DiscriminatorShape(4, layers))
    assert groups["discriminator-low"] and groups["discriminator-high"]
    assert not set(groups["discriminator-low"]) & set(groups["discriminator-high"])


@pytest.mark.parametrize(
    ("kind", "said"), [("G9_dropout", "has dropout"), ("G9_batch", "has batch normalisation")]
)
def test_other_kinds_of_generator_are_refused(kind: str, said: str):
    with pytest.raises(modelsoup.MismatchError, match=said):
        generator_shape_of(OFFICIAL[kind], "")


def test_an_anti_aliased_generator_is_refused():
    tensors = generator_tensors(SMALL) | {"model.7.filt": (1, 3, 3)}
    with pytest.raises(modelsoup.MismatchError, match="anti-aliasing"):
        generator_shape_of(tensors, "")


def test_a_start_of_another_width_is_named_with_both_shapes():
    other = GeneratorShape(width=8, blocks=2)
    start = {n: s for n, (_, s) in model_tensors(other, DiscriminatorShape(4)).items()}
    said = r"'G_A.model.1.weight' has the shape \[8, 3, 7, 7\].*has the shape \[4, 3, 7, 7\]"
    with pytest.raises(modelsoup.MismatchError, match=said):
        must_fit(start, SMALL, DiscriminatorShape(4), "start.safetensors")


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_start_of_another_block_count_is_named(blocks: int):
    other = GeneratorShape(width=4, blocks=blocks)
    start = {n: s for n, (_, s) in model_tensors(other, DiscriminatorShape(4)).items()}
    with pytest.raises(modelsoup.MismatchError, match=r"tensor 'G_A\.model\.1.*2 blocks"):
        must_fit(start, SMALL, DiscriminatorShape(4), "start.safetensors")


def test_a_part_of_a_model_fits():
    start = {n: s for n, (_, s) in model_tensors(SMALL, DiscriminatorShape(4)).items()}
    part = {n: s for n, s in start.items() if n.startswith("D_") or ".model.4." in n}

    def fits(shapes: dict[str, tuple[int, ...]]) -> bool:
        try:
            must_fit(shapes, SMALL, DiscriminatorShape(4), "start.safetensors")
        except modelsoup.MismatchError:
            return False
        return True

    assert fits(part) and fits({}) and fits(start)
    assert not fits(part | {"G_A.model.4.bias": (9,)})
    assert not fits(part | {"G_C.model.4.bias": (8,)})


def test_a_generator_is_loaded_in_its_direction(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    networks = {"G_A": ResnetGenerator(SMALL), "G_B": ResnetGenerator(SMALL)}
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
