"""`modelsoup.running.torch_bridge`: a torch trainer loads, freezes and saves as a tree wants it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
from safetensors import deserialize, safe_open
from torch import nn

from modelsoup import Job, merge, open_checkpoint
from modelsoup.errors import CheckpointError, MismatchError, OutputError, TrainerError
from modelsoup.running.torch_bridge import freeze, load_into, save_from, trainable
from modelsoup.trees.trainer import carry_out

STATISTICS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
LOW = ("conv.weight", "conv.bias", "norm.weight", "norm.bias", *STATISTICS)


class Small(nn.Module):
    """Conv, BatchNorm, Linear: all kinds of state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Language(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def made(seed: int, kind=Small):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind()


def step(network, count: int = 3, rate: float = 0.1) -> None:
    """Real steps of SGD, with all that could move what is frozen."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(trainable(network), rate, momentum=0.9, weight_decay=0.1)
    network.train()
    for _ in range(count):
        scans = torch.rand(8, 1, 6, 6, generator=generator)
        labels = (scans.mean((1, 2, 3)) > 0.5).long()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(scans), labels).backward()
        optimizer.step()


def raw(path: Path) -> dict[str, tuple[str, bytes]]:
    found = deserialize(path.read_bytes())
    return {name: (tensor["dtype"], bytes(tensor["data"])) for name, tensor in found}


def state(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A network after a few steps, so that its running statistics are no round numbers."""
    network = made(1)
    step(network)
    path = tmp_path / "start.safetensors"
    safetensors_torch.save_file(network.state_dict(), path)
    return path


def without(path: Path, *names: str) -> Path:
    left = {n: v for n, v in safetensors_torch.load_file(path).items() if n not in names}
    out = path.with_name("without.safetensors")
    safetensors_torch.save_file(left, out)
    return out


def as_bf16(path: Path) -> Path:
    out = path.with_name("bf16.safetensors")
    halved = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in safetensors_torch.load_file(path).items()
    }
    safetensors_torch.save_file(halved, out)
    return out


# Loading


def test_what_is_saved_is_what_is_loaded(trained, tmp_path):
    network = made(2)
    assert load_into(network, trained) == ()
    assert same(state(network), safetensors_torch.load_file(trained))
    save_from(network, tmp_path / "again.safetensors")
    assert raw(tmp_path / "again.safetensors") == raw(trained)


def test_a_model_folder_with_shards_is_loaded(trained, tmp_path):
    merge([trained, trained], tmp_path / "folder", shard_size="200B")
    assert len(open_checkpoint(tmp_path / "folder").files) > 1
    network = made(2)
    assert load_into(network, tmp_path / "folder") == ()
    assert torch.equal(network.conv.weight, safetensors_torch.load_file(trained)["conv.weight"])


def test_without_a_seed_what_is_missing_stays_as_the_constructor_made_it(trained):
    network = made(2)
    missing = load_into(network, without(trained, "head.weight", "head.bias"))
    assert set(missing) == {"head.weight", "head.bias"}
    assert torch.equal(network.head.weight, made(2).head.weight)
    assert not torch.equal(network.conv.weight, made(2).conv.weight)


def test_with_a_seed_what_is_missing_does_not_depend_on_how_the_module_was_made(trained):
    start = without(trained, "head.weight", "conv.bias", "norm.running_var")
    first, second, other = made(2), made(3), made(3)
    missing = load_into(first, start, seed=5)
    assert set(missing) == {"head.weight", "conv.bias", "norm.running_var"}
    load_into(second, start, seed=5)
    load_into(other, start, seed=6)
    assert same(state(first), state(second))
    assert torch.equal(first.norm.running_var, torch.ones(3))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_module_that_lacks_one_tensor_keeps_the_others_of_the_checkpoint(trained):
    start = without(trained, "head.bias", "norm.bias")
    network = made(2)
    load_into(network, start, seed=5)
    assert all(
        torch.equal(network.state_dict()[name], value)
        for name, value in safetensors_torch.load_file(start).items()
    )


def test_an_initial_value_does_not_depend_on_what_else_is_missing(trained):
    one, all_new = made(2), made(2)
    load_into(one, without(trained, "head.weight"), seed=5)
    assert len(load_into(all_new, None, seed=5)) == len(all_new.state_dict())
    assert torch.equal(one.head.weight, all_new.head.weight)


def test_layers_of_the_same_shape_do_not_start_alike():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_into(network, None, seed=5)
    assert not torch.equal(network[0].weight, network[1].weight)


def test_initialising_leaves_the_callers_random_numbers_alone(trained):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_into(made(2), without(trained, "head.weight"), seed=5)
    load_into(made(2), None, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_attention_is_initialised_by_its_private_method():
    first, second = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    load_into(first, None, seed=1)
    load_into(second, None, seed=1)
    assert same(state(first), state(second))
    assert not first.out_proj.bias.any()  # as its constructor has it, after the Linear's own


def test_parameters_that_nothing_initialises_are_told(trained, tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(2))

    with pytest.raises(TrainerError, match=r"sets the missing 'token' of Bare: construct"):
        load_into(Bare(), None, seed=1)
    assert load_into(Bare(), None) == ("token",)
    # A Conv's reset_parameters cannot reach the weight that a parametrization computes.
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1))
    with pytest.raises(TrainerError, match=r"'parametrizations\.weight\.original0'"):
        load_into(normed, None, seed=1)


def test_constants_that_nothing_initialises_stay():
    network = nn.Linear(2, 2)
    network.register_buffer("scale", torch.tensor([3.0]))
    load_into(network, None, seed=1)
    assert network.scale.tolist() == [3.0]


class BigGans(nn.Conv2d):
    """Spectral norm as BigGAN's code has it: buffers of the layer itself."""

    def __init__(self, *shape: int):
        super().__init__(*shape)
        self.register_buffer("u0", torch.randn(1, self.out_channels))
        self.register_buffer("sv0", torch.ones(1))


SPECTRAL = {
    "parametrization": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 5, 3)),
        ("parametrizations.weight.0._u", "parametrizations.weight.0._v"),
    ),
    "hook": (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 5, 3)), ("weight_u", "weight_v")),
    "BigGAN": (lambda: BigGans(2, 5, 3), ("u0", "sv0")),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", SPECTRAL)
def test_missing_vectors_of_spectral_norm_are_those_of_the_loaded_weight(kind, tmp_path):
    make, names = SPECTRAL[kind]
    whole = made(1, make)
    safetensors_torch.save_file(state(whole), tmp_path / "whole.safetensors")
    start = without(tmp_path / "whole.safetensors", *names)
    first, second, other = made(2, make), made(3, make), made(2, make)
    assert set(load_into(first, start, seed=5)) == set(names)
    load_into(second, start, seed=5)
    load_into(other, start, seed=6)
    assert same(state(first), state(second))  # whatever the constructors drew
    weight = next(v for n, v in whole.state_dict().items() if v.ndim == 4).flatten(1)
    left, values, right = torch.linalg.svd(weight)
    found, known = state(first), [left[:, 0], right[0] if names[1] != "sv0" else values[0]]
    for name, wanted in zip(names, known, strict=True):
        sign = (found[name].flatten() @ wanted.flatten()).sign()
        assert torch.allclose(found[name].flatten(), sign * wanted.flatten(), atol=1e-3)
    # In use it is divided by its largest singular value, before any training.
    if kind != "BigGAN":
        image = torch.rand(1, 2, 6, 6)
        plain = nn.functional.conv2d(image, weight.reshape(5, 2, 3, 3) / values[0], whole.bias)
        for network in (first.eval(), other.eval()):
            assert torch.allclose(network(image), plain, atol=1e-4)


class TwoValues(nn.Linear):
    """BigGAN's spectral norm that follows the two largest singular values."""

    def __init__(self):
        super().__init__(3, 4, bias=False)
        for number in range(2):
            self.register_buffer(f"u{number}", torch.randn(1, 4))
            self.register_buffer(f"sv{number}", torch.ones(1))


@pytest.mark.parametrize("missing", [("u0", "sv0", "u1", "sv1"), ("u1", "sv1")])
def test_every_missing_vector_of_spectral_norm_is_found(missing, tmp_path):
    left, right = (torch.linalg.qr(torch.randn(n, 3))[0] for n in (4, 3))
    weight = left @ torch.diag(torch.tensor([4.0, 2.0, 0.5])) @ right.T
    whole = {"weight": weight, "u0": left[None, :, 0], "sv0": torch.tensor([4.0])}
    given = {name: value.contiguous() for name, value in whole.items() if name not in missing}
    safetensors_torch.save_file(given, tmp_path / "a.safetensors")
    network = TwoValues()
    assert set(load_into(network, tmp_path / "a.safetensors", seed=1)) == set(missing)
    for number, value in enumerate((4, 2)):
        found = getattr(network, f"u{number}")[0]
        sign = (found @ left[:, number]).sign()
        assert torch.allclose(found, sign * left[:, number], atol=1e-3)
        assert getattr(network, f"sv{number}").item() == pytest.approx(value, rel=1e-3)


def test_a_right_vector_alone_is_found_from_the_left_one_that_is_there(tmp_path):
    make, (left, right) = SPECTRAL["parametrization"]
    whole = made(1, make)
    safetensors_torch.save_file(state(whole), tmp_path / "whole.safetensors")
    network = made(2, make)
    assert load_into(network, without(tmp_path / "whole.safetensors", right), seed=5) == (right,)
    assert torch.equal(state(network)[left], state(whole)[left])
    assert torch.allclose(state(network)[right], state(whole)[right], atol=1e-2)


def test_statistics_that_are_missing_begin_anew_whatever_was_seen_before(trained):
    network = made(2)
    step(network)
    before = network.norm.running_mean.clone()
    load_into(network, without(trained, "norm.running_mean", "norm.running_var"), seed=5)
    assert before.any() and not network.norm.running_mean.any()
    assert torch.equal(network.norm.running_var, torch.ones(3))
    weight = safetensors_torch.load_file(trained)["norm.weight"]
    assert torch.equal(network.norm.weight, weight)  # of the same layer, which is there


def test_parameters_stay_the_objects_that_an_optimizer_knows(trained):
    network = made(2)
    before = [id(parameter) for parameter in network.parameters()]
    load_into(network, without(trained, "head.weight"), seed=1)
    assert before == [id(parameter) for parameter in network.parameters()]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_buffers_that_are_not_persistent_are_no_part_of_a_checkpoint(trained, tmp_path):
    network = made(2)
    network.register_buffer("cache", torch.ones(2), persistent=False)
    assert load_into(network, trained) == ()
    save_from(network, tmp_path / "out.safetensors", like=trained)
    assert "cache" not in open_checkpoint(tmp_path / "out.safetensors")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_floats_become_the_modules_dtype(trained, tmp_path, dtype):
    loaded = safetensors_torch.load_file(trained)["conv.weight"].to(getattr(torch, dtype))
    safetensors_torch.save_file({"conv.weight": loaded}, tmp_path / "one.safetensors")
    network = made(2)
    load_into(network, tmp_path / "one.safetensors")
    assert network.conv.weight.dtype == torch.float32
    assert torch.equal(network.conv.weight, loaded.float())


def test_scalars_and_empty_tensors_are_loaded_and_saved(tmp_path):
    class Odd(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(value))
            self.none = nn.Parameter(torch.zeros(0, 3))
            self.empty = nn.Parameter(torch.zeros(2, 0))
            self.one = nn.Parameter(torch.full((5,), value)[::5])  # of stride 5

    save_from(Odd(2.5), tmp_path / "odd.safetensors")
    network = Odd(0.0)
    assert load_into(network, tmp_path / "odd.safetensors") == ()
    assert network.scale.item() == 2.5
    assert network.one.item() == 2.5


def test_what_else_is_to_be_said_is_in_the_metadata(tmp_path, trained):
    told = {"classes": '{"a": 0}', "format": "own"}
    save_from(made(1), tmp_path / "told.safetensors", like=trained, metadata=told)
    assert open_checkpoint(tmp_path / "told.safetensors").metadata == {
        "classes": '{"a": 0}', "format": "pt",
    }  # fmt: skip


# Tied tensors


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_tensor_is_there_if_one_of_its_names_is(tmp_path, name):
    weight = torch.arange(28.0).reshape(7, 4)
    safetensors_torch.save_file({name: weight}, tmp_path / "tied.safetensors")
    network = made(1, Language)
    assert load_into(network, tmp_path / "tied.safetensors", seed=3) == ("head.bias",)
    assert torch.equal(network.embed.weight, weight)
    assert network.head.weight is network.embed.weight


def test_a_tied_tensor_is_written_under_both_names_and_loaded_again(tmp_path):
    network = made(1, Language)
    save_from(network, tmp_path / "tied.safetensors")
    written = safetensors_torch.load_file(tmp_path / "tied.safetensors")
    assert written.keys() == {"embed.weight", "head.weight", "head.bias"}
    assert torch.equal(written["embed.weight"], written["head.weight"])
    assert load_into(made(2, Language), tmp_path / "tied.safetensors") == ()


def test_tensors_that_share_only_their_storage_are_tied_too(tmp_path):
    network = made(1, Language)
    network.head.weight = nn.Parameter(network.embed.weight.data)
    weight = torch.arange(28.0).reshape(7, 4)
    safetensors_torch.save_file({"embed.weight": weight}, tmp_path / "tied.safetensors")
    assert load_into(network, tmp_path / "tied.safetensors", seed=3) == ("head.bias",)
    assert torch.equal(network.head.weight, weight)


def test_a_tied_tensor_with_two_values_is_told(tmp_path):
    values = {"embed.weight": torch.zeros(7, 4), "head.weight": torch.ones(7, 4)}
    safetensors_torch.save_file(values, tmp_path / "torn.safetensors")
    with pytest.raises(MismatchError, match=r"different values for '\w+.weight' and '\w+.weight'"):
        load_into(made(1, Language), tmp_path / "torn.safetensors")


def test_a_tied_parameter_is_frozen_under_either_name():
    network = made(1, Language)
    freeze(network, ["head.weight"])
    assert trainable(network) == [network.head.bias]


# Freezing


def test_what_is_frozen_does_not_move_in_train_mode(trained, tmp_path):
    network = made(2)
    load_into(network, trained)
    freeze(network, LOW)
    assert [id(p) for p in trainable(network)] == [id(network.head.weight), id(network.head.bias)]
    step(network)
    save_from(network, tmp_path / "out.safetensors", like=trained, frozen=LOW)
    before, after = raw(trained), raw(tmp_path / "out.safetensors")
    assert {name for name in before if before[name] != after[name]} == {"head.weight", "head.bias"}


def test_without_freezing_all_of_it_would_have_moved(trained):
    """The test above can fail."""
    network = made(2)
    load_into(network, trained)
    before = state(network)
    step(network)
    assert not any(torch.equal(before[name], value) for name, value in state(network).items())


def test_frozen_statistics_are_those_that_the_network_trains_with(trained):
    network = made(2)
    load_into(network, trained)
    freeze(network, STATISTICS)
    scans = torch.rand(4, 1, 6, 6)
    assert torch.equal(network.train()(scans), network.eval()(scans))
    assert network.conv.weight.requires_grad and network.norm.weight.requires_grad


def test_statistics_that_are_not_frozen_go_on(trained):
    network = made(2)
    load_into(network, trained)
    freeze(network, ["norm.weight", "norm.bias"])
    before = network.norm.running_mean.clone()
    step(network)
    assert not torch.equal(before, network.norm.running_mean)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_frozen_network_is_frozen(trained, how):
    network = made(2)
    load_into(network, trained)
    freeze(network, LOW)
    if how == "deepcopy":
        copied = copy.deepcopy(network)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(network))
    else:
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    step(copied)
    before, after = state(network), state(copied)
    assert all(torch.equal(before[name], after[name]) for name in LOW)


def test_the_power_iteration_of_spectral_norm_can_be_frozen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.spectral_norm(nn.Linear(3, 3))
    new = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    for network in (old, new):
        buffers = [name for name, _ in network.named_buffers()]
        before = state(network)
        freeze(network, buffers)
        network.train()(torch.rand(2, 3))
        assert buffers and all(torch.equal(before[n], network.state_dict()[n]) for n in buffers)


def test_the_children_of_a_module_with_a_frozen_buffer_stay_in_train_mode():
    network = nn.Sequential(nn.Dropout(1.0))
    network.register_buffer("scale", torch.ones(1))
    freeze(network, ["scale"])
    assert not network.train()(torch.ones(3)).any()  # dropout of everything


def test_freezing_twice_is_freezing_once():
    network = made(1)
    freeze(network, LOW)
    freeze(network, LOW)
    assert len(network.norm._forward_pre_hooks) == 1


def test_an_optimizer_that_was_made_before_does_not_move_what_is_frozen():
    network = made(1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    network(torch.rand(2, 1, 6, 6)).sum().backward()
    freeze(network, ["conv.weight"])
    before = network.conv.weight.clone()
    optimizer.step()
    assert torch.equal(before, network.conv.weight)


def test_a_name_to_freeze_that_is_not_there_is_told_and_nothing_is_frozen():
    network = made(1)
    with pytest.raises(TrainerError) as told:
        freeze(network, ["conv.bias", "conv.wieght"])
    assert str(told.value) == (
        "the module has no tensor 'conv.wieght' to freeze; did you mean 'conv.weight' or "
        "'norm.weight' or 'conv.bias'?"
    )
    assert network.conv.bias.requires_grad


# Saving


def test_a_bf16_checkpoint_stays_one_through_a_float32_training(trained, tmp_path):
    start, out = as_bf16(trained), tmp_path / "out.safetensors"
    network = made(2)
    load_into(network, start)
    freeze(network, LOW)
    step(network)
    save_from(network, out, like=start, frozen=LOW)
    before, after = raw(start), raw(out)
    assert {name: dtype for name, (dtype, _) in after.items()} == {
        name: "I64" if name == "norm.num_batches_tracked" else "BF16" for name in before
    }
    assert all(before[name] == after[name] for name in LOW)
    written = safetensors_torch.load_file(out)["head.weight"]
    assert torch.equal(written, network.head.weight.detach().bfloat16())  # to nearest even


def test_frozen_bytes_are_the_checkpoints_though_the_module_is_coarser(trained, tmp_path):
    network = made(2).bfloat16()
    load_into(network, trained)
    freeze(network, ["conv.weight"])
    save_from(network, tmp_path / "out.safetensors", like=trained, frozen=["conv.weight"])
    assert raw(tmp_path / "out.safetensors")["conv.weight"] == raw(trained)["conv.weight"]


def test_what_was_missing_is_saved_in_the_dtype_of_the_rest(trained, tmp_path):
    start = without(as_bf16(trained), "head.weight", "norm.num_batches_tracked")
    network = made(2)
    load_into(network, start, seed=1)
    save_from(network, tmp_path / "out.safetensors", like=start)
    dtypes = {n: i.dtype for n, i in open_checkpoint(tmp_path / "out.safetensors").tensors.items()}
    assert dtypes.pop("norm.num_batches_tracked") == "I64"
    assert set(dtypes.values()) == {"BF16"}


def test_views_are_written_in_the_order_of_their_elements(tmp_path):
    network = nn.Linear(3, 2)
    network.weight = nn.Parameter(torch.arange(6.0).reshape(3, 2).T)
    network.to(memory_format=torch.preserve_format)
    assert not network.weight.is_contiguous()
    save_from(network, tmp_path / "out.safetensors")
    written = safetensors_torch.load_file(tmp_path / "out.safetensors")["weight"]
    assert torch.equal(written, network.weight)


def test_the_file_says_that_it_is_pytorchs(tmp_path):
    save_from(made(1), tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_frozen_tensor_that_was_trained_all_the_same_is_told_and_nothing_replaced(
    trained, tmp_path
):
    out = tmp_path / "out.safetensors"
    save_from(made(3), out)
    before = out.read_bytes()
    network = made(2)
    load_into(network, trained)
    step(network)
    with pytest.raises(TrainerError, match=r"frozen tensor '[\w.]+' is not what it is in .*start"):
        save_from(network, out, like=trained, frozen=LOW)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "start.safetensors"]


def test_frozen_names_that_are_in_no_checkpoint_are_told(trained, tmp_path):
    network, out = made(2), tmp_path / "out.safetensors"
    load_into(network, trained)
    with pytest.raises(TrainerError, match=r"the start None has no tensor 'conv.bias'"):
        save_from(network, out, frozen=["conv.bias"])
    with pytest.raises(TrainerError, match=r"start .*without.safetensors has no tensor 'head.bias"):
        save_from(network, out, like=without(trained, "head.bias"), frozen=["head.bias"])
    with pytest.raises(TrainerError, match=r"the module has no .*; did you mean 'conv.bias'"):
        save_from(network, out, like=trained, frozen=["conv.bais"])
    assert not out.exists()


def test_an_output_of_another_name_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"out.pt must end in .safetensors"):
        save_from(made(1), tmp_path / "out.pt")


# What does not fit


def test_an_unknown_name_is_told_with_the_nearest(trained, tmp_path):
    renamed = safetensors_torch.load_file(trained)
    renamed["head.wieght"] = renamed.pop("head.weight")
    safetensors_torch.save_file(renamed, tmp_path / "other.safetensors")
    network = made(2)
    with pytest.raises(MismatchError) as told:
        load_into(network, tmp_path / "other.safetensors", seed=1)
    assert str(told.value) == (
        f"{tmp_path / 'other.safetensors'} has 1 tensor that the module lacks: head.wieght; "
        f"did you mean 'head.weight'?"
    )
    assert same(state(network), state(made(2)))


def test_a_wrong_shape_is_told_and_nothing_loaded(trained, tmp_path):
    other = safetensors_torch.load_file(trained) | {"head.weight": torch.zeros(5, 3)}
    safetensors_torch.save_file(other, tmp_path / "other.safetensors")
    network = made(2)
    with pytest.raises(MismatchError) as told:
        load_into(network, tmp_path / "other.safetensors", seed=1)
    assert str(told.value) == (
        f"{tmp_path / 'other.safetensors'}: tensor 'head.weight' has the shape [5, 3], but in the "
        f"module [2, 3]"
    )
    assert same(state(network), state(made(2)))


@pytest.mark.parametrize("name", ["head.weight", "norm.num_batches_tracked"])
def test_numbers_of_another_kind_are_told(trained, tmp_path, name):
    loaded = safetensors_torch.load_file(trained)
    wrong = loaded[name].int() if name == "head.weight" else loaded[name].float()
    safetensors_torch.save_file(loaded | {name: wrong}, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match=rf"'{name}' has the dtype .*only floats are converted"):
        load_into(made(2), tmp_path / "other.safetensors")


def test_a_checkpoint_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"nope.safetensors does not exist"):
        load_into(made(1), tmp_path / "nope.safetensors")


def test_a_module_without_storage_is_told(trained):
    with pytest.raises(TrainerError, match=r"'conv.weight' is on the meta device"):
        load_into(Small().to("meta"), trained)


def test_a_module_with_state_that_is_no_tensor_is_told(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TrainerError, match=r"'_extra_state' is no tensor"):
        save_from(Extra(1, 1), tmp_path / "out.safetensors")


# In a tree


@dataclass(frozen=True)
class Options:
    steps: int = 3


class SmallTrainer:
    """What docs/torch.md describes."""

    name = "small"
    options = Options

    def train(self, job: Job) -> None:
        network = Small()
        load_into(network, job.start, seed=job.seed)
        freeze(network, job.frozen)
        step(network, job.options.steps)
        save_from(network, job.output, like=job.start, frozen=job.frozen)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_built_on_it_passes_the_checks_of_a_tree(trained, tmp_path, bf16):
    start = without(as_bf16(trained) if bf16 else trained, "head.weight", "head.bias")
    outputs = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for output in outputs:
        carry_out(
            SmallTrainer(), Options(), start=start, output=output, work=tmp_path / "work",
            frozen=LOW, seed=4,
        )  # fmt: skip
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert np.isfinite(open_checkpoint(outputs[0])["head.weight"].astype(np.float32)).all()


def test_a_trainer_built_on_it_makes_a_leaf_from_nothing(tmp_path):
    output = tmp_path / "leaf.safetensors"
    carry_out(
        SmallTrainer(), Options(), start=None, output=output, work=tmp_path / "work", frozen=(),
        seed=4,
    )  # fmt: skip
    assert open_checkpoint(output).tensors.keys() == Small().state_dict().keys()
