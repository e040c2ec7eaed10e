"""MUNIT: its networks' counts and scales, its losses by hand, who moves, and what is refused."""

import math
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from i2i_domains import make_domains
from i2i_states import moved
from modelsoup_i2i.networks.munit import Discriminator
from modelsoup_i2i.trainers.munit import MUNIT, MUNITOptions
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.turns import Batch
from torch.nn import functional

import modelsoup

torch.set_num_threads(1)  # tiny networks have nothing for a second one
TINY = {
    "width": 4, "blocks": 1, "style": 3, "mlp": 8, "d_width": 4, "d_layers": 2, "d_scales": 2,
    "load_size": 18, "crop_size": 16, "steps": 2, "sheet_every": 0, "threads": 1, "device": "cpu",
}  # fmt: skip
SPEC = {"width": 16, "mlp": 64, "blocks": 2, "d_width": 16, "d_layers": 3, "d_scales": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))


def session(data: Path, **given) -> Session:
    own = MUNIT().session(MUNITOptions(data=data, **(TINY | given)), None, seed=0)
    own.begin()
    return own


def drawn(style: int = 3, side: int = 16) -> Batch:
    torch.manual_seed(5)
    images = {way: torch.rand(2, 3, side, side) * 2 - 1 for way in "ab"}
    return Batch(images | {name: torch.randn(2, style) for name in ("s_a", "s_b")})


@pytest.mark.parametrize(
    ("options", "parts", "judge"),
    [
        ({}, (5_385_856, 2_764_936, 5_754_627, 1_120_768), 8_271_171),
        (SPEC, (191_136, 175_144, 214_211, 38_016), 83_810),
    ],
)
def test_all_networks_have_the_official_counts(options, parts, judge):
    found: Counter[str] = Counter()
    for name, (_, shape) in MUNIT().tensors(MUNITOptions(**options)).items():
        part = name.split(".")[: 2 if name.startswith("G") else 1]
        found[".".join(part)] += math.prod(shape)
    each = dict(zip(("content", "style", "decoder", "mlp"), parts, strict=True))
    each = {f"G_{domain}.{part}": count for domain in "AB" for part, count in each.items()}
    assert found == {**each, "D_A": judge, "D_B": judge}


def test_each_scale_sees_means_over_what_is_there_and_no_padding():
    judge = Discriminator(width=4, layers=1, scales=2)
    images = torch.rand(1, 3, 8, 8)
    smaller = torch.empty(1, 3, 4, 4)
    for y in range(4):
        for x in range(4):
            rows = slice(max(2 * y - 1, 0), 2 * y + 2), slice(max(2 * x - 1, 0), 2 * x + 2)
            smaller[..., y, x] = images[(..., *rows)].mean((-2, -1))
    first, second = judge(images)
    torch.testing.assert_close(first, judge.scales[0](images))
    torch.testing.assert_close(second, judge.scales[1](smaller))
    assert first.shape == (1, 1, 4, 4) and second.shape == (1, 1, 2, 2)


def test_a_generators_weights_begin_by_hes_rule_and_a_discriminators_at_002(data: Path):
    own = session(data, width=32, d_width=32)
    of_g = own.networks["G_A"].content.model[2].conv.weight  # 64 → 128, 4 × 4
    assert float(of_g.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 16)), rel=0.02)
    of_d = own.networks["D_A"].scales[0][2].weight
    assert float(of_d.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not own.networks["D_A"].scales[0][2].bias.any()


def lsgan(verdicts: list[torch.Tensor], target: float) -> torch.Tensor:
    return sum(((each - target) ** 2).mean() for each in verdicts)


@pytest.mark.parametrize("way", ["a", "b"])
@pytest.mark.parametrize("cycle", [0.0, 10.0])
def test_the_losses_are_those_of_the_paper(data: Path, way: str, cycle: float):
    """And so are their gradients: no target is detached."""
    own, b = session(data, lambda_cycle=cycle), drawn()
    x, s = (b.a, b.s_b) if way == "a" else (b.b, b.s_a)
    real = b.b if way == "a" else b.a
    names = ("G_A", "G_B", "D_B") if way == "a" else ("G_B", "G_A", "D_A")
    source, target, judge = (own.networks[name] for name in names)

    def decoded(network, content, style):
        return network.decoder(content, network.mlp(style))

    content, style = source.content(x), source.style(x)
    fake = decoded(target, content, s)
    by_hand = {
        "gan": lsgan(judge(fake), 1),
        "image": (decoded(source, content, style) - x).abs().mean(),
        "style": (target.style(fake) - s).abs().mean(),
        "content": (target.content(fake) - content).abs().mean(),
    }
    if cycle:
        back = decoded(source, target.content(fake), style)
        by_hand["cycle"] = (back - x).abs().mean()
    judged = lsgan(judge(fake.detach()), 0) + lsgan(judge(real), 1)

    made = MUNIT().translate(own, b, way=way)
    assert made.keys() == {f"{name}_{way}" for name in by_hand}
    for name, value in by_hand.items():
        torch.testing.assert_close(made[f"{name}_{way}"], value)
    torch.testing.assert_close(MUNIT().judge(own, b, way=way)[f"judge_{way}"], judged)

    weights = {"gan": 1, "image": 10, "style": 1, "content": 1, "cycle": cycle}
    assert {n: own.weights[f"{n}_{way}"] for n in by_hand} == {n: weights[n] for n in by_hand}
    parameters = [*source.parameters(), *target.parameters()]
    gradients = (
        torch.autograd.grad(sum(weights[n] * each[n + end] for n in by_hand), parameters)
        for each, end in ((by_hand, ""), (made, f"_{way}"))
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


def test_a_discriminators_loss_reaches_the_discriminators_and_each_turn_moves_its_own(data: Path):
    own, b = session(data), drawn()
    judged = MUNIT().judge(own, b, way="a")["judge_a"]
    reached = torch.autograd.grad(
        judged, list(own._module.parameters()), allow_unused=True, retain_graph=True
    )
    names = [name for name, _ in own._module.named_parameters()]
    told = {name.partition(".")[0] for name, g in zip(names, reached, strict=True) if g is not None}
    assert told == {"D_B"}
    turns = MUNIT().turns(own.options, 0)
    assert [(turn.name, turn.players) for turn in turns] == [("judge", ("D",)),
                                                             ("generator", ("G",))]  # fmt: skip
    assert moved(own) == {"G_A", "G_B", "D_A", "D_B"}


def test_a_step_in_bf16_tells_what_one_in_float32_does(data: Path):
    told = []
    for precision in (32, "bf16"):
        own = session(data, precision=precision, lambda_cycle=1.0)
        told.append(own.optimise([vars(drawn())]))
    assert told[0] == pytest.approx(told[1], rel=0.1, abs=0.02)


def test_pictures_of_any_size_are_trained_on_as_they_are(data: Path):
    own = session(data, mode="none")
    assert moved(own) == {"G_A", "G_B", "D_A", "D_B"}
    odd = drawn(side=30)
    continued = Batch({**vars(odd), "a": functional.pad(odd.a, (0, 2, 0, 2), mode="reflect")})
    one, other = (MUNIT().translate(own, b, way="a") for b in (odd, continued))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_translation_has_the_content_of_one_domain_and_a_style_of_the_other(data: Path):
    own = session(data)
    how = MUNIT().translators(own.options)
    assert [(n, t.source, t.target) for n, t in how.items()] == [
        ("T_AB", "X", "Y"), ("T_BA", "Y", "X")
    ]  # fmt: skip
    assert how["T_AB"].style.of_pictures == "S_B" and how["T_AB"].style.noise == 3
    b = drawn()
    style = own.networks["S_B"](b.b)
    content, of_a = own.networks["G_A"](b.a)
    assert style.shape == of_a.shape == (2, 3)
    by_hand = own.networks["R_B"](content, style)
    torch.testing.assert_close(own.networks["T_AB"](b.a, style), by_hand)
    assert not torch.equal(own.networks["T_AB"](b.a, b.s_b), by_hand)
    # In a training too, whatever the size.
    assert own["T_AB"](b.a[..., :15, :14], style).shape == (2, 3, 15, 14)


def test_groups_name_every_tensor_and_parts_name_each_once():
    o = MUNITOptions(**TINY)
    groups, names = MUNIT().groups(o), list(MUNIT().tensors(o))
    for parts in (("content", "style", "mlp", "decoder", "discriminator"), ("A", "B"),
                  ("generator", "discriminator")):  # fmt: skip
        patterns = [pattern for part in parts for pattern in groups[part]]
        assert all(sum(fnmatchcase(n, own) for own in patterns) == 1 for n in names)


def test_a_checkpoint_tells_its_options():
    o = MUNITOptions(**(TINY | SPEC | {"style": 5, "channels": 1}))
    shapes = {name: shape for name, (_, shape) in MUNIT().tensors(o).items()}
    wanted = {**SPEC, "style": 5, "channels": 1}
    assert MUNIT().options_in(shapes) == wanted
    of_b = {name: shape for name, shape in shapes.items() if name.startswith("G_B.")}
    assert MUNIT().options_in(of_b) == {n: v for n, v in wanted.items() if n[:2] != "d_"}
    del of_b["G_B.mlp.model.1.fc.bias"]
    with pytest.raises(modelsoup.MismatchError, match=r"'G_B' lacks mlp\.model\.1\.fc\.bias"):
        MUNIT().options_in(of_b)
    with pytest.raises(modelsoup.MismatchError, match="the first layers of MUNIT's networks"):
        MUNIT().options_in({"G_A.model.1.weight": (4, 3, 7, 7)})
    with pytest.raises(modelsoup.MismatchError, match=r"'D_A' has no scales\.0\.0\.weight"):
        MUNIT().options_in({**of_b, "D_A.model.0.weight": (4, 3, 4, 4)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop_size": 12}, "crop_size is 12, but the style encoders need 16 at least"),
        ({"d_layers": 4}, "16 is too small for discriminators of 4 layers at 2 scales"),
        ({"d_scales": 4}, r"at 4 scales \(fewer d_layers or d_scales see smaller images\)"),
        ({"lambda_cycle": -1}, "lambda_cycle is -1, but must be at least 0"),
    ],
)
def test_sizes_that_fit_no_network_are_told(options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        MUNITOptions(**(TINY | options))


def test_the_smallest_pictures_that_are_taken_are_judged_at_every_scale(data: Path):
    verdicts = session(data, d_layers=3, d_scales=2).networks["D_A"](drawn().a)
    assert [tuple(each.shape[2:]) for each in verdicts] == [(2, 2), (1, 1)]


def test_the_papers_recipe_is_the_default():
    o = MUNITOptions()
    assert (o.steps, o.halve_every, o.lr, o.weight_decay, o.batch) == (10**6, 10**5, 1e-4, 1e-4, 1)
    player = MUNIT().players(o)["G"]
    assert player.optimiser == "Adam"
    assert player.settings == {"betas": (0.5, 0.999), "weight_decay": 1e-4}
    assert (o.lambda_image, o.lambda_cycle, o.d_layers, o.d_scales) == (10, 0, 4, 3)
