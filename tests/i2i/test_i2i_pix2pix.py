"""pix2pix: the official networks, the paper's step, pairs that are learnt, and what is refused."""

import re
import signal
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from i2i_domains import make_domains
from modelsoup_i2i.measuring.evaluation import evaluate_model
from modelsoup_i2i.networks import patches, unets
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.networks.layers import at_any_size
from modelsoup_i2i.networks.patch import discriminator_in
from modelsoup_i2i.networks.unet import UnetGenerator, unet_in
from modelsoup_i2i.pictures.images import read_image, save_png, to_image, to_tensor
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.trainers.pix2pix import Pix2Pix, Pix2PixOptions
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.use.export import export_onnx
from modelsoup_i2i.use.generators import load_generator
from modelsoup_i2i.use.official_cyclegan import import_folder
from modelsoup_i2i.use.translate import translate, translate_arrays
from torch.nn import functional

import modelsoup
from modelsoup.terminal.cli import main

torch.set_num_threads(1)  # tiny networks have nothing for a second one
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = {
    "width": 4, "d_width": 4, "patch": 16, "load_size": 18, "crop_size": 16, "epochs": 2,
    "sheet_every": 0, "threads": 1, "device": "cpu",
}  # fmt: skip
NOISY = {"downs": 6, "load_size": 72, "crop_size": 64, "width": 2}  # has a dropout


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("pairs"), count_a=6, count_b=6)


def options(data: Path | None, **given) -> Pix2PixOptions:
    return Pix2PixOptions(data=data, **(TINY | given))


def session(data: Path, start: Path | None = None, *, frozen=(), **given) -> Session:
    return Pix2Pix().session(options(data, **given), start, seed=0, frozen=frozen)


def images(count: int, size: int = 16, batch: int = 2):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield [torch.rand(batch, 3, size, size, generator=generator) * 2 - 1 for _ in range(2)]


def flat(own: Session) -> dict[str, torch.Tensor]:
    return {
        f"{k}.{n}": t.clone()
        for k, net in own.networks.items()
        for n, t in net.state_dict().items()
    }


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(t), torch.as_tensor(second[n])) for n, t in first.items()
    )


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


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_translation_is_the_papers_u_net(norm: str):
    """Written out for three halvings: each layer of the decoder sees its mirror in the encoder."""
    network = unet(2, 3, 1, norm).build().double()
    image = torch.rand(2, 1, 16, 24, dtype=torch.float64, requires_grad=True)
    own = {f"{n}.": m for n, m in network.named_modules()}
    down_1, down_2, down_3, up_3, up_2, up_1 = (
        (own[f"model.model.{place}."], own.get(f"model.model.{normed}."))
        for place, normed in (
            ("0", "-"), ("1.model.1", "1.model.2"), ("1.model.3.model.1", "-"),
            ("1.model.3.model.3", "1.model.3.model.4"), ("1.model.5", "1.model.6"), ("3", "-"),
        )
    )  # fmt: skip

    def layer(pair, values: torch.Tensor) -> torch.Tensor:
        made = pair[0](values)
        return made if pair[1] is None else pair[1](made)

    def leaky(values: torch.Tensor) -> torch.Tensor:
        return torch.where(values > 0, values, 0.2 * values)

    first = layer(down_1, image)
    second = layer(down_2, leaky(first))
    third = layer(up_3, layer(down_3, leaky(second)).clamp(min=0))
    fourth = layer(up_2, torch.cat([second, third], 1).clamp(min=0))
    wanted = layer(up_1, torch.cat([first, fourth], 1).clamp(min=0)).tanh()
    made = network(image)
    assert torch.allclose(made, wanted, atol=1e-12)
    gradients = [torch.autograd.grad((m**3).sum(), image)[0] for m in (made, wanted)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-15)


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


# The step.


def bce(verdicts: torch.Tensor, wanted: float) -> torch.Tensor:
    target = torch.full_like(verdicts, wanted)
    return functional.binary_cross_entropy_with_logits(verdicts, target)


def plain_step(g, d, optimisers, x, y, gan: str, share: torch.Tensor) -> dict[str, float]:
    """The paper's step, written out: D on real and made pairs, then G."""
    fake = g(x)
    of_real, of_fake = d(torch.cat([x, y], 1)), d(torch.cat([x, fake.detach()], 1))
    told = {}
    if gan == "vanilla":
        objective = (bce(of_real, 1) + bce(of_fake, 0)) / 2
    elif gan == "lsgan":
        objective = ((of_real - 1) ** 2).mean() / 2 + (of_fake**2).mean() / 2
    else:
        objective = of_fake.mean() - of_real.mean()
    told["judge"] = objective.item()
    if gan == "wgan-gp":
        t = share.to(x).view(-1, 1, 1, 1)
        mixed = torch.cat([x, t * y + (1 - t) * fake.detach()], 1).requires_grad_()
        (slope,) = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        told |= {"penalty": penalty.item(), "discriminator": (objective + 10 * penalty).item()}
        objective = objective + 10 * penalty
    optimisers[1].zero_grad()
    objective.backward()
    optimisers[1].step()
    verdicts = d(torch.cat([x, fake], 1))
    adversarial = {
        "vanilla": bce(verdicts, 1), "lsgan": ((verdicts - 1) ** 2).mean(),
        "wgan-gp": -verdicts.mean(),
    }[gan]  # fmt: skip
    l1 = (fake - y).abs().mean()
    optimisers[0].zero_grad()
    (adversarial + 100 * l1).backward()
    optimisers[0].step()
    told |= {"gan": adversarial.item(), "l1": l1.item()}
    return {**told, "generator": told["gan"] + 100 * told["l1"]}


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("gan", ["vanilla", "lsgan", "wgan-gp"])
def test_a_step_is_the_papers(pairs: Path, gan: str, norm: str):
    own = session(pairs, gan=gan, norm=norm)
    told = Pix2Pix().networks(own.options)
    plain = {name: told[name].build() for name in ("G", "D")}
    for name, network in plain.items():
        network.load_state_dict(own.networks[name].state_dict())
        network.double()
        own.networks[name].double()
    optimisers = [
        torch.optim.Adam(plain[name].parameters(), 2e-4, (0.5, 0.999)) for name in ("G", "D")
    ]
    for step, (x, y) in enumerate((x.double(), y.double()) for x, y in images(3)):
        seed = np.random.SeedSequence((0, step, 0)).generate_state(1, np.uint64)[0] >> 1
        share = torch.rand(2, generator=torch.Generator().manual_seed(int(seed)))
        wanted = plain_step(plain["G"], plain["D"], optimisers, x, y, gan, share)
        assert own.step(x, y) == pytest.approx(wanted, rel=1e-6)
    for name, network in plain.items():
        for key, tensor in network.state_dict().items():
            assert torch.allclose(own.networks[name].state_dict()[key], tensor, atol=1e-6), key


def test_the_weights_of_a_plan_are_what_is_minimised(pairs: Path):
    own = session(pairs, lambda_gan=2, lambda_l1=3, gan="wgan-gp", lambda_penalty=4)
    ((x, y),) = images(1)
    made = own.step(x, y)
    assert made["generator"] == pytest.approx(2 * made["gan"] + 3 * made["l1"], rel=1e-5)
    assert made["discriminator"] == pytest.approx(made["judge"] + 4 * made["penalty"], rel=1e-5)


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_the_direction_says_what_is_translated(tmp_path: Path, direction: str):
    for n, kind in enumerate("AB"):
        for part in ("train", "test"):
            for name in "pq":
                (tmp_path / f"{part}{kind}").mkdir(exist_ok=True)
                save_png(np.full((16, 16, 3), 255 * n, np.uint8),
                         tmp_path / f"{part}{kind}" / f"{name}.png")  # fmt: skip
    own = session(tmp_path, direction=direction)
    (drawn,) = next(own.batches())
    assert drawn["x"].unique().tolist() == [-1.0 if direction == "AtoB" else 1.0]
    assert drawn["y"].unique().tolist() == [1.0 if direction == "AtoB" else -1.0]
    sets = own.options.test_sets(own.options.transform())
    assert {path.parent.name for path in sets.inputs} == {f"test{direction[0]}"}
    assert {path.parent.name for path in sets.truth or ()} == {f"test{direction[-1]}"}


# Noise, and going on.


def test_dropout_draws_anew_in_each_step_and_the_same_again(pairs: Path):
    """And the caller's generator is where it was."""
    ((x, y),) = images(1, 64, 1)

    def losses(**given) -> list[float]:
        own = session(pairs, lr=1e-12, **(NOISY | given))
        before = torch.get_rng_state()
        made = [own.step(x, y)["l1"] for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), before)
        return made

    torch.manual_seed(7)
    first = losses()
    torch.manual_seed(8)
    assert losses() == first
    assert len({round(loss, 5) for loss in first}) == 3
    assert len({round(loss, 5) for loss in losses(dropout=False)}) == 1


KILLED = """
import os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from modelsoup_i2i.training import state
from test_i2i_pix2pix import train
whole = state.State.take
def take(self, group):
    if self.steps == 8:
        os.kill(os.getpid(), 9)
    return whole(self, group)
state.State.take = take
train(Path({folder!r}), Path({data!r}), **{options!r})
"""


def train(
    folder: Path, data: Path, figures: dict[str, float] | None = None, **given
) -> list[str]:  # fmt: skip
    """Train in a folder; `out.safetensors` is the result. The lines of the log."""
    lines: list[str] = []
    told = {} if figures is None else figures
    (folder / "work").mkdir(parents=True, exist_ok=True)
    Pix2Pix().train(
        modelsoup.Job(
            None, folder / "out.safetensors", folder / "work", (), 5, options(data, **given),
            lambda _, new: told.update(new), lines.append,
        )
    )  # fmt: skip
    return lines


def result(folder: Path) -> dict[str, np.ndarray]:
    opened = modelsoup.open_checkpoint(folder / "out.safetensors")
    return {name: opened[name] for name in opened}


def test_a_killed_run_with_dropout_resumes_to_the_same_bits(pairs: Path, tmp_path: Path):
    given = {**NOISY, "checkpoint_every": 5, "sheet_every": 4}
    train(tmp_path / "whole", pairs, **given)
    script = KILLED.format(
        here=str(HERE), folder=str(tmp_path / "killed"), data=str(pairs), options=given
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    lines = train(tmp_path / "killed", pairs, **given)
    assert lines[0] == "goes on after step 5 of 12"
    assert same(result(tmp_path / "whole"), result(tmp_path / "killed"))
    counts = [v for n, v in result(tmp_path / "whole").items() if n.startswith("G.") and
              n.endswith("num_batches_tracked")]  # fmt: skip
    assert counts and all(int(count) == 12 for count in counts)


def test_pages_of_samples_change_nothing(pairs: Path, tmp_path: Path):
    """They are made by the network as it is used, and no statistics move."""
    for name, every in (("without", 0), ("with", 1)):
        train(tmp_path / name, pairs, **NOISY, sheet_every=every)
    assert same(result(tmp_path / "without"), result(tmp_path / "with"))
    assert len(list((tmp_path / "with" / "work" / "samples").iterdir())) == 12


# Trees.


def taken(groups: dict[str, list[str]], group: str, names: list[str]) -> set[str]:
    return {n for n in names if any(fnmatchcase(n, p) for p in groups[group])}


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize(("seen", "downs"), [(1, 2), (16, 3), (70, 6), (286, 8)])
def test_groups_cover_what_they_are_called(seen: int, downs: int, norm: str):
    own = Pix2PixOptions(patch=seen, downs=downs, norm=norm, width=2, d_width=2)
    names, groups = list(Pix2Pix().tensors(own)), Pix2Pix().groups(own)
    of = {group: taken(groups, group, names) for group in groups}
    assert of["generator"] | of["discriminator"] == set(names)
    assert of["encoder"] | of["decoder"] == of["generator"]
    assert not of["encoder"] & of["decoder"]
    assert of["discriminator-low"] | of["discriminator-high"] == of["discriminator"]
    assert not of["discriminator-low"] & of["discriminator-high"]
    assert of["low-level"] - of["discriminator"] < of["generator"]
    assert of["low-level"] & of["discriminator"] == of["discriminator-low"]
    # No pattern says nothing, and none takes a tensor of another group's layer.
    assert all(any(fnmatchcase(n, p) for n in names) for own in groups.values() for p in own)
    kinds = {n for n in of["encoder"] if n.endswith(".weight") and len(shape(own, n)) == 4}
    assert len(kinds) == downs
    low = [n for n in of["low-level"] & of["generator"] if len(shape(own, n)) == 4]
    assert len(low) == min(downs, 3)


def shape(own: Pix2PixOptions, name: str) -> tuple[int, ...]:
    return Pix2Pix().tensors(own)[name][1]


def test_two_models_are_merged_by_their_groups(pairs: Path, tmp_path: Path):
    for name, init in (("one", 0), ("two", 1)):
        session(pairs, init=init).save(tmp_path / f"{name}.safetensors")
    own, models = options(pairs), [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    groups = Pix2Pix().groups(own)
    modelsoup.merge(
        models, tmp_path / "soup.safetensors", beta=0.25, groups=groups,
        layers={"group:encoder": "merge"},
    )  # fmt: skip
    one, two, soup = (
        modelsoup.open_checkpoint(path) for path in (*models, tmp_path / "soup.safetensors")
    )
    merged = taken(groups, "encoder", list(one.tensors))
    assert set(soup.tensors) == set(one.tensors)
    for name in one.tensors:
        share = 0.25 if name in merged and not name.endswith("tracked") else None
        wanted = one[name] if share is None else share * one[name] + (1 - share) * two[name]
        np.testing.assert_allclose(soup[name], wanted, atol=1e-7, err_msg=name)
    assert any((one[name] != two[name]).any() for name in merged)
    assert load_generator(tmp_path / "soup.safetensors").downs == 4


def test_frozen_norms_keep_their_statistics(pairs: Path, tmp_path: Path):
    start = tmp_path / "start.safetensors"
    session(pairs).save(start)
    before = flat(session(pairs, start))
    frozen = taken(Pix2Pix().groups(options(pairs)), "low-level", list(before))
    own = session(pairs, start, frozen=sorted(frozen), lr=1e-2)
    for x, y in images(3):
        own.step(x, y)
    assert any(name.endswith("running_mean") for name in frozen)
    for name, tensor in flat(own).items():
        assert torch.equal(tensor, before[name]) == (name in frozen), name


# Use.


@pytest.fixture
def model(tmp_path: Path, pairs: Path) -> Path:
    """Trained for a few steps, so that its statistics are not those it was made with."""
    own = session(pairs, lr=1e-3)
    for x, y in images(3):
        own.step(x, y)
    own.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("direction", ["x2y", "y2x"])
def test_pictures_of_any_size_are_translated(model: Path, tmp_path: Path, direction: str):
    """Both words for a direction are the one that it has; the batch changes nothing."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for n, size in enumerate([(16, 16), (16, 16), (17, 40), (5, 3)]):
        save_png(rng.integers(0, 256, (*size, 3), np.uint8), tmp_path / "in" / f"{n}.png")
    written = translate(model, tmp_path / "in", tmp_path / "out", direction=direction, device="cpu")
    network = load_generator(model)
    assert not network.training and network.multiple == 16
    for file in written:
        image = to_tensor(read_image(tmp_path / "in" / file.name))[None]
        with torch.no_grad():
            own = to_image(at_any_size(network, image, 16)[0])
        assert np.abs(read_image(file).astype(int) - own).max() <= 1


@pytest.mark.needs("onnx")
@pytest.mark.timeout(120)
def test_an_onnx_model_gives_what_torch_gives_at_any_size(model: Path, tmp_path: Path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(export_onnx(model, tmp_path / "model.onnx")))
    network = load_generator(model)
    for shape in ((1, 3, 32, 48), (3, 3, 16, 16)):
        given = torch.rand(shape) * 2 - 1
        with torch.no_grad():
            own = network(given).numpy()
        (made,) = evaluator.run(None, {"image": given.numpy()})
        np.testing.assert_allclose(made, own, atol=1e-5)
    with pytest.raises(
        modelsoup.ParameterError, match="size is 24, where a multiple of 16 from 16"
    ):
        export_onnx(model, tmp_path / "other.onnx", size=24)
    assert not (tmp_path / "other.onnx").exists()


def test_a_checkpoint_of_no_trainer_names_the_generators_that_are_known(tmp_path: Path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(
        modelsoup.MismatchError, match=r"'G_A' or 'G_B' of cyclegan.*'G' of pix2pix"
    ):
        load_generator(tmp_path / "other.safetensors")


def test_what_a_checkpoint_decides_is_found_in_it(model: Path, pairs: Path):
    assert Pix2Pix().options_of(model) == {
        "width": 4, "downs": 4, "channels": 3, "norm": "batch", "d_width": 4, "patch": 16
    }  # fmt: skip
    with pytest.raises(modelsoup.MismatchError, match=r"\(the start has downs: 4\)$"):
        Pix2Pix().must_start(options(pairs, downs=3), model)
    with pytest.raises(
        modelsoup.MismatchError, match=r"there is no .*\(the start has norm: batch\)$"
    ):
        Pix2Pix().must_start(options(pairs, norm="instance"), model)
    Pix2Pix().must_start(options(pairs), model)


def test_a_training_is_evaluated_in_its_direction(pairs: Path, tmp_path: Path):
    """As `soup i2i evaluate` does, which is told where the model's inputs are."""
    figures: dict[str, float] = {}
    given = {"direction": "BtoA", "evaluate": ["psnr"]}
    train(tmp_path, pairs, figures, **given)
    own = options(pairs, **given)
    model, transform = tmp_path / "out.safetensors", own.transform()
    there, back = (
        evaluate_model(model, pairs, direction=way, metrics=["psnr"], transform=transform)[0].value
        for way in ("y2x", "x2y")
    )
    assert figures["psnr"] == pytest.approx(there)
    assert there != back


def test_the_plan_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the nodes' processes, as of this one
    text = (ROOT / "docs" / "i2i_training.md").read_text("utf-8")
    _, plan = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)[:2]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "plan.yaml").write_text(plan, "utf-8")
    made = tmp_path / "soup.safetensors"
    arguments = ["run", str(tmp_path / "plan.yaml"), "-o", str(made)]
    done = CliRunner().invoke(main, [*arguments, "--store", str(tmp_path / "store")])
    assert done.exit_code == 0, done.output
    assert Pix2Pix().options_of(made)["width"] == 16
    assert Pix2Pix().options_of(made)["crop_size"] == 32  # its lineage tells


# Official checkpoints.


def save_official(folder: Path, networks: dict[str, Network], leave_out: str = "?") -> dict:
    folder.mkdir(exist_ok=True)
    made = {}
    for name, network in networks.items():
        made[name] = network.build().state_dict()
        kept = {n: t for n, t in made[name].items() if not n.endswith(leave_out)}
        torch.save(kept, folder / f"latest_net_{name}.pth")
    return made


@pytest.mark.parametrize("seen", [1, 70])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_an_official_checkpoint_is_read(tmp_path: Path, norm: str, seen: int):
    networks = {"G": unet(4, 5, 3, norm), "D": patches.discriminator(seen, 4, 6, norm)}
    made = save_official(tmp_path / "run", networks)
    output = tmp_path / "out.safetensors"
    counts = import_folder(tmp_path / "run", output)
    read = modelsoup.open_checkpoint(output)
    assert same(
        {f"{k}.{n}": t for k, own in made.items() for n, t in own.items()},
        {name: read[name] for name in read},
    )
    assert counts == {
        name: sum(p.numel() for p in network.build().parameters())
        for name, network in networks.items()
    }
    told = {"width": 4, "d_width": 4, "downs": 5, "norm": norm, "patch": seen, "crop_size": 32}
    Pix2Pix().must_start(Pix2PixOptions(**told), output)
    # The generator alone, as published ones are; it is no CycleGAN's, whatever is said.
    import_folder(tmp_path / "run" / "latest_net_G.pth", output, direction="y2x", force=True)
    assert {name.partition(".")[0] for name in modelsoup.open_checkpoint(output)} == {"G"}
    image = torch.rand(1, 3, 32, 32)
    own = networks["G"].build()
    own.load_state_dict(made["G"])
    with torch.no_grad():
        assert torch.equal(load_generator(output)(image), own.eval()(image))


def test_batch_norms_that_did_not_count_begin_with_0(tmp_path: Path):
    made = save_official(tmp_path / "run", {"G": unet()}, "num_batches_tracked")
    import_folder(tmp_path / "run", tmp_path / "out.safetensors")
    read = modelsoup.open_checkpoint(tmp_path / "out.safetensors")
    assert same({f"G.{n}": t for n, t in made["G"].items()}, {n: read[n] for n in read})


def test_networks_of_two_models_are_refused(tmp_path: Path):
    for n, judge in enumerate(
        (patches.discriminator(70, 4, 3, "batch"), patches.discriminator(70, 4, 6, "instance"))
    ):
        save_official(tmp_path / f"{n}", {"G": unet(), "D": judge})
        with pytest.raises(modelsoup.MismatchError, match="do not belong to one model: G "):
            import_folder(tmp_path / f"{n}", tmp_path / "out.safetensors")
    resnet = CycleGAN().networks(CycleGANOptions(width=4, blocks=1))["G_A"]
    judge = patches.discriminator(70, 4, 6, "instance")
    save_official(tmp_path / "resnet", {"G": resnet, "D": judge})
    with pytest.raises(modelsoup.MismatchError, match=r"latest_net_D\.pth: .* belongs to pix2pix"):
        import_folder(tmp_path / "resnet", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# What is refused.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"patch": 286}, r"crop_size 16 is too small for .* patches of 286 \(a smaller patch"),
        ({"patch": 20}, "'patch'.*20, but must be 1, 16, 34"),
        ({"gan": "hinge"}, "'gan'.*'hinge', but must be 'vanilla', 'lsgan' or 'wgan-gp'"),
        ({"downs": 9}, "'downs'.*9, but must be"),
        ({"direction": "BtoC"}, "'direction'.*must be 'AtoB' or 'BtoA'"),
        ({"lambda_l1": -1}, "lambda_l1"),
        ({"lambda": 3}, "no option 'lambda'"),
    ],
)
def test_what_a_plan_cannot_ask_for_is_told(given: dict, said: str):
    with pytest.raises(modelsoup.TrainerError, match=said):
        modelsoup.build_options(Pix2Pix(), TINY | given)


# It learns.


def test_a_real_pair_is_learnt(tmp_path: Path):
    """Noto's emoji to Twemoji's: nearer to the truth than at first, and than the input is."""
    own = session(
        ROOT / "examples" / "emoji", load_size=32, crop_size=32, width=16, d_width=8, batch=4,
        epochs=10,
    )  # fmt: skip
    sets = own.options.test_sets(own.options.transform())
    inputs, truth = sets.read(sets.inputs), sets.read(sets.truth or ())

    def psnr(made: list[np.ndarray]) -> float:
        errors = [((m / 255 - t / 255) ** 2).mean() for m, t in zip(made, truth, strict=True)]
        return float(np.mean(-10 * np.log10(errors)))

    def translated() -> list[np.ndarray]:
        own.save(tmp_path / "model.safetensors")
        return translate_arrays(tmp_path / "model.safetensors", inputs)

    first = psnr(translated())
    assert own.run(lambda *_: None, lambda _: None)["diverged"] == 0
    learnt = psnr(translated())
    assert learnt > first + 4
    assert learnt > psnr(inputs) + 0.5
    (told,) = evaluate_model(tmp_path / "model.safetensors", sets, metrics=["psnr"])
    assert told.value == pytest.approx(learnt, abs=0.01)
