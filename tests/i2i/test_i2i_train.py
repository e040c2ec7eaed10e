"""`soup i2i train`: two folders of pictures and a trainer's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from i2i_domains import make_domains

from modelsoup import Store
from modelsoup.terminal.cli import main

SMALL = ("width=4", "blocks=1", "d_width=4", "d_layers=1", "device=cpu", "threads=1")
TINY = [word for setting in SMALL for word in ("--set", setting)]
FOLDERS = ("data/trainA", "data/trainB")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_domains(tmp_path / "data", 3, 2)
    return tmp_path


def soup(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_two_folders_become_a_model_by_one_short_line(here: Path) -> None:
    short = ("i2i", "train", "cyclegan", *FOLDERS, "--epochs", 1, "--size", 16, *TINY)
    told = soup(*short, "-o", "model.safetensors")
    assert told.stdout == "model.safetensors: 1 node computed, 0 reused\n"
    (entry,) = Store(".soup-store").entries()
    options = entry.record["options"]
    given = {name: options[name] for name in ("data_a", "data_b", "epochs", "crop_size", "width")}
    assert given == {
        "data_a": "data/trainA", "data_b": "data/trainB", "epochs": 1, "crop_size": 16, "width": 4,
    }  # fmt: skip
    assert options["load_size"] == 18
    # At length it is the same, and so is a plan's.
    long = ["train", "cyclegan", *TINY]
    for name in ("data_a", "data_b", "epochs", "crop_size", "load_size"):
        long += ["--set", f"{name}={options[name]}"]
    assert "0 nodes computed, 1 reused" in soup(*long, "-o", "again.safetensors").stdout


@pytest.mark.parametrize("size", [(128, 143), (256, 286), (64, 72), (100, 112)])
def test_pictures_are_resized_a_ninth_larger_than_they_are_cropped(size: tuple[int, int]) -> None:
    crop, load = size
    plan = json.loads(
        soup("i2i", "train", "cyclegan", *FOLDERS, "--size", crop, "--dry-run", "--json").stdout
    )
    options = plan["nodes"][0]["options"]
    assert (options["crop_size"], options["load_size"]) == (crop, load)


def test_size_and_epochs_are_told_to_a_trainer_that_counts_steps_and_sees_the_middle() -> None:
    words = ("i2i", "train", "stargan", *FOLDERS, "--epochs", 7, "--size", 32)
    (node,) = json.loads(soup(*words, "--dry-run", "--json").stdout)["nodes"]
    assert {name: node["options"][name] for name in ("epochs", "steps", "size")} == {
        "epochs": 7, "steps": None, "size": 32,
    }  # fmt: skip
    words = ("i2i", "train", "ugatit", *FOLDERS, "--epochs", 7)
    (node,) = json.loads(soup(*words, "--dry-run", "--json").stdout)["nodes"]
    assert {name: node["options"][name] for name in ("epochs", "steps", "decay_steps")} == {
        "epochs": 7, "steps": None, "decay_steps": 0,
    }  # fmt: skip
    # Without that steps would go before epochs, and nothing would be trained for as long.
    told = soup("train", "stargan", "--set", "epochs=7", "-o", "out.safetensors", code=1).stderr
    assert "epochs is 7, but steps, 200000, go before it: with steps: null they do not" in told


def test_pages_and_curves_of_a_training_lie_beside_its_model() -> None:
    soup(
        "i2i", "train", "cyclegan", *FOLDERS, "--epochs", 1, "--size", 16, *TINY,
        "--set", "tensorboard=true", "-o", "model.safetensors",
    )  # fmt: skip
    shown = Path("model-shown/cyclegan")
    assert (shown / "samples" / "step-0000003.png").is_file()
    assert list((shown / "tensorboard").iterdir())


def test_samples_beside_the_output_never_lie_among_the_pictures() -> None:
    words = ("i2i", "train", "cyclegan", *FOLDERS, "--epochs", 1, "--size", 16, *TINY)
    output = "data/trainA/model.safetensors"
    said = soup(*words, "-o", output, code=1).stderr
    assert "cyclegan: the folder for samples, beside the output, is " in said
    assert "what lies in" in said and "data/trainA is taken for pictures to train" in said
    assert sorted(path.name for path in Path("data/trainA").iterdir()) == [
        "0.png", "1.png", "2.png",
    ]  # fmt: skip
    # Without any, or elsewhere, they are in nobody's way.
    soup(*words, "-o", output, "--set", "sheet_every=0")
    soup(*words, "-o", "data/trainA/other.safetensors", "--set", "samples=pages", "--seed", 1)
    assert len(list(Path("pages").glob("*/samples/*.png"))) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cyclgn", *FOLDERS), "no trainer is called 'cyclgn'; did you mean 'cyclegan'?"),
        (("command", *FOLDERS),
         "the trainer 'command' has no option data_a, which is what A sets (soup train takes any "
         "trainer, and soup trainers command lists its options)"),
        (("cyclegan", *FOLDERS, "--size", 4),
         "--size: the options of the trainer 'cyclegan': crop_size 4 is too small for "
         "discriminators of 3 layers (fewer d_layers see smaller images)"),
        (("cyclegan", *FOLDERS, "--epochs", -1),
         "--epochs: the option 'epochs' of the trainer 'cyclegan' is -1, but must be at least 0"),
        (("cyclegan", *FOLDERS, "--epochs", 1, "--set", "epochs=-1"),
         "--set epochs: the option 'epochs' of the trainer 'cyclegan' is -1, but must be at least "
         "0"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_the_word_that_is_at_fault(words: tuple[str, ...], said: str) -> None:
    assert soup("i2i", "train", *words, code=1).stderr == f"Error: {said}\n"
    assert [path.name for path in Path().iterdir()] == ["data"]


def test_a_word_without_which_something_else_would_be_wrong_is_not_at_fault() -> None:
    """Without `--size` pictures would be smaller than what is cropped out of them."""
    words = ("--set", "evaluate=[psnrr]", "--set", "test_a=data/trainA")
    said = soup(
        "i2i", "train", "cyclegan", *FOLDERS, "--size", 16, "--set", "d_layers=1", *words,
        "--set", "test_b=data/trainB", code=1,
    ).stderr  # fmt: skip
    assert said.startswith(
        "Error: --set evaluate: the options of the trainer 'cyclegan': there is no metric 'psnrr'; "
        "did you mean 'psnr'?"
    )


def test_a_folder_that_is_not_there_is_told() -> None:
    said = soup("i2i", "train", "cyclegan", "data/trainA", "nope", code=1).stderr
    assert "/nope does not exist, where a folder of images is expected" in said
