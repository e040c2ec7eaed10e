"""Every trainer of images is quantised, and trained on in INT8 with its own losses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from modelsoup_i2i.pictures.images import save_png
from modelsoup_openvino import export
from modelsoup_openvino.deploy import deployable, options_for

from modelsoup import build_options, get_trainer
from modelsoup.trees.trainer import EXTRAS

sys.path.append(str(Path(__file__).parents[1] / "i2i"))
from i2i_domains import drawing, make_domains
from test_i2i_contract import ROWS, STEPS, placed

LASTS = ("epochs", "decay_epochs", "steps", "decay_steps", "halve_every")
BEGINS = ("lr", "scratch", "phase1", *LASTS)  # what a training from nothing is told
TRANSLATORS = {**ROWS, "transferi2i": ROWS["deepi2i"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_domains(tmp_path_factory.mktemp("trainers"), 2, 2, size=36)
    for name, kind in (("disc", "A"), ("square", "B")):
        (root / "classes" / name).mkdir(parents=True)
        for n in range(2):
            save_png(drawing(kind, n, 36), root / "classes" / name / f"{n}.png")
    return root


def test_every_trainer_is_here_that_learns_from_pictures_to_make_others_of_them():
    ours = {name for name, extra in EXTRAS.items() if extra == "i2i"}
    assert ours - TRANSLATORS.keys() == {"classifier", "gan", "modality", "self-init"}


@pytest.mark.parametrize("name", sorted(TRANSLATORS))
def test_a_training_in_int8_lasts_the_epochs_that_are_asked_for(name, folders):
    row, trainer = TRANSLATORS[name], deployable(name)
    told = {**row.options, **STEPS, **{n: str(path) for n, path in placed(row, folders).items()}}
    given = {option: value for option, value in told.items() if option not in ("lr", *LASTS)}
    session = trainer.session(options_for(trainer, None, given, epochs=2, rate=1e-5), None, seed=1)
    assert session.total_steps == 2 * session.steps_per_epoch


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
