"""BalaGAN and FUNIT: counts, classes, losses by hand, who moves, and what is wrong with input."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from click.testing import CliRunner
from i2i_domains import drawing, make_classes, make_domains
from i2i_states import flat, moved, silent
from modelsoup_i2i.networks.described import parameters
from modelsoup_i2i.networks.funit import Discriminator, Generator
from modelsoup_i2i.networks.modality import Labeller
from modelsoup_i2i.pictures.draws import Labelled, Sampler
from modelsoup_i2i.pictures.images import ImageError, read_image, save_png, to_tensor
from modelsoup_i2i.pictures.transforms import zoomed
from modelsoup_i2i.trainers import balagan
from modelsoup_i2i.trainers.balagan import FUNIT, BalaGAN, BalaGANOptions, FUNITOptions
from modelsoup_i2i.trainers.modality import Modality
from modelsoup_i2i.training.state import LABELS
from safetensors.torch import load_file, save_file

import modelsoup
from modelsoup import MismatchError, ParameterError, TrainerError
from modelsoup.terminal.cli import main

torch.set_num_threads(1)
TINY = {
    "size": 16, "width": 4, "downs": 2, "style_downs": 2, "latent": 6, "mlp": 8, "d_halvings": 2,
    "d_most": 12, "batch": 2, "threads": 0, "device": "cpu", "sheet_every": 0, "steps": 2,
}  # fmt: skip
TEST = {"width": 16, "downs": 2, "style_downs": 3, "latent": 16, "mlp": 64, "d_halvings": 3,
        "d_most": 128}  # fmt: skip


def counts(o: BalaGANOptions) -> dict[str, int]:
    networks = BalaGAN().networks(o)
    return {name: parameters(networks[name].tensors()) for name in "GD"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_domains(tmp_path / "data")


@pytest.fixture
def modal(tmp_path: Path) -> Path:
    """A with folders, of 3, 5 and 4 pictures; B without, of 4."""
    make_classes(tmp_path / "modal" / "trainA", {"red": 3, "green": 5, "blue": 4}, size=20)
    for part in ("trainB", "testA", "testB"):
        (tmp_path / "modal" / part).mkdir()
        for n in range(4):
            save_png(drawing(part[-1], n, 20), tmp_path / "modal" / part / f"{n}.png")
    return tmp_path / "modal"


def session(root: Path, trainer=BalaGAN, options=BalaGANOptions, start=None, work=None, **more):
    return trainer().session(options(data=root, **{**TINY, **more}), start, seed=1, work=work)


def started(root: Path, tmp_path: Path, **more):
    return session(root, work=tmp_path / "work", **more)


# Counts.


@pytest.mark.parametrize(
    ("k", "k_b", "count"),
    [(1, None, 54_134_724), (16, None, 54_165_474), (30, None, 54_194_174), (40, None, 54_214_674),
     (30, 30, 54_253_624)],
)  # fmt: skip
def test_a_head_has_1025_parameters_for_each_class(k, k_b, count):
    found = counts(BalaGANOptions(k=k, k_b=k_b))
    assert (found["G"], found["D"]) == (29_866_435, count)


def test_with_heads_of_two_layers_the_trunk_is_shorter():
    found = counts(BalaGANOptions(k=40, head_depth=2))
    assert found["D"] == 73_007_040 + 2050 * 41


def test_funit_makes_the_papers_steps_unless_epochs_take_their_place():
    assert (FUNITOptions().steps, FUNITOptions().batch) == (100_000, 64)
    assert BalaGANOptions().steps is None
    with pytest.raises(ValueError, match="epochs is 3, but steps, 100000, go before it: with"):
        FUNITOptions(epochs=3)
    told = FUNITOptions(epochs=3, steps=None)
    assert (told.epochs, told.steps) == (3, None)


def test_funit_has_one_head():
    told = BalaGAN().networks(FUNITOptions(k=118))["D"]
    assert parameters(told.tensors()) == 54_252_599
    small = {**TEST, "modalities": "start"}
    assert counts(FUNITOptions(k=4, **small))["D"] == 846_581
    assert counts(BalaGANOptions(k=4, **small))["D"] == 847_226
    assert counts(BalaGANOptions(k=4, **small))["G"] == 553_843


def test_a_training_of_two_classes_says_that_it_is_one(root: Path):
    given = {**TINY, "data": root}
    for trainer, options, said in (
        (BalaGAN(), BalaGANOptions(**given), "BalaGAN without modalities"),
        (FUNIT(), FUNITOptions(**given), "FUNIT of two classes"),
    ):
        log: list[str] = []
        trainer.session(options, None, seed=1).run(silent, log.append)
        (line,) = [line for line in log if "this is" in line]
        assert said in line
    assert not BalaGAN().remarks(BalaGANOptions(**{**given, "k": 2}))


def test_networks_tell_what_they_are_without_torch():
    o = BalaGANOptions(**TINY)
    for name, network in BalaGAN().networks(o).items():
        built = {n: tuple(v.shape) for n, v in network.build().state_dict().items()}
        assert built == network.shapes(), name


def test_shapes_are_those_of_the_paper():
    """512 × 16 × 16 content, 64 numbers of style, 1024 × 8 × 8 features, of 128 × 128."""
    with torch.device("meta"):
        generator, judge = Generator(), Discriminator(41)
        images = torch.zeros(2, 3, 128, 128)
        assert generator.enc_content(images).shape == (2, 512, 16, 16)
        assert generator.enc_class_model(images).shape == (2, 64)
        assert judge.cnn_f(images).shape == (2, 1024, 8, 8)
        said = judge(images, torch.zeros(2, dtype=torch.int64))
    assert [own.shape for own in said] == [(2, 8, 8), (2, 1024), (2, 41)]


def test_a_verdict_is_the_map_of_its_class_and_logits_are_means_of_maps():
    judge = Discriminator(3, width=4, halvings=2, most=12, depth=2).double()
    images, labels = torch.randn(2, 3, 16, 16).double(), torch.tensor([2, 0])
    said = judge(images, labels)
    maps = judge.cnn_f(images)
    verdicts, logits = (
        head[1].conv(torch.nn.functional.leaky_relu(head[0](maps), 0.2))
        for head in (judge.cnn_c, judge.cnn_classifier)
    )
    torch.testing.assert_close(said.verdicts, torch.stack([verdicts[0, 2], verdicts[1, 0]]))
    torch.testing.assert_close(said.logits, logits.mean((2, 3)))


def test_each_picture_may_be_given_several_styles_at_once():
    made = Generator(4, 2, 1, 2, 6, 8)
    images, styles = torch.randn(2, 3, 16, 16), torch.randn(4, 6)
    both = torch.cat([made(images, styles[:2]), made(images, styles[2:])])
    torch.testing.assert_close(made(images, styles), both)


# Steps.


def test_each_turn_moves_its_network_and_the_average_follows_the_generator(root: Path):
    own = session(root)
    before = flat(own)
    assert moved(own) == {"G", "D", "G_ema"}
    after = flat(own)
    for name in (n for n in before if n.startswith("G_ema.")):
        new = after[name.replace("G_ema.", "G.")]
        torch.testing.assert_close(after[name], 0.999 * before[name] + 0.001 * new)


def judged(own, **more) -> dict[str, float]:
    batch = {name: own.placed(values) for name, values in next(own.batches()).pop().items()}
    own.begin()
    terms = own.trainer.judge_real(own, types.SimpleNamespace(**batch, **more))
    return {name: float(value.detach()) for name, value in terms.items()}


def test_r1_of_a_batch_is_that_of_each_picture_over_the_batchs_square(root: Path):
    per_sample = judged(session(root, r1="per_sample", batch=3))["r1"]
    assert judged(session(root, batch=3))["r1"] == pytest.approx(per_sample / 9, rel=1e-5)
    assert per_sample > 0


def test_r1_is_the_squared_slope_of_each_pictures_mean_verdict(root: Path):
    own = session(root, r1="per_sample", batch=3)
    own.begin()
    judge = own.networks["D"].double()
    (drawn,) = next(own.batches())
    y, labels = drawn["y"].double(), drawn["c_y"]
    found = own.trainer.judge_real(own, types.SimpleNamespace(y=y, c_y=labels))["r1"]
    squares = []
    for image, label in zip(y, labels, strict=True):  # each alone
        leaf = image[None].clone().requires_grad_()
        (slope,) = torch.autograd.grad(judge(leaf, label[None]).verdicts.mean(), leaf)
        squares.append(slope.square().sum())
    torch.testing.assert_close(found.detach(), torch.stack(squares).mean())


def test_losses_are_the_papers(root: Path):
    """By the discriminator's own verdicts, before it moves."""
    own = session(root, lambda_r1=0.0)
    own.begin()
    (drawn,) = next(own.batches())
    x, y, c_x, c_y = (drawn[name] for name in ("x", "y", "c_x", "c_y"))
    generator, judge = own.networks["G"], own.networks["D"]
    batch = types.SimpleNamespace(**drawn)
    told = {n: float(v.detach()) for loss in (own.trainer.judge_made, own.trainer.judge_real,
            own.trainer.translate) for n, v in loss(own, batch).items()}  # fmt: skip
    with torch.no_grad():
        code = generator.enc_content(x)
        made, again = (
            generator.dec(code, generator.mlp(generator.enc_class_model(of))) for of in (y, x)
        )
        of_made, of_again = judge(made, c_y), judge(again, c_x)
        of_y, of_x = judge(y, c_y), judge(x, c_x)
        wanted = {
            "made": (1 + of_made.verdicts).clamp(min=0).mean(),
            "real": (1 - of_y.verdicts).clamp(min=0).mean(),
            "classes": -of_y.logits.log_softmax(1)[range(2), c_y].mean(),
            "gan": -0.5 * (of_made.verdicts.mean() + of_again.verdicts.mean()),
            "rec": (again - x).abs().mean(),
            "features": (of_made.features - of_y.features).abs().mean()
            + (of_again.features - of_x.features).abs().mean(),
        }
    assert told == {name: pytest.approx(float(v), rel=1e-4) for name, v in wanted.items()}
    weights = own.weights
    assert (weights["classes"], weights["rec"], weights["features"]) == (1.0, 0.1, 1.0)


def test_without_the_second_head_no_classes_are_told_apart(root: Path):
    losses: dict[str, float] = {}
    moved(session(root, FUNIT, FUNITOptions), losses)
    assert "classes" not in losses and losses["r1"] > 0


# Whose pictures have which label.


def test_b_is_the_class_after_all_modalities(modal: Path):
    own = session(modal, modalities="labels")
    assert own.classes == ("blue", "green", "red", "B")
    counted = {name: Counter(p.label for p in own.images[name]) for name in "XY"}
    assert counted == {"X": {0: 4, 1: 5, 2: 3}, "Y": {3: 4}}
    assert own.networks["D"].cnn_c[0].conv.weight.shape[0] == 4


def test_both_domains_may_be_split(tmp_path: Path):
    make_classes(tmp_path / "a", {"p": 3, "q": 2}, size=20)
    make_classes(tmp_path / "b", {"r": 2, "s": 4}, size=20)
    o = BalaGANOptions(
        data_a=tmp_path / "a", data_b=tmp_path / "b", modalities="labels", k_b=2, **TINY
    )
    assert o.class_names() == ("p", "q", "r", "s")
    assert [p.label for p in o.images()["Y"]] == [2, 2, 3, 3, 3, 3]


def test_folders_of_one_name_in_both_domains_are_two_modalities(tmp_path: Path):
    make_classes(tmp_path / "A", {"asleep": 3, "A_asleep": 2}, size=20)
    make_classes(tmp_path / "B", {"asleep": 2, "on a lawn": 4}, size=20)
    o = BalaGANOptions(data_a=tmp_path / "A", data_b=tmp_path / "B", modalities="labels", k_b=2)
    assert o.class_names() == ("A_A_asleep", "A_asleep", "B_asleep", "B_on a lawn")
    assert [picture.label for picture in o.images()["Y"]] == [2] * 2 + [3] * 4


def listed(root: Path, labels: dict[str, int], k: int) -> dict[str, object]:
    items = [{"path": path, "domain": "A", "label": label, "score": None}
             for path, label in labels.items()]  # fmt: skip
    names = [f"A_{n:02d}" for n in range(k)]
    return {"version": 1, "classes": [*names, "B"], "k_source": k, "k_target": 1, "items": items}


def test_a_file_folders_and_a_table_say_the_same(modal: Path, tmp_path: Path):
    files = sorted((modal / "trainA").rglob("*.png"))
    labels = {file.relative_to(modal / "trainA").as_posix(): ["blue", "green", "red"].index(
        file.parent.name) for file in files}  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(listed(modal, labels, 3)))
    rows = ["path,label", *(f"{path},{path.split('/')[0]}" for path in labels)]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    made = {
        str(by): BalaGANOptions(data=modal, modalities=by, **TINY)
        for by in ("labels", tmp_path / "m.json", tmp_path / "m.csv")
    }
    assert len({tuple(o.images()["X"]) for o in made.values()}) == 1
    assert len({o.decisive()["modalities"] for o in made.values()}) == 1
    labels["red/0.png"] = 0
    (tmp_path / "n.json").write_text(json.dumps(listed(modal, labels, 3)))
    other = BalaGANOptions(data=modal, modalities=tmp_path / "n.json", **TINY)
    assert other.decisive()["modalities"] != made["labels"].decisive()["modalities"]


def test_one_modality_is_a_training_of_two_classes_to_the_byte(tmp_path: Path):
    make_domains(tmp_path / "plain")
    make_domains(tmp_path / "folders")
    (tmp_path / "folders" / "A").mkdir()
    (tmp_path / "folders" / "trainA").rename(tmp_path / "folders" / "A" / "A_00")
    (tmp_path / "folders" / "A").rename(tmp_path / "folders" / "trainA")
    for name, more in (("plain", {"k": 1}), ("folders", {"modalities": "labels"})):
        own = session(tmp_path / name, **more)
        own.run(silent, silent)
        own.save(tmp_path / f"{name}.safetensors")
    plain, folders = (tmp_path / f"{n}.safetensors" for n in ("plain", "folders"))
    assert plain.read_bytes() == folders.read_bytes()


def test_k_auto_is_the_least_that_leaves_b_the_larger(tmp_path: Path):
    root = make_domains(tmp_path / "data", count_a=9, count_b=4)
    assert BalaGANOptions(data=root, k="auto").split == (3, 1)
    assert BalaGANOptions(data=root, k="auto", count_b=3).split == (3, 1)
    assert BalaGANOptions(data=root, k="auto", count_b=2).split == (5, 1)


def test_a_smaller_b_lies_within_a_larger_one(tmp_path: Path):
    root = make_domains(tmp_path / "data", count_b=8)
    kept = [{p.file for p in BalaGANOptions(data=root, count_b=count).images()["Y"]}
            for count in (1, 2, 4, 8)]  # fmt: skip
    assert [len(own) for own in kept] == [1, 2, 4, 8]
    assert all(small < large for small, large in pairwise(kept))


def test_an_excluded_target_is_never_read_and_has_no_class(modal: Path):
    for file in (modal / "trainB").iterdir():
        file.write_bytes(b"no picture")  # a read would fail
    own = session(modal, modalities="labels", exclude_target=True, steps=3)
    own.run(silent, silent)
    assert own.networks["D"].cnn_c[0].conv.weight.shape[0] == 3
    assert own.classes == ("blue", "green", "red")
    assert own.constant() == []


def drawn(own, count: int, **more) -> Counter:
    sampler = Sampler(own.pictures, [Labelled(("x", "c"), ("X", "Y"), **more)], seed=1, batch=count)
    return Counter(sampler.batch_at(0, 0, sampler.order(0))["c"].tolist())


def test_a_picture_of_both_domains_is_drawn_as_often_as_any_other(modal: Path):
    assert drawn(session(modal, modalities="labels"), 32) == {0: 8, 1: 10, 2: 6, 3: 8}


def test_an_epoch_is_both_domains_or_a_where_b_is_excluded(modal: Path):
    by_folders = {"modalities": "labels", "steps": None, "epochs": 1}
    assert session(modal, **by_folders).total_steps == (12 + 4) / TINY["batch"]
    assert session(modal, **by_folders, exclude_target=True).total_steps == 12 / TINY["batch"]


def test_balanced_each_class_is_drawn_as_often_as_any_other(modal: Path):
    own = session(modal, modalities="labels")
    assert drawn(own, 40, balanced=True) == dict.fromkeys(range(4), 10)
    assert BalaGAN().draws(BalaGANOptions(class_balanced=True))[0].balanced


# Labels that the start's network finds.


@pytest.fixture
def start(modal: Path, tmp_path: Path) -> Path:
    """Of an M whose centroids are a red picture's embedding and a green one's."""
    torch.manual_seed(0)
    own = Labeller("small", 16, 2).eval()
    look = zoomed(16)
    files = [modal / "trainA" / colour / "0.png" for colour in ("green", "red")]
    seen = torch.stack([to_tensor(look.for_test(read_image(file))) for file in files])
    with torch.no_grad():
        own.centroids.copy_(torch.nn.functional.normalize(own.embedded(seen)))
    save_file({f"M.{n}": values for n, values in own.state_dict().items()}, tmp_path / "M.st")
    return (tmp_path / "M.st").rename(tmp_path / "M.safetensors")


K2 = {"k": 2, "encoder": "small"}


def labels(own) -> dict[str, list[int]]:
    return {name: [p.label for p in pictures] for name, pictures in own.pictures.sets.items()}


def test_the_starts_network_says_who_is_of_which_modality(modal: Path, start: Path):
    own = session(modal, start=start, **K2)
    found = {Path(str(p)): p.label for p in own.pictures.sets["X"]}
    first = {path.parent.name: label for path, label in found.items() if path.stem == "0"}
    assert (first["green"], first["red"]) == (0, 1)
    assert labels(own)["Y"] == [2] * 4
    again = Labeller("small", 16, 2).eval()
    again.load_state_dict({n[2:]: values for n, values in load_file(start).items()})
    look = zoomed(16)
    with torch.no_grad():
        seen = torch.stack([to_tensor(look.for_test(read_image(path))) for path in found])
        assert again(seen, 0).tolist() == list(found.values())
    own.run(silent, silent)
    after = flat(own)
    assert all(torch.equal(value, after[name]) for name, value in load_file(start).items())
    assert own.classes == ("A_00", "A_01", "B")


def test_both_domains_may_have_clusters(modal: Path, start: Path, tmp_path: Path):
    read = load_file(start)
    read["M.belongs"] = torch.tensor([0, 1])
    save_file(read, tmp_path / "both.safetensors")
    own = session(modal, start=tmp_path / "both.safetensors", k=1, k_b=1, modalities="start",
                  encoder="small")  # fmt: skip
    assert {name: set(found) for name, found in labels(own).items()} == {"X": {0}, "Y": {1}}


def test_a_training_that_goes_on_has_the_labels_that_it_began_with(
    modal: Path, start: Path, tmp_path: Path
):
    """Whatever another machine's rounding would make of them."""
    whole = session(modal, start=start, **K2, steps=3)
    whole.run(silent, silent)
    first = session(modal, start=start, **K2, steps=3, work=tmp_path)
    first.begin()
    first.optimise(next(first.batches()))
    first.keep()
    second = session(modal, start=start, **K2, steps=3, work=tmp_path)
    second.run(silent, silent)
    for name, value in flat(whole).items():
        assert torch.equal(flat(second)[name], value), name
    told = json.loads((tmp_path / LABELS).read_text())
    told["labels"]["X"][0] = 1 - told["labels"]["X"][0]
    (tmp_path / LABELS).write_text(json.dumps(told))
    third = session(modal, start=start, **K2, steps=3, work=tmp_path)
    assert labels(third) == told["labels"] != labels(whole)
    (tmp_path / LABELS).write_text("{")
    with pytest.raises(
        modelsoup.TrainerError, match=r"labels.json is damaged: remove it, and stat"
    ):
        labels(session(modal, start=start, **K2, steps=3, work=tmp_path))


def test_labels_of_other_pictures_are_found_anew(modal: Path, start: Path, tmp_path: Path):
    before = labels(session(modal, start=start, **K2, work=tmp_path))["X"]
    save_png(drawing("A", 9, 20), modal / "trainA" / "red" / "9.png")
    after = labels(session(modal, start=start, **K2, work=tmp_path))["X"]
    assert (len(before), len(after)) == (12, 13)


def test_a_damaged_picture_is_left_out_of_modalities_too(modal: Path, start: Path):
    (modal / "trainA" / "red" / "9.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"9\.png"):
        labels(session(modal, start=start, **K2))
    assert len(labels(session(modal, start=start, **K2, on_bad_image="skip"))["X"]) == 12


def test_centroids_that_were_merged_are_refused(modal: Path, start: Path, tmp_path: Path):
    read = load_file(start)
    read["M.centroids"] = read["M.centroids"] / 2
    save_file(read, tmp_path / "half.safetensors")
    with pytest.raises(MismatchError, match=r"M\.centroids are none that a training found"):
        labels(session(modal, start=tmp_path / "half.safetensors", **K2))


# Bad input.


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"size": 20, "downs": 3}, "size is 20, but must be a multiple of 8 and at least 16"),
        ({"size": 16, "d_halvings": 4}, "size is 16, but must be a multiple of 4 and at least 32"),
        ({"exclude_target": True, "k_b": 2}, "k_b splits B, which exclude_target leaves out"),
        ({"modalities": "start"}, "whose M has so many of A: k"),
        ({"modalities": "none", "k": 3}, "k is 3 and k_b None, but modalities is none"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        BalaGANOptions(**{**TINY, **more})


def refused(said: str, **options) -> None:
    with pytest.raises(ParameterError, match=said):
        BalaGANOptions(**{**TINY, **options}).images()


def test_what_folders_and_files_cannot_be_is_refused(modal: Path, root: Path, tmp_path: Path):
    refused(r"k is 50, but .*trainA has 6 images: there cannot be more", data=root, k=50)
    refused("k is 4, but there are folders for 3", data=modal, modalities="labels", k=4)
    refused("has no folders, of which each would be", data=root, modalities="labels")
    save_png(drawing("A", 1, 20), modal / "trainA" / "alone.png")
    refused("have no modality, such as alone.png", data=modal, modalities="labels")
    (modal / "trainA" / "alone.png").unlink()
    (tmp_path / "m.csv").write_text("path,label\nred/0.png,1\n")
    refused("11 of 12 pictures .* have no modality", data=modal, modalities=tmp_path / "m.csv")
    refused("does not exist, where a file of modal", data=modal, modalities=tmp_path / "n.json")
    (modal / "trainA" / "empty").mkdir()
    refused("the modality 'empty' of .* is empty", data=modal, modalities="labels")
    (modal / "trainA" / "empty").rmdir()
    (modal / "trainA" / "red").rename(modal / "trainA" / "B")
    refused("a modality of A is called 'B'", data=modal, modalities="labels")
    refused(
        "B has 6 pictures and A 4: A is the rich domain", k="auto",
        data_a=root / "trainB", data_b=root / "trainA",
    )  # fmt: skip


def opening(own) -> str:
    said: list[str] = []
    own.run(silent, said.append)
    return "\n".join(said)


def test_the_log_says_which_modalities_are_small_and_which_domain_is_large(
    modal: Path, root: Path, tmp_path: Path
):
    told = opening(session(modal, modalities="labels", batch=5, steps=1))
    assert "modalities of fewer pictures than a batch has, 5: blue 4, red 3" in told
    swapped = BalaGANOptions(data_a=root / "trainB", data_b=root / "trainA", **TINY)
    told = opening(BalaGAN().session(swapped, None, seed=1))
    assert "B has more images than A, 6 beside 4" in told
    labels = {f.relative_to(modal / "trainA").as_posix(): 0
              for f in (modal / "trainA").rglob("*.png")}  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(listed(modal, labels, 3)))
    told = opening(session(modal, modalities=tmp_path / "m.json", steps=1))
    assert "no picture is of A_01, A_02" in told


def test_one_image_of_b_is_enough_and_the_log_says_what_to_expect(root: Path):
    told = opening(session(root, count_b=1))
    assert "B has one image: what is translated can only look like that one" in told
    assert "6 images of X and 1 of Y" in told


def test_a_start_of_another_k_is_refused_by_its_number(modal: Path, tmp_path: Path):
    own = session(modal, modalities="labels", steps=1)
    own.run(silent, silent)
    own.save(tmp_path / "three.safetensors")
    with pytest.raises(MismatchError, match=r"was trained on other classes"):
        session(modal, start=tmp_path / "three.safetensors")
    stripped = {k: v.clone() for k, v in flat(own).items()}
    save_file(stripped, tmp_path / "plain.safetensors")
    with pytest.raises(MismatchError, match=r"cnn_c\.0\.conv\.weight.*the start has classes: 4"):
        session(modal, start=tmp_path / "plain.safetensors")


def test_a_start_without_the_network_that_finds_labels_is_refused(modal: Path):
    with pytest.raises(TrainerError, match="M is not trained here, so it must begin with weights"):
        session(modal, **K2).run(silent, silent)
    with pytest.raises(TrainerError, match=r"of a start \(--start\), or of init_from \(M: file\)"):
        labels(session(modal, **K2))  # what a training tells of its pictures comes before its steps


@pytest.mark.parametrize(
    ("given", "has"),
    [({"k": 3, "encoder": "small"}, "k: 2"), ({"k": 2}, "encoder: small")],
    ids=["k", "encoder"],
)
def test_the_command_says_with_which_option_an_encoder_would_fit(
    modal: Path, start: Path, tmp_path: Path, given: dict, has: str
):
    words = ["train", "balagan", "-o", str(tmp_path / "own.safetensors"), "--start", str(start)]
    for name, value in {**TINY, **given, "data": modal}.items():
        words += ["--set", f"{name}={value}"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert re.search(rf"tensors? of .*\(.* has {has}\)", said), said


def test_modalities_of_the_other_domain_are_refused_with_the_numbers(modal: Path, start: Path):
    read = load_file(start)
    save_file(read | {"M.belongs": torch.tensor([0, 1])}, start)
    with pytest.raises(MismatchError, match=r"1 modalities of A and 1 of B.*say k: 1 and k_b: 1"):
        labels(session(modal, start=start, **K2))


def test_a_checkpoint_tells_its_options(modal: Path, tmp_path: Path):
    own = session(modal, modalities="labels", head_depth=2, heads=1, blocks=1, steps=1)
    own.run(silent, silent)
    own.save(tmp_path / "one.safetensors")
    found = BalaGAN().options_of(tmp_path / "one.safetensors")
    wanted = {name: TINY[name] for name in ("width", "downs", "style_downs", "latent", "mlp",
                                            "d_halvings", "d_most")}  # fmt: skip
    assert found == wanted | {
        "blocks": 1, "channels": 3, "k": 3, "heads": 1, "head_depth": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [{"k": 2}, {"k": 2, "exclude_target": True}, {"k": 2, "k_b": 2}, {"k": 1, "k_b": 1}],
    ids=str,
)
def test_a_result_tells_how_its_classes_are_split(modal: Path, start: Path, tmp_path: Path, more):
    read, k_b = load_file(start), more.get("k_b", 0)
    both = more["k"] + k_b
    read["M.belongs"] = torch.tensor([0] * more["k"] + [1] * k_b)
    read["M.centroids"] = read["M.centroids"][[n % 2 for n in range(both)]]
    save_file(read, start)
    own = session(modal, start=start, encoder="small", modalities="start", **more)
    own.save(tmp_path / "own.safetensors")
    found = BalaGAN().options_of(tmp_path / "own.safetensors")
    assert {name: found.get(name) for name in ("k", "k_b", "exclude_target")} == {
        "k": None, "k_b": None, "exclude_target": None, **more
    }  # fmt: skip
    told = Modality().options_of(start)
    assert (told["k"], told.get("k_b")) == (more["k"], more.get("k_b"))


def test_a_result_of_folders_that_exclude_b_leaves_it_to_the_data(modal: Path, tmp_path: Path):
    by_folders = {"modalities": "labels", "exclude_target": True}
    session(modal, **by_folders).save(tmp_path / "own.safetensors")
    found = BalaGAN().options_of(tmp_path / "own.safetensors")
    assert "k" not in found
    again = BalaGAN().session(
        BalaGANOptions(data=modal, **{**TINY, **found, **by_folders}),
        tmp_path / "own.safetensors", seed=1,
    )  # fmt: skip
    assert again.classes == ("blue", "green", "red")


def test_pictures_of_other_ratios_keep_theirs(tmp_path: Path):
    transform = BalaGANOptions(size=128).transform()
    wide = np.zeros((70, 140, 3), np.uint8)
    assert transform.prepare(wide, "").shape == (140, 280, 3)
    assert transform.draw(transform.prepare(wide, ""), np.random.default_rng(0)).shape[:2] == (
        128, 128,
    )  # fmt: skip
    assert transform.for_test(wide).shape == (128, 128, 3)
    assert math.isclose(transform.load[0] / 128, 140 / 128)
    assert modelsoup.get_trainer(f"{balagan.__name__}:BalaGAN").name == "balagan"


# A whole plan.

PLAN = """soup: 1
models:
  modalities:
    train: {trainer: modality, data_a: modal/trainA, data_b: modal/trainB, k: 2, encoder: small,
            size: 16, batch: 4, steps: 2, augment: [crop, flip], sheet_every: 0, device: cpu}
tree:
  of: [modalities]
  finetune: {trainer: balagan, data_a: modal/trainA, data_b: modal/trainB, k: 2, encoder: small,
             size: 16, width: 4, downs: 2, style_downs: 2, latent: 6, mlp: 8, d_halvings: 2,
             d_most: 12, batch: 2, steps: 60, checkpoint_every: 1, sheet_every: 0, device: cpu}
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_plan_of_modalities_and_a_translator_goes_on_where_it_was_killed(
    modal: Path, tmp_path: Path
):
    command = [sys.executable, "-m", "modelsoup", "run", "plan.yaml"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "modal").symlink_to(modal)
        (tmp_path / name / "plan.yaml").write_text(PLAN)
    subprocess.run(command, cwd=tmp_path / "whole", check=True)
    process = subprocess.Popen(command, cwd=tmp_path / "killed")
    found: list[Path] = []
    while process.poll() is None and not found:  # the translator's work folder is the one with both
        found = [own for own in (tmp_path / "killed").rglob(LABELS)
                 if (own.parent / "state.pt").exists()]  # fmt: skip
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # the command ends its training too
    process.wait()
    assert found and not list((tmp_path / "killed").glob("*.safetensors"))
    subprocess.run(command, cwd=tmp_path / "killed", check=True)
    made = [list((tmp_path / name).glob("*.safetensors")) for name in ("whole", "killed")]
    (one,), (other,) = made
    assert one.read_bytes() == other.read_bytes()
    names = modelsoup.open_checkpoint(one).tensors
    assert {name.partition(".")[0] for name in names} == {"G", "G_ema", "D", "M"}
