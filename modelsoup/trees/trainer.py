"""The fine-tune hook: what a trainer is, where trainers are found, and the one that runs a command.

A trainer is any object with a name, a dataclass of options, and `train`:

    @dataclass(frozen=True)
    class Options:
        rate: float
        epochs: int = 10

    class Digits:
        name = "digits"
        options = Options

        def train(self, job: Job) -> None:
            weights = … if job.start is None else load_file(job.start)
            …
            save_file(weights, job.output)

It may also have `groups(options)`, the layer groups of its architecture by name, for rules such as
`group:low-level`; `estimates(options)`, patterns of tensors that it finds anew where a start lacks
them, and that merges leave out; `tensors(options)`, the dtype and shape of every tensor that it
writes, so that a plan can be checked without training; `files(options)`, the paths of files whose
content is part of the result's key, `identity(options)`, what of the options is, and `version`;
`notices(options)`, sentences that a plan shows as warnings; and `outputs(options)`, what it writes
beside its result, so that a plan is refused in which two nodes would write the same, or one over
what is read.

A name that the start checkpoint lacks is initialised by the trainer; names in `job.frozen` must
come out as they went in, byte by byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..errors import SoupError, TrainerError, counted, how_to_install, listed, nearest, said
from ..files.dtypes import DTYPES

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pydantic import TypeAdapter

ENTRY_POINTS = "modelsoup.trainers"
COMMAND = "command"
PROGRESS_PREFIX = "soup-progress "
"""A line that a command prints with this before a JSON object is progress, not log."""

SECONDS_LEFT = "seconds_left"
"""A figure of this name, in a report, is the time left: it is shown as such, and not kept."""

_LAST_LINES = 5
_PLACEHOLDERS = ("start", "output", "work", "shown", "frozen", "seed", "python")
_PLACEHOLDER = re.compile(r"(?<!\$)\{(\{?)([A-Za-z_]\w*)\}(\}?)")
_NO_SCRIPT = re.compile(r"[\w./:=,@%+{}-]*")
_MARK = "MODELSOUP_NODE"  # in a command's environment: for which work folder it runs
_GRACE = 2.0  # seconds between asking a command to end and ending it
_AGAIN = 0.2  # seconds between two looks whether what an earlier run left behind has ended
EXTRAS = dict.fromkeys([
    "balagan",
    "classifier",
    "cut",
    "cyclegan",
    "deepi2i",
    "fastcut",
    "funit",
    "gan",
    "modality",
    "munit",
    "nice-gan",
    "pix2pix",
    "self-init",
    "stargan",
    "starganv2",
    "transferi2i",
    "ugatit",
], "i2i") | {"openvino-qat": "openvino"}  # fmt: skip
"""Trainers of ours, and the extra that brings each."""

Report = Callable[[float | None, Mapping[str, float]], None]
"""`report(done, metrics)`: the share that is done, in [0, 1] or None, and figures to show."""

Log = Callable[[str], None]

Note = Callable[[Mapping[str, Any]], None]
"""`note(told)`: plain data, as JSON has it, for the record of the node."""


def _unnoted(told: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Job:
    """What a trainer gets.

    Attributes:
        start: the checkpoint to begin with, a file or, where the leaves are such, a model folder
            (`modelsoup.open_checkpoint` reads both); None to initialise everything.
        output: where to write the result, one safetensors file.
        work: a folder of its own that survives a crash: a trainer that finds its last state there
            goes on from it.
        frozen: names of tensors that must come out as they went in.
        seed: for everything random, in [0, 2⁶³).
        options: an instance of the trainer's `options`.
        report: call it now and then, with progress and metrics.
        log: call it with a line for the node's log.
        note: call it with what the node's record should hold besides figures: what was trained on,
            where, with which versions. What is told later under the same name counts.
        shown: a folder of its own for what a person looks at, such as pictures and curves, which
            outlives the store; whoever writes there makes it. None where there is to be none.
    """

    start: Path | None
    output: Path
    work: Path
    frozen: tuple[str, ...]
    seed: int
    options: Any
    report: Report
    log: Log
    note: Note = _unnoted
    shown: Path | None = None


@runtime_checkable
class Trainer(Protocol):
    """A trainer; see the module's text for what else it may have."""

    name: str
    options: Any  # a dataclass

    def train(self, job: Job) -> None:
        """Write `job.output`; raise any exception to fail, with a sentence that says why."""


_trainers: dict[str, Trainer] = {}


def register_trainer(trainer: Trainer) -> Trainer:
    """Make a trainer known under its name in this process.

    Raises:
        TrainerError: it is no trainer, or the name is taken by another.
    """
    checked = _checked(trainer, repr(trainer))
    known = _trainers.get(checked.name)
    if checked.name == COMMAND or (known is not None and type(known) is not type(checked)):
        raise TrainerError(f"a trainer called {checked.name!r} exists already")
    _trainers[checked.name] = checked
    return checked


@cache
def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # 0.05 s

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def trainer_names() -> list[str]:
    """All that have a name: those registered, those that packages offer, and `command`."""
    return sorted({*_trainers, *_entry_points(), COMMAND})


def get_trainer(name: str) -> Trainer:
    """A trainer by its name, or by where it is: `module:Class`. Only its own module is imported.

    Raises:
        TrainerError: there is none, or it cannot be imported.
    """
    if name == COMMAND:
        return CommandTrainer()
    if name in _trainers:
        return _trainers[name]
    point = None if ":" in name else _entry_points().get(name)
    if point is None and ":" not in name:
        extra = EXTRAS.get(name)
        known = trainer_names()
        hint = (
            f" ({how_to_install(extra)} brings it)"
            if extra
            else nearest(name, known) or f" (there are {', '.join(known)}, or module:Class)"
        )
        raise TrainerError(f"no trainer is called {name!r}{hint}")
    try:
        if point is not None:
            loaded = point.load()
        else:
            module, _, attribute = name.partition(":")
            there = importlib.import_module(module)
            if not hasattr(there, attribute):
                raise AttributeError(
                    f"{module} has no {attribute!r}{nearest(attribute, dir(there))}"
                )
            loaded = getattr(there, attribute)
        if isinstance(loaded, type):
            loaded = loaded()
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{_kind(error)}: "
        missing = isinstance(error, ImportError) and name in EXTRAS
        hint = f" ({how_to_install(EXTRAS[name])} brings it)" if missing else ""
        raise TrainerError(
            f"the trainer {name!r} could not be imported: {kind}{error}{hint}"
        ) from error
    return _checked(loaded, f"{name!r}")


def _kind(error: BaseException) -> str:
    return type(error).__name__


def _checked(trainer: object, said: str) -> Trainer:
    if not isinstance(trainer, Trainer) or not dataclasses.is_dataclass(trainer.options):
        raise TrainerError(
            f"{said} is no trainer: it needs a name, options (a dataclass) and train(job)"
        )
    return trainer


def build_options(trainer: Trainer, given: Mapping[str, Any], folder: Path | None = None) -> Any:
    """A trainer's options, checked and with defaults filled in.

    Args:
        trainer: whose.
        given: what a plan says.
        folder: what options that are a `Path`, or a mapping of such, are relative to; None leaves
            them as they are.

    Raises:
        TrainerError: an unknown option, a missing one, or a value of the wrong type; the message
            names the option.
    """
    from pydantic import ValidationError

    fields = {f.name: f for f in dataclasses.fields(trainer.options) if f.init}
    for name in given:
        if name not in fields:
            has = f" (it has {', '.join(fields)})" if fields else " (it has none)"
            raise TrainerError(
                f"the trainer {trainer.name!r} has no option {name!r}{nearest(name, fields) or has}"
            )
    if folder is not None:
        folder = folder.absolute()
        # Before they are checked: options may look at what is there.
        told = {n for n in _path_options(trainer.options) if isinstance(given.get(n), str)}
        given = {**given, **{name: str(folder / given[name]) for name in told}}
    try:
        options = _adapter(trainer.options).validate_python(dict(given))
        if folder is None:
            return options
        paths: dict[str, Any] = {
            name: folder / value for name in fields
            if isinstance(value := getattr(options, name), Path)
        }  # fmt: skip
        paths |= {
            name: {key: folder / path for key, path in value.items()} for name in fields
            if isinstance(value := getattr(options, name), dict)
            and value and all(isinstance(path, Path) for path in value.values())
        }  # fmt: skip
        return dataclasses.replace(options, **paths)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        where = ".".join(map(str, place_of(first, given))) or "options"
        if first["type"] in ("missing", "missing_argument"):
            raise TrainerError(f"the trainer {trainer.name!r} needs the option {where!r}") from None
        if first["type"] == "value_error":  # the options' own class says what is wrong
            reason = first["ctx"]["error"]
            raise TrainerError(f"the options of the trainer {trainer.name!r}: {reason}") from None
        of_one = [first, *(fault for fault in others if fault["input"] is first["input"])]
        raise TrainerError(
            f"the option {where!r} of the trainer {trainer.name!r} is {said(first['input'])}, "
            f"but must be {expected(of_one)}"
        ) from None
    except (TypeError, ValueError) as error:
        raise TrainerError(f"the options of the trainer {trainer.name!r}: {error}") from error


# What pydantic found → what was wanted.
_EXPECTED = {
    "string_type": "a text", "path_type": "a path", "int_type": "an integer",
    "int_parsing": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "float_parsing": "a number", "bool_type": "true or false", "bool_parsing": "true or false",
    "list_type": "a list", "tuple_type": "a list", "set_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping", "none_required": "null",
}  # fmt: skip
_LIMITS = {
    "greater_than": "more than {gt:g}", "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}", "less_than_equal": "at most {le:g}",
}  # fmt: skip


def expected(faults: Iterable[Mapping[str, Any]]) -> str:
    """What pydantic wanted in the place of one value, in our words; of a union, whatever it may be.

    Args:
        faults: as `ValidationError.errors` has them.
    """
    return " or ".join(dict.fromkeys(map(_wanted, faults)))


def _wanted(fault: Mapping[str, Any]) -> str:
    if fault["type"] in ("too_short", "too_long"):
        length = fault["ctx"].get("min_length", fault["ctx"].get("max_length"))
        kind = "a mapping" if fault["ctx"]["field_type"] == "Dictionary" else "a list"
        limit = "at least" if fault["type"] == "too_short" else "at most"
        return f"{kind} of {limit} {counted(length, 'item')}"
    for limit, words in _LIMITS.items():
        if fault["type"] == limit:
            return words.format(**fault["ctx"])
    told = str(fault["msg"]).removeprefix("Input should be ").replace("False", "false")
    return _EXPECTED.get(fault["type"], told)


def place_of(fault: Mapping[str, Any], content: Any) -> tuple[str | int, ...]:
    """Where a fault of pydantic's is, without the tags of unions, which it puts among the keys."""
    place: list[str | int] = []
    last = len(fault["loc"]) - 1
    for index, part in enumerate(fault["loc"]):
        if (isinstance(content, Mapping) and part in content) or (
            isinstance(content, list) and isinstance(part, int) and part < len(content)
        ):
            content = content[part]
            place.append(part)
        elif index == last and fault["type"].startswith("missing"):
            place.append(part)
    return tuple(place)


def trainer_defaults(name: str) -> dict[str, Any]:
    """What a trainer's options are where nothing is said, as plain data, as far as it is known.

    Only a trainer that is installed, or registered, under a name of its own is asked: what a
    stranger's record calls `module:Class` is not imported.
    """
    if ":" in name or name not in trainer_names():
        return {}
    try:
        fields = dataclasses.fields(get_trainer(name).options)
    except TrainerError:
        return {}
    usual = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in fields
    }
    return {
        option: list(value) if isinstance(value, tuple) else value
        for option, value in usual.items()
        if value is not dataclasses.MISSING
    }


def options_as_json(options: Any) -> dict[str, Any]:
    """Options as plain data, for records and keys."""
    kind: Any = type(options)
    plain: dict[str, Any] = _adapter(kind).dump_python(options, mode="json")
    return plain


@cache
def _path_options(options: type) -> frozenset[str]:
    """The options that are a path, or none."""
    told = typing.get_type_hints(options)
    paths = (Path, Path | None)
    return frozenset(field.name for field in dataclasses.fields(options)
                     if told[field.name] in paths)  # fmt: skip


@cache
def _adapter(options: type) -> TypeAdapter[Any]:
    """What checks options; making one takes longer than using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(options)


@contextlib.contextmanager
def telling(trainer: Trainer, what: str) -> Iterator[None]:
    """Whatever a trainer's code raises when it is asked for something, as one sentence.

    Raises:
        TrainerError: it raised. Errors of ours are sentences already.
    """
    try:
        yield
    except SoupError:
        raise
    except Exception as error:
        raise TrainerError(
            f"the trainer {trainer.name!r} cannot tell its {what}: {_kind(error)}: {error}"
        ) from error


def trainer_groups(trainer: Trainer, options: Any) -> dict[str, Sequence[str]]:
    """The layer groups that a trainer defines; none if it defines none."""
    groups = getattr(trainer, "groups", None)
    if groups is None:
        return {}
    with telling(trainer, "groups"):
        return {str(name): [str(p) for p in patterns] for name, patterns in groups(options).items()}


def trainer_estimates(trainer: Trainer, options: Any) -> list[str]:
    """Patterns of tensors that are found anew where they lack, as far as a trainer tells them."""
    estimates = getattr(trainer, "estimates", None)
    if estimates is None:
        return []
    with telling(trainer, "estimates"):
        return [str(pattern) for pattern in estimates(options)]


def trainer_tensors(
    trainer: Trainer, options: Any
) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """(safetensors dtype, shape) of every tensor that a trainer writes; None if it cannot tell."""
    tensors = getattr(trainer, "tensors", None)
    if tensors is None:
        return None
    with telling(trainer, "tensors"):
        told = tensors(options)
        if told is None:
            return None
        signature = {
            str(name): (str(dtype), tuple(map(int, shape))) for name, (dtype, shape) in told.items()
        }
    for name, (dtype, _) in signature.items():
        if dtype not in DTYPES:
            raise TrainerError(
                f"the trainer {trainer.name!r} tells the dtype {dtype!r} of {name}"
                f"{nearest(dtype, DTYPES)} (expected a safetensors dtype such as F32)"
            )
    return signature


def trainer_buffers(trainer: Trainer, options: Any) -> frozenset[str]:
    """The names of what a trainer writes and does not train, as far as it tells them."""
    buffers = getattr(trainer, "buffers", None)
    if buffers is None:
        return frozenset()
    with telling(trainer, "buffers"):
        return frozenset(map(str, buffers(options)))


def trainer_reshapes(trainer: Trainer, options: Any) -> dict[str, str]:
    """Tensors that a trainer takes in other shapes than it writes: by which option; '' as it is."""
    reshapes = getattr(trainer, "reshapes", None)
    if reshapes is None:
        return {}
    with telling(trainer, "reshapes"):
        return {str(name): str(option) for name, option in reshapes(options).items()}


def trainer_fitting(
    trainer: Trainer, options: Any, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The options that a start of such shapes has and these lack, as far as a trainer tells."""
    fitting = getattr(trainer, "fitting", None)
    if fitting is None:
        return {}
    with telling(trainer, "fitting"):
        return dict(fitting(options, shapes))


def trainer_notices(trainer: Trainer, options: Any) -> list[str]:
    """What a trainer wants the user to know before anything runs."""
    notices = getattr(trainer, "notices", None)
    if notices is None:
        return []
    with telling(trainer, "notices"):
        return [str(notice) for notice in notices(options)]


def trainer_outputs(trainer: Trainer, options: Any) -> list[Path]:
    """Files and folders that a trainer writes beside its result, in the place of earlier ones."""
    outputs = getattr(trainer, "outputs", None)
    if outputs is None:
        return []
    with telling(trainer, "outputs"):
        return [Path(output) for output in outputs(options)]


def trainer_identity(trainer: Trainer, options: Any, given: Mapping[str, Any]) -> Any:
    """What decides a trainer's result, as plain data; all that is given, where it says nothing."""
    identity = getattr(trainer, "identity", None)
    if identity is None:  # paths as they are written: a plan may be moved
        return options_as_json(build_options(trainer, given))
    with telling(trainer, "identity"):
        return json.loads(json.dumps(identity(options)))


def named_files(trainer: Trainer, options: Any) -> list[Path]:
    """Files whose content a training depends on, and with it its key: a command's scripts."""
    files = getattr(trainer, "files", None)
    if files is None:
        return []
    with telling(trainer, "files"):
        return [Path(file) for file in files(options)]


@dataclass(frozen=True)
class CommandOptions:
    """Options of the trainer `command`.

    Attributes:
        command: the program and its arguments, given to no shell. `{start}`, `{output}`, `{work}`,
            `{shown}` (a folder to be made, for what a person looks at), `{frozen}` (a file with one
            name a line), `{seed}` and `{python}` (this interpreter) are filled in; an argument that
            is just `{start}` or `{shown}` is left out, with the option before it, where there is
            none. `{{seed}}` is the word in braces.
        env: environment variables, over this process's; the same is filled in.
        folder: where it runs; None is the plan's folder.
        timeout: seconds, after which it is ended; None waits.
        files: files besides those that `command` names whose change makes a new result.
    """

    command: list[str | int | float]
    env: dict[str, str | int | float] = field(default_factory=dict)
    folder: str | None = None
    timeout: float | None = None
    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("command is empty")
        named = [name for part in self.command for name in _placeholders(str(part))]
        if "output" not in named:
            raise ValueError("command never names {output}, where the result must be written")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}, but must be positive")
        for part in map(str, (*self.command, *self.env, *self.env.values())):
            if "\0" in part:
                raise ValueError(f"{part!r} holds a NUL, which no argument can")
            _must_know_placeholders(part)


def _placeholders(part: str) -> list[str]:
    found = _PLACEHOLDER.findall(part)
    return [name for before, name, after in found if not (before and after)]


def _must_know_placeholders(part: str) -> None:
    """Whether what looks like a placeholder is one; a script in an argument has its own braces.

    Raises:
        ValueError: it is not.
    """
    for name in _placeholders(part):
        meant = nearest(name, _PLACEHOLDERS, limit=1)
        if name not in _PLACEHOLDERS and (meant or _NO_SCRIPT.fullmatch(part)):
            known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
            raise ValueError(
                f"{part!r} has the placeholder {{{name}}}, which is none"
                f"{meant or f' (there are {known})'}; {{{{{name}}}}} is the word in braces"
            )


class CommandTrainer:
    """Trains with a program in any language: no shell, placeholders, a time limit."""

    name = COMMAND
    options = CommandOptions

    def identity(self, options: CommandOptions) -> dict[str, Any]:
        """What decides the result: neither the folder nor the patience."""
        return {"command": options.command, "env": options.env}

    def files(self, options: CommandOptions) -> list[Path]:
        """The files that the command names, and those that are listed."""
        folder = Path(options.folder or ".")
        parts = [str(part) for part in options.command]
        parts += [part.partition("=")[2] for part in parts if part.startswith("-")]
        named = [folder / part for part in (*parts, *options.files) if part]
        for part in options.files:
            if not os.path.isfile(folder / part):
                raise TrainerError(f"the command's file {folder / part} does not exist")
        # Not `Path.is_file`, which raises where an argument is too long for a name.
        return [path for path in dict.fromkeys(named) if os.path.isfile(path)]

    def notices(self, options: CommandOptions) -> list[str]:
        """Braces that may have been meant for a placeholder, and a program that is not here.

        They may belong to a script, and the program be where the node will run.
        """
        return [*self._unfilled(options), *self._absent(options)]

    def _unfilled(self, options: CommandOptions) -> list[str]:
        named: dict[str, str] = {}  # what is no placeholder → where it occurs first
        for part in map(str, (*options.command, *options.env.values())):
            for name in _placeholders(part):
                named.setdefault(name, part)
        return [
            f"{{{name}}} in {said(part)} is none of the command's placeholders, and is passed as "
            f"it stands ({{{{{name}}}}} says that this is meant)"
            for name, part in named.items()
            if name not in _PLACEHOLDERS
        ]

    def _absent(self, options: CommandOptions) -> list[str]:
        program = str(options.command[0]).replace("{python}", sys.executable)
        path = options.env.get("PATH", os.environ.get("PATH"))
        beside = Path(options.folder or ".", program)
        if "{" in program or os.path.isfile(beside) or shutil.which(program, path=str(path)):
            return []
        return [f"the program {program!r} of the command is not on this machine"]

    def train(self, job: Job) -> None:
        """Run the command to its end."""
        options: CommandOptions = job.options
        frozen = job.work / "frozen.txt"
        frozen.write_text("".join(f"{name}\n" for name in job.frozen), "utf-8")
        values = {
            "start": job.start, "output": job.output, "work": job.work, "shown": job.shown,
            "frozen": frozen, "seed": job.seed, "python": sys.executable,
        }  # fmt: skip
        command = _filled(options.command, values)
        environment = {
            **os.environ,
            _MARK: str(job.work),
            **{name: _filled_in(str(v), values) for name, v in options.env.items()},
        }
        last: deque[str] = deque(maxlen=_LAST_LINES)
        with _alone(job) as lock:
            deadline = None if options.timeout is None else time.monotonic() + options.timeout
            try:
                process = subprocess.Popen(  # noqa: S603  # no shell; the plan's author names it
                    command, cwd=options.folder, env=environment, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                    start_new_session=True, pass_fds=[lock],
                    preexec_fn=_die_with_parent(),  # noqa: PLW1509  # one call into the C library
                )  # fmt: skip
            except OSError as error:
                raise TrainerError(
                    f"the command {command[0]!r} cannot be run: {error.strerror}"
                ) from None
            os.pwrite(lock, _group_of(process.pid).encode(), 0)
            try:
                code = _follow(process, job, last, deadline)
            finally:
                _end(process)
                _end_left_behind(job.work)
        said = "; its last lines: " + " | ".join(last) if last else "; it printed nothing"
        if code is None:
            raise TrainerError(f"the command took longer than {options.timeout:g} s{said}")
        if code:
            how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise TrainerError(f"the command {' '.join(command[:3])} … {how}{said}")


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[int]:
    """End what a command left behind when the process that ran it was killed; then go on alone.

    It would write on into the work folder. Linux shows it, by a mark in its environment, by its
    process group, or by a locked file of the work folder that it inherited; elsewhere, and where it
    runs on another host, the lock is waited for.
    """
    path = job.work / "command.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        group = os.read(lock, 1024).decode(errors="replace")
        if group:
            _end_left_behind(job.work, group)
        waits = False
        while not _locked(lock):
            if not waits:
                waits = True
                job.log("waiting for the end of what an earlier run of the command left behind")
            _end_left_behind(job.work, group, holding=os.fstat(lock))
            time.sleep(_AGAIN)
        yield lock
    finally:
        # For those who inherited it, too: what a command leaves behind on purpose is let be.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _group_of(process: int) -> str:
    """A command's process group, as it can be known again: with when it began, and where."""
    try:
        namespace = Path(f"/proc/{process}/ns/pid").readlink()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{process} {_status(process)[_BEGAN]} {boot} {namespace}"
    except (OSError, IndexError):  # no Linux, or it has ended already
        return "-"


_GROUP, _BEGAN = 2, 19  # of what follows a process's name in its status


def _status(process: int | str) -> list[str]:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _end_left_behind(
    work: Path, group: str = "-", *, holding: os.stat_result | None = None
) -> None:  # fmt: skip
    """End what a command for a work folder started: marked, of its group, or holding a file."""
    mark = os.fsencode(f"{_MARK}={work}")
    leader = group.partition(" ")[0]
    if group.split()[2:] != _group_of(os.getpid()).split()[2:] or (
        Path(f"/proc/{leader}").exists() and group != _group_of(int(leader))
    ):
        leader = "-"  # its number is another's now
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            if (
                mark in (process / "environ").read_bytes().split(b"\0")
                or _status(process.name)[_GROUP] == leader
                or (holding is not None and _holds(process, holding))
            ):
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, IndexError):  # ended, or another user's
            continue


def _holds(process: Path, file: os.stat_result) -> bool:
    """Whether a process has a file open."""
    for number in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(number.stat(), file):
                return True
    return False


def _die_with_parent() -> Callable[[], object] | None:
    """What a child calls to be ended when its parent is, which only Linux offers."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _filled(command: Sequence[object], values: Mapping[str, object]) -> list[str]:
    filled: list[str] = []
    for part in map(str, command):
        if part in ("{start}", "{shown}") and values[part[1:-1]] is None:
            if filled and filled[-1].startswith("-"):
                filled.pop()
            continue
        filled.append(_filled_in(part, values))
    return filled


def _filled_in(part: str, values: Mapping[str, object]) -> str:
    def value(found: re.Match[str]) -> str:
        before, name, after = found.groups()
        if before and after:
            return f"{{{name}}}"
        if name not in values:
            return found[0]
        return f"{before}{'' if values[name] is None else values[name]}{after}"

    return _PLACEHOLDER.sub(value, part)


def _follow(
    process: subprocess.Popen[str], job: Job, last: deque[str], deadline: float | None
) -> int | None:
    """Pass a command's lines on until it ends; None if the deadline came first."""
    import selectors

    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        os.set_blocking(process.stdout.fileno(), False)
        rest = ""
        while True:
            wait = 0.5 if deadline is None else max(0.0, min(0.5, deadline - time.monotonic()))
            ready = selector.select(wait)
            chunk = process.stdout.read() if ready else ""
            *lines, rest = (rest + (chunk or "")).split("\n")
            for line in lines:
                _take(line, job, last)
            # A child that the command left behind may hold the pipe open for ever.
            if (ready and not chunk) or (not ready and process.poll() is not None):
                if rest:
                    _take(rest, job, last)
                selector.unregister(process.stdout)
                break
            if deadline is not None and time.monotonic() >= deadline:
                return None
    try:
        limit = None if deadline is None else max(0.0, deadline - time.monotonic())
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None


def _take(line: str, job: Job, last: deque[str]) -> None:
    if line.startswith(PROGRESS_PREFIX):
        try:
            content = json.loads(line.removeprefix(PROGRESS_PREFIX))
            done = content.pop("done", None)
            metrics = {name: float(value) for name, value in content.items()}
            job.report(None if done is None else float(done), metrics)
            return
        except (ValueError, TypeError, AttributeError):
            pass  # a line like any other, then
    if line.strip():
        last.append(line.strip())
    job.log(line)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command, if it still runs, and what it started."""
    if process.poll() is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        for sign, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, sign)
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                process.wait()
                break
    if process.stdout is not None:
        process.stdout.close()


def carry_out(
    trainer: Trainer, options: Any, *, start: Path | None, output: Path, work: Path,
    frozen: Sequence[str], seed: int, report: Report | None = None, log: Log | None = None,
    note: Note | None = None, shown: Path | None = None,
) -> None:  # fmt: skip
    """Train, and check what came of it.

    The output must be a sound checkpoint of finite floats in which frozen tensors have the dtype,
    shape and bytes that they had in the start, and which has every tensor of the start, in its
    shape. A trainer that tells its tensors must write those.

    Raises:
        TrainerError: the trainer failed, or what it wrote is not that.
    """
    from ..errors import CheckpointError
    from ..files.checkpoint import open_checkpoint

    work.mkdir(parents=True, exist_ok=True)
    _remove(output)
    if start is not None:
        start = start.absolute()  # a command runs in a folder of its own
    job = Job(
        start, output.absolute(), work.absolute(), tuple(frozen), seed, options,
        report or _silent, log or _unheard, note or _unnoted, shown,
    )  # fmt: skip
    said = f"the trainer {trainer.name!r}"
    try:
        trainer.train(job)
    except KeyboardInterrupt:
        raise
    except SoupError as error:
        if trainer.name != COMMAND:  # whose own output tells it
            job.log("".join(traceback.format_exception(error)).rstrip())
        raise
    except BaseException as error:  # what a stranger's code raises is its failure
        raise TrainerError(*failure(said, error)) from error
    if not output.exists():
        raise TrainerError(f"{said} wrote nothing to {output.name}")
    try:
        made = open_checkpoint(output)
    except CheckpointError as error:
        raise TrainerError(f"{said} wrote no sound checkpoint: {error}") from error
    if not made.tensors:
        raise TrainerError(f"{said} wrote a checkpoint without tensors")
    told = trainer_tensors(trainer, options)
    if told is not None:
        wrong = [
            name for name, (dtype, shape) in told.items()
            if name not in made.tensors
            or (made.tensors[name].dtype, made.tensors[name].shape) != (dtype, shape)
        ]  # fmt: skip
        if wrong:
            raise TrainerError(f"{said} wrote other tensors than it said: {listed(wrong)}")
    if start is None:
        return
    before = open_checkpoint(start)
    lost = [name for name in before.tensors if name not in made.tensors]
    if lost:
        left_out = counted(len(lost), "tensor")
        raise TrainerError(f"{said} left out {left_out} of its start: {listed(lost)}")
    other = [n for n, info in before.tensors.items() if made.tensors[n].shape != info.shape]
    if other and told is None:
        first = other[0]
        was, became = (list(of.tensors[first].shape) for of in (before, made))
        raise TrainerError(
            f"{said} gave {'another shape' if len(other) == 1 else 'other shapes'} to "
            f"{counted(len(other), 'tensor')} of its start: {listed(other)} "
            f"({first}: {became}, not {was})"
        )
    changed = [name for name in frozen if not _same_bytes(before.tensors, made.tensors, name)]
    if changed:
        frozen_ones = counted(len(changed), "frozen tensor")
        raise TrainerError(f"{said} changed {frozen_ones}: {listed(changed)}")


def failure(said: str, error: BaseException) -> list[str]:
    """What a stranger's code raised, a line for each of its message's.

    Args:
        said: whose failure it is.
        error: what was raised.
    """
    first, *more = str(error).strip().splitlines() or [""]
    return [f"{said} failed: {_kind(error)}{f': {first}' if first else ''}", *more]


def _silent(done: float | None, metrics: Mapping[str, float]) -> None:
    pass


def _unheard(line: str) -> None:
    pass


def _same_bytes(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> bool:
    first, second = before[name], after[name]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as a, second.file.open("rb") as b:
        a.seek(first.start)
        b.seek(second.start)
        left: int = first.nbytes
        while left:
            size = min(left, 1 << 20)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
