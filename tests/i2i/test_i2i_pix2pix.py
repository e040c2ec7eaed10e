"""pix2pix: the official networks, the paper's step, pairs that are learnt, and what is refused."""

import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from modelsoup_i2i.networks import patches, unets
from modelsoup_i2i.networks.described import Network, parameters
from modelsoup_i2i.networks.patch import discriminator_in
from modelsoup_i2i.networks.unet import UnetGenerator, unet_in

import modelsoup

torch.set_num_threads(1)  # tiny networks have nothing for a second one
ROOT = Path(__file__).parents[2]


def shapes(network) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def unet(width: int = 4, downs: int = 4, channels: int = 3, norm: str = "batch") -> Network:
    return unets.generator(width, downs, channels, norm, dropout=True)


def official(width: int, downs: int, channels: int, norm: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official generator, written out from its description."""
    found: dict[str, tuple[int, ...]] = {}
    wide = [width * min(2**level, 8) for level in range(downs)]

    def add(name: str, shape: tuple[int, ...], outs: int, *, bias: bool = norm == "instance"):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = (outs,)

    def normed(name: str, outs: int):
        if norm == "batch":
            for part in ("weight", "bias", "running_mean", "running_var"):
                found[f"{name}.{part}"] = (outs,)
            found[f"{name}.num_batches_tracked"] = ()

    def level(at: int, name: str):
        outer, inner = (channels if at == 0 else wide[at - 1]), wide[at]
        if at == 0:
            add(f"{name}.0", (inner, outer, 4, 4), inner)
            level(1, f"{name}.1.model")
            add(f"{name}.3", (2 * inner, outer, 4, 4), outer, bias=True)
        elif at == downs - 1:
            add(f"{name}.1", (inner, outer, 4, 4), inner)
            add(f"{name}.3", (inner, outer, 4, 4), outer)
            normed(f"{name}.4", outer)
        else:
            add(f"{name}.1", (inner, outer, 4, 4), inner)
            normed(f"{name}.2", inner)
            level(at + 1, f"{name}.3.model")
            add(f"{name}.5", (2 * inner, outer, 4, 4), outer)
            normed(f"{name}.6", outer)

    level(0, "model.model")
    return found


def test_both_networks_have_the_official_counts():
    generator = UnetGenerator()
    assert sum(p.numel() for p in generator.parameters()) == 54_413_955
    assert shapes(generator) == official(64, 8, 3, "batch")
    judge = patches.discriminator(70, 64, 6, "batch").build()
    assert sum(p.numel() for p in judge.parameters()) == 2_768_705


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("downs", [2, 3, 5, 7])
def test_any_generator_has_the_official_names_in_torch_and_without_it(downs: int, norm: str):
    told = unet(3, downs, 1, norm)
    network = told.build()
    assert shapes(network) == told.shapes() == official(3, downs, 1, norm)
    assert list(network.state_dict()) == list(told.tensors())
    assert {n: t.dtype == torch.int64 for n, t in network.state_dict().items()} == {
        n: dtype == "I64" for n, (dtype, _) in told.tensors().items()
    }
    assert unet_in(told.shapes(), "") == {
        "width": 3, "downs": downs, "channels": 1, "norm": norm
    }  # fmt: skip
    side = 2**downs
    assert network(torch.zeros(1, 1, side, 3 * side)).shape == (1, 1, side, 3 * side)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("seen", patches.LAYERS)
def test_any_discriminator_has_the_official_names_in_torch_and_without_it(seen: int, norm: str):
    told = patches.discriminator(seen, 3, 4, norm)
    network = told.build()
    assert shapes(network) == told.shapes()
    assert list(network.state_dict()) == list(told.tensors())
    assert discriminator_in(told.shapes(), "") == told
    stand = {name for layer in patches.stand(seen, batch_norm=norm == "batch") for name in layer}
    assert stand == {name.rpartition(".")[0] for name in told.tensors()}
    # A bias where no batch norm brings one, and in the first and the last convolution of patches.
    biased = {n for n, s in told.shapes().items() if n.endswith("weight") and len(s) == 4} - {
        n.replace("bias", "weight") for n in told.shapes() if n.endswith("bias")
    }
    convolutions = len(patches.stand(seen, batch_norm=False))
    without = 0 if norm == "instance" else convolutions - (1 if seen == 1 else 2)
    assert len(biased) == without


@pytest.mark.parametrize("seen", patches.LAYERS)
def test_a_verdict_sees_a_patch_of_the_side_that_is_told(seen: int):
    """By the gradient of one verdict: it is 0 outside of the patch."""
    assert patches.patch(patches.LAYERS[seen]) == seen
    network = patches.discriminator(seen, 2, 1, "batch").build().double().eval()
    image = torch.rand(1, 1, 2 * seen + 64, 160, dtype=torch.float64, requires_grad=True)
    verdicts = network(image)
    verdicts[0, 0, verdicts.shape[2] // 2, verdicts.shape[3] // 2].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == seen


def test_halvings_come_from_the_size():
    sizes = {256: 8, 512: 8, 286: 8, 128: 7, 64: 6, 32: 5, 48: 5, 4: 2, 2: 2}
    assert {side: unets.downs_for(side, 600) for side in sizes} == sizes


@pytest.mark.parametrize("downs", [5, 6, 8])
def test_dropout_is_where_the_paper_has_it(downs: int):
    """In the decoder of the blocks that lie between the widest ones: three of them at 256²."""
    for dropout, count in ((True, downs - 5), (False, 0)):
        network = unets.generator(2, downs, 1, "batch", dropout=dropout).build()
        found = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Dropout)]
        assert len(found) == count and all(name.endswith("model.7") for name in found)


def test_initial_weights_are_the_official_ones():
    torch.manual_seed(0)
    for name, tensor in unet(32, 6).build().state_dict().items():
        if tensor.ndim == 4:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("weight") and len(tensor) > 200:
            assert tensor.mean().item() == pytest.approx(1, abs=0.01), name
            assert tensor.std().item() == pytest.approx(0.02, rel=0.3), name
        elif name.endswith("bias"):
            assert not tensor.any()


def test_a_generator_of_other_channels_out_than_in_is_refused():
    told = unet().shapes() | {"model.model.3.weight": (8, 1, 4, 4), "model.model.3.bias": (1,)}
    with pytest.raises(modelsoup.MismatchError, match="images of 1 channels out of such of 3"):
        unet_in(told, "")
    with pytest.raises(modelsoup.MismatchError, match=r"lacks model\.model\.3\.bias"):
        unet_in({n: s for n, s in unet().shapes().items() if n != "model.model.3.bias"}, "")
