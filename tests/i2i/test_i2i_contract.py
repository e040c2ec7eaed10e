"""What holds for each trainer of images, whatever its paper: a row for each."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from i2i_domains import drawing, make_domains
from i2i_states import silent
from modelsoup_i2i.pictures.images import read_image, save_png
from modelsoup_i2i.pictures.sources import prepare
from modelsoup_i2i.training import compiling
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.use.export import export_onnx
from modelsoup_i2i.use.generators import load_model
from modelsoup_i2i.use.translate import translate
from safetensors.numpy import save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import modelsoup

torch.set_num_threads(1)
CROP = {"load_size": 18, "crop_size": 16}
GAN = {"ch": 8, "size": "32s", "attention": 0, "chunk": 4, "shared": 8, "accumulate": 1,
       "batch": 2}  # fmt: skip
FUNIT = {"size": 16, "width": 4, "downs": 2, "style_downs": 2, "latent": 6, "mlp": 8,
         "d_halvings": 2, "d_most": 12, "batch": 2}  # fmt: skip

CUT = {"width": 4, "blocks": 5, "d_width": 4, "d_layers": 1, "f_width": 8, "patches": 16,
       "decay_epochs": 0}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A trainer at test size.

    Attributes:
        options: beside its data.
        data: `domains`: a folder with trainA and so on; `two`: two folders, as classes; `classes`:
            a folder of classes.
        use: what `translate` is told; `references` stands for a folder of pictures.
        steps: after which a training is stopped, and then gone on with for one more.
        long: options of a training that improves, on pictures of 32 × 32.
        metric: by which it does; None is a Fréchet distance.
    """

    options: dict[str, Any]
    data: str = "domains"
    use: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    long: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None


ROWS = {
    "balagan": Row(
        FUNIT | {"r1": "per_sample"}, use={"reference": "references"},
        long={"width": 8, "batch": 2, "lr": 4e-4, "ema": 0.9, "lambda_rec": 1.0},
    ),
    "cyclegan": Row(
        CROP | {"width": 4, "blocks": 1, "d_width": 4, "d_layers": 1, "pool_size": 3},
        long={"width": 16, "blocks": 3, "d_width": 16, "d_layers": 2},
    ),
    "cut": Row(CROP | CUT, long=CUT | {"width": 16, "d_width": 16, "d_layers": 2, "f_width": 64}),
    "deepi2i": Row(
        GAN | {"scratch": True, "phase1": 1}, data="classes", use={"classes": "square"},
        long=GAN | {"scratch": True, "batch": 8, "lr": 5e-4, "d_lr": 1e-3},
    ),
    "fastcut": Row(
        CROP | CUT, long=CUT | {"width": 16, "d_width": 16, "d_layers": 2, "f_width": 64}
    ),
    "funit": Row(
        FUNIT | {"class_balanced": True}, use={"reference": "references"},
        long={"width": 8, "batch": 2, "lr": 4e-4, "ema": 0.9, "lambda_rec": 1.0},
    ),
    "munit": Row(
        CROP | {"width": 4, "blocks": 1, "style": 3, "mlp": 8, "d_width": 4, "d_layers": 2,
                "d_scales": 2},
        long={"width": 8, "blocks": 1, "mlp": 32, "style": 4, "d_width": 8, "d_layers": 3,
              "d_scales": 1, "lr": 2e-3},
        # It begins with coloured noise, which deep features hold nearer to pictures than blurs.
        metric="ssim",
    ),
    "nice-gan": Row(
        {"load_size": 52, "crop_size": 48, "width": 4, "blocks": 1, "d_layers": 6,
         "decay_steps": 0},
        long={"load_size": 52, "crop_size": 48, "width": 12, "blocks": 2, "d_layers": 6,
              "lr": 5e-4},
    ),
    "pix2pix": Row(
        CROP | {"width": 4, "d_width": 4, "downs": 4, "patch": 16},
        long={"load_size": 32, "width": 16, "d_width": 16, "downs": 4, "patch": 16, "lr": 5e-4},
    ),
    "stargan": Row(
        {"size": 16, "width": 4, "blocks": 1, "d_width": 4, "n_critic": 2, "batch": 2},
        data="two", use={"classes": "B"}, steps=3,
        long={"width": 16, "blocks": 3, "d_width": 32, "batch": 4, "lr": 4e-4, "rate": "constant"},
    ),
    "starganv2": Row(
        {"size": 32, "width": 4, "most": 8, "style": 4, "hidden": 8, "noise": 4, "batch": 2},
        data="two", use={"classes": "B"},
        long={"width": 16, "most": 64, "style": 16, "hidden": 64, "batch": 4, "lr": 4e-4,
              "f_lr": 4e-5, "ema": 0.99},
    ),
    "ugatit": Row(
        {"load_size": 26, "crop_size": 24, "width": 4, "blocks": 1, "d_width": 4, "d_layers": 5,
         "d_layers_local": 4, "decay_steps": 0},
        long={"width": 8, "blocks": 2, "d_width": 8, "d_layers": 5, "d_layers_local": 4,
              "lr": 5e-4},
    ),
}  # fmt: skip
STEPS = {"cache_mb": 1, "threads": 0, "sheet_every": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_domains(tmp_path_factory.mktemp("contract"), count_b=6, size=36)
    for name, kind in (("disc", "A"), ("square", "B")):
        (root / "classes" / name).mkdir(parents=True)
        for n in range(6):
            save_png(drawing(kind, n, 36), root / "classes" / name / f"{n}.png")
    return root


def placed(row: Row, folders: Path) -> dict[str, Path]:
    if row.data == "two":
        return {"data_a": folders / "trainA", "data_b": folders / "trainB"}
    return {"data": folders / "classes" if row.data == "classes" else folders}


def begun(name: str, folders: Path, work: Path | None, steps: int) -> Session:
    trainer, row = modelsoup.get_trainer(name), ROWS[name]
    own = {**STEPS, **row.options, **placed(row, folders), "steps": steps}
    return trainer.session(trainer.options(**own), None, seed=1, work=work)


@dataclass(frozen=True)
class Trained:
    """A training that was made in one go, and one that was stopped before its last step."""

    name: str
    row: Row
    trainer: Any
    options: Any
    whole: Path
    gone_on_with: Path


@pytest.fixture(scope="module", params=sorted(ROWS))
def trained(request, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, work = request.param, tmp_path_factory.mktemp(request.param)
    row, steps = ROWS[name], ROWS[name].steps + 1
    whole = begun(name, folders, None, steps)
    whole.run(silent, silent)
    whole.save(work / "whole.safetensors")
    first = begun(name, folders, work, steps)
    first.resume()
    first.begin()
    for group in islice(first.batches(), row.steps):
        first.take(group)
        dict(first.read())
    first.keep()
    del first
    second = begun(name, folders, work, steps)
    said: list[str] = []
    second.run(silent, said.append)
    assert said[0].startswith(f"goes on after step {row.steps} of {steps}")
    second.save(work / "gone-on-with.safetensors")
    return Trained(
        name, row, whole.trainer, whole.options, work / "whole.safetensors",
        work / "gone-on-with.safetensors",
    )  # fmt: skip


def test_a_training_that_was_stopped_ends_as_one_that_was_not(trained: Trained):
    assert trained.gone_on_with.read_bytes() == trained.whole.read_bytes()


def test_a_checkpoint_has_what_the_trainer_says_and_its_options_are_found(
    trained: Trained, folders: Path
):
    stored = modelsoup.open_checkpoint(trained.whole).tensors
    told = {name: shape for name, (_, shape) in trained.trainer.tensors(trained.options).items()}
    assert {name: tuple(info.shape) for name, info in stored.items()} == told
    found = trained.trainer.options_of(trained.whole)
    again = trained.trainer.tensors(
        trained.trainer.options(**found, **placed(trained.row, folders))
    )
    assert {name: tuple(shape) for name, (_, shape) in again.items()} == {
        name: tuple(shape) for name, shape in told.items()
    }


def test_every_group_of_layers_is_some_and_merges_alone(trained: Trained, tmp_path: Path):
    own = modelsoup.open_checkpoint(trained.whole)
    other = tmp_path / "other.safetensors"
    floats = {n for n in own.tensors if own[n].dtype.kind == "f"}
    save_file({n: np.asarray(own[n] + (n in floats)) for n in own.tensors}, other)
    groups = trained.trainer.groups(trained.options)
    for name, patterns in groups.items():
        for pattern in patterns:
            assert any(fnmatchcase(tensor, pattern) for tensor in own.tensors), (name, pattern)
    patterns = next(iter(groups.values()))
    modelsoup.merge([trained.whole, other], tmp_path / "out.safetensors", layers=patterns)
    made = modelsoup.open_checkpoint(tmp_path / "out.safetensors")
    for name in own.tensors:
        inside = any(fnmatchcase(name, pattern) for pattern in patterns)
        changed = not np.array_equal(made[name], own[name])
        assert changed == (inside and name in floats), name


def test_it_translates_a_folder(trained: Trained, folders: Path, tmp_path: Path):
    use = {k: folders / "testB" if v == "references" else v for k, v in trained.row.use.items()}
    written = translate(trained.whole, folders / "testA", tmp_path / "out", **use)
    assert [file.name for file in written] == [f"{n}.png" for n in range(6)]
    model = load_model(trained.whole)
    side = model.size or 36
    assert all(read_image(file, 3).shape == (side, side, 3) for file in written)


@pytest.mark.needs("onnx")
@pytest.mark.timeout(120)
def test_its_onnx_makes_what_it_makes_and_so_does_that_of_its_styles(
    trained: Trained, tmp_path: Path
):
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, rng = load_model(trained.whole), np.random.default_rng(0)
    modules: dict[Any, torch.nn.Module] = {"translation": model.module}
    if model.how.style is not None:
        makers = {"style": model.how.style.of_pictures, "style-of-noise": model.how.style.of_noise}
        modules |= {part: model.makers[name] for part, name in makers.items() if name is not None}
    for part, module in modules.items():
        file = tmp_path / f"{part}.onnx"
        size = None if part == "style-of-noise" else 32
        stored = onnx.load(export_onnx(trained.whole, file, size=size, part=part))
        given = {}
        for one in stored.graph.input:
            shape = [d.dim_value or 2 for d in one.type.tensor_type.shape.dim]
            if one.name == "class":
                given[one.name] = np.arange(shape[0]) % max(model.how.classes, 1)
            else:
                given[one.name] = rng.uniform(-1, 1, shape).astype(np.float32)
        with torch.no_grad():
            own = module(*(torch.from_numpy(values) for values in given.values())).numpy()
        (made,) = ReferenceEvaluator(stored).run(None, given)
        np.testing.assert_allclose(made, own, atol=2e-4, err_msg=part)


class Device(Session):
    """A session that goes on as on a GPU."""

    early, behind = False, 3


@pytest.mark.parametrize("name", sorted(ROWS))
def test_no_step_asks_the_device_for_a_value(name: str, folders: Path):
    """Fake tensors have none, and refuse."""
    trainer, row = modelsoup.get_trainer(name), ROWS[name]
    options = trainer.options(
        **{**STEPS, **row.options, **placed(row, folders), "steps": row.steps + 1}
    )
    own = Device(trainer, options, None, seed=1)
    drawn = list(own.batches())
    own.begin()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for group in drawn:
            own.take([{n: torch.empty_like(v) for n, v in batch.items()} for batch in group])
        assert own.steps == row.steps + 1
        with pytest.raises(DataDependentOutputException):
            list(own.read())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_who_compiles_its_networks_learns_how_they_are_called_and_nothing_moves(
    name: str, folders: Path
):
    own, untouched = (begun(name, folders, None, 2) for _ in range(2))
    for each in (own, untouched):
        each.begin()
    told = pickle.loads(pickle.dumps(own._called(next(iter(own.batches())))))
    assert told.keys() <= own.networks.keys()
    other = begun(name, folders, None, 2)
    other.begin()
    for network, calls in told.items():
        assert 0 < len(calls) < 12
        for call in calls:
            assert len(call.trained) == len(list(other.networks[network].parameters()))
            compiling.made_as(call, other.networks[network], other.networks[network], other)
    steps = [[each.optimise(group) for group in each.batches()] for each in (own, untouched)]
    assert steps[0] == steps[1]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emoji") / "set"
    prepare("emoji", root, size=32, count=200)
    for part in ("train", "test"):
        (root / part).mkdir()
        for domain in "AB":
            (root / part / domain).symlink_to(root / f"{part}{domain}")
    return root


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_minute_on_a_real_pair_makes_it_better(name: str, emoji: Path):
    trainer, row = modelsoup.get_trainer(name), ROWS[name]
    place = {"data": emoji}
    if row.data == "two":
        place = {f"{part}_{of}": emoji / f"{folder}{of.upper()}" for of in "ab"
                 for part, folder in (("data", "train"), ("test", "test"))}  # fmt: skip
    elif row.data == "classes":
        place = {"data": emoji / "train", "test": emoji / "test"}
    sizes = {"size": 32} if hasattr(trainer.options, "size") else {"load_size": 36, "crop_size": 32}
    metric = row.metric or ("fd-st-alex" if row.data == "domains" else "mfd-st-alex")
    options = trainer.options(**{
        **STEPS, **sizes, **row.long, **place, "steps": 100_000,
        "evaluate": [metric], "evaluate_n": 60,
    })  # fmt: skip
    own = trainer.session(options, None, seed=1)
    own.begin()
    sets = options.test_sets(options.transform())
    before = own.evaluate(sets)[metric]
    end = time.process_time() + 60
    for group in own.batches():
        own.take(group)
        losses = dict(own.read())
        if time.process_time() > end:
            break
    assert all(np.isfinite(value) for one in losses.values() for value in one.values())
    after = own.evaluate(sets)[metric]
    assert after > before + 0.15 if metric == "ssim" else after < 0.9 * before
