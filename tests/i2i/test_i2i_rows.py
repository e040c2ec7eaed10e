"""The rows of examples/deepi2i and of examples/balagan are commands that the trainers take."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

pytest.importorskip("torch")
h5py = pytest.importorskip("h5py")

from modelsoup import get_trainer  # noqa: E402
from modelsoup.trees.trainer import build_options  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip


def loaded(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{example}_rows", EXAMPLES / example / "rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    return loaded("deepi2i")


@pytest.fixture(scope="module")
def balagan() -> ModuleType:
    return loaded("balagan")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    for part in ("pretrain", "train", "test"):
        with h5py.File(folder / f"{part}.h5", "w") as file:
            file["imgs"] = np.zeros((10, 32, 32, 1), np.uint8)
            file["labels"] = np.arange(10)
            file.attrs["classes"] = list(CLASSES)
    return folder


def taken(name: str, words: list[str], folder: Path) -> None:
    """Have a trainer take a command's options."""
    pairs = [word.partition("=") for at, word in pairwise(words) if at == "--set"]
    trainer = get_trainer(name)
    options = build_options(
        trainer, {option: yaml.safe_load(value) for option, _, value in pairs}, folder=folder
    )
    assert trainer.networks(options)
    assert trainer.turns(options, 0)


def test_each_row_is_a_command_that_its_trainer_takes(rows: ModuleType, data: Path, tmp_path: Path):
    for name, row in rows.rows().items():
        words = rows.command(name, data, 3)
        assert words[:5] == ["soup", "train", row.trainer, "-o", f"{name}-seed-3.safetensors"]
        taken(row.trainer, words, tmp_path)
        before = list(rows.needed(name))
        assert before[-1] == name
        assert all(own in rows.rows() for own in before)


def test_what_is_pretrained_on_is_no_other_rows_data(rows: ModuleType, data: Path):
    for name, row in rows.rows().items():
        words = " ".join(rows.command(name, data, None))
        assert ("data=" + str(data / "pretrain.h5") in words.split()) == (name in ("P", "P2"))
        assert ("train.h5" in words) == (row.trainer != "self-init")


def test_a_table_has_means_and_spreads_of_what_was_measured(rows: ModuleType, tmp_path: Path):
    for seed, value in ((0, 1.0), (1, 3.0)):
        told = [{"name": name, "value": value} for name in rows.METRICS]
        (tmp_path / f"D1-seed-{seed}.json").write_text(json.dumps(told), "utf-8")
    (row,) = rows.table(tmp_path).splitlines()[2:]
    assert row.startswith("| D1 | transfer | 2.000 ± 1.414 |")
    assert row.endswith("| 2 |")


def test_curves_and_movements_are_tables_of_what_trainings_left(rows: ModuleType, tmp_path: Path):
    for seed, last in ((0, 4), (12, 6)):
        shown = tmp_path / f"D1-seed-{seed}-shown" / "deepi2i"
        shown.mkdir(parents=True)
        (shown / "metrics.csv").write_text(
            f"epoch,step,mfd-fmnist-cnn64,rc,source_use\n1,250,8,10,0\n2,500,{last},20,0.5\n",
            "utf-8",
        )
    title, _, first, *others = rows.curves(tmp_path).splitlines()
    assert title.startswith("| row |  | 250 | 500 | 750 |") and len(others) == 2
    assert first.startswith("| D1 | mfd-fmnist-cnn64 | 8.000 ± 0.000 | 5.000 ± 1.414 |  |")
    moved = {"linear": {"sum": 7.0}, "blocks.0": {"sum": 2.0}, "blocks.1": {"sum": 1.0}}
    (tmp_path / "T3-seed-0-moved.json").write_text(json.dumps(moved), "utf-8")
    assert rows.moves(tmp_path).splitlines()[2:] == ["| T3 | 1a and 1b | 2 | 1 |"]


def test_what_is_measured_of_a_row_is_its_control_and_of_some_what_was_never_seen(rows: ModuleType):
    assert rows.views("P") == ["P"] and rows.views("P2") == []
    assert rows.views("D2") == ["D2", "D2-control"]
    assert rows.views("D9") == ["D9", "D9-control", "D9-boots", "D9-others"]
    asked = {name: rows.evaluation(name, Path("x"), 1) for name in rows.views("D9")}
    assert {words[3] for words in asked.values()} == {"D9-seed-1.safetensors"}
    assert asked["D9"] == [word for word in asked["D9-control"] if word != "--control"]
    assert asked["D9-boots"][-2:] == ["--sources", "ankle-boot"]
    assert set(asked["D9-others"][-1].split(",")) == {*CLASSES} - {"ankle-boot"}
    assert rows.fluctuation("T3", 1)[3:5] == ["1b-seed-1.safetensors", "T3-seed-1.safetensors"]
    kept = [file for file, _ in rows.measuring("T3", Path("x"), 1)]
    assert kept == ["T3-seed-1.json", "T3-control-seed-1.json", "T3-seed-1-moved.json"]
    assert not rows.fluctuation("T0", 1) and not rows.fluctuation("D1", 1)


def stored(folder: Path) -> None:
    """Twenty pictures of each kind, for training and for tests."""
    for part in ("train", "test"):
        with h5py.File(folder / f"{part}.h5", "w") as file:
            file["imgs"] = np.zeros((200, 8, 8, 1), np.uint8)
            file["labels"] = np.arange(200) % 10
            file.attrs["classes"] = list(CLASSES)


def test_each_row_of_balagan_is_a_command_that_its_trainer_takes(
    balagan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    stored(tmp_path)
    balagan.pictures(tmp_path, tmp_path)
    assert len(list((tmp_path / "trainA").rglob("*.png"))) == 80
    assert len(list((tmp_path / "testB").rglob("*.png"))) == 20
    for name, row in balagan.rows().items():
        if row.exported is not None:  # what `soup i2i modalities` would leave there
            for kind in ("A_00", "B_00"):
                shutil.copytree("trainB", f"{row.exported}-seed-3-classes/{kind}")
        count, of = ("", "") if name.startswith("shoes-") else (":5", "-of-5")
        *exporting, words = balagan.commands(name + count, 3)
        result = f"{name}{of}-seed-3.safetensors"
        assert words[:5] == ["soup", "train", row.trainer, "-o", result]
        taken(row.trainer, words, tmp_path)
        start = [] if row.start is None else [f"{row.start}{of}-seed-3.safetensors"]
        assert [word for at, word in pairwise(words) if at == "--start"] == start
        *before, last = balagan.needed(name + count)
        assert last == name + count
        made = [balagan.file_name(own, 3) for own in before]
        used = start + [own[own.index("modalities") + 1] for own in exporting]
        assert bool(exporting) == (row.exported is not None) and made[-1:] == used
        translated = balagan.translation(name, None)
        assert ("--reference" in translated) == (row.trainer == "balagan")
    figures = dict.fromkeys(balagan.MEASURED, 1.0)
    for seed in (0, 1):
        (tmp_path / f"k4-of-5-seed-{seed}.json").write_text(json.dumps(figures), "utf-8")
    (row,) = balagan.table(tmp_path).splitlines()[2:]
    assert row.startswith("| k4 | 4 modalities | 5 | 1.000 ± 0.000 |") and row.endswith("| 2 |")


def test_a_folder_of_results_gets_the_pictures_that_it_lacks(balagan: ModuleType, tmp_path: Path):
    stored(tmp_path)
    results = tmp_path / "results"
    balagan.pictures(tmp_path, results)
    folders = {place.name for place in results.iterdir()}
    kept = results / "trainB" / "0.png"
    kept.write_bytes(b"as it was")
    shutil.rmtree(results / "shoes-trainB")
    balagan.pictures(tmp_path, results)
    assert {place.name for place in results.iterdir()} == folders
    assert len(list((results / "shoes-trainB").rglob("*.png"))) == 60
    assert kept.read_bytes() == b"as it was"


@pytest.mark.parametrize(
    "row, said",
    [
        ("shoes-k1:100", "shoes-k1 takes no count (100): its B has 1,500 pictures"),
        ("k4:few", "k4 has 'few' pictures of B, where 1 to 500 are expected"),
        ("k4:501", "k4 has '501' pictures of B, where 1 to 500 are expected"),
    ],
)
def test_a_count_that_a_row_cannot_have_is_told(row: str, said: str, tmp_path: Path):
    words = ["--data", "fashion", "--print", row]
    command = [sys.executable, EXAMPLES / "balagan" / "rows.py", *words]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {said}" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_starts_of_a_translation_are_trained_and_measured(tmp_path: Path):
    for part in ("pretrain", "train", "test"):
        rng = np.random.default_rng(0)
        with h5py.File(tmp_path / f"{part}.h5", "w") as file:
            file["imgs"] = rng.integers(0, 256, (1000, 28, 28, 1)).astype(np.uint8)
            file["labels"] = np.arange(1000) % 10
            file.attrs["classes"] = list(CLASSES)
    words = ["--data", tmp_path, "--results", tmp_path / "made", "--steps", *"1111"]
    command = [sys.executable, EXAMPLES / "transferi2i" / "starts.py", *words]
    done = subprocess.run(
        [*map(str, command), "--shares", "target", "0.5"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("| the target's GAN | ") and second.startswith(
        "| 0.5 of the source's |"
    )
    assert first.count("|") == 9 and first.rstrip(" |").endswith("1")
    told = [line.split() for line in done.stderr.splitlines() if " done " in line]
    made = [words[3].partition("#")[0] for words in told]
    for gan in ("pretrained", "source", "target"):
        assert made.count(gan) == 1
