"""GANs of classes, DeepI2I on them, and TransferI2I: who moves when, on what, and what is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from click.testing import CliRunner, Result
from i2i_domains import make_classes
from i2i_states import flat, moved, silent
from modelsoup_i2i.networks import biggans
from modelsoup_i2i.networks.biggan import Auxiliary, OwnBlocks
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.networks.spectral import Spectral
from modelsoup_i2i.training import estimates
from modelsoup_i2i.training.losses import deceive, judge, slope_penalty
from modelsoup_i2i.training.state import State
from modelsoup_i2i.training.turns import Batch
from modelsoup_i2i.training.watch import Losses
from modelsoup_i2i.use.generators import load_model, load_network
from safetensors.numpy import load_file
from safetensors.torch import save_file

from modelsoup import (
    MismatchError,
    ParameterError,
    TrainerError,
    get_trainer,
    merge,
    open_checkpoint,
)
from modelsoup.terminal.cli import main

torch.set_num_threads(1)
SIZES = {
    "size": "32s", "ch": 8, "chunk": 4, "shared": 8, "attention": 0, "batch": 2, "steps": 2,
    "sheet_every": 0, "lr": 1e-3, "d_lr": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("classes"), {"a": 4, "b": 4, "c": 4})


def session(
    trainer: str, data: Path | None, start: Path | None = None, work: Path | None = None,
    seed: int = 1, **options: object,
) -> State:  # fmt: skip
    made = get_trainer(trainer)
    given = made.options(data=data, **(SIZES | options))
    return made.session(given, start, seed=seed, work=work)


@pytest.fixture(scope="module")
def gan(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own, output = session("gan", data), tmp_path_factory.mktemp("gan") / "gan.safetensors"
    own.run(silent, silent)
    own.save(output)
    return output


# The GAN.


def test_a_gan_moves_both_and_each_nth_step_the_generator(data: Path):
    own = session("gan", data, n_critic=2)
    assert [moved(own) for _ in range(2)] == [{"D"}, {"D", "G"}]


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_a_gans_losses_are_those_of_its_verdicts(data: Path, kind: str):
    own = session("gan", data, gan=kind)
    own.begin()
    trainer, (group,) = own.trainer, next(own.batches())
    batch = Batch(group)
    for network in own._module.values():
        network.eval()  # so that no pass changes the next one
    made = own["G"](batch.z_d, batch.c_d)
    expected = judge(own["D"](batch.y, batch.c_y), own["D"](made, batch.c_d), kind)
    torch.testing.assert_close(trainer.judge(own, batch)["judge"], expected)
    made = own["G"](batch.z_g, batch.c_g)
    torch.testing.assert_close(
        trainer.make(own, batch)["gan"], deceive(own["D"](made, batch.c_g), kind)
    )
    real = {"hinge": lambda v: torch.relu(1 - v), "softplus": lambda v: torch.log1p(torch.exp(-v))}
    fake = {"hinge": lambda v: torch.relu(1 + v), "softplus": lambda v: torch.log1p(torch.exp(v))}
    verdicts = torch.tensor([[0.5], [-2.0]])
    torch.testing.assert_close(
        judge(verdicts, -verdicts, kind), (real[kind](verdicts) + fake[kind](-verdicts)).mean()
    )


def test_r1_is_half_the_squared_slope_and_is_taken_lazily_at_so_many_times_its_weight(data: Path):
    own = session("gan", data, lambda_r1=2.0, r1_every=3, steps=4)
    told: list[dict[str, float]] = [{} for _ in range(4)]
    for losses in told:
        moved(own, losses)
    assert ["r1" in losses for losses in told] == [True, False, False, True]
    assert own.weights["r1"] == 6.0
    images = torch.randn(2, 3, 32, 32)
    line = torch.randn(3 * 32 * 32)
    value = slope_penalty(lambda x: (x.flatten(1) @ line)[:, None], images)
    torch.testing.assert_close(value, 0.5 * line.square().sum())


def test_the_first_blocks_of_a_discriminator_can_stay(data: Path):
    own = session("gan", data, freeze_d=2)
    before = flat(own)
    moved(own)
    after = flat(own)
    first = [name for name in after if name.startswith(("D.blocks.0.", "D.blocks.1."))]
    assert first
    assert all(torch.equal(after[name], before[name]) for name in first)
    assert not torch.equal(after["D.blocks.2.0.conv1.weight"], before["D.blocks.2.0.conv1.weight"])
    with pytest.raises(ValueError, match="freeze_d is 5, but D has 4 blocks"):
        session("gan", data, freeze_d=5)


def test_an_encoder_beside_a_gan_is_what_its_discriminator_is(data: Path, tmp_path: Path):
    own = session("gan", data, encoder=True)
    moved(own)
    own.save(tmp_path / "out.safetensors")
    saved = open_checkpoint(tmp_path / "out.safetensors")
    names = [name for name in saved if name.startswith("E.")]
    assert len(names) == len(Network(biggans.ENCODER, {"arch": "32s", "ch": 8}).shapes())
    weights = [name for name in names if not name.endswith(("u0", "sv0"))]
    assert all(np.array_equal(saved[name], saved[f"D{name[1:]}"]) for name in weights)


def test_an_average_can_be_written_instead_of_the_last_weights(data: Path, tmp_path: Path):
    own = session("gan", data, ema=0.5, average="instead")
    moved(own)
    own.save(tmp_path / "out.safetensors")
    saved = open_checkpoint(tmp_path / "out.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"G", "D"}
    name, now = "linear.weight", flat(own)
    assert np.array_equal(saved[f"G.{name}"], now[f"G_ema.{name}"].numpy())
    assert not np.array_equal(saved[f"G.{name}"], now[f"G.{name}"].numpy())
    options = own.trainer.options(data=data, **SIZES, ema=0.5, average="instead")
    told = own.trainer.tensors(options)
    assert {n: tuple(i.shape) for n, i in saved.tensors.items()} == {
        n: shape for n, (_, shape) in told.items()
    }  # fmt: skip


# DeepI2I.


def test_adaptor_and_discriminator_move_first_and_the_encoder_never(data: Path, gan: Path):
    own = session("deepi2i", data, gan, phase1=1, steps=3)
    assert own.begun_as == {"E": "D"}
    encoder = {name: value for name, value in flat(own).items() if name.startswith("E.")}
    assert [moved(own) for _ in range(2)] == [{"A", "D"}, {"A", "D", "G"}]
    assert all(torch.equal(value, flat(own)[name]) for name, value in encoder.items())
    saved = load_file(gan)
    assert all(np.array_equal(v, saved[f"D{n[1:]}"]) for n, v in encoder.items())
    assert any(not torch.equal(v, flat(own)[f"D{n[1:]}"]) for n, v in encoder.items())


def test_from_scratch_all_four_move_at_once_and_the_adaptor_is_added_whole(data: Path):
    own = session("deepi2i", data, scratch=True)
    assert own._module["A"].sides == (8, 4)
    torch.testing.assert_close(own._module["A"].strength, torch.tensor([0.1, 1.0]))
    assert moved(own) == {"E", "A", "G", "D"}


def test_a_frozen_encoder_needs_weights_to_begin_with(data: Path):
    own = session("deepi2i", data)
    with pytest.raises(TrainerError, match="E is not trained here, so it must begin with weights"):
        own.begin()


def test_the_reconstruction_compares_each_picture_with_its_own_translation(data: Path, gan: Path):
    own = session("deepi2i", data, gan, alpha=0.1, alpha_first=0.01)
    own.begin()
    for network in own._module.values():
        network.eval()
    batch = Batch(next(own.batches())[0])
    own.trainer.judge(own, batch)
    made = own.in_use("T").module(batch.x, batch.z_g, batch.c_g)
    of_made, of_real = (
        own._module["D"].walk(images) for images in (made, batch.x)
    )  # labels do not matter
    expected = sum(
        alpha * (of_made[side] - of_real[side]).abs().mean()
        for side, alpha in {8: 0.01, 4: 0.1}.items()
    )
    torch.testing.assert_close(own.trainer.translate(own, batch)["rec"], expected)
    official = session("deepi2i", data, gan, rec_pairs="official", rec="mse")
    official.begin()
    for name, network in official._module.items():
        network.load_state_dict(own._module[name].state_dict())
        network.eval()
    expected = sum(
        alpha * (of_made[side][0] - of_made[side][1]).square().mean()
        for side, alpha in {8: 0.01, 4: 0.1}.items()
    )
    torch.testing.assert_close(official.trainer.translate(official, batch)["rec"], expected)


def test_no_gradient_of_the_translators_step_reaches_the_discriminator(data: Path, gan: Path):
    own = session("deepi2i", data, gan)
    own.begin()
    batch = Batch(next(own.batches())[0])
    own.trainer.judge(own, batch)
    sum(own.trainer.translate(own, batch).values()).backward()
    assert all(parameter.grad is None for parameter in own._module["D"].parameters())
    assert all(parameter.requires_grad for parameter in own._module["D"].parameters())


@pytest.mark.parametrize(
    ("adaptor", "sides"), [("all", [8, 4]), ((8,), [8]), ((4,), [4]), ("identity", [])]
)
def test_an_adaptor_of_some_sides_is_told_by_its_checkpoint(
    data: Path, gan: Path, tmp_path: Path, adaptor: object, sides: list[int]
):
    own = session("deepi2i", data, gan, adaptor=adaptor, phase1=0)
    assert moved(own) == {"D", "G", *(["A"] if sides else [])}
    own.save(tmp_path / "out.safetensors")
    found = own.trainer.options_of(tmp_path / "out.safetensors")
    expected = {"size": "32s", "ch": 8, "chunk": 4, "shared": 8, "rows": 3}
    assert {name: found[name] for name in expected} == expected
    assert found.get("adaptor", "all") == adaptor
    assert own._module["A"].sides == tuple(sides or (8, 4))


@pytest.mark.parametrize("mode", ["taps", "bottleneck"])
def test_fewer_halvings_are_trained_and_told(data: Path, tmp_path: Path, mode: str):
    own = session("deepi2i", data, scratch=True, n_down=2, n_down_mode=mode)
    assert moved(own) == {"E", "A", "G", "D"}
    assert own._module["A"].sides == (8,)
    assert own._module["G"].least == (8 if mode == "bottleneck" else 4)
    own.save(tmp_path / "out.safetensors")
    found = own.trainer.options_of(tmp_path / "out.safetensors")
    assert (found["n_down"], found.get("n_down_mode", "taps")) == (2, mode)


def test_ssim_alone_is_a_loss_too(data: Path, gan: Path):
    losses: dict[str, float] = {}
    own = session("deepi2i", data, gan, lambda_ssim=1.0, lambda_gan=0.0, lambda_rec=0.0)
    moved(own, losses)
    assert 0 < losses["ssim"] < 2
    assert losses["translator"] == pytest.approx(losses["ssim"])
    assert "rec" not in losses


@pytest.mark.parametrize(
    ("trainer", "options", "at"),
    [
        ("gan", {"ema": 0.9, "lambda_r1": 1.0, "r1_every": 2}, 1),
        ("deepi2i", {"phase1": 2, "ema": 0.9}, 1), ("deepi2i", {"phase1": 1, "accumulate": 2}, 2),
        ("transferi2i", {}, 1), ("self-init", {"classes": 3}, 1),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_in_any_phase_ends_with_the_same_bits(
    data: Path, gan: Path, tmp_path: Path, trainer: str, options: dict[str, object], at: int
):
    given = {"steps": 4, "checkpoint_every": at, **options}
    of_all = (trainer, None if trainer == "self-init" else data, None if trainer == "gan" else gan)
    whole = session(*of_all, **given)
    whole.run(silent, silent)
    early = session(*of_all, tmp_path, **given)
    steps = early.batches()
    for _ in range(at):
        early.optimise(next(steps))
    early.keep()
    later = session(*of_all, tmp_path, **given)
    later.run(silent, silent)
    assert later.steps == whole.steps == 4
    assert all(torch.equal(value, flat(whole)[name]) for name, value in flat(later).items())


# Self-initialisation.


def test_an_adaptor_learns_to_give_what_the_generator_had_and_nothing_else_changes(gan: Path):
    own = session("self-init", None, gan, classes=3, steps=60, batch=8)
    before = flat(own)
    steps = own.batches()
    losses = [own.optimise(next(steps))["align"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert {n.partition(".")[0] for n, v in flat(own).items() if not torch.equal(v, before[n])} == {
        "A"
    }  # fmt: skip


def test_an_adaptor_is_compared_before_its_strength(gan: Path):
    one, other = (session("self-init", None, gan, classes=3, strength=s) for s in (0.1, 1.0))
    assert one.optimise(next(one.batches())) == other.optimise(next(other.batches()))


def test_classes_are_handed_on_where_no_data_name_them(gan: Path, tmp_path: Path):
    own = session("self-init", None, gan, classes=3)
    own.save(tmp_path / "out.safetensors")
    told = open_checkpoint(tmp_path / "out.safetensors").metadata["modelsoup.classes"]
    assert told == '{"a": 0, "b": 1, "c": 2}'


# TransferI2I.


@pytest.mark.parametrize(
    ("kept", "own"),
    list(enumerate([69_789_892, 24_049_348, 6_260_164, 1_641_796, 355_587, 2_787])),
)
def test_an_auxiliary_owns_as_much_as_published(kept: int, own: int):
    sizes = {"arch": "128", "ch": 96, "classes": 0}
    network = Network(biggans.OWN_BLOCKS, {"kept": kept, **sizes})
    buffers = network.buffers()
    shapes = {n: s for n, s in network.shapes().items() if n not in buffers}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == own


def test_the_first_blocks_are_the_same_objects_and_the_others_are_not(data: Path, gan: Path):
    own = session("transferi2i", data, gan, common=2)
    auxiliary, generator = own._joined["auxiliary"], own._module["G"]
    assert isinstance(auxiliary, Auxiliary)
    assert isinstance(own._module["X"], OwnBlocks)
    same = [one is other for one, other in zip(auxiliary.blocks, generator.blocks, strict=True)]
    assert same == [True, True, False]
    assert own.begun_as == {"E": "D", "X": "G"}
    z, c = torch.randn(2, generator.noise), torch.tensor([0, 2])
    generator.eval(), own._module["X"].eval()
    torch.testing.assert_close(auxiliary(z, c), generator(z, c))


def test_an_auxiliarys_pass_leaves_the_statistics_of_what_is_common(data: Path, gan: Path):
    own = session("transferi2i", data, gan, common=2)
    own.begin()
    common = own._module["G"].blocks[0][0].bn1
    apart = own._module["X"].blocks["2"][0].bn1
    before = common.stored_mean.clone(), apart.stored_mean.clone()
    own["auxiliary"](torch.randn(4, own._module["G"].noise), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(common.stored_mean, before[0])
    assert not torch.equal(apart.stored_mean, before[1])


def test_all_that_translates_moves_also_what_one_of_two_losses_reaches(data: Path, gan: Path):
    """The adaptor is in the first loss of the turn alone, the auxiliary's blocks in the last."""
    for accumulate in (1, 2):
        own = session("transferi2i", data, gan, common=2, accumulate=accumulate)
        assert moved(own) == {"A", "G", "X", "D"}


def test_without_weight_there_is_no_auxiliary(data: Path, gan: Path, tmp_path: Path):
    plain = session("deepi2i", data, gan, alpha=1.0, alpha_first=1.0, phase1=0)
    none = session("transferi2i", data, gan, lambda_aux=0.0)
    for own in (plain, none):
        own.run(silent, silent)
    assert flat(plain).keys() == flat(none).keys()
    assert all(torch.equal(value, flat(none)[name]) for name, value in flat(plain).items())


def test_no_more_blocks_can_be_in_common_than_there_are(data: Path):
    own = get_trainer("transferi2i").options
    assert own(data=data, **SIZES).kept == 3  # the paper's four, of a network that has them
    with pytest.raises(ValueError, match="common is 4, but G has 3 blocks"):
        own(data=data, **SIZES, common=4)


def test_memory_has_networks_that_nobody_moves_in_it(data: Path, gan: Path):
    own = session("deepi2i", data, gan)
    drawn = next(own.batches())[0]
    told = [
        estimates.memory(
            own.trainer, dataclasses.replace(own.options, train_encoder=trained), own.weights,
            drawn, device=own.device, early=True, last=1,
        ).lasting
        for trained in (False, True)
    ]  # fmt: skip
    weights = sum(tensor.nbytes for tensor in own._module["E"].state_dict().values())
    parameters = [p.nbytes for p in own._module["E"].parameters()]
    # Trained, it has the largest gradient and Adam's two averages beside its weights.
    assert told[1] - told[0] == max(parameters) + 2 * sum(parameters)
    assert told[0] > weights


def test_the_auxiliary_is_in_no_checkpoint(data: Path, gan: Path, tmp_path: Path):
    own = session("transferi2i", data, gan)
    own.save(tmp_path / "out.safetensors")
    saved = open_checkpoint(tmp_path / "out.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"E", "A", "G", "D"}
    assert own.trainer.tensors(own.options).keys() == saved.tensors.keys()


# Classes.


def test_other_classes_than_a_starts_are_refused_or_their_rows_drawn_anew(
    gan: Path, tmp_path: Path
):
    data = make_classes(tmp_path / "data", {"p": 3, "q": 3})
    said = "trained on other classes.*class_rows: resize draws their rows anew, and rows: 3 keeps"
    with pytest.raises(MismatchError, match=said):
        session("gan", data, gan)
    own = session("gan", data, gan, class_rows="resize")
    assert own.classes == ("p", "q")
    there = load_file(gan)
    rows = own._module["G"].shared.weight
    assert tuple(rows.shape) == (2, 8)
    mean, spread = there["G.shared.weight"].mean(0), there["G.shared.weight"].std(0)
    assert (np.abs(rows.detach().numpy() - mean) < 5 * spread + 1e-6).all()
    assert tuple(own._module["D"].embed.u0.shape) == (1, 2)
    kept = own._module["D"].blocks[0][0].conv1.weight.detach().numpy()
    assert np.array_equal(kept, there["D.blocks.0.0.conv1.weight"])
    assert moved(own) == {"G", "D"}
    own.save(tmp_path / "out.safetensors")
    assert '{"p": 0, "q": 1}' in open_checkpoint(tmp_path / "out.safetensors").metadata.values()
    # The same by `init_from`.
    given = {"G": gan, "D": gan}
    with pytest.raises(MismatchError, match=r"G.shared.weight has the shape \[3, 8\]"):
        session("gan", data, init_from=given)
    other = session("gan", data, init_from=given, class_rows="resize")
    assert torch.equal(other._module["G"].shared.weight, session(
        "gan", data, gan, class_rows="resize")._module["G"].shared.weight)  # fmt: skip


def test_a_class_can_be_left_out_of_those_that_a_start_knows(data: Path, gan: Path):
    with pytest.raises(MismatchError, match="the data lack 'c'"):
        session("deepi2i", data, gan, exclude=["c"])
    own = session("deepi2i", data, gan, exclude=["c"], rows=3)
    assert own.classes == ("a", "b")
    assert {int(c) for (batch,) in own.batches() for c in batch["c_g"]} <= {0, 1}


def test_the_discriminator_learns_from_more_pictures_which_are_not_translated(
    data: Path, tmp_path: Path
):
    # Their classes stand in another order, one is none of the data's, and squares of c are green.
    more = make_classes(tmp_path / "more", {"0": 2, "c": 5, "b": 3, "a": 3})
    own = session("deepi2i", data, classes=["c", "a"], scratch=True, d_data=more, steps=16)
    assert {name: len(pictures) for name, pictures in own.images.items()} == {
        "data": 8, "d_data": 8,
    }  # fmt: skip
    c, green, blue = own.classes.index("c"), 1, 2
    drawn = [batch for (batch,) in own.batches()]
    shown = {
        name: {
            int(picture.mean((1, 2)).argmax())
            for batch in drawn
            for picture, label in zip(batch[name], batch[f"c_{name}"], strict=True)
            if label == c
        }
        for name in "xy"
    }
    assert shown == {"x": {blue}, "y": {green, blue}}


def test_the_discriminators_own_pictures_lack_no_class(data: Path, tmp_path: Path):
    more = make_classes(tmp_path / "more", {"a": 2, "b": 3})
    with pytest.raises(ParameterError, match=f"'c'.*{more}|{more}.*'c'"):
        session("deepi2i", data, scratch=True, d_data=more)


def test_statistics_of_a_merge_are_found_anew_and_nothing_else_moves(
    data: Path, gan: Path, tmp_path: Path
):
    start = tmp_path / "start.safetensors"
    tensors = {name: torch.from_numpy(value) for name, value in load_file(gan).items()}
    spoilt = {n: v + 9 if "stored" in n or n.endswith("u0") else v for n, v in tensors.items()}
    save_file(spoilt, start)
    own = session("gan", data, start, repair=60, steps=61, ema=0.9)
    said: list[str] = []
    own._repair(said.append)
    assert said == ["statistics of norms were found anew on 60 steps of batches"]
    now, whole = flat(own), session("gan", data, gan, steps=61)
    for name, _ in own._module["G"].named_parameters():
        assert torch.equal(now[f"G.{name}"], tensors[f"G.{name}"])
    for _ in range(60):
        whole.settle(next(whole.batches()))
    name = "G.blocks.0.0.bn1.stored_var"
    assert (spoilt[name] - flat(whole)[name]).abs().min() > 7
    assert (now[name] - flat(whole)[name]).abs().max() < 0.5
    assert torch.equal(now[name], now[name.replace("G.", "G_ema.")])
    vector = "D.blocks.0.0.conv1"
    matrix = tensors[f"{vector}.weight"].flatten(1)
    largest = torch.linalg.matrix_norm(matrix, 2)
    assert (now[f"{vector}.u0"] @ matrix).norm() == pytest.approx(largest.item(), rel=1e-2)


def test_a_start_of_more_rows_can_be_kept(data: Path, tmp_path: Path):
    start = tmp_path / "start.safetensors"
    trainer = get_trainer("gan")
    networks = trainer.networks(trainer.options(classes=7, **SIZES))
    save_file({f"{name}.{key}": value for name, network in networks.items()
               for key, value in network.build().state_dict().items()}, start)  # fmt: skip
    with pytest.raises(MismatchError, match=r"G.shared.weight.*\[7, 8\]"):
        session("gan", data, start)
    kept = session("gan", data, start, rows=7)
    assert tuple(kept._module["G"].shared.weight.shape) == (7, 8)
    assert max(int(batch["c_g"].max()) for (batch,) in kept.batches()) <= 2
    with pytest.raises(ValueError, match="rows is 2, fewer than the 3 classes"):
        session("gan", data, rows=2)


@pytest.mark.parametrize("trainer", ["gan", "deepi2i", "transferi2i"])
def test_a_step_in_bf16_is_near_to_one_in_float32(data: Path, gan: Path, trainer: str):
    start = None if trainer == "gan" else gan
    told: list[dict[str, float]] = [{}, {}]
    for losses, precision in zip(told, (32, "bf16"), strict=True):
        moved(session(trainer, data, start, precision=precision, attention=0), losses)
    assert told[1] == pytest.approx(told[0], abs=0.1)


@pytest.mark.parametrize(
    ("size", "downs"), [("64", 2), ("64", 3), ("64s", 3), ("128", 3), ("128", 4)]
)
def test_a_generator_that_begins_later_is_told_from_its_shapes(size: str, downs: int):
    sizes = {
        "arch": size, "ch": 8, "classes": 3, "chunk": 4, "shared": 8, "attention": 32,
        "channels": 3, "least": biggans.deepest(size, downs),
    }  # fmt: skip
    shapes = Network(biggans.GENERATOR, sizes).shapes()
    assert biggans.generator_in({f"G.{n}": s for n, s in shapes.items()}, "G.") == sizes


def test_rows_of_other_classes_are_drawn_anew_also_where_there_are_as_many(
    gan: Path, tmp_path: Path
):
    other = make_classes(tmp_path / "data", {"x": 3, "y": 3, "z": 3})
    own = session("gan", other, gan, class_rows="resize")
    rows = own._module["G"].shared.weight.detach().numpy()
    assert not np.array_equal(rows, load_file(gan)["G.shared.weight"])


def test_a_frozen_adaptor_keeps_its_strength_whatever_the_options_say(
    data: Path, gan: Path, tmp_path: Path
):
    session("deepi2i", data, gan).save(tmp_path / "start.safetensors")
    start = open_checkpoint(tmp_path / "start.safetensors")
    trainer = get_trainer("deepi2i")
    frozen = [name for name in start if name.startswith("A.")]
    own = trainer.session(
        trainer.options(data=data, strength=0.2, **SIZES), tmp_path / "start.safetensors", seed=1,
        frozen=frozen,
    )  # fmt: skip
    own.run(silent, silent)
    own.save(tmp_path / "out.safetensors")
    saved = open_checkpoint(tmp_path / "out.safetensors")
    assert all(np.array_equal(saved[name], start[name]) for name in frozen)


def test_an_average_has_the_statistics_of_a_network_that_waits_for_its_phase(data: Path, gan: Path):
    own = session("deepi2i", data, gan, ema=0.9, phase1=2)
    moved(own)
    now = flat(own)
    name = "blocks.1.0.bn1.stored_mean"
    assert not np.array_equal(now[f"G.{name}"].numpy(), load_file(gan)[f"G.{name}"])
    assert torch.equal(now[f"G_ema.{name}"], now[f"G.{name}"])


def test_a_term_of_some_steps_has_their_mean():
    losses = Losses()
    losses.add({"judge": 1.0, "r1": 3.0})
    losses.add({"judge": 2.0})
    assert losses.means() == {"judge": 1.5, "r1": 3.0}


def test_test_pictures_in_another_order_of_classes_have_the_labels_of_training(
    data: Path, tmp_path: Path
):
    h5py, test = pytest.importorskip("h5py"), tmp_path / "test.h5"
    with h5py.File(test, "w") as file:
        file["imgs"] = np.zeros((3, 3, 8, 8), np.uint8)
        file["labels"] = np.array([0, 1, 2])
        file.attrs["classes"] = ["c", "a", "b"]
    options = get_trainer("gan").options(data=data, test=test, test_per_class=1, **SIZES)
    assert options.class_set("test").names == ("a", "b", "c")
    assert [own.label for own in options.class_set("test").pictures] == [2, 0, 1]


def test_from_scratch_transferi2i_reconstructs_as_deepi2i():
    options = get_trainer("transferi2i").options
    assert options(**SIZES).alphas() == {4: 1.0, 8: 1.0}
    assert options(**SIZES, scratch=True).alphas() == {4: 0.1, 8: 0.01}
    assert options(**SIZES, scratch=True, alpha=1.0).alphas() == {4: 1.0, 8: 0.01}


def test_an_average_of_a_start_says_how_it_is_begun_with(data: Path, gan: Path, tmp_path: Path):
    start = tmp_path / "averaged.safetensors"
    session("gan", data, gan, ema=0.9).save(start)
    with pytest.raises(MismatchError, match="init_from takes it, G: file:G_ema"):
        session("deepi2i", data, start)
    given = {"G": Path(f"{start}:G_ema"), "D": start, "E": Path(f"{start}:D")}
    own = session("deepi2i", data, init_from=given)
    assert np.array_equal(
        flat(own)["G.linear.weight"].numpy(), load_file(start)["G_ema.linear.weight"]
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ch": 4}, "ch is 4, but must be at least 8"),
        ({"adaptor": ()}, "adaptor names no side"),
        ({"classes": ("a",)}, "one class: there is none to translate into"),
        ({"classes": ("a",), "test": Path("x"), "evaluate": ["collapse"]}, "two classes or more"),
        ({"average": "instead"}, "there is none without ema"),
        ({"adaptor": (16,)}, "adaptor has 16, but there are maps of 4, 8"),
        ({"n_down": 4}, "n_down is 4, but must be 2 to 3 for 32 pixels"),
        ({"size": 32}, "no features of 4 × 4: 32s have"),
        ({"rec_pairs": "official", "batch": 1}, "compares the first two of a batch, which is 1"),
        ({"decay_epochs": 1}, "beside them decay_epochs is 0"),
    ],
)
def test_options_that_fit_no_network_are_told(data: Path, options: dict[str, object], said: str):
    with pytest.raises((ValueError, ParameterError), match=said):
        session("deepi2i", data, **options)


def test_a_translator_of_one_kind_is_not_begun_with_another(data: Path, gan: Path):
    with pytest.raises(MismatchError, match="ch 16"):
        session("deepi2i", data, gan, ch=16)


def test_a_whole_pipeline_is_one_plan_that_is_not_made_twice(data: Path, tmp_path: Path):
    options = ", ".join(f"{name}: {value}" for name, value in SIZES.items())
    tree = tmp_path / "tree.yaml"
    tree.write_text(
        f"""soup: 1
models:
  gan: {{train: {{trainer: gan, data: {data}, {options}, encoder: true}}}}
  other: {{train: {{trainer: gan, data: {data}, {options}, encoder: true}}}}
  parts: {{of: [gan, other], merge: {{layers: {{"E.*": first, rest: second}}}}}}
  fits: {{of: [parts], finetune: {{trainer: self-init, classes: 3, {options}}}}}
tree: {{of: [fits], finetune: {{trainer: transferi2i, data: {data}, {options}}}}}
""",
        "utf-8",
    )

    def soup(*arguments: object) -> str:
        made = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert made.exit_code == 0, made.output
        return made.output

    kept = "--store", tmp_path / "store"
    assert "5 steps to do" in soup("plan", tree, *kept)
    output = tmp_path / "out.safetensors"
    assert "5 nodes computed" in soup("run", tree, "-o", output, *kept)
    assert "0 nodes computed" in soup("run", tree, "-o", output, "--force", *kept)
    saved, classes = open_checkpoint(output), {"a": 0, "b": 1, "c": 2}
    assert {name.partition(".")[0] for name in saved} == {"E", "A", "G", "D"}
    assert json.loads(saved.metadata["modelsoup.classes"]) == classes


def test_a_plan_takes_a_start_of_other_classes_where_it_is_told_to(data: Path, tmp_path: Path):
    options = ", ".join(f"{name}: {value}" for name, value in SIZES.items())
    own = f"trainer: gan, data: {data}, {options}"
    tree = tmp_path / "tree.yaml"

    def carried_out(more: str) -> Result:
        tree.write_text(
            f"""soup: 1
models:
  gan: {{train: {{{own}}}}}
  fits: {{of: [gan], finetune: {{trainer: self-init, classes: 2, {options}{more}}}}}
tree: {{of: [fits], finetune: {{trainer: transferi2i, data: {data}, classes: [a, b], {options}}}}}
""",
            "utf-8",
        )
        words = "run", str(tree), "-o", str(tmp_path / "out.safetensors"), "--store"
        return CliRunner().invoke(main, [*words, str(tmp_path / "store")])

    refused = carried_out("")
    assert refused.exit_code == 1
    said = "other shapes for 3 tensors of gan: G.shared.weight, D.embed.weight, D.embed.u0"
    assert f"{said} (class_rows: resize takes them)" in refused.output
    made = carried_out(", class_rows: resize")
    assert made.exit_code == 0, made.output
    saved = open_checkpoint(tmp_path / "out.safetensors")
    assert saved.tensors["G.shared.weight"].shape == (2, 8)
    assert json.loads(saved.metadata["modelsoup.classes"]) == {"a": 0, "b": 1}


# Merges.


@pytest.fixture(scope="module")
def other(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another GAN, whose weights have singular values as unlike as those of a trained one."""
    own, output = session("gan", data, init=5), tmp_path_factory.mktemp("gan") / "other.safetensors"
    for weight in own._module.parameters():
        if weight.dim() > 1:
            fading = 4 * 0.8 ** torch.arange(len(weight))
            weight.data.mul_(fading.view(-1, *[1] * (weight.dim() - 1)))
    own.save(output)
    return output


def largest(values: np.ndarray) -> float:
    """What numpy's SVD says that a weight is divided by."""
    return float(np.linalg.svd(values.reshape(len(values), -1), compute_uv=False)[0])


def by_vector(values: np.ndarray, vector: np.ndarray) -> float:
    """What a step of power iteration makes of it, from a left vector."""
    matrix = values.reshape(len(values), -1)
    right = vector @ matrix
    return float(np.linalg.norm(right @ matrix.T) / max(np.linalg.norm(right), 1e-9))


def divisors(network: torch.nn.Module) -> dict[str, float]:
    """What each weight is divided by in use."""
    network.eval()
    layers = {n: own for n, own in network.named_modules() if isinstance(own, Spectral)}
    with torch.no_grad():
        return {n: float(own.weight.norm() / own.divided().norm()) for n, own in layers.items()}


def test_spectral_norms_of_a_merge_are_those_of_its_weights(
    data: Path, gan: Path, other: Path, tmp_path: Path
):
    trainer = get_trainer("gan")
    options = trainer.options(data=data, **SIZES)
    halves, averages = tmp_path / "halves.safetensors", tmp_path / "averages.safetensors"
    warned = merge([gan, other], averages).notices
    report = merge([gan, other], halves, estimates=trainer.estimates(options))
    vectors = {n for own in warned if own.kind == "recalibrate" for n in own.names}
    vectors = {name for name in vectors if "stored" not in name}
    assert [set(own.names) for own in report.notices if own.kind == "estimates"] == [vectors]
    made, averaged = open_checkpoint(halves), open_checkpoint(averages)
    assert made.tensors.keys() == averaged.tensors.keys() - vectors
    given = [{"start": halves}, {"init_from": {"G": halves, "D": averages}}]
    begun = [session("gan", data, **own) for own in given]
    off = []
    for network in "GD":
        told = trainer.networks(options)[network]
        loaded = [load_network(file, network, told) for file in (halves, averages)]
        loaded += [own._module[network] for own in begun]
        every = list(map(divisors, loaded))
        assert every[0]
        for name in every[0]:
            weight = made[f"{network}.{name}.weight"]
            expected = [pytest.approx(largest(weight), rel=0.04)] * len(every)
            assert [found[name] for found in every] == expected, name
            mean = by_vector(weight, averaged[f"{network}.{name}.u0"][0])
            off.append(abs(mean / largest(weight) - 1))
    assert max(off) > 0.3  # by the mean of the vectors
    models = [load_model(file) for file in (halves, averages)]
    given = models[0].given(["one"], 1)
    first, second = (model.made(None, given)[0].astype(int) for model in models)
    assert np.abs(first - second).max() <= 1
