"""StarGAN: its networks, losses and turns, what a checkpoint tells, and official files."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from i2i_domains import make_classes
from i2i_states import first_batch, flat, moved, numbers
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.networks.described import parameters
from modelsoup_i2i.pictures.cache import Pictures
from modelsoup_i2i.pictures.draws import Spot, Uniform
from modelsoup_i2i.trainers.stargan import StarGAN, StarGANOptions
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.turns import Batch
from modelsoup_i2i.use.official_stargan import import_stargan

import modelsoup
from modelsoup import MismatchError

TINY = {
    "size": 16, "width": 4, "blocks": 1, "d_width": 4, "batch": 3, "steps": 10, "device": "cpu",
    "threads": 0, "sheet_every": 0,
}  # fmt: skip
CLASSES = {"ash": 4, "oak": 3, "yew": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data") / "trees", CLASSES, size=20)


def session(data: Path, **more) -> Session:
    return StarGAN().session(StarGANOptions(data=data, **{**TINY, **more}), None, seed=0)


def begun(data: Path, **more) -> tuple[Session, Batch]:
    """A session, and the batch of its first step."""
    own = session(data, **more)
    return own, first_batch(own)


# --- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"classes": 5}, {"G": 8_430_528, "D": 44_762_048}),
        ({"classes": 2}, {"G": 8_414_848 + 2 * 3136, "D": 44_721_088 + 2 * 8192}),
        (
            {"classes": 3, "size": 64, "width": 16, "blocks": 3, "d_width": 16, "d_layers": 4},
            {"G": 311_248, "D": 180_336},
        ),
    ],
)
def test_the_networks_have_the_papers_parameters(options: dict[str, int], expected: dict[str, int]):
    networks = StarGAN().networks(StarGANOptions(**options))
    assert {name: parameters(own.tensors()) for name, own in networks.items()} == expected


def test_tensors_have_the_official_names():
    networks = StarGAN().networks(StarGANOptions(classes=5, blocks=1, width=2, d_width=1, size=64))
    assert networks["G"].shapes() == {
        "main.0.weight": (2, 8, 7, 7), "main.1.weight": (2,), "main.1.bias": (2,),
        "main.3.weight": (4, 2, 4, 4), "main.4.weight": (4,), "main.4.bias": (4,),
        "main.6.weight": (8, 4, 4, 4), "main.7.weight": (8,), "main.7.bias": (8,),
        "main.9.main.0.weight": (8, 8, 3, 3),
        "main.9.main.1.weight": (8,), "main.9.main.1.bias": (8,),
        "main.9.main.3.weight": (8, 8, 3, 3),
        "main.9.main.4.weight": (8,), "main.9.main.4.bias": (8,),
        "main.10.weight": (8, 4, 4, 4), "main.11.weight": (4,), "main.11.bias": (4,),
        "main.13.weight": (4, 2, 4, 4), "main.14.weight": (2,), "main.14.bias": (2,),
        "main.16.weight": (3, 2, 7, 7),
    }  # fmt: skip
    judge = networks["D"].shapes()
    assert judge["conv1.weight"] == (1, 16, 3, 3) and judge["conv2.weight"] == (5, 16, 2, 2)
    assert [n for n in judge if n.endswith("bias")] == [f"main.{2 * n}.bias" for n in range(5)]


def test_what_is_made_depends_on_the_class_and_on_no_other_picture_of_the_batch(data: Path):
    own, b = begun(data)
    generator = own.networks["G"]
    classes = torch.tensor([0, 1, 2])
    with torch.no_grad():
        made = generator(b.x, classes)
        for n in range(3):
            alone = generator(b.x[n : n + 1], classes[n : n + 1])
            torch.testing.assert_close(alone, made[n : n + 1])
        same = generator(b.x[:1].expand(3, -1, -1, -1), classes)
        vectors = generator(b.x, torch.eye(3))
    assert torch.equal(vectors, made)
    # Norms that took the maps of classes away would leave one picture.
    assert all(float((same[n] - same[n - 1]).abs().max()) > 1e-3 for n in range(3))


def test_pictures_whose_sides_are_no_multiples_of_four_are_made_of_their_size(data: Path):
    own, b = begun(data)
    with torch.no_grad():
        made = own["G"](b.x[..., :13], b.c)
        edge = torch.nn.functional.pad(b.x[..., :13], (0, 3, 0, 0), mode="reflect")
        assert torch.equal(made, own["G"](edge, b.c)[..., :13])


# --- losses and turns --------------------------------------------------------------------------


def test_the_discriminators_loss_is_the_papers(data: Path):
    own, b = begun(data)
    generator, judge = own.networks["G"], own.networks["D"]
    told = {**StarGAN().judge(own, b), **StarGAN().penalty(own, b)}
    with torch.no_grad():
        fake = generator(b.x, b.target)
    real_verdicts, logits = judge(b.x)
    fake_verdicts, _ = judge(fake)
    picked = logits.log_softmax(1)[range(3), b.c]
    expected = {"judge": fake_verdicts.mean() - real_verdicts.mean(), "class_real": -picked.mean()}
    squares = []
    for real, made, share in zip(b.x, fake, b.share, strict=True):
        mixed = (share * real + (1 - share) * made)[None].requires_grad_()
        (slope,) = torch.autograd.grad(judge(mixed)[0].sum(), mixed)
        squares.append((float(slope.norm()) - 1) ** 2)
    expected["penalty"] = torch.tensor(np.mean(squares))
    assert numbers(told) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-6)
    assert own.weights == {"penalty": 10, "class": 1, "class_real": 1, "rec": 10}


def test_the_generators_loss_is_the_papers(data: Path):
    own, b = begun(data)
    generator, judge = own.networks["G"], own.networks["D"]
    StarGAN().judge(own, b)
    told = StarGAN().translate(own, b)
    made = generator(b.x, b.target)
    verdicts, logits = judge(made)
    picked = logits.log_softmax(1)[range(3), b.target]
    back = generator(made, b.c)
    expected = {
        "gan": -verdicts.mean(), "class": -picked.mean(), "rec": (back - b.x).abs().mean(),
    }  # fmt: skip
    assert numbers(told) == pytest.approx(numbers(expected), rel=1e-5)


def test_what_is_aimed_at_are_the_batchs_own_classes_in_another_order(data: Path):
    own = session(data, batch=9)
    orders = []
    for group in zip(range(4), own.batches(), strict=False):
        own.begin()
        b = Batch(group[1][0])
        StarGAN().judge(own, b)
        assert Counter(b.target.tolist()) == Counter(b.c.tolist()) == {0: 4, 1: 3, 2: 2}
        orders.append(tuple(b.order.argsort().tolist()))
    assert len(set(orders)) == 4 and tuple(range(9)) not in orders


def test_the_generator_moves_in_each_fifth_step_on_the_batch_of_that(data: Path):
    own = session(data)
    assert [moved(own) for _ in range(10)] == 2 * [*[{"D"}] * 4, {"G", "D"}]
    often = session(data, n_critic=1)
    assert moved(often) == {"G", "D"}


def test_a_step_that_is_made_again_is_the_same(data: Path):
    first, second = (session(data, n_critic=1) for _ in range(2))
    for own in (first, second):
        torch.manual_seed(id(own) % 1000)  # what it draws is no business of torch's generator
        own.optimise(next(own.batches()))
    after = flat(second)
    assert all(torch.equal(values, after[name]) for name, values in flat(first).items())


def test_rates_fall_in_the_second_half_or_not_at_all(data: Path):
    options = StarGANOptions(classes=5)
    assert (options.steps, options.lr, options.batch, options.n_critic) == (200_000, 1e-4, 16, 5)
    paces = [options.pace(0, step) for step in (0, 99_999, 100_000, 150_000, 199_999, 300_000)]
    assert paces == pytest.approx([1, 1, 1, 0.5, 1e-5, 0])
    assert {replace(options, rate="constant").pace(0, step) for step in (0, 199_999)} == {1}
    epochs = replace(options, steps=None, epochs=4)
    assert [epochs.pace(epoch, 99) for epoch in range(4)] == [1, 1, 1, 0.5]
    falling = replace(options, rate="constant", steps=10, decay_steps=10)
    assert falling.pace(0, 19) == pytest.approx(1 / 11)


def test_uniform_numbers_are_drawn_by_their_place_and_name(data: Path):
    own = session(data)
    pictures: Pictures = own.pictures
    draw = Uniform(("p", "q"), (500,))
    spot = Spot(7, 0, 3, np.arange(9))
    p, q = draw.at(pictures, spot)
    assert p.dtype == np.float32 and p.shape == (500,)
    assert 0 <= p.min() < 0.02 and 0.98 < p.max() < 1 and abs(p.mean() - 0.5) < 0.05
    assert np.array_equal(p, Uniform(("p",), (500,)).at(pictures, spot)[0])
    assert abs(np.corrcoef(p, q)[0, 1]) < 0.2
    assert not np.array_equal(p, draw.at(pictures, replace(spot, index=4))[0])
    (one,) = Uniform(("p",)).at(pictures, spot)
    assert one.dtype == np.float32 and one.shape == ()


# --- checkpoints -------------------------------------------------------------------------------


def shapes_of(options: StarGANOptions) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in StarGAN().tensors(options).items()}


def test_a_checkpoint_tells_the_options_that_it_decides():
    given = {"classes": 3, "channels": 1, "size": 48, "width": 6, "blocks": 2, "d_width": 5,
             "d_layers": 3}  # fmt: skip
    shapes = shapes_of(StarGANOptions(**given))
    assert StarGAN().options_in(shapes) == given
    generator = {name: own for name, own in shapes.items() if name.startswith("G.")}
    of_generator = ("classes", "channels", "width", "blocks")
    assert StarGAN().options_in(generator) == {name: given[name] for name in of_generator}


def test_what_is_none_of_its_networks_is_told_by_a_tensor():
    shapes = shapes_of(StarGANOptions(classes=3, width=4, blocks=1, size=16, d_width=4))
    for changed, said in (
        ({}, "has no main.0.weight of four dimensions"),
        ({**shapes, "G.main.1.weight": (5,)}, r"main.1.weight has the shape \[5\], where \[4\]"),
        ({**shapes, "G.main.0.weight": (4, 2, 7, 7)}, "makes 3 channels, but sees only 2"),
        ({**shapes, "D.conv2.weight": (3, 9)}, "'D' has no main.0.weight and conv2.weight of four"),
        ({**shapes, "D.conv2.bias": (3,)}, r"'D' has conv2.bias \[3\], which such a network lacks"),
    ):
        with pytest.raises(MismatchError, match=said):
            StarGAN().options_in(changed)


def test_groups_divide_the_generator_and_the_discriminator():
    from fnmatch import fnmatchcase

    options = StarGANOptions(classes=3, blocks=3, d_layers=5)
    names, groups = shapes_of(options), StarGAN().groups(options)
    for parts, whole in (
        (("encoder", "middle", "decoder"), "G."),
        (("discriminator-low", "discriminator-high"), "D."),
    ):
        of = {
            name: [part for part in parts if any(fnmatchcase(name, p) for p in groups[part])]
            for name in names if name.startswith(whole)
        }  # fmt: skip
        assert {len(found) for found in of.values()} == {1}
        assert {found[0] for found in of.values()} == set(parts)
    assert groups["low-level"] == [*groups["encoder"], *groups["discriminator-low"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": ("oak",)}, "one class: there is none to translate into"),
        ({"d_layers": 5}, "d_layers is 5, but 16 pixels are halved to one in 4"),
        ({"decay_steps": 5}, "rate is linear, and decay_steps says otherwise: rate: constant"),
        ({"halve_every": 5}, "rate is linear, and halve_every says otherwise"),
    ],
)
def test_options_that_fit_nothing_are_told(data: Path, options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        StarGANOptions(data=data, **{**TINY, **options})


# --- official files ----------------------------------------------------------------------------


def official(folder: Path, own: Session, step: int, networks: str = "GD") -> Path:
    """What the official code would have saved, with the statistics that its norms keep."""
    folder.mkdir(exist_ok=True)
    for network in networks:
        state = own.networks[network].state_dict()
        kept = dict(state)
        for name, values in state.items():
            if values.ndim == 1 and name.endswith(".weight"):
                place = name.removesuffix(".weight")
                kept[f"{place}.running_mean"] = torch.full_like(values, 7)
                kept[f"{place}.running_var"] = torch.full_like(values, 9)
                kept[f"{place}.num_batches_tracked"] = torch.tensor(5)
        torch.save(kept, folder / f"{step}-{network}.ckpt")
    return folder


def test_an_official_folder_becomes_a_checkpoint_that_translates(data: Path, tmp_path: Path):
    own = session(data)
    folder = official(tmp_path / "models", own, 200000)
    output = tmp_path / "out.safetensors"
    done = CliRunner().invoke(i2i, ["import", "stargan", str(folder), str(output)])
    assert done.exit_code == 0, done.output
    assert "MIT" in done.output and "G: " in done.output and "D: " in done.output
    made = modelsoup.open_checkpoint(output)
    expected = flat(own)
    assert set(made.tensors) == set(expected)
    assert all(np.array_equal(made[name], values) for name, values in expected.items())
    told = StarGAN().options_of(output)  # beside data, classes are names of those
    assert (told["size"], told["d_layers"], "classes" in told) == (16, 3, False)
    assert StarGAN().options_in({n: i.shape for n, i in made.tensors.items()})["classes"] == 3


def test_the_last_step_of_a_folder_is_taken_or_the_one_that_is_named(data: Path, tmp_path: Path):
    early, late = session(data), session(data, init=1)
    folder = official(tmp_path / "models", early, 9000)
    official(folder, late, 10000, "G")
    output, said = tmp_path / "out.safetensors", []
    counts = import_stargan(folder, output, say=said.append)
    assert list(counts) == ["G"]
    assert "step 10000, the last of 2" in said[0] and "has no D" in said[1]
    name = "G.main.0.weight"
    taken = modelsoup.open_checkpoint(output)[name]
    assert np.array_equal(taken, flat(late)[name])
    import_stargan(folder, output, step=9000, force=True, say=said.append)
    taken = modelsoup.open_checkpoint(output)[name]
    assert np.array_equal(taken, flat(early)[name])


def test_what_is_no_official_folder_is_told(data: Path, tmp_path: Path):
    output = tmp_path / "out.safetensors"
    folder = official(tmp_path / "models", session(data), 10)
    with pytest.raises(modelsoup.CheckpointError, match=r"step 11 \(it has those of 10"):
        import_stargan(folder, output, step=11)
    with pytest.raises(modelsoup.CheckpointError, match="does not exist, where a folder with"):
        import_stargan(tmp_path / "none", output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(modelsoup.CheckpointError, match=r"no generator, such as 200000-G\.ckpt"):
        import_stargan(tmp_path / "empty", output)
    official(folder, session(data, classes=("ash", "oak")), 10, "D")
    with pytest.raises(MismatchError, match="classes 3 of G, 2 of D"):
        import_stargan(folder, output)
    torch.save(session(data).networks["D"].state_dict(), folder / "10-G.ckpt")
    with pytest.raises(MismatchError, match=r"10-G\.ckpt: the generator"):
        import_stargan(folder, output)
    assert not output.exists()
