"""Weight fluctuation: Σ F Δ², by block."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.measuring.fluctuation import between, block_of, fluctuation, information
from modelsoup_i2i.trainers.gan import Gan, GanOptions
from safetensors.torch import save_file

from modelsoup import CheckpointError, MismatchError, ParameterError

FIRST = {"blocks.0.weight": (3, 2), "blocks.0.bias": (3,)}
SHAPES = {**FIRST, "blocks.1.0.weight": (2, 2), "fc.b": (2,)}


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def test_the_information_is_the_mean_of_squares_over_samples():
    found = information({"w": np.array([n, 2.0 * n])} for n in (1, 2, 4))
    assert found["w"].tolist() == [7, 28]
    with pytest.raises(ParameterError, match="a mean over samples, and there are none"):
        information([])
    with pytest.raises(MismatchError, match="of other weights than the first's"):
        information([{"w": np.ones(2)}, {"v": np.ones(2)}])
    with pytest.raises(MismatchError, match="the gradient of w holds NaN"):
        information([{"w": np.array([np.nan])}])


def test_the_fluctuation_of_each_block_is_the_weighed_square_of_what_moved():
    before, after = weights(0), weights(1)
    fisher = {name: np.abs(values) for name, values in weights(2).items()}
    found = fluctuation(before, after, fisher)
    assert list(found) == ["blocks.0", "blocks.1", "fc"]
    wanted = sum((fisher[n] * (after[n] - before[n]) ** 2).sum() for n in FIRST)
    assert found["blocks.0"].sum == pytest.approx(wanted)
    assert found["blocks.0"].count == 9 and found["blocks.0"].mean == pytest.approx(wanted / 9)


@given(st.floats(-100, 100))
def test_what_did_not_move_has_none_and_twice_as_far_is_four_times_as_much(times: float):
    before, step = weights(0), weights(1)
    fisher = {name: np.abs(values) for name, values in weights(2).items()}

    def moved(by: float) -> float:
        after = {name: before[name] + by * step[name] for name in before}
        return sum(own.sum for own in fluctuation(before, after, fisher).values())

    assert moved(0) == 0
    assert moved(times) == pytest.approx(times**2 * moved(1), abs=1e-9)


def test_only_weights_with_information_are_compared_and_they_must_be_there():
    before, after = weights(0), weights(1)
    assert list(fluctuation(before, after, {"fc.b": np.ones(2)})) == ["fc"]
    with pytest.raises(MismatchError, match="no weight 'gone' in what came before"):
        fluctuation(before, after, {"gone": np.ones(2)})
    del after["fc.b"]
    with pytest.raises(MismatchError, match=r"no weight 'fc\.b' in what came after"):
        fluctuation(before, after, {"fc.b": np.ones(2)})
    with pytest.raises(
        MismatchError, match=r"'fc\.b' is \[2\] in what came before, but its inf.*\[3"
    ):
        fluctuation(before, before, {"fc.b": np.ones(3)})


def test_a_block_is_what_comes_before_and_with_the_first_number():
    names = {
        "blocks.0.0.conv1.weight": "blocks.0", "model.10.conv_block.1.weight": "model.10",
        "linear.weight": "linear", "shared.weight": "shared", "gamma": "gamma",
    }  # fmt: skip
    assert {name: block_of(name) for name in names} == names


# Of checkpoints.


def gan(seed: int = 0) -> dict[str, torch.Tensor]:
    options = GanOptions(size="32s", ch=8, classes=3, chunk=4, shared=8, attention=0)
    torch.manual_seed(seed)
    return {
        f"{name}.{tensor}": values.clone()
        for name, network in Gan().networks(options).items()
        for tensor, values in network.build().state_dict().items()
    }


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gan") / "before.safetensors"
    save_file(gan(), path)
    return path


def moved(before: Path, tmp_path: Path, by: float, block: str = "G.") -> Path:
    """The same with parameters that went some way on; D and statistics as they were."""
    rng = torch.Generator().manual_seed(5)
    there = gan()
    for name in sorted(there):
        step = torch.randn(there[name].shape, generator=rng)
        if name.startswith(block) and name.endswith((".weight", ".bias")):
            there[name] += by * step
    path = tmp_path / f"after-{by}-{block}safetensors"
    save_file({n: t for n, t in there.items() if n.startswith("G.")}, path)
    return path


def test_the_generator_of_two_checkpoints_is_compared_by_block(before: Path, tmp_path: Path):
    same = between(before, before, samples=2)
    assert list(same) == ["shared", "linear", "blocks.0", "blocks.1", "blocks.2", "output_layer.0",
                          "output_layer.2"]  # fmt: skip
    assert all(own.sum == own.mean == 0 for own in same.values())
    once, twice = (between(before, moved(before, tmp_path, by), samples=4) for by in (0.01, 0.02))
    for name, own in once.items():
        assert own.sum > 0 and twice[name].sum == pytest.approx(4 * own.sum, rel=1e-3)
    only = between(before, moved(before, tmp_path, 0.01, "G.blocks.1."), samples=4)
    assert [name for name, own in only.items() if own.sum] == ["blocks.1"]
    assert only["blocks.1"].sum == pytest.approx(once["blocks.1"].sum)


def test_the_information_is_that_of_the_likelihood_of_each_sample(before: Path, tmp_path: Path):
    """Of one sample it is the squared slope of log σ(D(G(z))), by a step along one weight."""
    options = GanOptions(size="32s", ch=8, classes=3, chunk=4, shared=8, attention=0)
    pair = {name: network.build() for name, network in Gan().networks(options).items()}
    for name, network in pair.items():
        own = {n[2:]: t for n, t in gan().items() if n.startswith(name)}
        network.load_state_dict(own)
        network.eval().double()
    label = int(np.random.default_rng(3).integers(3))
    z, c = map(torch.from_numpy, Gan().translators(options)["G"].given(["0"], label, seed=3))

    def likelihood(step: float) -> float:
        bias = pair["G"].output_layer[2].bias
        with torch.no_grad():
            bias[1] += step
            found = torch.nn.functional.logsigmoid(pair["D"](pair["G"](z.double(), c), c))
            bias[1] -= step
        return float(found)

    slope = (likelihood(1e-4) - likelihood(-1e-4)) / 2e-4
    there = gan()
    there["G.output_layer.2.bias"][1] += 0.5
    save_file(there, tmp_path / "after.safetensors")
    found = between(before, tmp_path / "after.safetensors", samples=1, seed=3)
    assert found["output_layer.2"].sum == pytest.approx(0.25 * slope**2, rel=1e-3)


def test_the_command_tells_each_block(before: Path, tmp_path: Path):
    asked = ["fluctuation", str(before), str(moved(before, tmp_path, 0.01)), "--samples", "2"]
    told = CliRunner().invoke(i2i, asked)
    assert told.exit_code == 0 and told.output.count("a weight") == 7
    found = json.loads(CliRunner().invoke(i2i, [*asked, "--json"]).output)
    assert set(found["blocks.0"]) == {"sum", "mean", "count"}
    assert f"{found['blocks.0']['sum']:.4g}" in told.output


def test_checkpoints_that_cannot_be_compared_are_told(before: Path, tmp_path: Path):
    def refused(said: str, first: dict, second: dict, kind=MismatchError) -> None:
        for name, there in (("a", first), ("b", second)):
            save_file(there, tmp_path / f"{name}.safetensors")
        with pytest.raises(kind, match=said):
            between(tmp_path / "a.safetensors", tmp_path / "b.safetensors", samples=1)

    whole = gan()
    generator = {n: t for n, t in whole.items() if n.startswith("G.")}
    refused(r"a\.safetensors has no discriminator", generator, whole)
    refused(r"b\.safetensors, beside .*: its G lacks", whole, {"x": torch.ones(1)})
    other = generator | {"G.linear.bias": torch.ones(3)}
    refused(r"b\.saf.*: its G: linear\.bias has the shape \[3\], where", whole, other)
    nothing = generator | {"G.linear.bias": torch.nan * generator["G.linear.bias"]}
    refused(r"b\.safetensors: G\.linear\.bias holds NaN", whole, nothing, CheckpointError)
    with pytest.raises(ParameterError, match="samples is 0"):
        between(before, before, samples=0)
