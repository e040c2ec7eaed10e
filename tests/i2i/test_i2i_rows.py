"""The rows of examples/deepi2i are commands that the trainers take."""

from __future__ import annotations

import importlib.util
import json
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
from modelsoup.trainer import build_options  # noqa: E402

FILE = Path(__file__).parents[2] / "examples" / "deepi2i" / "rows.py"
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepi2i_rows", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    for part in ("pretrain", "train", "test"):
        with h5py.File(folder / f"{part}.h5", "w") as file:
            file["imgs"] = np.zeros((10, 32, 32, 1), np.uint8)
            file["labels"] = np.arange(10)
            file.attrs["classes"] = list(CLASSES)
    return folder


def test_each_row_is_a_command_that_its_trainer_takes(rows: ModuleType, data: Path, tmp_path: Path):
    for name, row in rows.rows().items():
        words = rows.command(name, data, 3)
        assert words[:5] == ["soup", "train", row.trainer, "-o", f"{name}-seed-3.safetensors"]
        pairs = [word.partition("=") for at, word in pairwise(words)
                 if at == "--set"]  # fmt: skip
        given = {option: yaml.safe_load(value) for option, _, value in pairs}
        trainer = get_trainer(row.trainer)
        options = build_options(trainer, given, folder=tmp_path)
        assert trainer.networks(options)
        assert trainer.turns(options, 0)
        before = list(rows.needed(name))
        assert before[-1] == name
        assert all(own in rows.rows() for own in before)


def test_what_is_pretrained_on_is_no_other_rows_data(rows: ModuleType, data: Path):
    for name, row in rows.rows().items():
        words = " ".join(rows.command(name, data, None))
        assert ("pretrain.h5" in words) == (name in ("P", "P2"))
        assert ("train.h5" in words) == (row.trainer != "self-init")


def test_a_table_has_means_and_spreads_of_what_was_measured(rows: ModuleType, tmp_path: Path):
    for seed, value in ((0, 1.0), (1, 3.0)):
        told = [{"name": name, "value": value} for name in rows.METRICS]
        (tmp_path / f"D1-seed-{seed}.json").write_text(json.dumps(told), "utf-8")
    (row,) = rows.table(tmp_path).splitlines()[2:]
    assert row.startswith("| D1 | transfer | 2.000 ± 1.414 |")
    assert row.endswith("| 2 |")
