"""U-GAT-IT and NICE-GAN: the official networks, their steps by hand, and their checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from i2i_domains import make_domains
from i2i_states import flat, moved
from modelsoup_i2i.networks import cams
from modelsoup_i2i.networks.cam import ILN, AdaILN, attended
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.turns import Batch
from modelsoup_i2i.use.generators import load_model
from modelsoup_i2i.use.official_cam import import_nice_gan, import_ugatit
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

import modelsoup
from modelsoup.terminal.cli import main

torch.set_num_threads(1)
TINY = {
    "ugatit": {"load_size": 26, "crop_size": 24, "width": 4, "blocks": 1, "d_width": 4,
               "d_layers": 5, "d_layers_local": 4},
    "nice-gan": {"load_size": 52, "crop_size": 48, "width": 4, "blocks": 1, "d_layers": 6},
}  # fmt: skip
BOTH = sorted(TINY)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("light"), count_a=4, count_b=4, size=52)


def session(name: str, data: Path, start: Path | None = None, *, frozen=(), **given) -> Session:
    trainer = modelsoup.get_trainer(name)
    own = {
        "data": data,
        "steps": 3,
        "decay_steps": 0,
        "sheet_every": 0,
        "threads": 0,
        "device": "cpu",
    }
    options = trainer.options(**own | TINY[name] | given)
    return trainer.session(options, start, seed=1, frozen=frozen)


def made(room: str, kind: str, **sizes: int) -> tuple[nn.Module, State]:
    """A network in float64, whose weights are drawn and whose vectors are those of its weights."""
    torch.manual_seed(0)
    network = cams.network(room, kind, **sizes).build().double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.3 * name.endswith("rho"))
    network.eval()
    state = network.state_dict()
    for name in [n for n in state if n.endswith("weight_orig")]:
        matrix = state[name].flatten(1)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        state[name.replace("orig", "u")].copy_(left[:, 0])
        state[name.replace("orig", "v")].copy_(right[0])
    return network, dict(network.named_parameters())


# A plain reading of the papers' figures, of names and weights alone.


def divided(p: State, name: str) -> torch.Tensor:
    weight = p[f"{name}.weight_orig"]
    return weight / torch.linalg.matrix_norm(weight.flatten(1), 2)


def conv(x, weight, pad: int, stride: int = 1, bias=None):
    return F.conv2d(F.pad(x, [pad] * 4, "reflect"), weight, bias, stride)


def plainly_mixed(x, rho, gamma, beta):
    """ρ₀ · IN + ρ₁ · LN, with unbiased variances, by torch's own."""
    by_channel = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
    own = x.var((1, 2, 3), keepdim=True)
    by_all = (x - x.mean((1, 2, 3), keepdim=True)) / (own + 1e-5).sqrt()
    if rho.ndim == 4:
        first, second = rho, 1 - rho
    else:
        first, second = (s[:, :, None, None] for s in rho.softmax(2).unbind(2))
    mixed = first * by_channel + second * by_all
    return mixed * gamma.view(*gamma.shape[:2], 1, 1) + beta.view(*beta.shape[:2], 1, 1)


def iln(x, p: State, name: str):
    return plainly_mixed(x, p[f"{name}.rho"], p[f"{name}.gamma"], p[f"{name}.beta"])


def decoded(x, p: State, blocks: int):
    style = x.mean((2, 3))
    for layer in ("FC.0", "FC.2"):
        style = (style @ p[f"{layer}.weight"].T).relu()
    gamma, beta = style @ p["gamma.weight"].T, style @ p["beta.weight"].T
    for n in range(1, blocks + 1):
        own = f"UpBlock1_{n}."
        y = conv(x, p[f"{own}conv1.weight"], 1)
        y = plainly_mixed(y, p[f"{own}norm1.rho"], gamma, beta).relu()
        y = conv(y, p[f"{own}conv2.weight"], 1)
        x = x + plainly_mixed(y, p[f"{own}norm2.rho"], gamma, beta)
    return x


@pytest.mark.parametrize(("name", "half"), [("ugatit", 500_000), ("nice-gan", 150_000)])
def test_in_the_second_half_of_a_papers_steps_the_rate_falls(name: str, half: int):
    o = modelsoup.get_trainer(name).options()
    assert (o.steps, o.decay_steps) == (half, half)
    assert [o.pace(0, step) for step in (0, half - 1)] == [1, 1]
    assert o.pace(0, half + half // 2 - 1) == pytest.approx(0.5, abs=1e-5)
    assert 0 < o.pace(0, 2 * half - 1) < 1e-5
    # In place of steps, epochs; what is said to that is what does it.
    with pytest.raises(ValueError, match="steps: null and decay_steps: 0 they"):
        type(o)(epochs=3)
    assert type(o)(epochs=3, steps=None, decay_steps=0).pace(2) == 1


def ugatit_generator(x, p: State, blocks: int):
    x = F.instance_norm(conv(x, p["DownBlock.1.weight"], 3)).relu()
    for place in (5, 9):
        x = F.instance_norm(conv(x, p[f"DownBlock.{place}.weight"], 1, 2)).relu()
    for place in range(12, 12 + blocks):
        own = f"DownBlock.{place}.conv_block."
        y = F.instance_norm(conv(x, p[f"{own}1.weight"], 1)).relu()
        x = x + F.instance_norm(conv(y, p[f"{own}5.weight"], 1))
    gap, gmp = p["gap_fc.weight"], p["gmp_fc.weight"]
    logits = torch.cat([x.mean((2, 3)) @ gap.T, x.amax((2, 3)) @ gmp.T], 1)
    x = torch.cat([x * gap[:, :, None, None], x * gmp[:, :, None, None]], 1)
    x = F.conv2d(x, p["conv1x1.weight"], p["conv1x1.bias"]).relu()
    heat = x.sum(1, keepdim=True)
    x = decoded(x, p, blocks)
    for place in (2, 7):
        x = conv(F.interpolate(x, scale_factor=2), p[f"UpBlock2.{place}.weight"], 1)
        x = iln(x, p, f"UpBlock2.{place + 1}").relu()
    return conv(x, p["UpBlock2.11.weight"], 3).tanh(), logits, heat


def ugatit_discriminator(x, p: State, layers: int):
    for n in range(layers - 1):
        own = f"model.{3 * n + 1}"
        stride = 2 if n < layers - 2 else 1
        x = F.leaky_relu(conv(x, divided(p, own), 1, stride, p[f"{own}.bias"]), 0.2)
    gap, gmp = (divided(p, name) for name in ("gap_fc", "gmp_fc"))
    logits = torch.cat([x.mean((2, 3)) @ gap.T, x.amax((2, 3)) @ gmp.T], 1)
    raw = [p[f"{name}.weight_orig"][:, :, None, None] for name in ("gap_fc", "gmp_fc")]
    x = F.conv2d(torch.cat([x * raw[0], x * raw[1]], 1), p["conv1x1.weight"], p["conv1x1.bias"])
    return conv(F.leaky_relu(x, 0.2), divided(p, "conv"), 1), logits


def nice_generator(x, p: State, blocks: int):
    x = conv(x, p["UpBlock0.1.weight"], 1, bias=p["UpBlock0.1.bias"])
    x = decoded(iln(x, p, "UpBlock0.2").relu(), p, blocks)
    for place in (1, 9):
        x = iln(conv(x, p[f"UpBlock2.{place}.weight"], 1), p, f"UpBlock2.{place + 1}").relu()
        own = f"UpBlock2.{place + 3}"
        x = F.pixel_shuffle(F.conv2d(x, p[f"{own}.weight"], p[f"{own}.bias"]), 2)
        x = iln(x, p, f"UpBlock2.{place + 5}").relu()
    return (conv(x, p["UpBlock2.17.weight"], 3).tanh(),)


def nice_discriminator(x, p: State, layers: int):
    def judging(x, name: str, stride: int = 2):
        made = conv(x, divided(p, name), 1, stride, p[f"{name}.bias"])
        return F.leaky_relu(made, 0.2)

    x = judging(judging(x, "model.1"), "model.4")
    both = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
    logits = both @ divided(p, "fc").T
    twice = torch.cat([x, x], 1) * p["fc.weight_orig"][:, :, None, None]
    focused = F.conv2d(twice, p["conv1x1.weight"], p["conv1x1.bias"])
    code = seen = F.leaky_relu(p["lamda"] * focused + x, 0.2)
    for n in range(layers - 6):
        seen = judging(seen, f"Dis0_0.{3 * n + 1}")
    local = conv(judging(seen, "Dis0_1.1", 1), divided(p, "conv0"), 1)
    whole = judging(judging(seen, "Dis1_0.1"), "Dis1_0.4")
    whole = conv(judging(whole, "Dis1_1.1", 1), divided(p, "conv1"), 1)
    return local, whole, logits, code


PLAIN: list[tuple[str, str, dict[str, int], tuple[int, ...], Callable[..., Any]]] = [
    (cams.UGATIT, "Generator", {"width": 2, "blocks": 2}, (2, 3, 16, 12), ugatit_generator),
    (cams.UGATIT, "Discriminator", {"width": 2, "layers": 5}, (2, 3, 24, 32),
     ugatit_discriminator),
    (cams.NICE, "Generator", {"width": 2, "blocks": 2}, (2, 4, 4, 5), nice_generator),
    (cams.NICE, "Discriminator", {"width": 2, "layers": 7}, (2, 3, 96, 96), nice_discriminator),
]  # fmt: skip


@pytest.mark.parametrize(("room", "kind", "sizes", "shape", "plain"), PLAIN)
def test_networks_and_their_gradients_are_those_of_a_plain_reading(room, kind, sizes, shape, plain):
    network, parameters = made(room, kind, **sizes)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    depth = sizes.get("blocks", sizes.get("layers"))
    given = [True] if plain is ugatit_generator else []
    own, by_hand = network(x, *given), plain(x, parameters, depth)
    own = own if isinstance(own, tuple) else (own,)
    assert [one.shape for one in own] == [one.shape for one in by_hand]
    wanted = [x, *parameters.values()]
    seeds = [torch.randn(one.shape, dtype=x.dtype) for one in own]
    results = [
        torch.autograd.grad(outputs, wanted, seeds, materialize_grads=True)
        for outputs in (own, by_hand)
    ]
    for one, other in zip(own, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    for name, one, other in zip(["x", *parameters], *results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=name)
        assert one.abs().max() > 0, name


@pytest.mark.parametrize(
    ("begin", "rho"), [((0.0,), 0.0), ((0.9,), 0.9), ((3.2, 1.0), 0.9002495), ((1.0, 3.2), 0.09975)]
)
def test_norms_begin_with_the_papers_shares(begin, rho: float):
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + 1
    norm, ada = ILN(3, begin).double(), AdaILN(3, begin).double()
    by_instance = plainly_mixed(maps, torch.ones(1, 3, 1, 1), torch.ones(1, 3), torch.zeros(1, 3))
    by_layer = plainly_mixed(maps, torch.zeros(1, 3, 1, 1), torch.ones(1, 3), torch.zeros(1, 3))
    mixed = rho * by_instance + (1 - rho) * by_layer
    torch.testing.assert_close(norm(maps), mixed, rtol=1e-5, atol=1e-6)
    gamma, beta = torch.randn(2, 2, 3, dtype=torch.float64)
    scaled = mixed * gamma[:, :, None, None] + beta[:, :, None, None]
    torch.testing.assert_close(ada(maps, gamma, beta), scaled, rtol=1e-5, atol=1e-6)


def test_maps_of_half_a_precision_are_normed_in_a_whole_one():
    maps = torch.randn(1, 4, 8, 8) + 100  # which bfloat16 has no digits for
    rough = maps.bfloat16()
    torch.testing.assert_close(ILN(4)(rough), ILN(4)(rough.float()))
    assert ILN(4)(rough).dtype == torch.float32


def test_attention_is_a_convolution_of_scaled_maps():
    maps, importance = torch.randn(2, 3, 4, 4), torch.randn(1, 6)
    convolution = nn.Conv2d(6, 5, 1)
    scaled = torch.cat([maps, maps], 1) * importance[:, :, None, None]
    torch.testing.assert_close(attended(maps, importance, convolution), convolution(scaled))


def counted(network: Network) -> int:
    kept = network.buffers()
    return sum(int(np.prod(s)) for name, s in network.shapes().items() if name not in kept)


@pytest.mark.parametrize(
    ("name", "given", "counts"),
    [
        ("ugatit", {}, {"G_A2B": 10_589_888, "D_GA": 53_130_176, "D_LB": 3_290_560}),
        ("ugatit", {"width": 16, "blocks": 2, "d_width": 16},
         {"G_B2A": 370_864, "D_GB": 3_329_264, "D_LA": 208_240}),
        ("ugatit", {"d_width": 16, "d_layers": 6}, {"D_GA": 833_520}),
        ("nice-gan", {}, {"G_A": 8_104_640, "D_B": 46_874_433}),
        ("nice-gan", {"width": 16, "blocks": 2}, {"G_B": 214_192, "D_A": 2_938_833}),
    ],
)  # fmt: skip
def test_networks_have_the_official_counts(name: str, given, counts):
    trainer = modelsoup.get_trainer(name)
    networks = trainer.networks(trainer.options(**given))
    assert {network: counted(networks[network]) for network in counts} == counts


@pytest.mark.parametrize(("name", "total"), [("ugatit", 134_021_248), ("nice-gan", 109_958_146)])
def test_the_command_tells_the_official_count_of_the_whole(name: str, total: int):
    told = CliRunner().invoke(main, ["trainers", name, "--tensors", "--json"])
    assert json.loads(told.stdout)["parameters"] == total


@pytest.mark.parametrize(("room", "kind", "sizes", "shape", "plain"), PLAIN)
def test_names_are_known_without_building_a_network(room, kind, sizes, shape, plain):
    network = cams.network(room, kind, **sizes)
    built = network.build()
    assert list(network.shapes().items()) == [
        (name, tuple(tensor.shape)) for name, tensor in built.state_dict().items()
    ]
    assert network.buffers() == {name for name, _ in built.named_buffers()}


# Steps.


def still(own: Session) -> Callable[[str], nn.Module]:
    """The networks of a session that has begun, whose vectors do not move in a forward pass."""
    own.begin()
    for network in own._module.values():
        network.eval()
    return lambda name: own._module[name]


def squares(verdicts, target: float) -> torch.Tensor:
    return sum(((one - target) ** 2).mean() for one in verdicts)


def drawn(own: Session) -> Batch:
    return Batch(next(own.batches())[0])


def test_ugatits_losses_are_those_of_the_paper(data: Path):
    own = session("ugatit", data)
    network, batch = still(own), drawn(own)
    a, b = batch.a, batch.b
    told = {}
    for way in "ab":
        told |= own.trainer.judge(own, batch, way=way)
    for way in "ab":
        told |= own.trainer.translate(own, batch, way=way)
    for way, forth, back, x, y in (
        ("a", "G_A2B", "G_B2A", a, b), ("b", "G_B2A", "G_A2B", b, a)
    ):  # fmt: skip
        judges = [network(f"D_{scale}{'B' if way == 'a' else 'A'}") for scale in "GL"]
        fake, of_x, _ = network(forth)(x, True)
        same, of_y, _ = network(forth)(y, True)
        judged = sum(squares(d(y), 1) + squares(d(fake), 0) for d in judges)
        cam = F.binary_cross_entropy_with_logits(of_x, torch.ones(1, 2))
        cam = cam + F.binary_cross_entropy_with_logits(of_y, torch.zeros(1, 2))
        by_hand = {
            "judge": judged, "gan": sum(squares(d(fake), 1) for d in judges), "cam": cam,
            "cycle": (network(back)(fake) - x).abs().mean(), "identity": (same - y).abs().mean(),
        }  # fmt: skip
        for name, value in by_hand.items():
            torch.testing.assert_close(told[f"{name}_{way}"], value, rtol=1e-4, atol=1e-6)
    weights = own.weights
    assert [weights[f"{n}_a"] for n in ("gan", "cycle", "identity", "cam")] == [1, 10, 10, 1000]


def test_nice_gans_losses_are_those_of_the_paper(data: Path):
    own = session("nice-gan", data)
    network, batch = still(own), drawn(own)
    a, b = batch.a, batch.b
    told = own.trainer.judge(own, batch)
    for way in "ab":
        told |= own.trainer.translate(own, batch, way=way)
    (code_a, code_b) = (network("D_A")(a)[-1], network("D_B")(b)[-1])
    fakes = {"A": network("G_A")(code_b), "B": network("G_B")(code_a)}
    for way, domain, real in (("a", "A", a), ("b", "B", b)):
        judged = network(f"D_{domain}")
        by_hand = squares(judged(real)[:3], 1) + squares(judged(fakes[domain])[:3], 0)
        torch.testing.assert_close(told[f"judge_{way}"], by_hand, rtol=1e-4, atol=1e-6)
    for way, forth, back, x, y, code in (
        ("a", "B", "A", a, b, code_b), ("b", "A", "B", b, a, code_a)
    ):  # fmt: skip
        *verdicts, again = network(f"D_{forth}")(fakes[forth])
        by_hand = {
            "gan": squares(verdicts, 1),
            "cycle": (network(f"G_{back}")(again) - x).abs().mean(),
            "reconstruction": (network(f"G_{forth}")(code) - y).abs().mean(),
        }
        for name, value in by_hand.items():
            torch.testing.assert_close(told[f"{name}_{way}"], value, rtol=1e-4, atol=1e-6)
    assert [own.weights[f"{n}_b"] for n in ("gan", "cycle", "reconstruction")] == [1, 10, 10]


@pytest.mark.parametrize("name", BOTH)
def test_a_step_moves_every_network(name: str, data: Path):
    own = session(name, data)
    assert moved(own) == set(own.trainer.networks(own.options))


def parameters(own: Session, letter: str) -> State:
    return {
        f"{name}.{key}": value.detach().clone() for name, network in own._module.items()
        if name.startswith(letter) for key, value in network.named_parameters()
    }  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_generators_learn_through_discriminators_and_do_not_move_them(name: str, data: Path):
    own, alone = session(name, data, steps=2), session(name, data, steps=2)
    group = next(own.batches())
    own.optimise(group)
    turn, *_ = alone.trainer.turns(alone.options, 0)
    assert turn.players == ("D",)
    before = parameters(alone, "G")
    alone.begin()
    for updates in alone.updates.values():
        updates.set_pace(1.0)
    with alone._noise():
        alone._take(turn, [Batch(group[0])], [{}])
    judges = parameters(alone, "D")
    assert all(torch.equal(value, judges[n]) for n, value in parameters(own, "D").items())
    assert all(torch.equal(value, before[n]) for n, value in parameters(alone, "G").items())


def test_an_encoder_learns_by_judging_alone(data: Path):
    own = session("nice-gan", data)
    own.begin()
    batch = drawn(own)
    every = list(own._module["D_A"].named_parameters())
    encoder = [(n, p) for n, p in every if not n.startswith(("Dis", "conv0", "conv1."))]
    loss = sum(own.trainer.judge(own, batch).values())
    slopes = torch.autograd.grad(loss, [p for _, p in encoder], retain_graph=True)
    # conv1x1 and the importance are multiplied by λ, which begins with 0.
    still_dead = {"conv1x1.weight", "conv1x1.bias"}
    assert {n for (n, _), s in zip(encoder, slopes, strict=True) if not s.any()} == still_dead
    made = own.trainer.translate(own, batch, way="b")  # its fake is of X, so D_A encodes it again
    cycle = made["cycle_b"]
    nothing = torch.autograd.grad(cycle, [p for _, p in encoder], retain_graph=True,
                                  allow_unused=True)  # fmt: skip
    assert all(slope is None for slope in nothing)
    (slope,) = torch.autograd.grad(cycle, [own._module["G_A"].UpBlock2[17].weight])
    assert slope.any()  # of the generator before that encoder


@pytest.mark.parametrize("accumulate", [1, 2])
def test_shares_of_norms_stay_shares(accumulate: int, data: Path):
    """With one batch in a step each is put back within the backward pass, with two after it."""
    own = session("ugatit", data, lr=0.3, accumulate=accumulate)
    steps = own.batches()
    for _ in range(2):
        own.optimise(next(steps))
    rho = torch.cat([v.flatten() for n, v in flat(own).items() if n.endswith(".rho")])
    assert rho.min() == 0 and rho.max() == 1
    others = torch.cat([v.flatten() for n, v in flat(own).items() if n.endswith(".beta")])
    assert others.min() < 0


def test_shares_that_are_a_softmax_are_free(data: Path):
    own = session("nice-gan", data, lr=0.3)
    own.optimise(next(own.batches()))
    assert flat(own)["G_A.UpBlock0.2.rho"].max() > 3


@pytest.mark.parametrize("name", BOTH)
def test_merges_are_told_to_leave_out_vectors_which_a_training_finds_anew(
    name: str, data: Path, tmp_path: Path
):
    own = session(name, data)
    own.save(tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    patterns = own.trainer.estimates(own.options)
    left = {n for n in tensors if any(fnmatchcase(n, pattern) for pattern in patterns)}
    assert left == {n for n in tensors if n.endswith(("weight_u", "weight_v"))} != set()
    kept = {n: value for n, value in tensors.items() if n not in left}
    save_file(kept, tmp_path / "part.safetensors")
    begun = session(name, data, tmp_path / "part.safetensors")
    assert set(begun.missing) == left
    vector = next(n for n in left if n.endswith("weight_u"))
    matrix = tensors[vector.replace("weight_u", "weight_orig")]
    matrix = matrix.reshape(len(matrix), -1)
    assert np.linalg.norm(flat(begun)[vector].numpy() @ matrix) == pytest.approx(
        np.linalg.norm(matrix, 2), rel=0.05
    )


def test_a_discriminators_vectors_move_with_each_pass_and_not_in_use():
    torch.manual_seed(0)
    network = cams.network(cams.UGATIT, "Discriminator", width=4, layers=4).build()
    plain = nn.utils.spectral_norm(nn.Conv2d(3, 4, 4, stride=2))
    own = {name.removeprefix("model.1."): v for name, v in network.state_dict().items()
           if name.startswith("model.1.")}  # fmt: skip
    plain.load_state_dict(copy.deepcopy(own))
    images = torch.randn(1, 3, 16, 16)
    network(images)
    plain(images)
    torch.testing.assert_close(network.model[1].weight_u, plain.weight_u)
    before = network.model[1].weight_u.clone()
    network.eval()
    network(images)
    assert torch.equal(network.model[1].weight_u, before)


@pytest.mark.parametrize("name", BOTH)
def test_what_is_used_is_what_was_trained(name: str, data: Path, tmp_path: Path):
    own = session(name, data)
    own.optimise(next(own.batches()))
    own.save(tmp_path / "model.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (52, 48, 3), np.uint8)
    for n, direction in enumerate(("x2y", "y2x")):
        stored = load_model(tmp_path / "model.safetensors", direction)
        assert stored.name == own.deployed[n]
        (first,), (second,) = (m.made([picture]) for m in (stored, own.in_use(own.deployed[n])))
        assert np.abs(first.astype(int) - second).max() <= 1


def test_an_encoder_in_use_is_divided_but_where_its_weight_itself_is_wanted(
    data: Path, tmp_path: Path
):
    own = session("nice-gan", data)
    own._module["D_A"].lamda.data.fill_(0.7)
    own.optimise(next(own.batches()))
    own.save(tmp_path / "model.safetensors")
    stored = load_model(tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        wanted = own._module["G_B"].eval()(own._module["D_A"].eval()(images)[-1])
        torch.testing.assert_close(stored.module(images), wanted, rtol=1e-4, atol=1e-5)
    names = set(stored.module.encoder.state_dict())
    assert "model.1.weight" in names and "fc.weight_orig" in names
    assert [name for name in names if name.endswith("weight_u")] == ["fc.weight_u"]


def test_a_merged_encoder_is_divided_by_the_values_that_it_has(data: Path, tmp_path: Path):
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for n, file in enumerate(files):
        own = session("nice-gan", data, init=n)
        own.optimise(next(own.batches()))
        own.save(file)
    modelsoup.merge(files, tmp_path / "merged.safetensors")
    encoder = load_model(tmp_path / "merged.safetensors").module.encoder
    for layer in (encoder.model[1], encoder.model[4]):
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert largest.item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", BOTH)
def test_pictures_of_any_size_are_trained_on(name: str, data: Path):
    own = session(name, data, crop_size=[50, 51], load_size=52)
    losses = own.optimise(next(own.batches()))
    assert all(np.isfinite(value) for value in losses.values())


# Bad input.


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("ugatit", {"crop_size": 64, "load_size": 71},
         "images of 64 × 64 are too small for discriminators of 7 layers, which see 96 × 96 and "
         "more (d_layers 6 sees such)"),
        ("ugatit", {"crop_size": 16, "load_size": 18, "d_layers": 4},
         "images of 16 × 16 are too small for discriminators of 5 layers, which see 24 × 24 and "
         "more (d_layers_local 4 sees such)"),
        ("ugatit", {"d_layers": 2}, "d_layers is 2, but must be at least 3"),
        ("nice-gan", {"crop_size": [96, 64], "load_size": 286},
         "images of 96 × 64 are too small for discriminators of 7 layers, which see 96 × 96 and "
         "more (d_layers 6 sees such)"),
        ("nice-gan", {"crop_size": 32},
         "images of 32 × 32 are too small for discriminators of 7 layers, which see 96 × 96 and "
         "more (d_layers 6, the fewest, sees 48 × 48)"),
        ("nice-gan", {"d_layers": 5}, "d_layers is 5, but must be at least 6"),
    ],
)  # fmt: skip
def test_what_discriminators_cannot_judge_is_refused(name: str, given, said: str):
    with pytest.raises(ValueError, match=r"must be at least|too small") as refused:
        modelsoup.get_trainer(name).options(**given)
    assert str(refused.value) == said


@pytest.mark.parametrize("name", BOTH)
def test_a_picture_that_is_met_and_too_small_is_told(name: str, tmp_path: Path):
    small = make_domains(tmp_path, count_a=2, count_b=2, size=20)
    own = session(name, small, mode="none")
    with pytest.raises(modelsoup.ParameterError, match=r"images of 20 × 20 are too small"):
        own.optimise(next(own.batches()))


# Checkpoints.


@pytest.mark.parametrize("name", BOTH)
def test_options_are_found_in_a_checkpoint(name: str):
    trainer = modelsoup.get_trainer(name)
    given = {"width": 5, "blocks": 2, "d_layers": 6, "channels": 1}
    if name == "ugatit":
        given |= {"d_width": 3, "d_layers": 4, "d_layers_local": 6}
    shapes = {n: s for n, (_, s) in trainer.tensors(trainer.options(**given)).items()}
    assert trainer.options_in(shapes) == given


OFFICIAL = {
    "ugatit": {"genA2B": "G_A2B", "genB2A": "G_B2A", "disGA": "D_GA", "disGB": "D_GB",
               "disLA": "D_LA", "disLB": "D_LB"},
    "nice-gan": {"gen2A": "G_A", "gen2B": "G_B", "disA": "D_A", "disB": "D_B"},
}  # fmt: skip


def official(name: str, **given: int) -> dict[str, State]:
    """What the official code would save of networks of such sizes, drawn."""
    trainer = modelsoup.get_trainer(name)
    small = {"d_width": 2} if name == "ugatit" else {}
    own = trainer.networks(trainer.options(**{"width": 4, "blocks": 1, **small, **given}))
    torch.manual_seed(0)
    return {key: {n: torch.randn(shape) for n, shape in own[network].shapes().items()}
            for key, network in OFFICIAL[name].items()}  # fmt: skip


def saved(path: Path, networks: dict[str, State]) -> Path:
    one = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.Adam([one])
    one.grad = torch.ones(2)
    optimiser.step()
    torch.save({**networks, "G_optim": optimiser.state_dict(), "start_iter": 7}, path)
    return path


@pytest.mark.parametrize("name", BOTH)
def test_an_official_file_is_imported_and_its_licence_told(name: str, tmp_path: Path):
    networks = official(name)
    file, output = saved(tmp_path / "latest.pt", networks), tmp_path / "model.safetensors"
    told = CliRunner().invoke(main, ["i2i", "import", name, str(file), str(output)])
    assert told.exit_code == 0, told.output
    stored = modelsoup.open_checkpoint(output)
    assert stored.tensors.keys() == {
        f"{OFFICIAL[name][key]}.{n}" for key, own in networks.items() for n in own
    }
    for key, own in networks.items():
        for n, value in own.items():
            assert np.array_equal(stored[f"{OFFICIAL[name][key]}.{n}"], value.numpy())
    assert "The code of that layout is MIT" in told.stderr
    trainer = modelsoup.get_trainer(name)
    network = next(iter(trainer.networks(trainer.options())))
    told_of = counted(trainer.networks(trainer.options(width=4, blocks=1))[network])
    assert f"{network}: {told_of:,} parameters" in told.stdout
    assert load_model(output).how.label == "A to B"


def test_a_file_with_generators_alone_says_what_lacks(tmp_path: Path):
    networks = {k: v for k, v in official("ugatit").items() if k.startswith("gen")}
    file, said = saved(tmp_path / "latest.pt", networks), []
    import_ugatit(file, tmp_path / "model.safetensors", say=said.append)
    assert said[0] == (
        f"{file} has no disGA, disGB, disLA, disLB: a training that starts from this "
        f"makes them anew"
    )


def of_another_width(networks: dict[str, State]) -> None:
    networks["genB2A"] = official("ugatit", width=5)["genB2A"]


def of_the_full_version(networks: dict[str, State]) -> None:
    networks["genA2B"]["FC.0.weight"] = torch.ones(16, 4096)


def without_generators(networks: dict[str, State]) -> None:
    for key in ("genA2B", "genB2A"):
        del networks[key]


def of_nice_gan(networks: dict[str, State]) -> None:
    networks.clear()
    networks.update(official("nice-gan"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_width, "the networks do not belong to one model: G_A2B has the width 4, and "
                           "G_B2A 5"),
        (of_the_full_version, "the generator 'G_A2B' is of the full version, whose FC.0.weight "
                              "[16, 4096] sees maps of one size, where the light one's is "
                              "expected, [16, 16]"),
        (without_generators, "has no generator, genA2B or genB2A"),
        (of_nice_gan, "has no generator, genA2B or genB2A; `soup i2i import nice-gan` reads it"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_ugatits_is_told(change, said: str, tmp_path: Path):
    networks = official("ugatit")
    change(networks)
    file = saved(tmp_path / "latest.pt", networks)
    with pytest.raises(modelsoup.SoupError) as refused:
        import_ugatit(file, tmp_path / "model.safetensors")
    assert str(refused.value).startswith(str(file)) and str(refused.value).endswith(said)
    assert not (tmp_path / "model.safetensors").exists()


def test_generators_as_wide_as_no_encoder_are_told(tmp_path: Path):
    networks = official("nice-gan")
    networks |= {k: v for k, v in official("nice-gan", width=6).items() if k.startswith("gen")}
    file = saved(tmp_path / "latest.pt", networks)
    with pytest.raises(modelsoup.MismatchError, match="G_A has the width 6, and D_A 4"):
        import_nice_gan(file, tmp_path / "model.safetensors")


def test_a_training_starts_from_what_was_imported(data: Path, tmp_path: Path):
    given = {k: v for k, v in TINY["ugatit"].items() if "_size" not in k}
    file = saved(tmp_path / "latest.pt", official("ugatit", **given))
    import_ugatit(file, tmp_path / "start.safetensors", say=str)
    own = session("ugatit", data, tmp_path / "start.safetensors")
    assert own.missing == ()
    stored = modelsoup.open_checkpoint(tmp_path / "start.safetensors")
    assert all(np.array_equal(stored[n], value.numpy()) for n, value in flat(own).items())
