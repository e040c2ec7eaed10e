"""The hook: what a trainer gets, what it must leave, and a command as a trainer."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from trainers import Add, Plain, network

import modelsoup
from modelsoup import TrainerError, check, parse_tree, register_trainer
from modelsoup.plan import trainer_of
from modelsoup.trainer import (
    CommandTrainer,
    build_options,
    carry_out,
    get_trainer,
    named_files,
    trainer_groups,
    trainer_names,
    trainer_tensors,
)


def train(tmp_path: Path, trainer: Any, options: dict[str, Any], **more: Any) -> list[str]:
    """Carry a trainer out; the lines of its log."""
    log: list[str] = []
    given = {"start": None, "frozen": (), "seed": 5, **more}
    carry_out(
        trainer, build_options(trainer, options), output=tmp_path / "out.safetensors",
        work=tmp_path / "work", log=log.append, **given,
    )  # fmt: skip
    return log


# --- where trainers are ------------------------------------------------------------------------


def test_a_trainer_is_found_by_module_and_class_or_once_it_is_registered() -> None:
    assert get_trainer("trainers:Add").name == "add"
    registered = register_trainer(type("Mine", (Plain,), {"name": "mine"})())
    assert get_trainer("mine") is registered
    assert {"mine", "command"} <= set(trainer_names())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("comand", "no trainer is called 'comand'; did you mean 'command'"),
        ("balagan", r"\(pip install 'modelsoup\[i2i\]' brings it\)"),
        ("zzz", "there are .*command.*, or module:Class"),
        ("no_such_module:Class", "could not be imported: No module named 'no_such_module'"),
        ("trainers:NoClass", "could not be imported: trainers has no 'NoClass'"),
        ("trainers:NoTrainer", "is no trainer: it needs a name, options"),
        ("trainers:network", "is no trainer"),
    ],
)
def test_a_trainer_that_is_not_there_is_told(name: str, said: str) -> None:
    with pytest.raises(TrainerError, match=said):
        get_trainer(name)


def test_a_name_is_taken_once() -> None:
    register_trainer(type("One", (Add,), {"name": "taken"})())
    with pytest.raises(TrainerError, match="a trainer called 'taken' exists already"):
        register_trainer(type("Other", (Add,), {"name": "taken"})())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ad": 1}, "has no option 'ad'; did you mean 'add'"),
        ({"add": "x"}, "the option 'add' of the trainer 'add' is 'x'"),
        ({"steps": 1.5}, "the option 'steps' of the trainer 'add' is 1.5"),
    ],
)
def test_options_are_checked_against_the_trainers_own(given, said) -> None:
    with pytest.raises(TrainerError, match=said):
        build_options(Add(), given)


@dataclass(frozen=True)
class Positive:
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but must be at least 1")


class Counts(Plain):
    """Has options that know what they may be."""

    name = "counts"
    options = Positive  # type: ignore[assignment]


def test_what_options_say_of_themselves_is_told_as_they_say_it() -> None:
    said = "^the options of the trainer 'counts': steps is 0, but must be at least 1$"
    with pytest.raises(TrainerError, match=said):
        build_options(Counts(), {"steps": 0})


def test_options_have_their_defaults_and_types() -> None:
    options = build_options(Add(), {"add": 2, "note": "n"})
    assert (options.add, options.steps, options.note) == (2.0, 1, "n")


@dataclass(frozen=True)
class Located:
    data: Path
    other: Path | None = None
    name: str = "data"


class Reads(Plain):
    """Has options that are paths."""

    name = "reads"
    options = Located  # type: ignore[assignment]


def test_paths_are_relative_to_the_plan_and_count_as_they_are_written(tmp_path: Path) -> None:
    options = build_options(Reads(), {"data": "images", "other": "/else"}, tmp_path)
    assert options == Located(tmp_path / "images", Path("/else"), "data")
    register_trainer(Reads())
    text = "soup: 1\nmodels: {m: {train: {trainer: reads, data: images}}}\ntree: {of: [m]}\n"
    keys = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        tree, _ = parse_tree(text, folder=tmp_path / name)
        training = tree.operation("m").training
        assert trainer_of(training)[1].data == tmp_path / name / "images"
        keys.add(check(tree).nodes["m"].key)
    assert len(keys) == 1


def test_a_required_option_is_asked_for() -> None:
    with pytest.raises(TrainerError, match="the trainer 'command' needs the option 'command'"):
        build_options(CommandTrainer(), {})


def test_what_a_trainer_need_not_tell() -> None:
    options = build_options(Plain(), {})
    assert trainer_groups(Plain(), options) == {}
    assert trainer_tensors(Plain(), options) is None
    assert trainer_tensors(Add(), options)["G.low.w"] == ("F32", (5,))


# --- a command ---------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys, time
from safetensors.numpy import load_file, save_file
sys.path.insert(0, {tests!r})
from trainers import network
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
weights = network(int(arguments["--seed"])) | (
    load_file(arguments["--in"]) if "--in" in arguments else {{}}
)
frozen = open(arguments["--frozen"]).read().split()
for name in weights:
    if name not in frozen:
        weights[name] = weights[name] * 2
print("soup-progress", json.dumps({{"done": 0.5, "loss": 0.25}}))
print("soup-progress is what this line is about")
print("hello from", os.environ["GREETING"], flush=True)
save_file(weights, arguments["--out"])
"""
COMMAND = ["{python}", "train.py", "--in", "{start}", "--out", "{output}", "--frozen", "{frozen}",
           "--seed", "{seed}"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    (tmp_path / "train.py").write_text(script)
    save_file(network(1), tmp_path / "start.safetensors")
    return tmp_path


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"command": COMMAND, "env": {"GREETING": "afar"}, "folder": str(folder), **more}


def test_a_command_gets_its_placeholders_and_its_lines_are_kept(folder: Path) -> None:
    reports = []
    log = train(
        folder, CommandTrainer(), options(folder), start=folder / "start.safetensors",
        frozen=("D.low.w",), report=lambda done, metrics: reports.append((done, dict(metrics))),
    )  # fmt: skip
    made, before = load_file(folder / "out.safetensors"), network(1)
    np.testing.assert_array_equal(made["D.low.w"], before["D.low.w"])
    np.testing.assert_array_equal(made["G.low.w"], before["G.low.w"] * 2)
    assert reports == [(0.5, {"loss": 0.25})]
    assert log == ["soup-progress is what this line is about", "hello from afar"]


def test_without_a_start_its_option_is_left_out(folder: Path) -> None:
    train(folder, CommandTrainer(), options(folder))
    made = load_file(folder / "out.safetensors")
    np.testing.assert_array_equal(made["G.low.w"], network(5)["G.low.w"] * 2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)",
         r"ended with exit code 3; its last lines: a \| b"),
        ("import sys; sys.exit(1)", "ended with exit code 1; it printed nothing"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by signal 11"),
        ("raise ValueError('no data')", "its last lines: .*ValueError: no data"),
        ("pass", "wrote nothing to out.safetensors"),
    ],
)  # fmt: skip
def test_a_command_that_fails_says_why(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(TrainerError, match=said):
        train(tmp_path, CommandTrainer(), {"command": [sys.executable, "-c", code, "{output}"]})


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="the command 'no-such-program' cannot be run: No such"):
        train(tmp_path, CommandTrainer(), {"command": ["no-such-program", "{output}"]})


def test_a_command_and_what_it_started_are_ended_at_the_time_limit(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(2); "
        "open(sys.argv[1], \"w\")'.replace('import time', 'import sys, time'), 'late'])\n"
        "print('started', flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    with pytest.raises(TrainerError, match="took longer than 1 s; its last lines: started"):
        train(
            tmp_path, CommandTrainer(),
            {"command": [sys.executable, "-c", code, "{output}"], "timeout": 1,
             "folder": str(tmp_path)},
        )  # fmt: skip
    assert time.monotonic() - begin < 6
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_no_shell_sees_a_command(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1]); sys.exit(1)"
    with pytest.raises(TrainerError, match=r"last lines: \$HOME; touch x"):
        train(
            tmp_path, CommandTrainer(),
            {"command": [sys.executable, "-c", code, "$HOME; touch x", "{output}"]},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"command": []}, "command is empty"),
        ({"command": ["x"]}, r"never names \{output\}"),
        ({"command": ["x", "{output}"], "timeout": 0}, "timeout is 0.0, but must be positive"),
        ({"command": "x {output}"}, "must be a list"),
    ],
)
def test_a_malformed_command_is_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainerError, match=said):
        build_options(CommandTrainer(), given)


def test_the_files_that_a_command_names_are_part_of_its_key(folder: Path) -> None:
    (folder / "data.csv").write_text("1")
    made = build_options(CommandTrainer(), options(folder, files=["data.csv"]))
    assert named_files(CommandTrainer(), made) == [folder / "train.py", folder / "data.csv"]
    (folder / "tree.yaml").write_text(
        json.dumps(
            {
                "soup": 1,
                "models": {"a": "start.safetensors", "b": "start.safetensors"},
                "tree": {"of": ["a", "b"], "finetune": options(folder, files=["data.csv"])},
            }
        )
    )

    def computed() -> tuple[str, ...]:
        tree, _ = modelsoup.read_tree(folder / "tree.yaml")
        return modelsoup.run(
            tree, folder / "o.safetensors", store=folder / "store", force=True
        ).computed

    assert computed() == ("root.merge", "root")
    assert computed() == ()
    (folder / "data.csv").write_text("2")
    assert computed() == ("root",)
    (folder / "train.py").write_text((folder / "train.py").read_text() + "\n# changed\n")
    assert computed() == ("root",)
    (folder / "data.csv").unlink()
    with pytest.raises(modelsoup.PlanError, match=r"the command's file .*data\.csv does not exist"):
        computed()


@dataclass(frozen=True)
class Noted:
    what: str = "plain"


class Notes(Plain):
    """Tells its record of what it trained with."""

    name = "notes"
    options = Noted

    def train(self, job: modelsoup.Job) -> None:
        job.note({"device": "cpu", "seen": {"images": 3}})
        job.note({"device": job.options.what if job.options.what == "plain" else object()})
        save_file(network(1), job.output)


def test_what_a_trainer_notes_is_in_the_nodes_record(tmp_path: Path) -> None:
    register_trainer(Notes())

    def records(what: str) -> Any:
        text = f"soup: 1\nmodels: {{a: {{train: {{trainer: notes, what: {what}}}}}}}\ntree: a\n"
        tree, _ = parse_tree(text)
        out = tmp_path / f"{what}.safetensors"
        return modelsoup.run(tree, out, store=tmp_path / "store").records

    assert records("plain")["a"]["notes"] == {"device": "plain", "seen": {"images": 3}}
    # At once, and not when its record is written after hours.
    with pytest.raises(modelsoup.SoupError, match="'notes' failed: TypeError: Object of type"):
        records("odd")
