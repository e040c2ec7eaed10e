"""The plain DeepI2I in `benchmarks/` is the published one, and ours computes what it does."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.networks import biggans
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.deepi2i import DeepI2I, DeepI2IOptions
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
SMALL = {"arch": "64s", "ch": 8, "classes": 4, "chunk": 6, "shared": 10, "attention": 32}


def load_reference():
    path = ROOT / "benchmarks" / "deepi2i_reference.py"
    spec = importlib.util.spec_from_file_location("deepi2i_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deepi2i_reference"] = module
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def original(**more):
    torch.manual_seed(0)
    made = reference.Original(**{**SMALL, **more})
    for network in made.networks().values():
        for name, value in network.named_parameters():
            if name.endswith("gamma"):  # attention is 0 at first: nothing of it would be seen
                torch.nn.init.constant_(value, 0.7)
    return made


def described(arch, ch, classes, chunk, shared, attention) -> dict[str, Network]:
    own, known = {"arch": arch, "ch": ch, "attention": attention}, {"classes": classes}
    return {
        "G": Network(biggans.GENERATOR, own | known | {"chunk": chunk, "shared": shared}),
        "D": Network(biggans.DISCRIMINATOR, own | known),
        "E": Network(biggans.ENCODER, own), "A": Network(biggans.ADAPTOR, {"arch": arch, "ch": ch}),
    }  # fmt: skip


def ours_with(weights) -> dict[str, torch.nn.Module]:
    """Our networks with the tensors of the plain ones."""
    made = {name: network.build() for name, network in described(**SMALL).items()}
    for name, network in made.items():
        lacking = network.load_state_dict(weights.networks()[name].state_dict(), strict=False)
        assert not lacking.unexpected_keys
        assert lacking.missing_keys == (["strength"] if name == "A" else [])
    made["E"].train(weights.E.training)
    return made


def counted(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (("128", 96, 1000, 20, 128, 64), (70_433_988, 87_982_370, 87_982_370, 87_368_065)),
        (("128", 96, 256, 20, 128, 64), (70_338_756, 86_839_586, 86_839_586, 86_225_281)),
        (("64", 64, 9, 20, 128, 32), (31_739_268, 19_557_058, 19_557_058, 33_964_545)),
        (("64s", 32, 9, 16, 64, 32), (3_434_948, 2_399_842, 2_399_842, 2_855_425)),
        (("32s", 12, 10, 16, 64, 0), (351_859, 172_597, 172_597, 273_409)),
    ],
)  # fmt: skip
def test_the_official_layout_has_as_many_parameters_as_the_report_counts(sizes, expected):
    """Those of E and A with the layers that nothing calls: without, ours are counted elsewhere."""
    with torch.device("meta"):
        made = reference.Original(*sizes, dead=True, device="meta").networks()
    assert tuple(counted(made[name]) for name in "GDEA") == expected


@pytest.mark.parametrize(
    "sizes", [("128", 96, 1000, 20, 128, 64), ("64", 8, 4, 20, 128, 64), ("32s", 12, 10, 16, 64, 0)]
)
def test_the_plain_networks_have_the_names_and_shapes_of_ours(sizes):
    with torch.device("meta"):
        made = reference.Original(*sizes, device="meta").networks()
    for name, network in described(*sizes).items():
        shapes = network.shapes()
        shapes.pop("strength", None)  # of the adaptor, ours alone
        plain = {tensor: tuple(v.shape) for tensor, v in made[name].state_dict().items()}
        assert plain == shapes


def test_a_translation_its_gradients_and_what_a_pass_moves_are_the_published_ones():
    theirs = original()
    own = ours_with(theirs)
    for network in (*theirs.networks().values(), *own.values()):
        network.double()  # so that no rounding decides what is rectified
    x, z, c = torch.randn(3, 3, 64, 64), torch.randn(3, 30), torch.tensor([1, 3, 1])
    x, z = x.double(), z.double()
    fake = theirs.translate(x, z, c)
    made = own["G"](z, c, own["A"](own["E"](x)))
    torch.testing.assert_close(made, fake, atol=1e-6, rtol=1e-4)
    toward = torch.randn_like(fake)
    (fake * toward).sum().backward()
    (made * toward).sum().backward()
    for name in "GA":
        plain = dict(theirs.networks()[name].named_parameters())
        for tensor, value in own[name].named_parameters():
            assert value.grad is not None and value.grad.abs().max() > 0
            torch.testing.assert_close(value.grad, plain[tensor].grad, atol=1e-6, rtol=1e-4)
    moved_alike(theirs, own)


def test_verdicts_and_what_is_compared_of_pictures_are_the_published_ones():
    theirs = original()
    own = ours_with(theirs)
    x, c = torch.randn(3, 3, 64, 64), torch.tensor([0, 2, 2])
    verdicts, maps = theirs.D(x, c)
    judged, found = own["D"](x, c, taps=True)
    torch.testing.assert_close(judged, verdicts, atol=1e-5, rtol=1e-4)
    assert set(maps) == {4, 8, 16}
    for side, feature in maps.items():
        torch.testing.assert_close(found[side], feature, atol=1e-5, rtol=1e-4)
    assert maps[4].min() < 0  # before the activation that the verdict has
    moved_alike(theirs, own)


def moved_alike(theirs, own) -> None:
    """Buffers, of singular vectors and of batch norms, went the same way; the encoder's stayed."""
    for name, network in own.items():
        plain = theirs.networks()[name].state_dict()
        for tensor, value in network.named_buffers():
            if tensor != "strength":
                torch.testing.assert_close(value, plain[tensor], atol=1e-5, rtol=1e-4)
    for tensor, value in original().E.state_dict().items():
        assert torch.equal(value, theirs.E.state_dict()[tensor])


def passes(count: int = 1) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(
            torch.randn(2, 3, 64, 64, generator=generator) if n % 2 == 0
            else torch.randint(4, (2,), generator=generator)
            for n in range(4)
        )
        for _ in range(count)
    ]  # fmt: skip


def parameters(made) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {tensor: v.detach().clone() for tensor, v in network.named_parameters()}
        for name, network in made.networks().items()
    }


def changed(before, after) -> set[str]:
    return {
        name for name in before
        if any(not torch.equal(v, after[name][tensor]) for tensor, v in before[name].items())
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "first", "second"),
    [({"phase": 1}, {"A", "D"}, {"A", "D", "G"}), ({"scratch": True}, set("GDEA"), set("GDEA"))],
)
def test_in_the_first_phase_only_adaptor_and_discriminator_are_trained(more, first, second):
    made, moved = original(**more), []
    for _ in range(2):
        before = parameters(made)
        made.step(*passes(2))
        moved.append(changed(before, parameters(made)))
    assert moved == [first, second]


def test_each_translation_is_compared_with_its_own_source_and_judged_as_its_class():
    """As one pass of a discriminator whose estimates stand still tells it."""
    made = original()
    made.D.eval()
    ((x, c_x, y, c_y),) = passes()
    torch.manual_seed(5)
    losses = made.step((x, c_x, y, c_y))
    again = original()
    again.D.eval()
    torch.manual_seed(5)
    with torch.no_grad():
        z, c = again.draw(2)
        of_fake, of_real = again.D(again.translate(x, z, c), c)[0], again.D(y, c_y)[0]
    torch.testing.assert_close(losses["D_real"], (1 - of_real).clamp(min=0).mean())
    torch.testing.assert_close(losses["D_fake"], (1 + of_fake).clamp(min=0).mean())
    again.D.load_state_dict(made.D.state_dict())  # which has taken its step
    with torch.no_grad():
        z, c = again.draw(2)
        verdicts, own = again.D(again.translate(x, z, c), c)
        _, source = again.D(x, c_x)
    torch.testing.assert_close(losses["G_adv"], -verdicts.mean())
    share = {16: 0.01, 8: 0.1, 4: 0.1}
    apart = sum(w * (own[side] - source[side]).abs().mean() for side, w in share.items())
    torch.testing.assert_close(losses["rec"], apart)


# Ours, trained.


RATE = 1e-5


class Given(reference.Original):
    """Noise and classes that are given, in place of what it would draw."""

    def draw(self, count: int):
        return self.given.pop(0)


@pytest.mark.parametrize("phase", [0, 2])
@pytest.mark.parametrize("rec", ["l1", "mse"])
def test_our_steps_are_the_published_ones(tmp_path: Path, phase: int, rec: str):
    """At small rates: ours sees sources apart from translations, and D's estimates move twice."""
    for label in range(4):
        (tmp_path / "set" / f"{label}").mkdir(parents=True)
        for n in range(2):
            save_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "set" / f"{label}" / f"{n}.png")
    torch.manual_seed(0)
    theirs = Given(**SMALL, phase=phase, rec=rec, lr_g=RATE, lr_d=RATE)
    with torch.no_grad():
        for network in theirs.networks().values():
            for value in network.parameters():  # no longer orthogonal, which any vector suits
                value.add_(0.02 * torch.randn_like(value))
    for _ in range(100):
        theirs.D(torch.zeros(1, 3, 64, 64), torch.zeros(1, dtype=torch.int64))
    start = tmp_path / "start.safetensors"
    save_file(
        {
            f"{name}.{tensor}": value
            for name, network in theirs.networks().items()
            for tensor, value in network.state_dict().items()
        },
        start,
    )
    sizes = {name: value for name, value in SMALL.items() if name not in ("arch", "classes")}
    options = DeepI2IOptions(
        data=tmp_path / "set", size="64s", **sizes, batch=2, phase1=phase, rec=rec, lr=RATE,
        d_lr=RATE, device="cpu", sheet_every=0,
    )  # fmt: skip
    session = DeepI2I().session(options, start, seed=0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        ((x, c_x, y, c_y),) = passes()
        drawn = [
            (torch.randn(2, 30, generator=generator), torch.randint(4, (2,), generator=generator))
            for _ in range(2)
        ]
        theirs.given = list(drawn)
        expected = theirs.step((x, c_x, y, c_y))
        told = session.step(x, c_x, y, c_y, *(values for pair in drawn for values in pair))
        assert told["judge"] == pytest.approx(
            float((expected["D_real"] + expected["D_fake"]).detach()), rel=1e-3, abs=1e-3
        )
        assert told["gan"] == pytest.approx(float(expected["G_adv"].detach()), rel=1e-3, abs=1e-3)
        assert told["rec"] == pytest.approx(float(expected["rec"].detach()), rel=1e-3)
    began = load_file(start)
    for name in "GDA":
        own = dict(session.networks[name].named_parameters())
        plain = dict(theirs.networks()[name].named_parameters())
        ways = [
            torch.cat([(of[n] - began[f"{name}.{n}"]).flatten() for n in plain]).detach()
            for of in (own, plain)
        ]
        assert ways[1].abs().max() > RATE  # of two steps, or four, each of which is about the rate
        torch.testing.assert_close(ways[0].norm(), ways[1].norm(), rtol=1e-2, atol=0)
        assert torch.cosine_similarity(*ways, dim=0) > 0.99
    for tensor, value in session.networks["E"].state_dict().items():
        assert torch.equal(value, began[f"E.{tensor}"])


def test_a_width_need_not_be_a_multiple_of_eight():
    options = DeepI2IOptions(
        size="32s", ch=12, classes=10, chunk=16, shared=64, attention=0, device="cpu"
    )
    found = {
        name: sum(p.numel() for p in network.build().parameters())
        for name, network in DeepI2I().networks(options).items()
    }
    assert found == {"E": 171_540, "A": 272_352, "G": 351_859, "D": 172_597}


# The papers' tables.

PAPERS = ROOT / "examples" / "deepi2i" / "papers"
METRICS = ("RC", "FC", "mKIDx100", "mFID")


def table(name: str) -> list[dict[str, str]]:
    with (PAPERS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measured(name: str, key: str, value: str) -> dict[str, tuple[float, ...]]:
    """Of the rows of one method: by set, whose first word tells it, the four metrics."""
    return {
        row.get("dataset", row[key]).split()[0].rstrip("s"): tuple(float(row[m]) for m in METRICS)
        for row in table(name) if row[key].endswith(value)
    }  # fmt: skip


def test_three_papers_have_one_measurement_of_training_from_scratch():
    first = measured("deepi2i_table1", "method", "(scratch)")
    later = measured("transferi2i_table3", "method", "(scratch)")
    assert first == measured("report_table1", "run", "(Ori. Loss)")
    assert {name: first[name] == own for name, own in later.items()} == {
        "Animal": False, "Bird": True, "Food": True,
    }  # fmt: skip
    assert (first["Animal"], later["Animal"]) == (
        (49.2, 52.4, 5.78, 80.7), (3.47, 1.54, 41.37, 356.1),
    )  # fmt: skip


def test_what_is_in_two_tables_of_a_paper_is_the_same_in_both():
    ours = {row["method"]: row for row in table("transferi2i_table3") if "Animal" in row["dataset"]}
    shared = {row["shared_resblocks"]: row for row in table("transferi2i_table2")}
    begun = table("transferi2i_table1")
    assert float(ours["TransferI2I"]["mKIDx100"]) == float(shared["4"]["mKIDx100"]) == 9.25
    assert float(ours["DeepI2I"]["mKIDx100"]) == float(begun[0]["mKIDx100"]) == 11.48
    (whole,) = (row for row in table("deepi2i_figure3") if row["variant"] == "DeepI2I")
    assert measured("deepi2i_table1", "method", "DeepI2I")["Animal"] == tuple(
        float(whole[metric]) for metric in METRICS
    )


def test_every_table_is_as_long_as_printed():
    rows = {file.stem: len(table(file.stem)) for file in sorted(PAPERS.glob("*.csv"))}
    assert rows == {
        "deepi2i_figure3": 6, "deepi2i_table1": 15,
        "report_parameters": 4, "report_table1": 4,
        "transferi2i_100_a_class": 3, "transferi2i_table1": 4, "transferi2i_table2": 4,
        "transferi2i_table3": 24, "transferi2i_table4": 36,
    }  # fmt: skip


def test_the_report_counted_networks_of_a_thousand_classes_for_sets_of_fewer():
    with torch.device("meta"):
        made = reference.Original(dead=True, device="meta").networks()
        live = reference.Original(device="meta").networks()
    for row in table("report_parameters"):
        assert row["n_classes_that_gives_it"] == "1000"
        assert counted(made[row["network"]]) == int(row["params_reported"])
        assert counted(live[row["network"]]) == int(row["live_params"])
