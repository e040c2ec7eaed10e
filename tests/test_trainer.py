"""The hook: what a trainer gets, what it must leave, and a command as a trainer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
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
from modelsoup.trees.keys import trainer_of
from modelsoup.trees.trainer import (
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


def test_a_trainer_of_ours_that_an_old_installation_lacks_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Entry points are written when a package is installed: a pull does not bring new ones."""
    monkeypatch.setattr("modelsoup.trees.trainer._entry_points", dict)
    for name in ("pix2pix", "cyclegan"):
        said = rf"'{name}' \(pip install -e '\.\[i2i\]' in a clone of modelsoup brings it\)"
        with pytest.raises(TrainerError, match=said):
            get_trainer(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("comand", "no trainer is called 'comand'; did you mean 'command'"),
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


@dataclass(frozen=True)
class Looked:
    """Looks at what is there while it is made."""

    data: Path

    def __post_init__(self) -> None:
        if not self.data.is_dir():
            raise ValueError(f"{self.data} is no folder")


class Looks(Plain):
    name = "looks"
    options = Looked  # type: ignore[assignment]


def test_options_that_look_at_a_path_find_it_beside_the_plan(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert build_options(Looks(), {"data": "images"}, tmp_path) == Looked(tmp_path / "images")
    with pytest.raises(TrainerError, match=re.escape(f"{tmp_path / 'else'} is no folder")):
        build_options(Looks(), {"data": "else"}, tmp_path)


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


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("{outptu}", r"has the placeholder \{outptu\}, which is none; did you mean 'output'\?"),
        ("--rate={lr}", r"'--rate=\{lr\}' has the placeholder \{lr\}, .* \(there are \{start\}, "),
        ("cp x {ouput} # or so", r"did you mean 'output'\?; \{\{ouput\}\} is the word in braces"),
    ],
)
@pytest.mark.parametrize("place", ["command", "env"])
def test_an_unknown_placeholder_is_a_problem_of_the_plan(folder, place, part, said) -> None:
    given = options(folder)
    given[place] = [*COMMAND, part] if place == "command" else {"X": part}
    text = json.dumps(
        {
            "soup": 1, "models": {"a": "start.safetensors"},
            "tree": {"of": ["a"], "finetune": given},
        }
    )  # fmt: skip
    with pytest.raises(modelsoup.PlanError, match=said):
        parse_tree(text, folder=folder)


def test_braces_that_are_no_placeholders_are_left_as_they_are(tmp_path: Path) -> None:
    given = [
        '{"rate": 0.1}', "${HOME}", "${output}", 'print(f"{a + 1} {b}")', "{{seed}}", "{}", "a{1}",
    ]  # fmt: skip
    code = "import sys; print(sys.argv[2:]); sys.exit(1)"
    with pytest.raises(TrainerError) as caught:
        train(
            tmp_path, CommandTrainer(),
            {"command": [sys.executable, "-c", code, "{output}", *given, "{seed}{seed}"]},
        )  # fmt: skip
    given[4] = "{seed}"
    assert str([*given, "55"]) in str(caught.value)


def test_braces_in_a_script_that_may_have_been_meant_are_told_by_the_plan(folder: Path) -> None:
    script = "echo lr={lr}; awk '{{print}}' x; cp {start} {output}"
    given = {"command": ["sh", "-c", script], "env": {"X": "a {rate} b"}}
    finetune = json.dumps(given)
    text = f"soup: 1\nmodels: {{a: start.safetensors}}\ntree: {{of: [a], finetune: {finetune}}}\n"
    tree, _ = parse_tree(text, folder=folder)
    of_lr, of_rate = modelsoup.check(tree).warnings
    assert of_lr.startswith('root: {lr} in "echo lr={lr}; ')
    assert of_lr.endswith(
        "is none of the command's placeholders, and is passed as it stands ({{lr}} says that this "
        "is meant)"
    )
    assert of_rate.startswith("root: {rate} in 'a {rate} b' is none")
    options = build_options(CommandTrainer(), {"command": ["sh", "-c", "{{lr}} {output}"]})
    assert CommandTrainer().notices(options) == []


def test_placeholders_are_filled_in_in_the_environment_too(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(os.environ['WHERE'])"
    with pytest.raises(TrainerError, match=f"its last lines: to {tmp_path}/out.safetensors, 5$"):
        train(
            tmp_path, CommandTrainer(),
            {"command": [sys.executable, "-c", code, "{output}"],
             "env": {"WHERE": "to {output}, {seed}"}},
        )  # fmt: skip


def test_an_argument_that_is_too_long_for_a_file_name_is_an_argument(tmp_path: Path) -> None:
    code = "import sys; sys.exit(str(len(sys.argv[1])))" + "#" * 300
    made = build_options(CommandTrainer(), {"command": [sys.executable, "-c", code, "x" * 5000,
                                                        "{output}"]})  # fmt: skip
    assert named_files(CommandTrainer(), made) == [Path(sys.executable)]
    with pytest.raises(TrainerError, match="its last lines: 5000"):
        train(tmp_path, CommandTrainer(), {"command": made.command})


def test_a_file_that_is_listed_and_too_long_for_a_name_is_told(tmp_path: Path) -> None:
    made = build_options(
        CommandTrainer(), {"command": ["x", "{output}"], "files": ["y" * 300]}
    )  # fmt: skip
    with pytest.raises(TrainerError, match=r"the command's file y+ does not exist"):
        named_files(CommandTrainer(), made)


class Reshapes(Plain):
    """Writes its start with another shape, and cannot tell its tensors."""

    def train(self, job: modelsoup.Job) -> None:
        weights = dict(modelsoup.open_checkpoint(job.start))
        save_file(weights | {"G.low.w": np.ones((5, 1), np.float32)}, job.output)


class TellsShapes(Reshapes):
    """Says beforehand what it writes."""

    def tensors(self, options: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
        told = {name: ("F32", values.shape) for name, values in network(0).items()}
        return told | {"G.low.w": ("F32", (5, 1))}


def test_a_tensor_of_another_shape_than_the_starts_is_refused(folder: Path) -> None:
    said = (
        r"gave another shape to 1 tensor of its start: G\.low\.w \(G\.low\.w: \[5, 1\], not \[5\]\)"
    )
    with pytest.raises(TrainerError, match=said):
        train(folder, Reshapes(), {}, start=folder / "start.safetensors")
    train(folder, TellsShapes(), {}, start=folder / "start.safetensors")
    assert load_file(folder / "out.safetensors")["G.low.w"].shape == (5, 1)


class Recasts(Plain):
    """Leaves every byte as it is, and calls them by another dtype."""

    def train(self, job: modelsoup.Job) -> None:
        weights = {n: np.array(v) for n, v in modelsoup.open_checkpoint(job.start).items()}
        save_file({n: v.view(job.options.note) for n, v in weights.items()}, job.output)


class TellsOtherwise(Add):
    """Says of one tensor what it will not be."""

    def tensors(self, options: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
        name, dtype, *shape = options.note.split()
        return super().tensors(options) | {name: (dtype, tuple(map(int, shape)))}


def test_a_frozen_tensor_keeps_its_dtype(folder: Path) -> None:
    given = {"start": folder / "start.safetensors", "frozen": ("G.low.w", "D.low.w")}
    train(folder, Recasts(), {"note": "float32"}, **given)
    with pytest.raises(TrainerError, match=r"changed 2 frozen tensors: G\.low\.w, D\.low\.w"):
        train(folder, Recasts(), {"note": "int32"}, **given)


@pytest.mark.parametrize("note", ["G.low.w F16 5", "G.low.w F32 5 1", "G.more.w F32 1"])
def test_a_trainer_writes_the_tensors_that_it_told(folder: Path, note: str) -> None:
    train(folder, TellsOtherwise(), {"note": "G.low.w F32 5"})
    name = note.split(maxsplit=1)[0]
    with pytest.raises(TrainerError, match=f"wrote other tensors than it said: {name}$"):
        train(folder, TellsOtherwise(), {"note": note})


def test_an_error_has_the_last_five_lines_of_a_command(tmp_path: Path) -> None:
    code = "print(*'abcdefg', sep='\\n\\n', end=''); raise SystemExit(1)"
    with pytest.raises(TrainerError, match=r"exit code 1; its last lines: c \| d \| e \| f \| g$"):
        train(tmp_path, CommandTrainer(), {"command": [sys.executable, "-c", code, "{output}"]})


BIG = (1 << 20) // 4 * 3 + 7  # elements: 12 MiB and a bit, more than what is compared at a time


class TouchesTheEnd(Plain):
    """Changes the last element of a large tensor, to what its option says."""

    name = "ends"

    def train(self, job: modelsoup.Job) -> None:
        weights = {name: np.array(v) for name, v in modelsoup.open_checkpoint(job.start).items()}
        weights["large"][-1] = float(job.options.note)
        save_file(weights, job.output)


def test_a_frozen_tensor_is_compared_to_its_last_element(tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    save_file({"large": np.zeros(BIG, np.float32), "small": np.zeros(2, np.float32)}, start)
    for note in ("0", "1"):
        given = {"start": start, "frozen": ("small", "large")}
        if note == "0":
            train(tmp_path, TouchesTheEnd(), {"note": note}, **given)
            continue
        with pytest.raises(TrainerError, match="changed 1 frozen tensor: large"):
            train(tmp_path, TouchesTheEnd(), {"note": note}, **given)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_trainers_result_is_searched_to_its_last_element(tmp_path: Path, value: str) -> None:
    start = tmp_path / "start.safetensors"
    save_file({"large": np.zeros(BIG, np.float32)}, start)
    register_trainer(TouchesTheEnd())
    text = (
        "soup: 1\nmodels: {a: start.safetensors}\n"
        f"tree: {{of: [a], finetune: {{trainer: ends, note: '{value}'}}}}\n"
    )
    tree, _ = parse_tree(text, folder=tmp_path)
    with pytest.raises(modelsoup.RunError, match="made NaN or infinity in 1 tensor: large"):
        modelsoup.run(tree, None, store=tmp_path / "store")


GRANDCHILD = """
import os, subprocess, sys
how = sys.argv[1]
more = {"env": {}} if how != "kept" else {}
if how == "inherits":
    more |= {"close_fds": False}
subprocess.Popen(["/bin/sleep", "60"], start_new_session=how != "in group", **more)
open(os.path.join(sys.argv[2], "ready"), "w").close()
import time
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="platform: orphans are known by /proc")
@pytest.mark.parametrize("how", ["kept", "in group", "inherits"])
def test_a_commands_grandchild_is_ended_whatever_its_environment(tmp_path: Path, how) -> None:
    """After a kill -9 of all that could end it, by the next run of the same node."""
    (tmp_path / "grand.py").write_text(GRANDCHILD)
    save_file(network(1), tmp_path / "a.safetensors")
    command = ["sh", "-c", f"[ -e work-is-done ] || {sys.executable} grand.py '{how}' .; "
               "cp $0 $1", "{start}", "{output}"]  # fmt: skip
    (tmp_path / "tree.yaml").write_text(json.dumps(
        {"soup": 1, "models": {"a": "a.safetensors"},
         "tree": {"of": ["a"], "finetune": {"command": command}}}
    ))  # fmt: skip
    arguments = [sys.executable, "-m", "modelsoup", "run", "tree.yaml", "-o", "o.safetensors", "-q"]
    run = subprocess.Popen(arguments, cwd=tmp_path)
    wait_for((tmp_path / "ready").exists)
    (sleeper,) = sleeping(tmp_path)
    run.kill()
    run.wait()
    (tmp_path / "work-is-done").touch()
    begin = time.monotonic()
    subprocess.run(arguments, cwd=tmp_path, check=True, timeout=50)
    assert time.monotonic() - begin < 20
    wait_for(lambda: not is_running(sleeper), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="platform: leftovers are known by /proc")
@pytest.mark.parametrize("code", [0, 1])
def test_what_a_command_leaves_behind_in_another_session_is_ended_with_it(folder, code) -> None:
    line = (
        "cp $0 $1; setsid sh -c 'touch up; exec /bin/sleep 60' & while [ ! -e up ]; do :; done; "
        f"exit {code}"
    )
    given = {"command": ["sh", "-c", line, "{start}", "{output}"], "folder": str(folder)}
    if code:
        with pytest.raises(TrainerError, match="exit code 1"):
            train(folder, CommandTrainer(), given, start=folder / "start.safetensors")
    else:
        train(folder, CommandTrainer(), given, start=folder / "start.safetensors")
    assert (folder / "up").exists()
    wait_for(lambda: not sleeping(folder), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="platform: leftovers are known by /proc")
def test_a_service_that_a_command_leaves_behind_on_purpose_is_let_be(folder: Path) -> None:
    """In a session and an environment of its own, and holding what it inherited."""
    line = (
        "cp $0 $1; [ -e up ] || setsid env -i sh -c 'touch up; exec /bin/sleep 60' & "
        "while [ ! -e up ]; do :; done"
    )
    given = {"command": ["sh", "-c", line, "{start}", "{output}"], "folder": str(folder)}
    for _ in range(2):
        train(folder, CommandTrainer(), given, start=folder / "start.safetensors")
        (service,) = wait_for(lambda: sleeping(folder))
    assert is_running(service)
    os.kill(service, signal.SIGKILL)


def wait_for(what: Any, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def sleeping(folder: Path) -> list[int]:
    """Processes that sleep for a minute in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_it = (process / "cmdline").read_bytes() == b"/bin/sleep\0" + b"60\0"
            if is_it and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def is_running(process: int) -> bool:
    try:
        state = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_commands_lock_is_its_own_nodes_alone(tmp_path: Path) -> None:
    """What one node's command leaves behind must not hold another node's lock."""
    store = modelsoup.Store(tmp_path / "store")
    code = "import os; print(sorted(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}'))); raise SystemExit(1)"  # noqa: E501
    with store.lock("0" * 32), pytest.raises(TrainerError) as caught:
        train(tmp_path, CommandTrainer(), {"command": [sys.executable, "-c", code, "{output}"]})
    assert "command.lock" in str(caught.value)
    assert "locks" not in str(caught.value)


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
        ({"command": ["x", "${output}"]}, r"never names \{output\}"),
        ({"command": ["x", "{output}", "a\0b"]}, r"'a\\x00b' holds a NUL, which no argument can"),
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
