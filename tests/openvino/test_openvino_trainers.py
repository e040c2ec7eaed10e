"""Every trainer of images is quantised, and trained on in INT8 with its own losses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from modelsoup_i2i.pictures.images import save_png
from modelsoup_openvino import export

from modelsoup import build_options, get_trainer

sys.path.append(str(Path(__file__).parents[1] / "i2i"))
from i2i_domains import drawing, make_domains
from test_i2i_contract import ROWS, STEPS, placed

BEGINS = ("lr", "epochs", "steps", "scratch", "phase1")  # what a training from nothing is told


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_domains(tmp_path_factory.mktemp("trainers"), 2, 2, size=36)
    for name, kind in (("disc", "A"), ("square", "B")):
        (root / "classes" / name).mkdir(parents=True)
        for n in range(2):
            save_png(drawing(kind, n, 36), root / "classes" / name / f"{n}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_trainers_translator_becomes_int8_and_is_trained_on(quantise, name, folders, tmp_path):
    row, trainer = ROWS[name], get_trainer(name)
    told = {**row.options, **STEPS, **{n: str(path) for n, path in placed(row, folders).items()}}
    start = tmp_path / "start.safetensors"
    trainer.session(build_options(trainer, {**told, "steps": 1}), None, seed=1).save(start)
    sizes = {option: value for option, value in told.items() if option not in BEGINS}
    sizes |= {"phase1": 0} if "phase1" in told else {}
    run = quantise(
        tmp_path, model=start, of=name, epochs=1, rate=1e-5, held_out=2, training=sizes,
        sizes={"data": None} if "data" not in sizes else {},
        quantisation={"overflow_fix": "enable"},
    )  # fmt: skip
    calibrated, trained = run.told["candidates"]
    assert calibrated["psnr"] != trained["psnr"]
    assert run.told["likeness"]["agreement"]["int8"] > 35
    found = export.integer_operations(export.read(run.out / "int8.xml"))
    whole, total = (sum(counts) for counts in zip(*found.values(), strict=True))
    assert whole >= 0.9 * total
