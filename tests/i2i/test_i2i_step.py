"""One step of training: the same as the original's, and what frozen, balanced or broken ones do."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from i2i_domains import TINY, make_domains
from modelsoup_i2i.pictures.images import to_tensor
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.training.processes import Place
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.step import DivergedError

import modelsoup

torch.set_num_threads(1)  # tiny networks have nothing for a second one
ROOT = Path(__file__).parent.parent.parent
SMALL = TINY | {"d_layers": 2, "blocks": 2}


def reference():
    path = ROOT / "benchmarks" / "cyclegan_reference.py"
    spec = importlib.util.spec_from_file_location("cyclegan_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))


def images(count: int, size: int = 16, batch: int = 1):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield [torch.rand(batch, 3, size, size, generator=generator) * 2 - 1 for _ in range(2)]


def session(data: Path, start: Path | None = None, **options) -> Session:
    frozen = options.pop("frozen", ())
    return CycleGAN().session(
        CycleGANOptions(data=data, **(SMALL | options)), start, seed=0, frozen=frozen
    )


def beside(data: Path, pool: int = 1000, *, lean: bool = False, winograd: bool = False, **options):
    """The original and ours, from the same weights, in float64, where rounding hides nothing.

    No pool gets full, so that none draws.
    """
    own = session(data, pool_size=pool, **options)
    original = reference().Original(4, 2, 4, 2, pool=pool)
    original.networks().load_state_dict(
        {f"{k}.{n}": t for k, net in own.networks.items() for n, t in net.state_dict().items()}
    )
    original.networks().double()
    for network in own.networks.values():
        network.double()
    for name in ("G_A", "G_B"):
        own.networks[name].recompute, own.networks[name].winograd = lean, winograd
    return own, original


@pytest.mark.parametrize(
    "options", [{}, {"channels_last": True}, {"accumulate": 2}], ids=["plain", "layout", "late"]
)
def test_a_step_is_the_originals(data: Path, options: dict):
    own, original = beside(data, **options)
    for a, b in ((a.double(), b.double()) for a, b in images(3)):
        made = own.optimise(
            [{"a": a, "b": b}]
        )  # with accumulate, updates come after the backward pass
        wanted = {name: loss.item() for name, loss in original.step(a, b).items()}
        assert made["gan_a"] == pytest.approx(wanted["G_A"], rel=1e-6)
        assert made["gan_b"] == pytest.approx(wanted["G_B"], rel=1e-6)
        assert made["cycle_a"] == pytest.approx(wanted["cycle_A"] / 10, rel=1e-6)
        assert made["cycle_b"] == pytest.approx(wanted["cycle_B"] / 10, rel=1e-6)
        assert made["identity_a"] == pytest.approx(wanted["idt_A"] / 5, rel=1e-6)
        assert made["identity_b"] == pytest.approx(wanted["idt_B"] / 5, rel=1e-6)
        assert made["judge_a"] == pytest.approx(wanted["D_A"], rel=1e-6)
        assert made["judge_b"] == pytest.approx(wanted["D_B"], rel=1e-6)
        total = sum(wanted[name] for name in wanted if not name.startswith("D_"))
        assert made["generator"] == pytest.approx(total, rel=1e-6)


def gradients(networks) -> dict[str, torch.Tensor]:
    return {
        f"{k}.{n}": p.grad.clone()
        for k, net in networks.items() for n, p in net.named_parameters() if p.grad is not None
    }  # fmt: skip


@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_the_originals(data: Path, channels_last: bool, lean: bool, winograd: bool):
    """Adam divides by a gradient's size, so that weights would hide a factor: gradients do not."""
    own, original = beside(
        data, lean=lean, winograd=winograd, channels_last=channels_last, lr=1e-30
    )
    caught: dict[str, torch.Tensor] = {}
    for updates in own.updates.values():
        for name, parameter in updates.parameters.items():
            # One for each way.
            parameter.register_hook(
                lambda g, name=name: caught.__setitem__(name, caught.get(name, 0) + g)
            )
    a, b = (side.double() for side in next(images(1)))
    own.step(a, b)
    for optimizer in (original.optimizer_G, original.optimizer_D):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    original.step(a, b)
    wanted = gradients(original.networks())
    assert caught.keys() == wanted.keys() and len(wanted) == 2 * (20 + 8)
    for name, gradient in wanted.items():
        # A bias before a norm has no gradient but noise.
        assert torch.allclose(caught[name], gradient, rtol=1e-6, atol=1e-9), name


def test_after_some_steps_the_images_are_the_originals(data: Path):
    own, original = beside(data)
    for a, b in images(5):
        own.step(a.double(), b.double())
        original.step(a.double(), b.double())
    with torch.no_grad():
        for a, b in ((a.double(), b.double()) for a, b in images(2)):
            assert (own.networks["G_A"](a) - original.G_A(a)).abs().max() < 1e-6
            assert (own.networks["D_B"](b) - original.D_B(b)).abs().max() < 1e-6


def test_recomputing_changes_nothing_but_rounding(data: Path):
    first, second = (beside(data)[0] for _ in range(2))
    for name in ("G_A", "G_B"):
        assert not second.networks[name].recompute  # these images are small
        first.networks[name].recompute = True
    for a, b in images(3):
        made, wanted = (own.step(a.double(), b.double()) for own in (first, second))
        assert made == pytest.approx(wanted, rel=1e-9)


def test_wide_generators_are_winograds_and_the_same_but_for_rounding(data: Path):
    """In float32, as they are used; sides of 5 inside, of 20 outside, fall back."""
    wide = {"width": 32, "blocks": 1, "lr": 1e-7}
    own, plain = session(data, **wide), session(data, **wide)
    assert not session(data).networks["G_A"].winograd  # narrow ones are not
    assert not session(data, precision="bf16", **wide).networks["G_A"].winograd
    for name in ("G_A", "G_B"):
        assert own.networks[name].winograd
        plain.networks[name].winograd = False
    for size in (16, 24, 20):
        for a, b in images(2, size):
            first, second = own.networks["G_A"](a), plain.networks["G_A"](a)
            assert (first - second).abs().max() < 1e-5
            assert own.step(a, b) == pytest.approx(plain.step(a, b), rel=1e-4)


def test_a_state_goes_on_to_the_same_bits_with_winograd(data: Path):
    wide = {"width": 32, "blocks": 1, "pool_size": 2, "lr": 1e-3}
    whole, early = session(data, **wide), session(data, **wide)
    both = list(images(4))
    for a, b in both[:2]:
        whole.step(a, b)
        early.step(a, b)
    later = session(data, **wide)
    later.load_state_dict(early.state_dict())
    for own in (whole, later):
        for a, b in both[2:]:
            own.step(a, b)
    assert all(torch.equal(tensor, flat(later)[name]) for name, tensor in flat(whole).items())


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_of_winograds_blocks_are_laid_out_and_saved_as_ever(
    data: Path, tmp_path: Path, channels_last: bool
):
    own = session(data, width=32, blocks=1, channels_last=channels_last, lr=1e-3)
    before = flat(own)
    ((a, b),) = images(1)
    own.step(a, b)
    after = flat(own)
    name = "G_A.model.10.conv_block.1.weight"
    weight = own.updates["G"].parameters[name]
    for tensor in (weight, weight.grad, own.updates["G"].state_dict()[name]["exp_avg"]):
        assert tensor.permute(2, 3, 0, 1).is_contiguous()
    own.save(tmp_path / "saved.safetensors")
    saved = modelsoup.open_checkpoint(tmp_path / "saved.safetensors")
    assert not torch.equal(before[name], after[name])
    assert all((saved[key] == tensor.numpy()).all() for key, tensor in after.items())
    again = session(data, tmp_path / "saved.safetensors", width=32, blocks=1)
    assert all(torch.equal(flat(again)[key], tensor) for key, tensor in after.items())


def flat(own: Session) -> dict[str, torch.Tensor]:
    return {
        f"{k}.{n}": t.clone()
        for k, net in own.networks.items()
        for n, t in net.state_dict().items()
    }


BALANCED = {"balance": 0.75, "lambda_gan": 1, "lambda_cycle": 5, "lambda_identity": 10}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (0.75, 0.25, 3.75, 1.25, 2.5, 7.5, 1, 1)),
        ({"balance_invert": True}, (0.25, 0.75, 1.25, 3.75, 7.5, 2.5, 1, 1)),
        ({"balance_doubled": True}, (1.5, 0.5, 7.5, 2.5, 5, 15, 1, 1)),
        ({"balance_discriminators": True}, (0.75, 0.25, 3.75, 1.25, 2.5, 7.5, 0.75, 0.25)),
        ({"balance_identity": "by_generator"}, (0.75, 0.25, 3.75, 1.25, 7.5, 2.5, 1, 1)),
        ({"balance": None, "lambda_gan": 2}, (2, 2, 5, 5, 10, 10, 1, 1)),
        ({"balance": None, "lambda_cycle": 3}, (1, 1, 3, 3, 10, 10, 1, 1)),
        ({"balance": None, "lambda_identity": 0}, (1, 1, 5, 5, 0, 0, 1, 1)),
    ],
)
def test_what_an_option_says_of_a_loss_is_what_the_generators_minimise(
    data: Path, options: dict, weights: tuple[float, ...]
):
    names = ("gan_a", "gan_b", "cycle_a", "cycle_b", "identity_a", "identity_b")
    own = session(data, **(BALANCED | options))
    assert tuple(own.weights.values()) == pytest.approx(weights)
    ((a, b),) = images(1)
    losses = own.step(a, b)
    total = sum(
        weight * losses.get(name, 0.0) for name, weight in zip(names, weights, strict=False)
    )
    assert losses["generator"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("weighed", [False, True])
def test_a_discriminator_without_weight_does_not_learn(data: Path, weighed: bool):
    """With λ = 1 all weight is that of X → Y."""
    own = session(data, balance=1.0, balance_discriminators=weighed, lr=1e-3)
    before = flat(own)
    ((a, b),) = images(1)
    own.step(a, b)
    moved = {name.partition(".")[0] for name, t in flat(own).items()
             if not torch.equal(t, before[name])}  # fmt: skip
    assert ("D_A" in moved, "D_B" in moved) == (True, not weighed)


def test_the_seed_of_the_subset_chooses_it(data: Path):
    chosen = {
        seed: session(data, count_b=2, subset_seed=seed).pictures.sets["Y"] for seed in range(6)
    }  # fmt: skip
    assert chosen[0] == session(data, count_b=2, subset_seed=0).pictures.sets["Y"]
    assert len(set(chosen.values())) > 1


@pytest.mark.parametrize("flip", [False, True])
def test_pictures_are_mirrored_where_that_is_asked_for(data: Path, flip: bool):
    own = session(data, flip=flip, load_size=16, crop_size=16, epochs=20)
    plain = {to_tensor(own.pictures[file]).numpy().tobytes() for file in own.pictures.sets["X"]}
    seen = [drawn["a"][0].numpy().tobytes() for (drawn,) in own.batches()]
    share = sum(picture in plain for picture in seen) / len(seen)
    assert 0.25 < share < 0.75 if flip else share == 1


def test_a_half_balance_is_half_the_plain_loss(data: Path):
    plain, half = session(data), session(data, balance=0.5)
    ((a, b),) = images(1)
    assert half.step(a, b)["generator"] == plain.step(a, b)["generator"] / 2


def test_an_automatic_balance_is_that_of_the_data(data: Path):
    own = session(data, balance="auto", loss="tree-paper")
    assert own.weights["gan_a"] == pytest.approx(2 / 6)  # of 6 and 4 images
    assert own.weights["cycle_b"] == pytest.approx(5 * 4 / 6)


def test_frozen_tensors_keep_every_bit_and_the_others_move(data: Path, tmp_path: Path):
    start = tmp_path / "start.safetensors"
    session(data).save(start)
    groups = CycleGAN().groups(CycleGANOptions(data=data, **SMALL))
    from fnmatch import fnmatchcase

    before = flat(session(data, start))
    frozen = [n for n in before if any(fnmatchcase(n, p) for p in groups["low-level"])]
    assert any(n.startswith("D_") for n in frozen) and any(n.startswith("G_") for n in frozen)
    own = session(data, start, frozen=frozen, lr=1e-2)
    for updates in own.updates.values():
        assert not set(updates.parameters) & set(frozen)
    for a, b in images(3):
        own.step(a, b)
    for name, tensor in flat(own).items():
        assert torch.equal(tensor, before[name]) == (name in frozen), name


def test_a_training_with_all_generators_frozen_trains_discriminators(data: Path, tmp_path: Path):
    start = tmp_path / "start.safetensors"
    session(data).save(start)
    before = flat(session(data, start))
    own = session(data, start, frozen=[n for n in before if n.startswith("G_")], lr=1e-2)
    ((a, b),) = images(1)
    own.step(a, b)
    for name, tensor in flat(own).items():
        assert torch.equal(tensor, before[name]) == name.startswith("G_"), name


def test_leaves_share_their_initial_weights_whatever_else_they_load(data: Path, tmp_path: Path):
    whole = flat(session(data))
    assert all(torch.equal(t, flat(session(data))[n]) for n, t in whole.items())
    other = flat(session(data, init=1))
    assert all(not torch.equal(t, other[n]) for n, t in whole.items() if n.endswith("weight"))
    from safetensors.torch import save_file

    part = tmp_path / "part.safetensors"
    save_file({n: t + 1 for n, t in whole.items() if n.startswith("D_")}, part)
    mixed = session(data, part)
    for name, tensor in flat(mixed).items():
        assert torch.equal(tensor, whole[name] + 1 if name.startswith("D_") else whole[name])
    assert all(name.startswith("G_") for name in mixed.missing)


def test_batches_of_two_and_accumulation_agree(data: Path):
    alike = {"pool_size": 0, "lr": 1e-3}
    whole, parts = session(data, **alike), session(data, accumulate=2, **alike)
    for a, b in images(2, batch=2):
        first = whole.step(a, b)
        second = parts.optimise([{"a": a[:1], "b": b[:1]}, {"a": a[1:], "b": b[1:]}])
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize(
    "sizes", [((16, 20), (16, 20)), ((18, 21), (18, 21)), ((16, 16), (20, 24))]
)
def test_images_of_any_size_are_trained_on(data: Path, sizes):
    own = session(data, mode="none", d_layers=1)
    a, b = (torch.rand(1, 3, *size) * 2 - 1 for size in sizes)
    for _ in range(5):  # the pool is full after 3
        losses = own.step(a, b)
        a, b = a.flip(2), b.flip(2)
    assert all(math.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", ["image", "gradient"])
def test_what_is_not_finite_stops_before_any_weight_breaks(data: Path, late: bool, where: str):
    own = session(data, accumulate=2 if late else 1, lr=1e-3)
    ((a, b),) = images(1)
    own.step(a, b)
    if where == "image":
        a = a * float("nan")
    else:
        own.networks["G_A"].model[1].weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(DivergedError):
        own.step(a, b)
    assert own.steps == 1
    assert all(tensor.isfinite().all() for tensor in flat(own).values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_fails_leaves_nothing_to_the_next(data: Path, accumulate: int):
    """Images that are too small for a discriminator, after those that are not."""
    own, other = (session(data, accumulate=accumulate) for _ in range(2))
    ((a, b),) = images(1)
    wanted = own.optimise([{"a": a, "b": b}])
    good = [{"a": a, "b": b}] * (accumulate - 1)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        other.optimise([*good, {"a": a, "b": torch.zeros(1, 3, 4, 4)}])
    assert other.optimise([{"a": a, "b": b}]) == wanted
    assert all(torch.equal(tensor, flat(other)[name]) for name, tensor in flat(own).items())


def test_bf16_trains_in_float32_weights(data: Path):
    own, plain = session(data, precision="bf16"), session(data)
    for a, b in images(2):
        losses, wanted = own.step(a, b), plain.step(a, b)
    # Of eight bits: near, and not the same.
    assert all(0 < abs(losses[n] - value) < 0.05 * value for n, value in wanted.items())
    assert all(math.isfinite(value) for value in losses.values())
    assert all(tensor.dtype == torch.float32 for tensor in flat(own).values())


def test_a_network_that_is_given_more_is_trained_as_it_is_used(data: Path, tmp_path: Path):
    own = session(data)
    network = own.as_used("G_A")
    network.beside = torch.nn.Linear(1, 1)
    before = network.beside.weight.clone()
    network.register_forward_hook(lambda module, _, made: made * module.beside.weight)
    ((a, b),) = images(1)
    own.step(a, b)
    assert own.networks["G_A"] is network and not network.recompute and not network.winograd
    assert not network.training and own.networks["G_B"].training
    assert not torch.equal(network.beside.weight, before)  # by the player whose network it is
    own.save(tmp_path / "result.safetensors")
    session(data).save(tmp_path / "plain.safetensors")
    names = [
        set(modelsoup.open_checkpoint(tmp_path / f"{n}.safetensors").tensors)
        for n in ("result", "plain")
    ]
    assert names[0] == names[1]
    with pytest.raises(modelsoup.TrainerError, match="before the first step only"):
        own.as_used("G_A")
    with pytest.raises(modelsoup.TrainerError, match="no network is called 'G_C'"):
        own.as_used("G_C")


@pytest.mark.parametrize("different", [{"width": 8}, {"blocks": 1}, {"blocks": 3}, {"d_width": 8}])
def test_a_start_of_another_shape_is_named(data: Path, tmp_path: Path, different: dict):
    start = tmp_path / "start.safetensors"
    session(data).save(start)
    with pytest.raises(modelsoup.MismatchError, match=r"tensor '[GD]_A\.model.*has the shape \["):
        session(data, start, **different)


def test_a_device_that_is_not_there_is_told(data: Path):
    if torch.cuda.is_available():
        pytest.skip("platform: there is a GPU")
    with pytest.raises(modelsoup.TrainerError, match="there are 0 GPUs"):
        session(data, device="cuda:3")


def test_rates_are_those_of_the_linear_schedule(data: Path):
    own = session(data, lr=1.0, epochs=100, decay_epochs=100)
    rates = [own.options.pace(epoch - 1) for epoch in (1, 100, 101, 200)]
    assert rates == pytest.approx([1, 1, 100 / 101, 1 / 101], rel=1e-12)
    constant = session(data, lr=0.5, epochs=50).options
    assert {constant.pace(epoch) for epoch in range(50)} == {1}
    # Whoever makes the steps may make more of them.
    assert constant.pace(60) == 1 and own.options.pace(300) == own.options.pace(199)


def test_rates_may_fall_as_half_a_cosine(data: Path):
    line = session(data, lr=1.0, epochs=100, decay_epochs=100).options
    half = replace(line, decay="cosine")
    assert [half.pace(epoch) for epoch in (0, 99)] == [1, 1]
    assert half.pace(199) == pytest.approx((1 + math.cos(100 / 101 * math.pi)) / 2)
    assert half.pace(124) > line.pace(124) and half.pace(174) < line.pace(174)
    # Where the rate falls in a line, or not at all, keys are what they were.
    assert "decay" not in line.decisive() and half.decisive()["decay"] == "cosine"


def test_rates_of_steps_fall_as_those_of_epochs_or_are_halved(data: Path):
    own = session(data, steps=100, decay_steps=100)
    falling = own.options
    rates = [falling.pace(0, step - 1) for step in (1, 100, 101, 200)]
    assert rates == pytest.approx([1, 1, 100 / 101, 1 / 101], rel=1e-12)
    assert own.total_steps == 200 and falling.pace(9, 500) == falling.pace(0, 199)
    halved = replace(falling, decay_steps=0, halve_every=30)
    paces = [halved.pace(3, step) for step in (0, 29, 30, 59, 60, 89)]
    assert paces == [1, 1, 0.5, 0.5, 0.25, 0.25]
    # Where it stays as it is, keys are what they were.
    assert not {"decay_steps", "halve_every"} & {*replace(falling, decay_steps=0).decisive()}
    assert falling.decisive()["decay_steps"] == 100 and halved.decisive()["halve_every"] == 30
    with pytest.raises(ValueError, match="beside epochs it is 0, and decay_epochs may follow"):
        replace(falling, steps=None)


def test_a_step_is_made_at_the_rate_of_its_number(data: Path):
    """Adam's first step is as long as its rate: after a halving, it is half as long."""
    moved = []
    for taken in (2, 3):
        own = session(data, steps=4, halve_every=3, lr=1e-3)
        before = flat(own)
        own.steps = taken
        own.step(*next(iter(own.batches()))[0].values())
        moved.append(max(float((t - before[n]).abs().max()) for n, t in flat(own).items()))
    assert moved == pytest.approx([1e-3, 5e-4], rel=1e-2)


def test_steps_that_somebody_makes_are_those_of_a_run(data: Path):
    """At the rate of each epoch, the falling ones too."""
    options = {"epochs": 1, "decay_epochs": 2, "lr": 1e-2, "flip": False}
    whole, own = session(data, **options), session(data, **options)
    before = flat(own)
    whole.run(lambda _done, _figures: None, lambda _line: None)
    for (drawn,) in own.batches():
        own.step(*drawn.values())
    assert own.steps == whole.total_steps == 18
    assert all(torch.equal(tensor, flat(whole)[name]) for name, tensor in flat(own).items())
    # Each of Adam's first steps is as long as the rate: at the first one they would lead further.
    constant = session(data, **(options | {"epochs": 3, "decay_epochs": 0}))
    for (drawn,) in constant.batches():
        constant.step(*drawn.values())
    moved, further = (
        sum((tensor - before[name]).abs().sum() for name, tensor in flat(trained).items())
        for trained in (own, constant)
    )
    assert 0 < moved < further


def test_each_pool_draws_on_its_own(data: Path):
    """Of both domains, of each process and of each seed; and the same again for the same."""
    options = CycleGANOptions(data=data, **SMALL)

    def drawn(seed: int, rank: int) -> list[bytes]:
        own = CycleGAN().session(options, None, seed=seed, place=Place(rank, 2))
        return [pool.state_dict()["generator"].numpy().tobytes() for pool in own.pools.values()]

    every = [state for seed in (0, 1) for rank in (0, 1) for state in drawn(seed, rank)]
    assert len(set(every)) == 8
    assert drawn(1, 1) == every[6:]


def test_places_of_several_processes_cover_the_epoch(data: Path):
    """Two processes see together what one with twice the batch sees."""
    options = CycleGANOptions(data=data, **SMALL)
    single = CycleGAN().session(replace(options, batch=2), None, seed=4)
    both = [CycleGAN().session(options, None, seed=4, place=Place(rank, 2)) for rank in range(2)]
    assert single.steps_per_epoch == both[0].steps_per_epoch == 3
    for one, first, second in zip(
        single.batches(), both[0].batches(), both[1].batches(), strict=True
    ):
        for name in "ab":
            parts = [drawn[0][name] for drawn in (first, second)]
            assert torch.equal(one[0][name], torch.cat(parts))
