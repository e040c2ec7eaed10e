"""The tree paper's tables as plans: how many trainings each row is, and that the small ones run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import modelsoup

EXAMPLE = Path(__file__).parents[2] / "examples" / "edge_tree" / "paper.py"


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for name in ("apple2orange", "horse2zebra"):
        for part in ("trainA", "trainB"):
            (tmp_path / name / part).mkdir(parents=True)
    return tmp_path


def test_every_row_of_tables_iii_to_vii_is_there(paper: ModuleType):
    """Table VII has one of ours besides: calibration alone."""
    assert Counter(row.table for row in paper.paper_rows()) == {3: 36, 4: 12, 5: 6, 6: 2, 7: 4}
    assert len({row.name for row in paper.paper_rows()}) == 60


def test_every_row_is_as_many_trainings_as_in_the_paper(paper: ModuleType, pairs: Path):
    for row in paper.paper_rows():
        content = paper.plan(row, paper.SIZES["paper"], pairs, seed=1)
        tree, warnings = modelsoup.parse_tree(yaml.safe_dump(content), folder=pairs)
        kinds = Counter(type(operation).__name__ for _, operation in tree.operations())
        trainings = {1: 1, 2: 3, 3: 7}[row.levels] if not row.asymmetric else 6
        trainings += row.int8 is not None
        assert kinds["Train"] + kinds["FineTune"] == trainings, row
        assert not warnings
        for _, operation in tree.operations():
            training = getattr(operation, "training", None)
            if training is not None:
                options = training.options.get("training", training.options)
                assert options["imbalance"] == row.imbalance
                assert options.get("balance") == (row.imbalance / 100 if row.aware else None)
                assert (options["load_size"], options["crop_size"], options["width"]) == (
                    286,
                    256,
                    64,
                )


def test_leaves_have_the_rates_of_table_i(paper: ModuleType, pairs: Path):
    (row,) = [r for r in paper.paper_rows() if r.name == "table3-horse_to_zebra-99-3-levels"]
    tree, _ = modelsoup.parse_tree(yaml.safe_dump(paper.plan(row, paper.SIZES["paper"], pairs, 0)))
    rates = [op.training.options["lr"] for _, op in tree.operations() if hasattr(op, "training")]
    assert Counter(rates) == {5e-5: 1, 1.5e-4: 1, 1.5e-3: 1, 3e-2: 1, 2e-4: 3}


def test_reversed_pairs_exchange_the_folders(paper: ModuleType, pairs: Path):
    assert paper.domains("orange_to_apple", pairs)["data_a"].endswith("apple2orange/trainB")
    assert paper.domains("horse_to_zebra", pairs)["data_b"].endswith("horse2zebra/trainB")
    with pytest.raises(modelsoup.ParameterError, match="neither apple2orange nor orange2apple"):
        paper.domains("apple_to_orange", pairs / "horse2zebra")


def test_the_asymmetric_trees_third_leaf_is_trained_on_another_pair(paper: ModuleType, pairs: Path):
    """Horses and zebras, or any set that is named: none of it is of the pair that is measured."""
    (row,) = [r for r in paper.paper_rows() if r.asymmetric]
    size = paper.SIZES["paper"]
    leaf = paper.plan(row, size, pairs, 0)["models"]["other"]["train"]
    assert leaf["data_a"] == str(pairs / "horse2zebra" / "trainA")
    (pairs / "horse2zebra").rename(pairs / "elsewhere")
    with pytest.raises(modelsoup.ParameterError, match=r"another pair, and .*horse2zebra/trainA"):
        paper.plan(row, size, pairs, 0)
    (small,) = paper.small_rows([row])
    for data, chosen in ((pairs, row), (None, small)):
        content = paper.plan(chosen, size, data, 0, other=pairs / "elsewhere")
        own, *rest = [
            {Path(model["train"][key]).parent for key in ("data_a", "data_b")}
            for name, model in sorted(content["models"].items(), key=lambda m: m[0] != "other")
        ]
        assert own == {pairs / "elsewhere"} and own not in rest
    with pytest.raises(modelsoup.ParameterError, match=r"soup i2i data day-night SET.*--other SET"):
        paper.plan(small, size, None, 0)
    with pytest.raises(modelsoup.ParameterError, match=r"another pair, and .*nowhere/trainA"):
        paper.plan(small, size, None, 0, other=pairs / "nowhere")


def test_a_row_is_measured_on_test_folders_wherever_they_are(paper: ModuleType, tmp_path: Path):
    """A folder above may be called as it likes."""
    from i2i_domains import make_domains
    from modelsoup_i2i import ResnetGenerator
    from modelsoup_i2i.pictures.images import list_images, read_image
    from safetensors.torch import save_file

    data = tmp_path / "training"
    make_domains(data / "apple2orange")
    torch.manual_seed(0)
    network = ResnetGenerator(4, 1).state_dict()
    save_file({f"G_A.{k}": v for k, v in network.items()}, tmp_path / "model.safetensors")
    (row,) = [r for r in paper.paper_rows() if r.name == "table3-orange_to_apple-90-1-levels"]
    size = paper.Size({"load_size": 24, "crop_size": 20}, ())
    figures, rows = paper.measure(tmp_path / "model.safetensors", row, size, data)
    assert figures == {}
    for column, folder in ((0, "testB"), (2, "testA")):  # orange to apple
        files = list_images(data / "apple2orange" / folder)[: len(rows)]
        assert [pictures[column].tolist() for pictures in rows] == [
            read_image(file).tolist() for file in files
        ]
    assert len(rows) == 4 and all((row[0] != row[1]).any() for row in rows)


def test_only_the_discriminators_go_up_with_s2_a(paper: ModuleType):
    (row,) = [
        r for r in paper.small_rows(paper.paper_rows())
        if r.name == "table4-noto_to_twemoji-95-2-levels-S2-A"
    ]  # fmt: skip
    content = paper.plan(row, paper.SIZES["small"], None, 0)
    plan = modelsoup.check(modelsoup.parse_tree(yaml.safe_dump(content))[0])
    assert plan.problems == ()
    merge = plan.nodes["root.merge"]
    assert {name[0] for name in merge.merged} == {"D"}
    assert {name[0] for name in merge.dropped} == {"G"}


@pytest.mark.needs("openvino")
def test_table_vii_is_one_training_in_int8(paper: ModuleType, pairs: Path):
    rows = [row for row in paper.paper_rows() if row.table == 7]
    assert [row.int8 for row in rows] == [None, 0, 2, paper.QAT_EPOCHS]
    size = paper.SIZES["paper"]
    float32, content, *others = (paper.plan(row, size, pairs, 0) for row in rows)
    assert content["models"] == float32["models"]  # which is so trained once
    assert others == [content, content]
    options = content["tree"]["finetune"]
    assert options["training"]["data"] == str(pairs / "apple2orange")
    training = modelsoup.parse_tree(yaml.safe_dump(content), folder=pairs)[0].operation("root")
    trainer = modelsoup.get_trainer("openvino-qat")
    built = modelsoup.build_options(trainer, training.training.options, pairs)
    assert (built.epochs, built.pictures) == (5, True)
    places = {paper.edge_of(row, size, pairs, 0, pairs) for row in rows[1:]}
    assert len(places) == 1
    shorter = paper.Size(size.options | {"epochs": 1}, size.metrics)
    assert places != {paper.edge_of(rows[1], shorter, pairs, 0, pairs)}
    (pairs / "apple2orange").rename(pairs / "orange2apple")
    with pytest.raises(modelsoup.ParameterError, match="in the order of its name"):
        paper.plan(rows[1], size, pairs, 0)


def test_a_wrong_row_is_told(tmp_path: Path):
    command = [sys.executable, str(EXAMPLE), "--table", "6", "--rows", "zebra"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no row of table 6 has 'zebra' in its name (there are table6-" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_row_runs_and_is_measured(tmp_path: Path):
    command = [
        sys.executable, str(EXAMPLE), "--table", "3", "--rows", "noto_to_twemoji-99-2",
        "--seeds", "0", "1", "--epochs", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=900)
    assert "± " in (tmp_path / "table3.md").read_text()
    assert (tmp_path / "table3.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.needs("openvino")
def test_a_small_row_in_int8_runs_and_is_measured(tmp_path: Path):
    command = [
        sys.executable, str(EXAMPLE), "--table", "7", "--rows", "int8-2", "--seeds", "0",
        "--epochs", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=900)
    assert "INT8, 2 epochs" in (tmp_path / "table7.md").read_text()
    (made,) = tmp_path.glob("table7-int8-seed0-*")
    shutil.rmtree(made / "pictures")
    again = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert again.returncode == 1 and "has 0 pictures for 40 test images" in again.stderr
