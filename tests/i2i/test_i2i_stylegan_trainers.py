"""GANs, DeepI2I and TransferI2I on StyleGAN: one domain a network, one model a direction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from click.testing import CliRunner
from i2i_domains import make_classes
from i2i_states import flat, moved, silent
from modelsoup_i2i.networks.stylegan import Auxiliary
from modelsoup_i2i.training import estimates
from modelsoup_i2i.training.losses import deceive, gradient_penalty, judge
from modelsoup_i2i.training.state import State
from modelsoup_i2i.training.turns import Batch
from modelsoup_i2i.use.generators import load_generator

from modelsoup import MismatchError, ParameterError, TrainerError, get_trainer, open_checkpoint
from modelsoup.terminal.cli import main

torch.set_num_threads(1)
SIZES = {
    "network": "stylegan", "size": 64, "width": 8, "code": 8, "depth": 2, "batch": 2, "steps": 2,
    "sheet_every": 0,
}  # fmt: skip
BETWEEN = {"source": "cat", "target": "dog"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("classes"), {"cat": 3, "dog": 4, "owl": 2}, 70)


def session(
    trainer: str, data: Path | None, start: Path | None = None, work: Path | None = None,
    **options: object,
) -> State:  # fmt: skip
    made = get_trainer(trainer)
    between = BETWEEN if trainer in ("deepi2i", "transferi2i") else {}
    given = made.options(data=data, **(SIZES | between | options))
    return made.session(given, start, seed=1, work=work)


@pytest.fixture(scope="module")
def gan(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own, output = session("gan", data, classes=("dog",)), tmp_path_factory.mktemp("gan")
    own.run(silent, silent)
    own.save(output / "gan.safetensors")
    return output / "gan.safetensors"


def first_of(own: State) -> Batch:
    """A batch, for networks that draw nothing themselves."""
    own.begin()
    for network in own._module.values():
        network.eval()
    return Batch(next(own.batches())[0])


# The options.


def test_what_is_not_said_is_the_networks_own():
    trainer = get_trainer("gan").options
    told = ("size", "lr", "d_lr", "beta2", "gan", "lambda_drift")
    for network, usual in (
        ("biggan", (128, 1e-4, 4e-4, 0.999, "hinge", 0.0)),
        ("stylegan", (256, 1e-3, 1e-3, 0.99, "wgan-gp", 1e-3)),
    ):
        assert tuple(getattr(trainer(network=network), name) for name in told) == usual
    assert trainer(network="stylegan", lr=1e-4, gan="hinge").lr == 1e-4
    init = get_trainer("self-init").options
    assert (init(classes=3).d_lr, init(network="stylegan").d_lr) == (1e-4, 1e-3)
    for name, blocks, alpha in (("deepi2i", "deepi2i", 0.1), ("transferi2i", "single", 1.0)):
        own = get_trainer(name).options(network="stylegan")
        assert own.blocks == blocks
        assert own.alphas() == dict.fromkeys((4, 8, 16, 32), alpha)
        assert own.strengths() == dict.fromkeys((4, 8, 16, 32), 0.1)


@pytest.mark.parametrize(
    ("trainer", "options", "said"),
    [
        ("gan", {"ch": 16}, "ch is 16, but stylegan has no such option: biggan has"),
        ("gan", {"class_rows": "resize"}, "class_rows is resize, but stylegan has no such"),
        ("gan", {"network": "biggan", "size": "32s", "code": 512, "depth": 8}, "width is 8, but"),
        ("deepi2i", {"n_down": 3}, "n_down is 3, but stylegan"),
        ("deepi2i", {"rec_pairs": "official"}, "rec_pairs is official, but stylegan"),
        ("deepi2i", {"adaptor": (64,)}, "adaptor has 64, but there are maps of 4, 8, 16, 32"),
        ("deepi2i", {"target": "cat"}, "source and target are both 'cat'"),
        ("deepi2i", {"classes": ("cat", "dog")}, "source and target say which classes are used, n"),
        ("deepi2i", {"source": None}, "source is missing: the class of the source's pictures"),
        ("deepi2i", {"source": "cow"}, "cow"),
        ("gan", {"size": "32s"}, "size is 32s, but a StyleGAN's is 64, 128, 256, 512 or 1024"),
        ("gan", {"freeze_d": 6}, "freeze_d is 6, but D has 5 blocks"),
        ("self-init", {"adaptor": "identity"}, "has no weights to begin with"),
    ],
)  # fmt: skip
def test_options_that_fit_no_stylegan_are_told(
    data: Path, trainer: str, options: dict[str, object], said: str
):
    with pytest.raises((ValueError, ParameterError), match=said):
        session(trainer, data, **options)


def test_a_size_that_there_is_no_biggan_of_is_told():
    for size in (512, 1024):
        with pytest.raises(ValueError, match=f"size is {size}, but a BigGAN's is 32, 32s, 64"):
            get_trainer("gan").options(size=size)


def test_what_the_network_does_not_have_decides_nothing():
    for network, other in (("biggan", "mixing"), ("stylegan", "chunk")):
        told = get_trainer("gan").options(network=network).decisive()
        assert other not in told and told["network"] == network and told["lr"]


# The GAN.


def test_a_gan_learns_from_the_pictures_of_the_classes_that_are_named(data: Path):
    own = session("gan", data, classes=("dog",))
    assert [len(pictures) for pictures in own.pictures.sets.values()] == [4]
    assert own.classes == ()
    assert moved(own) == {"G", "D"}
    (how,) = own.trainer.translators(own.options).values()
    assert (how.source, how.classes, [d.names for d in how.takes]) == (None, 0, [("z",)])
    own.begin()
    batch = next(own.batches())[0]
    assert batch["z_d"].shape == (2, 8) and not batch["c_d"].any()


def test_a_judge_that_compares_pictures_sees_real_and_made_ones_apart(data: Path):
    own = session("gan", data)
    batch = first_of(own)
    made = own["G"](batch.z_d).detach()
    of_real, of_made = (own._module["D"](images) for images in (batch.y, made))
    assert not torch.allclose(own._module["D"](torch.cat([made, batch.y]))[2:], of_real)
    torch.manual_seed(0)
    losses = own.trainer.judge(own, batch)
    torch.testing.assert_close(losses["judge"], judge(of_real, of_made, "wgan-gp"))
    torch.testing.assert_close(losses["judge"], (of_made - of_real).mean())
    torch.testing.assert_close(losses["drift"], of_real.square().mean())
    torch.manual_seed(0)
    penalty = gradient_penalty(own._module["D"], batch.y, made, torch.rand(2))
    torch.testing.assert_close(losses["penalty"], penalty)
    assert (own.weights["penalty"], own.weights["drift"]) == (10.0, 1e-3)
    torch.testing.assert_close(
        own.trainer.make(own, batch)["gan"],
        deceive(own._module["D"](own["G"](batch.z_g)), "wgan-gp"),
    )


def test_the_non_saturating_loss_goes_with_r1_and_without_a_penalty(data: Path):
    own = session("gan", data, gan="softplus", lambda_r1=10.0, r1_every=2)
    told: list[dict[str, float]] = [{}, {}]
    for losses in told:
        moved(own, losses)
    assert set(told[0]) == {"judge", "r1", "discriminator", "gan"}
    assert set(told[1]) == {"judge", "gan"}
    assert own.weights["r1"] == 20.0


def test_the_mapping_network_learns_at_a_hundredth_of_the_rate(data: Path):
    own = session("gan", data, lr=1e-2)
    before = flat(own)
    moved(own)
    steps = {name: (value - before[name]).abs().max().item() for name, value in flat(own).items()}
    # Adam's first step is the rate, whatever the gradient.
    assert steps["G.style.1.linear.weight_orig"] == pytest.approx(1e-4, rel=0.01)
    assert steps["G.generator.progression.1.conv2.conv.weight_orig"] == pytest.approx(1e-2, rel=0.1)


def test_the_first_blocks_of_a_stylegans_judge_can_stay(data: Path):
    own = session("gan", data, freeze_d=2)
    before = flat(own)
    moved(own)
    still = {
        ".".join(name.split(".")[1:3]) for name, value in flat(own).items()
        if name.startswith("D.") and name.endswith("weight_orig")
        and torch.equal(value, before[name])
    }  # fmt: skip
    assert still == {"from_rgb.4", "progression.4", "progression.5"}


def test_a_page_shows_pictures_that_are_made_of_noise(data: Path, tmp_path: Path):
    from modelsoup_i2i.pictures.images import read_image

    own = session("gan", data, work=tmp_path)
    own.sheet()
    page = read_image(tmp_path / "samples" / "step-0000000.png")
    assert page.shape[1] > 4 * 64 and page.shape[0] < 3 * 64


def test_a_gan_is_told_by_its_checkpoint_and_its_generator_can_be_used(gan: Path, tmp_path: Path):
    assert "modelsoup.classes" not in open_checkpoint(gan).metadata
    found = get_trainer("gan").options_of(gan)
    wanted = {"network": "stylegan", "size": 64, "width": 8, "code": 8, "depth": 2}
    assert {name: found[name] for name in wanted} == wanted
    assert found["rgb_activation"] is True
    generator = load_generator(gan)
    z = torch.randn(2, 8)
    assert generator(z).shape == (2, 3, 64, 64)
    saved = open_checkpoint(gan)
    style = generator.state_dict()["style.1.linear.weight_orig"].numpy()
    assert np.array_equal(style, saved["G.style.1.linear.weight_orig"])


def test_an_older_judge_without_activation_is_kept_as_it_is(data: Path, tmp_path: Path):
    older = session("gan", data, rgb_activation=False, encoder=True)
    older.save(tmp_path / "older.safetensors")
    with pytest.raises(MismatchError, match="the start has rgb_activation: False"):
        session("gan", data, tmp_path / "older.safetensors", encoder=True)
    own = session(
        "gan", data, tmp_path / "older.safetensors", encoder=True, rgb_activation=False
    )  # fmt: skip
    assert not own.missing
    assert all(torch.equal(value, flat(older)[name]) for name, value in flat(own).items())


def test_a_checkpoint_of_the_other_network_is_refused_and_named(data: Path, gan: Path):
    with pytest.raises(MismatchError, match="the start has network: stylegan, size: 64"):
        get_trainer("gan").session(
            get_trainer("gan").options(data=data, size="32s", ch=8), gan, seed=1
        )


# DeepI2I.


def test_pictures_are_drawn_of_the_source_and_of_the_target(data: Path, gan: Path):
    own = session("deepi2i", data, gan)
    assert {n: len(pictures) for n, pictures in own.pictures.sets.items()} == {"cat": 3, "dog": 4}
    files = {name: {str(p) for p in pictures} for name, pictures in own.pictures.sets.items()}
    assert all(f"{name}/" in file for name, own_files in files.items() for file in own_files)
    shades = {0: "cat", 1: "dog"}  # the channel that the squares of a class have
    for (batch,) in own.batches():
        for name, wanted in (("x", "cat"), ("y", "dog")):
            brightest = batch[name].amax((2, 3)).argmax(1).tolist()
            assert [shades[channel] for channel in brightest] == [wanted] * 2
    (how,) = own.trainer.translators(own.options).values()
    assert (how.source, how.target, how.label) == ("cat", "dog", "cat to dog")
    assert [draw.names for draw in how.takes] == [("z",)]


def test_tests_are_held_out_of_both_domains(data: Path):
    given = {**SIZES, **BETWEEN, "data": data, "test_per_class": 1}
    options = get_trainer("deepi2i").options(**given)
    parts = {part: options.images(part) for part in ("train", "test")}
    assert {part: {n: len(p) for n, p in own.items()} for part, own in parts.items()} == {
        "train": {"cat": 2, "dog": 3}, "test": {"cat": 1, "dog": 1},
    }  # fmt: skip
    for name in BETWEEN.values():
        assert not set(parts["train"][name]) & set(parts["test"][name])


def test_adaptor_and_judge_move_first_and_the_encoder_never(data: Path, gan: Path):
    own = session("deepi2i", data, gan, phase1=1)
    assert own.begun_as == {"E": "D"}
    assert own._module["A"].strength.tolist() == pytest.approx([0.1] * 4)
    assert [moved(own) for _ in range(2)] == [{"A", "D"}, {"A", "D", "G"}]


def test_from_scratch_all_of_a_stylegans_networks_move(data: Path):
    own = session("deepi2i", data, scratch=True)
    assert own._module["A"].strength.tolist() == pytest.approx([0.1, 1, 1, 1])
    assert moved(own) == {"E", "A", "D", "G"}


def test_the_maps_of_a_picture_and_its_translation_are_compared(data: Path, gan: Path):
    own = session("deepi2i", data, gan, rec="mse")
    batch = first_of(own)
    losses = own.trainer.judge(own, batch)
    assert set(losses) == {"judge", "penalty", "drift"}
    made = own._joined["T"](batch.x, batch.z_g)
    maps, wanted = (own._module["D"].walk(images) for images in (made, batch.x))
    expected = sum(0.1 * (maps[n] - wanted[n]).square().mean() for n in (4, 8, 16, 32))
    losses = own.trainer.translate(own, batch)
    torch.testing.assert_close(losses["rec"], expected)
    torch.testing.assert_close(losses["gan"], -own._module["D"](made).mean())
    made = own._joined["T"](batch.x, batch.z_d)
    torch.testing.assert_close(
        own.trainer.judge(own, batch)["judge"],
        (own._module["D"](made).mean() - own._module["D"](batch.y).mean()).detach(),
        check_device=False,
    )


@pytest.mark.parametrize(
    "options", [{}, {"blocks": "single"}, {"adaptor": (8, 32)}, {"adaptor": "identity"}]
)
def test_a_translator_is_told_by_its_checkpoint(
    data: Path, gan: Path, tmp_path: Path, options: dict[str, object]
):
    own = session("deepi2i", data, gan, **options)
    own.save(tmp_path / "out.safetensors")
    found = own.trainer.options_of(tmp_path / "out.safetensors")
    wanted = {"network": "stylegan", "size": 64, "width": 8, **options}
    assert {name: found[name] for name in wanted} == wanted
    again = own.trainer.options(**found)
    shapes = {name: shape for name, (_, shape) in own.trainer.tensors(again).items()}
    assert shapes == {n: tuple(i.shape) for n, i in open_checkpoint(
        tmp_path / "out.safetensors").tensors.items()}  # fmt: skip


def test_networks_of_two_models_are_told(data: Path):
    trainer = get_trainer("deepi2i")

    def shapes(**options: object) -> dict[str, tuple[int, ...]]:
        own = trainer.tensors(trainer.options(**(SIZES | options)))
        return {name: shape for name, (_, shape) in own.items()}

    whole, other = shapes(), shapes(width=16)
    for network in "DEA":
        mixed = {n: (other if n.startswith(f"{network}.") else whole)[n] for n in whole}
        said = f"G and {network} do not belong to one model: width is 8 in one and 16 in the other"
        with pytest.raises(MismatchError, match=said):
            trainer.options_in(mixed)


def test_groups_of_layers_are_all_of_a_translator(data: Path):
    from fnmatch import fnmatchcase

    for trainer in map(get_trainer, ("deepi2i", "transferi2i")):
        options = trainer.options(**SIZES)
        names, groups = list(trainer.tensors(options)), trainer.groups(options)
        assert {f"generator-{n}" for n in range(1, 6)} <= set(groups)
        for group, patterns in groups.items():
            assert any(fnmatchcase(n, p) for n in names for p in patterns), group


@pytest.mark.parametrize("trainer", ["gan", "deepi2i", "transferi2i"])
def test_the_memory_that_a_step_needs_is_known_before(data: Path, gan: Path, trainer: str):
    own = session(trainer, data, None if trainer == "gan" else gan)
    batch = next(own.batches())[0]
    needed = estimates.memory(
        own.trainer, own.options, own.weights, batch, device=own.device, early=True, last=1
    )
    assert needed is not None and needed.passing > 2 * 3 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("trainer", "options"),
    [("gan", {"ema": 0.9}), ("deepi2i", {"phase1": 2}), ("transferi2i", {"accumulate": 2}),
     ("self-init", {})],
)  # fmt: skip
def test_a_run_that_goes_on_draws_the_same_noise_and_ends_with_the_same_bits(
    data: Path, gan: Path, tmp_path: Path, trainer: str, options: dict[str, object]
):
    given = {"steps": 3, "checkpoint_every": 1, **options}
    of_all = (trainer, None if trainer == "self-init" else data, None if trainer == "gan" else gan)
    whole = session(*of_all, **given)
    whole.run(silent, silent)
    early = session(*of_all, tmp_path, **given)
    early.optimise(next(early.batches()))
    early.keep()
    later = session(*of_all, tmp_path, **given)
    later.run(silent, silent)
    assert later.steps == whole.steps == 3
    assert all(torch.equal(value, flat(whole)[name]) for name, value in flat(later).items())


# Self-initialisation and TransferI2I.


def test_an_adaptor_alone_learns_what_a_stylegan_had(gan: Path):
    own = session("self-init", None, gan, steps=41, batch=4)
    before = flat(own)
    steps = own.batches()
    losses = [own.optimise(next(steps))["align"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert {n.partition(".")[0] for n, v in flat(own).items() if not torch.equal(v, before[n])} == {
        "A"
    }  # fmt: skip
    batch = first_of(own)
    had = own._module["G"].walk(batch.z)
    made = own._module["A"](own._module["E"](had[64]), plain=True)
    expected = sum((made[n] - had[n]).abs().mean() for n in (4, 8, 16, 32))
    torch.testing.assert_close(own.trainer.align(own, batch)["align"], expected)


def test_the_auxiliary_has_the_first_blocks_and_the_mapping_network_of_the_generator(
    data: Path, gan: Path, tmp_path: Path
):
    own = session("transferi2i", data, gan)
    auxiliary, generator = own._joined["auxiliary"], own._module["G"]
    assert isinstance(auxiliary, Auxiliary) and auxiliary.G.style is generator.style
    both = zip(auxiliary.blocks, generator.generator.progression.values(), strict=True)
    assert [one is other for one, other in both] == [True] * 4 + [False]
    assert own.begun_as == {"E": "D", "X": "G"}
    batch = first_of(own)
    torch.testing.assert_close(auxiliary(batch.z_e), generator(batch.z_e))
    verdicts = own._module["D"](auxiliary(batch.z_e))
    torch.testing.assert_close(
        own.trainer.unmask(own, batch)["aux_judge"], verdicts.mean().detach(), check_device=False
    )
    assert moved(session("transferi2i", data, gan)) == {"A", "D", "G", "X"}
    own.save(tmp_path / "out.safetensors")
    saved = open_checkpoint(tmp_path / "out.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"E", "A", "G", "D"}
    assert own._module["A"].progression["1"].conv.weight_orig.shape == (8, 8, 3, 3)


def test_an_encoder_needs_a_start(data: Path):
    with pytest.raises(TrainerError, match="E is not trained here, so it must begin with weights"):
        session("deepi2i", data).begin()


def test_both_directions_are_plans_of_the_same_two_gans(data: Path, tmp_path: Path):
    options = ", ".join(f"{name}: {value}" for name, value in SIZES.items())

    def gan(name: str) -> str:
        own = f"data: {data}, classes: [{name}], {options}, encoder: true"
        return f"{{train: {{trainer: gan, {own}}}}}"

    tree = tmp_path / "tree.yaml"
    tree.write_text(
        f"""soup: 1
models:
  cat: {gan("cat")}
  dog: {gan("dog")}
  parts: {{of: [cat, dog], merge: {{layers: {{"E.*": first, rest: second}}}}}}
  fits: {{of: [parts], finetune: {{trainer: self-init, {options}}}}}
tree:
  of: [fits]
  finetune: {{trainer: transferi2i, data: {data}, source: cat, target: dog, {options}}}
""",
        "utf-8",
    )

    def soup(*arguments: object) -> str:
        made = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert made.exit_code == 0, made.output
        return made.output

    assert "5 steps to do" in soup("plan", tree, "--store", tmp_path / "store")
    output = tmp_path / "out.safetensors"
    run = ("run", tree, "-o", output, "--store", tmp_path / "store")
    assert "5 nodes computed" in soup(*run)
    assert "0 nodes computed" in soup(*run, "--force")
    assert {name.partition(".")[0] for name in open_checkpoint(output)} == {"E", "A", "G", "D"}


def test_counts_of_a_stylegan_are_told_by_the_command():
    made = CliRunner().invoke(
        main, ["trainers", "deepi2i", "--set", "network=stylegan", "--tensors", "--json"]
    )
    assert made.exit_code == 0, made.output
    networks = json.loads(made.stdout)["networks"]
    counts = {name: own["parameters"] for name, own in networks.items()}
    assert counts == {"E": 18_805_760, "A": 18_878_464, "G": 26_078_403, "D": 25_365_505}
