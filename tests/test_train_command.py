"""`soup trainers` and `soup train`; and the folder in which trainers leave what is looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Interval, Lt
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from trainers import SHAPES, network

import modelsoup
from modelsoup import RunError, Store, binary_tree, parse_tree
from modelsoup.running.processes import ProcessExecutor
from modelsoup.running.runner import folder_name
from modelsoup.terminal.cli import main

TESTS = str(Path(__file__).parent)
SOUP = [sys.executable, "-m", "modelsoup"]
ADD = "trainers:Add"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    save_file(network(0), tmp_path / "start.safetensors")
    return tmp_path


def soup(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def mistake(*arguments: object) -> str:
    """The sentence with which a command ends; nothing is written, and nothing to stdout."""
    result = soup(*arguments, code=1)
    assert result.stdout == ""
    assert [path.name for path in Path().iterdir()] == ["start.safetensors"]
    return result.stderr.removeprefix("Error: ").removesuffix("\n")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- soup trainers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """What several trainers share.

    Attributes:
        rate: of learning, for
            all layers.
        low, high: where values are cut.
    """

    rate: Annotated[float, Gt(0), Lt(float("inf"))] = 1e-4
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Own(Common):
    """One trainer's own.

    Attributes:
        high: above which values are cut.
        width: channels.

    Raises:
        ValueError: this is no option: it is another section.
    """

    width: Annotated[int, Ge(1)] | None = None
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    mode: Literal["fast", 32] = "fast"
    data: Path | None = None
    names: list[str] = field(default_factory=lambda: ["a", "b"])
    more: dict[str, int] = field(default_factory=dict)
    flip: bool = True
    out: Annotated[Path, "somewhere"] = field(kw_only=True)
    internal: int = field(default=3, init=False)


class Described:
    """Does something.

    At length.
    """

    name = "described"
    options = Own
    version = "7"

    def train(self, job: modelsoup.Job) -> None:
        raise NotImplementedError


def test_a_trainer_is_described_with_types_defaults_ranges_and_what_its_docstring_says() -> None:
    modelsoup.register_trainer(Described())
    told = json.loads(soup("trainers", "described", "--json").stdout)
    assert (told["summary"], told["version"]) == ("Does something.", "7")
    assert told["class"].endswith("test_train_command:Described")
    rows = {o["name"]: [o["type"], o["default"], o["range"], o["doc"]] for o in told["options"]}
    assert rows == {
        "rate": ["number", 1e-4, "more than 0, finite", "of learning, for all layers."],
        "low": ["number", 0.0, "", "where values are cut."],
        "high": ["number", 1.0, "", "above which values are cut."],
        "width": ["integer or null", None, "at least 1", "channels."],
        "share": ["number", 0.5, "at least 0, at most 1", ""],
        "mode": ["fast or 32", "fast", "", ""],
        "data": ["path or null", None, "", ""],
        "names": ["list of text", ["a", "b"], "", ""],
        "more": ["mapping", {}, "", ""],
        "flip": ["true or false", True, "", ""],
        "out": ["path", None, "", ""],
    }
    assert [o["name"] for o in told["options"] if o["required"]] == ["out"]

    lines = soup("trainers", "described").stdout.splitlines()
    assert lines[0] == "described: Does something."
    assert lines[2] == "version: 7"
    assert lines[3].split() == ["option", "type", "default", "range", "what", "it", "is"]
    cells = [" ".join(line.split()) for line in lines[4:]]
    assert "rate number 0.0001 more than 0, finite of learning, for all layers." in cells
    assert "width integer or null null at least 1 channels." in cells
    assert "names list of text [a, b]" in cells
    assert "flip true or false true" in cells
    assert "out path required" in cells


def test_the_trainers_that_there_are_have_a_line_each() -> None:
    modelsoup.register_trainer(Described())
    lines = [" ".join(line.split()) for line in soup("trainers").stdout.splitlines()[1:]]
    assert "described Does something." in lines
    assert any(line.startswith("command Trains with a program in any language") for line in lines)
    rows = json.loads(soup("trainers", "--json").stdout)
    assert {row["name"] for row in rows} >= {"command", "cyclegan", "described", "openvino-qat"}
    assert len(lines) == len(rows)


def test_a_trainer_that_cannot_be_imported_is_listed_with_what_brings_it() -> None:
    listed = python(
        """
        import sys
        sys.modules["modelsoup_i2i"] = None
        from modelsoup.terminal.cli import main
        main(["trainers"], standalone_mode=False)
        """
    )
    (line,) = [line for line in listed.splitlines() if line.split()[0] == "cyclegan"]
    assert "could not be imported" in line
    assert "pip install -e '.[i2i]'" in line
    assert "command " in listed


def test_a_trainer_whose_extra_lacks_a_package_is_listed_with_what_brings_it() -> None:
    listed = python(
        """
        from importlib import metadata
        known = metadata.version
        def version(name):
            if name == "torch":
                raise metadata.PackageNotFoundError(name)
            return known(name)
        metadata.version = version
        from modelsoup.terminal.cli import main
        main(["trainers"], standalone_mode=False)
        """
    )
    (line,) = [line for line in listed.splitlines() if line.split()[0] == "cyclegan"]
    assert "folders of unpaired images. (needs pip install -e '.[i2i]' in a clone" in line


def test_what_a_checkpoint_will_hold_is_told_by_network_without_torch() -> None:
    printed = python(
        """
        import sys
        from modelsoup.terminal.cli import main
        words = ["--tensors", "--set", "width=32", "--set", "blocks=6"]
        main(["trainers", "cyclegan", *words], standalone_mode=False)
        main(["trainers", "cyclegan", *words, "--json"], standalone_mode=False)
        print("torch" in sys.modules)
        """
    )
    assert printed.splitlines()[-1] == "False"
    assert "G_A  36 tensors, 1.97 M parameters, 7.86 MB, F32" in printed
    told = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    generator = {"tensors": 36, "parameters": 1_965_059}
    discriminator = {"tensors": 10, "parameters": 2_764_737}
    assert told["networks"] == {
        "G_A": generator, "G_B": generator, "D_A": discriminator, "D_B": discriminator,
    }  # fmt: skip
    assert told["parameters"] == 2 * (1_965_059 + 2_764_737)
    assert told["nbytes"] == 4 * told["parameters"]
    first = {"name": "G_A.model.1.weight", "dtype": "F32", "shape": [32, 3, 7, 7]}
    assert told["tensors"][0] == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trainers comand", "no trainer is called 'comand'; did you mean 'command'?"),
        (f"trainers {ADD} --tensors --set ad=2",
         "--set ad: the trainer 'add' has no option 'ad'; did you mean 'add'?"),
        (f"trainers {ADD} --tensors --set add=two",
         "--set add: the option 'add' of the trainer 'add' is 'two', but must be a number"),
        ("trainers trainers:Plain --tensors",
         "the trainer 'plain' does not tell which tensors it writes"),
        ("train comand", "no trainer is called 'comand'; did you mean 'command'?"),
        (f"train {ADD} --set steps", "--set has 'steps', but must be OPTION=VALUE"),
        (f"train {ADD} --set seed=3",
         "--set seed: the trainer has no such option (--seed N gives the seed)"),
        (f"train {ADD} --set trainer=x", "--set trainer: the trainer has no such option"),
        (f"train {ADD} --set steps=1.5",
         "--set steps: the option 'steps' of the trainer 'add' is 1.5, but must be an integer"),
        (f"train {ADD} --set add=1 --set steps=[1]",
         "--set steps: the option 'steps' of the trainer 'add' is [1], but must be an integer"),
        (f"train {ADD} --seed -1", "seed is -1, not an integer from 0 to 2^63 - 1"),
        ("train command", "the trainer 'command' needs --set command=…"),
        ("train command --set timeout=1", "the trainer 'command' needs --set command=…"),
        ("train command --set command=true",
         "--set command: the options of the trainer 'command': command never names {output}, where "
         "the result must be written"),
        ("train command --set command='",
         """--set command: "'" is no command: no closing quotation"""),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_the_word_that_is_at_fault(arguments: str, said: str) -> None:
    assert mistake(*arguments.split()) == said


# --- soup train --------------------------------------------------------------------------------


def test_one_model_is_trained_without_a_plan() -> None:
    words = ("train", ADD, "-o", "out.safetensors", "--set", "add=2", "--set", "steps=4")
    first = soup(*words, "--seed", 3)
    assert first.stdout == "out.safetensors: 1 node computed, 0 reused\n"
    made = load_file("out.safetensors")
    assert made.keys() == SHAPES.keys()
    for name, values in network(3).items():
        np.testing.assert_allclose(made[name], values + 2, rtol=1e-6)
    lineage = modelsoup.read_lineage(modelsoup.open_checkpoint("out.safetensors"))
    assert lineage is not None
    assert (lineage["operation"], lineage["trainer"], lineage["seed"]) == ("train", ADD, 3)

    again = soup(*words, "--seed", 3)
    assert again.stdout.endswith("was this result already: 0 nodes computed, 1 reused\n")
    # The output's name decides neither seed nor key.
    named = [*words[:3], "other.safetensors", *words[4:]]
    assert soup(*named, "--seed", 3).stdout.endswith("0 nodes computed, 1 reused\n")


def test_without_a_seed_the_same_words_train_the_same_model() -> None:
    for name in ("a", "b"):
        soup("train", ADD, "-o", f"{name}.safetensors", "--store", name)
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_a_start_is_fine_tuned() -> None:
    soup("train", ADD, "-o", "out.safetensors", "--start", "start.safetensors")
    made = load_file("out.safetensors")
    for name, values in network(0).items():
        np.testing.assert_array_equal(made[name], values + 1)
    lineage = modelsoup.read_lineage(modelsoup.open_checkpoint("out.safetensors"))
    assert lineage is not None and lineage["operation"] == "finetune"


def test_the_plan_of_one_model_comes_back_from_its_checkpoint() -> None:
    soup("train", ADD, "-o", "out.safetensors", "--start", "start.safetensors", "--set", "add=3")
    Path("tree.yaml").write_text(soup("plan", "--from", "out.safetensors").stdout)
    done = soup("run", "tree.yaml", "-o", "out.safetensors")
    assert "was this result already: 0 nodes computed" in done.stdout


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("0.5", 0.5), ("3", 3.0), (".5", 0.5), ("1,000", None), ("no", None)],
)
def test_values_are_read_as_in_a_plan(text: str, value: float | None) -> None:
    if value is None:
        assert "but must be a number" in mistake("train", ADD, "--set", f"add={text}")
        return
    report = json.loads(soup("train", ADD, "--set", f"add={text}", "--json").stdout)
    assert report["nodes"]["Add"]["options"] == {"add": value}


def test_a_text_may_hold_what_else_is_a_sign_if_it_stands_in_quotes() -> None:
    report = json.loads(soup("train", ADD, "--set", "note='a: b = c'", "--json").stdout)
    assert report["nodes"]["Add"]["options"] == {"note": "a: b = c"}


def test_a_command_is_a_trainer_whose_words_are_those_of_a_shell() -> None:
    Path("my script.py").write_text(
        "import shutil, sys\nshutil.copyfile(sys.argv[1], sys.argv[2])\nprint('copied')\n"
    )
    soup(
        "train", "command", "-o", "out.safetensors", "--start", "start.safetensors",
        "--set", "command={python} 'my script.py' {start} {output}",
    )  # fmt: skip
    assert {n: v.tolist() for n, v in load_file("out.safetensors").items()} == {
        n: v.tolist() for n, v in network(0).items()
    }
    as_list = '["{python}", my script.py, "{start}", "{output}"]'
    again = soup(
        "train", "command", "-o", "out.safetensors", "--start", "start.safetensors",
        "--set", f"command={as_list}",
    )  # fmt: skip
    assert "0 nodes computed" in again.stdout


def test_a_training_that_was_killed_goes_on_with_the_same_words(here: Path) -> None:
    words = ["train", ADD, "-q", "--set", "steps=20", "--set", "pause=0.1", "--seed", "1"]
    process = subprocess.Popen([*SOUP, *words], cwd=here)
    states = here / ".soup-store" / "work"
    deadline = time.monotonic() + 60
    while not list(states.glob("*/state.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (state,) = states.glob("*/state.safetensors")
    soup(*words)
    log = here / ".soup-store" / "logs" / f"{state.parent.name}.log"
    assert "resumed at " in log.read_text()
    expected = network(1)
    for _ in range(20):
        expected = {n: v + np.float32(1 / 20) for n, v in expected.items()}
    made = load_file("model.safetensors")
    assert all(np.array_equal(made[name], values) for name, values in expected.items())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing() -> None:
    words = ("train", ADD, "--start", "start.safetensors", "--dry-run")
    shown = soup(*words)
    assert "tune: trainers:Add" in shown.stdout
    assert "1 step to do" in shown.stdout
    assert json.loads(soup(*words, "--json").stdout)["steps"] == ["Add"]
    assert [path.name for path in Path().iterdir()] == ["start.safetensors"]
    soup(*words[:-1])
    assert "0 steps to do" in soup(*words).stdout


def test_a_start_that_is_not_there_is_told() -> None:
    said = soup("train", ADD, "--start", "strat.safetensors", code=1).stderr
    where = "Error: soup train: start: "
    assert said == f"{where}strat.safetensors does not exist; did you mean 'start.safetensors'?\n"
    assert not Path("model.safetensors").exists()


def test_a_model_that_was_trained_alone_is_listed_in_the_store_as_such() -> None:
    soup("train", ADD)
    assert "soup train" in soup("store", "list").stdout


def test_another_output_is_replaced_only_by_force() -> None:
    save_file({"w": np.zeros(1, np.float32)}, "model.safetensors")
    before = Path("model.safetensors").read_bytes()
    assert "--force" in soup("train", ADD, code=1).stderr
    assert Path("model.safetensors").read_bytes() == before
    soup("train", ADD, "--force")
    assert Path("model.safetensors").read_bytes() != before


def test_the_shell_can_complete_trainers() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from modelsoup.terminal.cli import main; main(prog_name='soup')"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "_SOUP_COMPLETE": "bash_complete", "COMP_WORDS": "soup train c",
             "COMP_CWORD": "2"},
    )  # fmt: skip
    assert [line.partition(",")[2] for line in run.stdout.splitlines()] == [
        "classifier",
        "command",
        "cut",
        "cyclegan",
    ]


# --- what a person looks at --------------------------------------------------------------------

SHOWS = """soup: 1
models: {a: start.safetensors, b/c: {train: {trainer: "trainers:Shows"}}}
defaults: {finetune: {trainer: "trainers:Shows", note: tuned}}
tree: {of: [a, b/c]}
"""


def test_what_is_shown_lies_beside_the_result_by_plan_and_node(here: Path) -> None:
    (here / "my tree.yaml").write_text(SHOWS)
    (here / "results").mkdir()
    told = soup("run", "my tree.yaml", "-o", "results/out.safetensors").stderr
    shown = here / "results" / "my tree-shown"
    found = sorted(str(path.relative_to(shown)) for path in shown.rglob("*.txt"))
    assert found == ["b%2Fc/picture.txt", "root/picture.txt"]
    place = "results/my tree-shown"
    assert f"note: pictures and curves, where a trainer leaves any, are in {place}\n" in told
    assert told.endswith(f"note: pictures and curves are in {place}\n")
    # Another place makes no other result, and what was shown outlives the store's.
    assert "0 nodes computed" in soup("run", "my tree.yaml", "-o", "again.safetensors").stdout
    soup("store", "gc", "--keep", "none")
    assert (shown / "root" / "picture.txt").is_file()


def test_what_one_model_shows_lies_beside_it() -> None:
    soup("train", "trainers:Shows", "-o", "out.safetensors", "--seed", 9)
    assert Path("out-shown/Shows/picture.txt").read_text() == "seed 9"


def test_where_nothing_is_shown_there_is_no_folder_and_nothing_is_said_of_it() -> None:
    words = ("train", ADD, "-o", "out.safetensors")
    assert "pictures and curves are in" not in soup(*words).stderr
    assert not Path("out-shown").exists()
    assert "pictures" not in soup(*words).stderr  # nothing is trained


@pytest.mark.parametrize("elsewhere", [False, True])
def test_in_python_the_folder_is_named_or_there_is_none(here: Path, elsewhere: bool) -> None:
    tree = binary_tree({"a": modelsoup.Train(modelsoup.Training("trainers:Shows"))})
    where = ProcessExecutor(1) if elsewhere else None
    try:
        for shown, store in ((None, "first"), ("here", "second")):
            report = modelsoup.run(tree, None, store=store, shown=shown, executor=where)
            expected = None if shown is None else str(here / shown / "a")
            assert report.records["a"]["notes"] == {"shown": expected}
    finally:
        if where is not None:
            where.shutdown()
    assert (here / "here" / "a" / "picture.txt").is_file()


def test_an_output_is_not_where_trainers_show_things(here: Path) -> None:
    (here / "a").mkdir()
    tree, _ = parse_tree(SHOWS, folder=here)
    with pytest.raises(modelsoup.OutputError, match="are in one place"):
        modelsoup.run(tree, "a/out.safetensors", shown="a", store="s")
    assert [path.name for path in (here / "a").iterdir()] == []


def test_a_command_is_told_the_folder_and_left_without_the_option_where_there_is_none(
    here: Path,
) -> None:
    script = (
        "import sys, shutil; shutil.copyfile('start.safetensors', sys.argv[1]); print(sys.argv[2:])"
    )
    command = ["{python}", "-c", script, "{output}", "--pictures", "{shown}"]
    tree = binary_tree({"a": modelsoup.Train(modelsoup.Training("command", {"command": command}))})
    for shown, words in ((None, []), ("here", ["--pictures", str(here / "here" / "a")])):
        store = Store(f"store-{shown}")
        modelsoup.run(tree, None, store=store.folder, shown=shown)
        (entry,) = store.entries()
        assert store.log(entry.key).read_text() == f"{words}\n"


NAMES = [
    "root", "root.1-2", "both#2", "a b", "Ünï", "", ".", "..", ".hidden", "a/b", "a%2Fb", "a\\b",
    "a:b", "a\0b", "a\nb", "\ud800", "x" * 300, "x" * 301, "é" * 200,
]  # fmt: skip


def test_any_nodes_name_is_that_of_a_folder_of_its_own(tmp_path: Path) -> None:
    made = [folder_name(name) for name in NAMES]
    assert len(set(made)) == len(NAMES)
    assert made[:5] == NAMES[:5]
    shown = tmp_path / "shown"
    shown.mkdir()
    for name in made:
        (shown / name).mkdir()
        assert (shown / name).resolve().parent == shown
    assert len(list(shown.iterdir())) == len(NAMES)


def test_a_failed_run_says_nothing_of_a_folder_that_is_not_there(here: Path) -> None:
    tree = binary_tree({"a": modelsoup.Train(modelsoup.Training("trainers:Fails"))})
    with pytest.raises(RunError, match="the learning rate is a poem"):
        modelsoup.run(tree, None, store="s", shown="here")
    assert not (here / "here").exists()
