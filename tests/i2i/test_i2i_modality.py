"""The trainer `modality`: networks and losses as the papers have them, and what it leaves."""

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from i2i_domains import make_classes
from i2i_states import flat, moved, silent
from modelsoup_i2i.networks.described import parameters
from modelsoup_i2i.networks.modalities import labeller, labeller_in
from modelsoup_i2i.networks.modality import Labeller
from modelsoup_i2i.pictures.draws import Single
from modelsoup_i2i.pictures.images import list_images
from modelsoup_i2i.pictures.transforms import zoomed
from modelsoup_i2i.pictures.views import NUMBERS
from modelsoup_i2i.trainers.modality import Modality, ModalityOptions
from modelsoup_i2i.training.losses import divergence, nt_xent
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.use.modalities import load_labeller, must_be_one_models
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import modelsoup

SMALL = {
    "encoder": "small", "size": 32, "k": 3, "batch": 16, "steps": 4, "device": "cpu", "threads": 0,
    "sheet_every": 0,
}  # fmt: skip
VAE = {**SMALL, "encoder": "vae", "size": 64, "batch": 4, "steps": 2, "lr": 5e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A of three kinds, B of one."""
    root = tmp_path_factory.mktemp("modality")
    make_classes(root / "A", {"red": 9, "green": 8, "blue": 7}, 36)
    make_classes(root / "B", {"other": 8}, 40)
    return root


def options(data: Path | None, **more) -> ModalityOptions:
    given = {} if data is None else {"data_a": data / "A", "data_b": data / "B"}
    return ModalityOptions(**{**SMALL, **given, **more})


def trained(folder: Path, given: ModalityOptions, start: Path | None = None, frozen=()) -> Path:
    """Train by a job, as a plan does; the log and the figures lie beside the result."""
    folder.mkdir()
    (folder / "work").mkdir()
    told: dict[str, object] = {"log": [], "figures": {}}
    job = modelsoup.Job(
        start=start, output=folder / "out.safetensors", work=folder / "work", frozen=tuple(frozen),
        seed=3, options=given, report=lambda _, figures: told["figures"].update(figures),
        log=told["log"].append, shown=folder / "shown",
    )  # fmt: skip
    Modality().train(job)
    (folder / "told.json").write_text(json.dumps(told))
    return job.output


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("model") / "it", options(data, steps=30))


# Networks.


@pytest.mark.parametrize("encoder", ["resnet18", "small", "vae"])
def test_names_and_shapes_are_told_without_building_and_back(encoder: str):
    told = labeller(encoder, 64, 5)
    built = told.build()
    assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == told.shapes()
    assert list(built.state_dict()) == list(told.shapes())
    assert labeller_in({f"M.{n}": shape for n, shape in told.shapes().items()}) == told
    assert told.tensors()["belongs"] == ("I64", (5,)) and told.tensors()["side"] == ("I64", ())
    images = torch.rand(2, 3, 64, 64)
    wide = {"resnet18": 512, "small": 128, "vae": 128}[encoder]
    assert built.eval().embedded(images).shape == (2, wide)
    if encoder != "vae":
        z = labeller(encoder, 64, 5, embedding="z")
        assert labeller_in({f"M.{n}": shape for n, shape in z.shapes().items()}) == z
        assert z.build().eval().embedded(images).shape == (2, wide // 2)


def test_the_counts_are_the_specs():
    def count(encoder: str, *parts: str) -> int:
        told = labeller(encoder, 64, 5)
        own, buffers = told.tensors(), told.buffers()
        return parameters(
            {n: t for n, t in own.items() if n not in buffers and n.startswith(parts)}
        )

    assert count("resnet18", "encoder.") == 11_176_512
    assert count("resnet18", "head.") == 393_984
    assert count("resnet18", "") == 11_570_496
    assert count("vae", "encoder.") == 2_095_104
    assert count("vae", "decoder.") == 1_842_531
    assert count("vae", "") == 3_937_635


def test_the_encoder_is_torchvisions_resnet_on_values_from_0_to_1():
    torchvision = pytest.importorskip("torchvision.models", exc_type=ImportError)
    own, other = labeller("resnet18", 64, 2).build().eval(), torchvision.resnet18()
    other.fc = torch.nn.Identity()
    other.load_state_dict(own.encoder.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(own.embedded(2 * images - 1), other.eval()(images), atol=1e-5)


def test_a_vae_makes_pictures_of_codes_that_it_draws():
    own = labeller("vae", 64, 2).build().eval()
    images, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 128)
    from modelsoup_i2i.networks.modality import Reconstruction

    made, mean, log_variance = Reconstruction(own)(images, noise)
    assert made.shape == images.shape and made.abs().max() <= 1
    assert torch.equal(own.embedded(images), mean)
    codes = mean + noise * log_variance.exp().sqrt()
    assert torch.allclose(made, own.decoder(codes), atol=1e-6)
    still, _, _ = Reconstruction(own)(images, torch.zeros(2, 128))
    assert torch.equal(still, own.decoder(mean))


def hand_made(belongs: list[int], centroids: list[list[float]]) -> Labeller:
    made = Labeller("small", 32, len(belongs)).eval()
    rows = torch.zeros(len(belongs), 128)
    rows[:, :2] = torch.tensor(centroids)
    made.centroids.copy_(rows)
    made.belongs.copy_(torch.tensor(belongs))
    return made


def test_a_label_is_the_nearest_centroid_of_the_own_domain():
    own = hand_made([0, 0, 1], [[1, 0], [0, 1], [0.6, 0.8]])
    rows = torch.zeros(3, 128)
    rows[:, :2] = torch.tensor([[5.0, 1.0], [0.6, 0.8], [-1.0, 0.1]])
    labels, cosines = own.nearest(rows, 0)
    assert labels.tolist() == [0, 1, 1] and labels.dtype == torch.int64
    assert cosines.tolist() == pytest.approx([5 / math.sqrt(26), 0.8, 0.1 / math.sqrt(1.01)])
    assert own.nearest(rows, 1)[0].tolist() == [2, 2, 2]


def test_b_as_one_class_has_the_label_k():
    own = hand_made([0, 0], [[1, 0], [0, 1]])
    labels, cosines = own.nearest(torch.rand(3, 128), 1)
    assert labels.tolist() == [2, 2, 2] and cosines.isnan().all()
    assert own(torch.rand(1, 3, 32, 32), 1).tolist() == [2]
    assert own(torch.rand(1, 3, 32, 32), 0).item() in (0, 1)


def test_pictures_of_another_size_are_brought_to_the_encoders():
    own = hand_made([0], [[1, 0]])
    images = torch.rand(2, 3, 64, 64)
    halved = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(own.embedded(images), own.embedded(halved), atol=1e-5)


# Losses.


def test_nt_xent_of_two_pictures_by_hand():
    """Four views on the axes: each has one other at cosine 1, 0 or −1."""
    first, second = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, -4.0]])
    # Of the first picture both views are (1, 0), and others at 0; of the second they are opposite.
    alike = math.log(math.exp(2) + 2) - 2
    apart = math.log(2 + math.exp(-2)) + 2
    assert nt_xent(first, second).item() == pytest.approx((alike + apart) / 2)
    at_one = math.log(math.exp(1) + 2) - 1, math.log(2 + math.exp(-1)) + 1
    assert nt_xent(first, second, 1.0).item() == pytest.approx(sum(at_one) / 2)


def test_views_that_are_the_same_cost_less_than_any():
    rows = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    other = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    assert nt_xent(rows, rows) < nt_xent(rows, other)
    same = torch.ones(16, 32)
    assert nt_xent(same, same).item() == pytest.approx(math.log(31), abs=1e-5)


def test_the_divergence_of_a_standard_normal_is_0_and_else_by_hand():
    assert divergence(torch.zeros(3, 5), torch.zeros(3, 5)).item() == 0
    mean, log_variance = (
        torch.tensor([[1.0, 0.0], [2.0, 0.0]]),
        torch.log(torch.tensor([[1.0, 4.0]] * 2)),
    )
    of_variance = -0.5 * (1 + math.log(4) - 4)
    assert divergence(mean, log_variance).item() == pytest.approx((0.5 + 2) / 2 + of_variance)


def test_the_vaes_loss_is_its_mean_square_and_the_weighted_divergence(data: Path):
    session = Modality().session(
        ModalityOptions(**VAE, data_a=data / "A", data_b=data / "B"), None, seed=0
    )
    assert session.weights["kl"] == 4 / 32  # the batch, of all pictures of A and B
    batch = next(session.batches())
    losses = session.optimise(batch)
    assert losses["encode"] == pytest.approx(losses["mse"] + losses["kl"] / 8, rel=1e-5)
    assert batch[0]["x"].shape == (4, 3, 64, 64) and batch[0]["z"].shape == (4, 128)


# Training.


def test_a_picture_is_seen_by_a_crop_of_almost_all_of_its_shorter_side():
    transform = zoomed(32)
    picture = np.arange(70 * 105 * 3).reshape(70, 105, 3).astype(np.uint8)
    prepared = transform.prepare(picture, "")
    assert prepared.shape == (35, 52, 3)  # 32 · 140 / 128, and half as much again
    seen = transform.for_test(picture)
    assert np.array_equal(seen, prepared[1:33, 10:42])
    assert np.array_equal(transform.for_test(prepared), seen)  # from memory, too
    assert transform.prepare(picture.transpose(1, 0, 2), "").shape == (52, 35, 3)
    drawn = [transform.draw(prepared, np.random.default_rng(n)) for n in range(40)]
    assert {one.shape for one in drawn} == {(32, 32, 3)}
    assert len({one.tobytes() for one in drawn}) > 20


def test_a_step_moves_the_encoder_and_the_head_and_no_centroid(data: Path):
    session = Modality().session(options(data), None, seed=0)
    before, told = flat(session), {}
    assert moved(session, told) == {"M"}
    assert set(told) == {"nt_xent"} and 0 < told["nt_xent"] < 6
    after = flat(session)
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {"M.centroids", "M.belongs", "M.side"}


def test_both_views_of_a_batch_are_seen_in_one_pass(data: Path):
    """Batch norm so has statistics of both, as the official code's."""
    session = Modality().session(options(data), None, seed=0)
    session.optimise(next(session.batches()))
    assert session.networks["M"].encoder.layers[1].num_batches_tracked.item() == 1


class Device(Session):
    """A session that goes on as on a GPU."""

    early, behind = False, 3


@pytest.mark.parametrize("kind", [SMALL | {"augment": tuple(NUMBERS)}, VAE])
def test_no_step_asks_the_device_for_a_value(data: Path, kind: dict):
    """Fake tensors have none, and refuse."""
    given = ModalityOptions(**kind, data_a=data / "A", data_b=data / "B")
    own = Device(Modality(), given, None, seed=1)
    drawn = list(islice(own.batches(), 2))
    own.begin()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for group in drawn:
            own.take([{n: torch.empty_like(v) for n, v in batch.items()} for batch in group])
        assert own.steps == 2
        with pytest.raises(DataDependentOutputException):
            list(own.read())


def test_it_learns_to_find_the_other_view(data: Path):
    """Of 32 views the best guess without learning costs log 31."""
    given = options(data, steps=60, lr=3e-3, augment=["crop", "flip"])
    session = Modality().session(given, None, seed=0)
    figures = session.run(silent, silent)
    assert figures["nt_xent"] < math.log(31) - 0.5


def test_pictures_of_both_domains_come_and_of_b_none_where_it_is_excluded(data: Path):
    for excluded, sets in ((False, ("X", "Y")), (True, ("X",))):
        given = options(data, exclude_target=excluded)
        session = Modality().session(given, None, seed=0)
        assert tuple(session.images) == sets
        assert Modality().draws(given)[0] == Single("x", sets)
        files = Modality().files(given)
        assert any((data / "B") in file.parents for file in files) is not excluded
    from modelsoup_i2i.pictures.draws import Spot

    class Seen:
        """Which pictures are taken."""

        def __init__(self, pictures) -> None:
            self.sets, self.transform, self.own, self.taken = (
                pictures.sets, pictures.transform, pictures, [],
            )  # fmt: skip

        def take(self, names, place, *rest):
            self.taken.append((*names, place))
            return self.own.take(names, place, *rest)

    whole = Modality().session(options(data), None, seed=0).pictures
    seen = Seen(whole)
    for index in range(32):
        Single("x", ("X", "Y")).at(seen, Spot(0, 0, index, np.arange(32)))
    assert sorted(seen.taken) == [("X", n) for n in range(24)] + [("Y", n) for n in range(8)]


def test_a_result_has_centroids_of_length_1_and_says_whose_they_are(model: Path, data: Path):
    found = load_file(model)
    assert found["M.centroids"].shape == (3, 128)
    assert torch.allclose(found["M.centroids"].norm(dim=1), torch.ones(3), atol=1e-5)
    assert found["M.belongs"].tolist() == [0, 0, 0] and found["M.side"].item() == 32
    own = load_labeller(model)
    assert not own.training and own.kind == "small"


def test_what_was_found_lies_beside_the_samples_and_in_the_figures(model: Path, data: Path):
    told = json.loads((model.parent / "told.json").read_text())
    found = json.loads((model.parent / "shown" / "modalities.json").read_text())
    assert (found["version"], found["k_source"], found["k_target"]) == (1, 3, 1)
    assert found["classes"] == ["A_00", "A_01", "A_02", "B"] and found["seed"] == 1234
    assert (found["embedding"], found["normalised"]) == ("h", True)
    assert len(found["encoder"]) == 64 and np.shape(found["centroids"]) == (3, 128)
    of_a = [item for item in found["items"] if item["domain"] == "A"]
    assert [item["path"] for item in of_a] == [
        str(file.relative_to(data / "A")) for file in list_images(data / "A")
    ]
    assert all(item["label"] in (0, 1, 2) and -1 <= item["score"] <= 1 for item in of_a)
    of_b = [item for item in found["items"] if item["domain"] == "B"]
    assert len(of_b) == 8 and all((i["label"], i["score"]) == (3, None) for i in of_b)
    figures = told["figures"]
    assert figures["modalities"] == 3 and figures["smallest"] >= 1
    assert figures["cosine"] == pytest.approx(np.mean([i["score"] for i in of_a]), abs=1e-5)
    assert 1 / 3 < figures["purity"] <= 1 and 0 <= figures["nmi"] <= 1
    assert any(line.startswith("modalities of A, 3: A_00 ") for line in told["log"])
    assert (model.parent / "shown" / "modalities.png").stat().st_size > 1000


def test_training_stopped_and_gone_on_is_the_same_and_clusters_once_more(
    data: Path, tmp_path: Path
):
    whole = trained(tmp_path / "whole", options(data))
    folder = tmp_path / "stopped"
    (folder / "work").mkdir(parents=True)
    given = options(data, checkpoint_every=1)
    session = Modality().session(given, None, seed=3, work=folder / "work")
    steps = session.batches()
    for _ in range(2):
        session.take(next(steps))
        list(session.read())
    session.keep()
    steps.close()
    again = Modality().session(given, None, seed=3, work=folder / "work", shown=folder / "shown")
    again.run(silent, silent)
    again.write(folder / "out.safetensors")
    ended = Modality().session(given, None, seed=3, work=folder / "work", shown=folder / "shown")
    ended.run(silent, silent)  # a crash after the last step
    ended.write(folder / "once more.safetensors")
    for other in ("out", "once more"):
        assert load_file(whole).keys() == load_file(folder / f"{other}.safetensors").keys()
        for name, values in load_file(whole).items():
            assert torch.equal(values, load_file(folder / f"{other}.safetensors")[name]), name


def test_balanced_domains_have_modalities_each_and_bs_follow(data: Path, tmp_path: Path):
    output = trained(tmp_path / "both", options(data, k=2, k_b=2))
    assert load_file(output)["M.belongs"].tolist() == [0, 0, 1, 1]
    found = json.loads((tmp_path / "both" / "shown" / "modalities.json").read_text())
    assert found["classes"] == ["A_00", "A_01", "B_00", "B_01"]
    assert {i["label"] for i in found["items"] if i["domain"] == "B"} == {2, 3}


def test_an_encoder_is_clustered_anew_without_being_trained(
    model: Path, data: Path, tmp_path: Path
):
    """Into another number, as a sweep over k wants it."""
    output = trained(tmp_path / "five", options(data, k=5, recluster=True, steps=1), model)
    before, after = load_file(model), load_file(output)
    assert after["M.centroids"].shape == (5, 128) and after["M.belongs"].tolist() == [0] * 5
    for name in before:
        if name not in ("M.centroids", "M.belongs"):
            assert torch.equal(before[name], after[name]), name
    same = trained(tmp_path / "three", options(data, recluster=True, steps=1), model)
    assert torch.equal(load_file(same)["M.centroids"], before["M.centroids"])


@pytest.mark.parametrize("more", [{"embedding": "z"}, {"k": 1}, {"exclude_target": True}])
def test_other_ways_of_clustering_are_labelled_too(data: Path, tmp_path: Path, more: dict):
    output = trained(tmp_path / "way", options(data, steps=1, **more))
    own = load_labeller(output)
    assert own.embedding == more.get("embedding", "h")
    assert own.centroids.shape == (more.get("k", 3), 64 if "embedding" in more else 128)
    found = json.loads((tmp_path / "way" / "shown" / "modalities.json").read_text())
    assert {i["domain"] for i in found["items"]} == (
        {"A"} if "exclude_target" in more else {"A", "B"}
    )


def test_b_may_have_one_picture(data: Path, tmp_path: Path):
    make_classes(tmp_path / "B", {"other": 1}, 36)
    output = trained(tmp_path / "out", options(None, data_a=data / "A", data_b=tmp_path / "B"))
    found = json.loads((output.parent / "shown" / "modalities.json").read_text())
    assert [i["label"] for i in found["items"] if i["domain"] == "B"] == [3]


def test_a_vae_is_clustered_by_its_means(data: Path, tmp_path: Path):
    given = ModalityOptions(**VAE, data_a=data / "A", data_b=data / "B")
    own = load_labeller(trained(tmp_path / "vae", given))
    assert own.kind == "vae" and own.centroids.shape == (3, 128) and int(own.side) == 64


def test_of_a_damaged_picture_nothing_is_said_where_it_is_left_out(data: Path, tmp_path: Path):
    make_classes(tmp_path / "A", {"red": 6, "green": 6}, 36)
    make_classes(tmp_path / "B", {"other": 4}, 36)
    (tmp_path / "A" / "red" / "0.png").write_bytes(b"nothing")
    output = trained(tmp_path / "out", options(tmp_path, on_bad_image="skip", batch=8, steps=1))
    found = json.loads((output.parent / "shown" / "modalities.json").read_text())
    assert len(found["items"]) == 15
    assert "red/0.png" not in [item["path"] for item in found["items"]]


def test_averaged_centroids_are_no_models_and_are_refused(data: Path, model: Path, tmp_path: Path):
    other = load_file(trained(tmp_path / "other", options(data, cluster_seed=5, steps=2)))
    mean = {
        n: (v + other[n]) / 2 if v.is_floating_point() else v for n, v in load_file(model).items()
    }
    merged = tmp_path / "merged.safetensors"
    save_file(mean, merged)
    with pytest.raises(
        modelsoup.MismatchError, match=r"merge.*--start.*recluster: true and steps: 1"
    ):
        load_labeller(merged)
    again = trained(tmp_path / "again", options(data, recluster=True, steps=1), merged)
    assert load_labeller(again).centroids.shape == (3, 128)
    with pytest.raises(modelsoup.MismatchError, match="a training"):
        must_be_one_models(Labeller("small", 32, 2), "fresh")


def test_a_training_that_diverges_leaves_no_clusters_and_is_refused(data: Path, tmp_path: Path):
    output = trained(tmp_path / "out", options(data, lr=1e30))
    told = json.loads((tmp_path / "out" / "told.json").read_text())
    assert told["figures"]["diverged"] == 1 and "modalities" not in told["figures"]
    assert not (tmp_path / "out" / "shown" / "modalities.json").exists()
    with pytest.raises(modelsoup.MismatchError, match="diverged"):
        load_labeller(output)


def test_known_classes_are_as_of_a_table_or_as_of_folders(data: Path, tmp_path: Path):
    assert set(options(data).known().values()) == {"red", "green", "blue"}
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nred/0.png,warm\nblue/0.png,cold\nelsewhere.png,cold\n")
    assert options(data, labels=table).known() == {"red/0.png": "warm", "blue/0.png": "cold"}
    assert options(None, data_a=data / "A" / "red", data_b=data / "B").known() == {}
    table.write_text("path,label\nelsewhere.png,cold\n")
    with pytest.raises(modelsoup.ParameterError, match=r"elsewhere\.png are not in it"):
        trained(tmp_path / "out", options(data, labels=table))


# Options.


def test_k_auto_gives_each_modality_no_more_than_b_has(data: Path):
    assert options(data, k="auto").clusters() == (3, 0)  # 24 and 8
    assert options(data, k="auto", count_b=7).clusters() == (4, 0)
    assert Modality().identity(options(data, k="auto"))["k"] == 3
    assert options(None, k=40).clusters() == (40, 0)
    with pytest.raises(modelsoup.ParameterError, match="there are no data: say k"):
        options(None, k="auto").clusters()


def test_more_modalities_than_pictures_are_told_before_the_training(data: Path):
    with pytest.raises(modelsoup.ParameterError, match="k is 25, but A has 24 pictures"):
        Modality().images(options(data, k=25))
    with pytest.raises(modelsoup.ParameterError, match="k_b is 9, but B has 8 pictures"):
        Modality().images(options(data, k_b=9))


def test_domains_the_wrong_way_round_are_told(data: Path):
    way = {"data_a": data / "B", "data_b": data / "A"}
    with pytest.raises(modelsoup.ParameterError, match=r"B has 24 pictures and A 8.*exchange"):
        options(None, **way, k="auto").clusters()
    told = Modality().opening(options(None, **way), {})
    assert len(told) == 2 and "warning: B, which stays one class, has 24" in told[1]
    assert len(Modality().opening(options(None, **way, k_b=3), {})) == 1
    assert Modality().opening(options(data), {}) == ["A is to have 3 modalities, B is one class"]


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("no augmentation 'colour'.*color", {"augment": ["colour"]}),
        ("shuffle, of 8 × 8 tiles, but size is 36", {"augment": ["shuffle"], "size": 36}),
        ("color and gray, for pictures of 3 channels, but channels is 1", {"channels": 1}),
        ("size is 32, but the VAE sees 64", {"encoder": "vae"}),
        ("embedding is z", {"encoder": "vae", "size": 64, "embedding": "z"}),
        ("batch is 1, but batch norm", {"batch": 1}),
        ("k_b splits B, which exclude_target leaves out", {"k_b": 2, "exclude_target": True}),
        ("evaluate measures translators", {"evaluate": ["ssim"], "test_a": ".", "test_b": "."}),
        ("jitter is .* must be between 0 and", {"jitter": (0.8, 0.8, 0.8, 0.6)}),
        ("gamma is 0", {"gamma": 0}),
    ],
)
def test_options_that_do_not_fit_are_told(said: str, more: dict):
    with pytest.raises(ValueError, match=said):
        options(None, **more)


def test_nothing_but_a_start_or_init_from_has_an_encoder_to_cluster_anew(
    model: Path, data: Path, tmp_path: Path
):
    again = {"recluster": True, "steps": 1}
    with pytest.raises(modelsoup.TrainerError, match=r"M is not trained here.*--start.*init_from"):
        trained(tmp_path / "random", options(data, **again))
    assert not (tmp_path / "random" / "out.safetensors").exists()
    begun = trained(tmp_path / "begun", options(data, **again, init_from={"M": model}))
    assert torch.equal(load_file(begun)["M.centroids"], load_file(model)["M.centroids"])


def test_a_result_sees_pictures_at_the_size_at_which_its_encoder_was_trained(
    model: Path, data: Path, tmp_path: Path
):
    """Of a start of another size too; an encoder that is clustered anew keeps its own."""
    larger = trained(tmp_path / "larger", options(data, size=40, steps=1), model)
    assert load_file(larger)["M.side"].item() == 40
    begun = options(data, size=40, steps=1, init_from={"M": model})
    assert load_file(trained(tmp_path / "begun", begun))["M.side"].item() == 40
    again = trained(tmp_path / "again", options(data, size=40, recluster=True, steps=1), model)
    before, after = load_file(model), load_file(again)
    assert after["M.side"].item() == 32
    assert torch.equal(after["M.centroids"], before["M.centroids"])


def test_frozen_centroids_are_refused_before_the_training(model: Path, data: Path, tmp_path: Path):
    with pytest.raises(modelsoup.ParameterError, match=r"M\.centroids is frozen.*recluster"):
        trained(tmp_path / "out", options(data), model, frozen=["M.centroids"])


def test_each_epoch_leaves_a_share_of_the_rate():
    given = options(None, gamma=0.95, steps=None, epochs=9)
    assert [given.pace(n) for n in range(3)] == pytest.approx([1, 0.95, 0.95**2])


@pytest.mark.parametrize(("more", "steps"), [({}, 4), ({"exclude_target": True}, 3)])
def test_an_epoch_is_every_picture_of_both_domains_once(data: Path, more: dict, steps: int):
    own = options(data, steps=None, epochs=2, batch=8, **more)  # A has 24 pictures and B 8
    made = Modality().session(own, None, seed=1)
    assert (made.steps_per_epoch, made.total_steps) == (steps, 2 * steps)
    drawn = torch.cat([group[0]["x"] for group in islice(made.batches(), steps)])
    assert len({picture.numpy().tobytes() for picture in drawn}) == 8 * steps


def test_a_start_of_another_encoder_is_told_with_the_option(model: Path, data: Path):
    given = ModalityOptions(**VAE, data_a=data / "A", data_b=data / "B")
    with pytest.raises(modelsoup.MismatchError, match="the start has encoder: small"):
        Modality().must_start(given, model)
    assert Modality().options_of(model) == {
        "encoder": "small", "k": 3, "channels": 3, "embedding": "h"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.needs("examples")
@pytest.mark.timeout(600)
def test_the_modalities_of_digits_that_nobody_labelled_are_the_digits(tmp_path: Path):
    """0, 1, 4 and 6 as A, fifty of 2 as B."""
    from modelsoup_i2i.pictures.images import resized, save_png
    from sklearn.datasets import load_digits

    digits, of_b = load_digits(), 0
    for n, (picture, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        of_b += digit == 2
        if digit in (0, 1, 4, 6) or (digit == 2 and of_b <= 50):
            folder = tmp_path / ("B" if digit == 2 else "A") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            grey = (picture * 15.9).astype(np.uint8)[:, :, None].repeat(3, axis=2)
            save_png(resized(grey, (32, 32)), folder / f"{n}.png")
    given = options(
        tmp_path, k=4, batch=128, steps=150, lr=1e-3, augment=("crop", "color", "blur"),
        jitter=(0.4, 0.4, 0, 0), restarts=5,
    )  # fmt: skip
    output = trained(tmp_path / "out", given)
    figures = json.loads((output.parent / "told.json").read_text())["figures"]
    assert figures["nmi"] > 0.7 and figures["purity"] > 0.85
    guessed = trained(tmp_path / "guessed", options(tmp_path, k=4, steps=1))
    before = json.loads((guessed.parent / "told.json").read_text())["figures"]
    assert figures["nmi"] > before["nmi"] + 0.1
