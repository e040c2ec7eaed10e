"""Let the system fail, one call after the other: a program of its own, for `test_io_errors`.

    python faults.py FOLDER OUTPUT COMMAND …

The command of `soup` is carried out once in a copy of the folder, to count the calls that change
something there; then as often as there were calls, each time in a fork and a new copy, and each
time another of them fails. The command `threads TREE.yaml` stands for a run in threads of the
process itself, where nodes meet the failing calls too. Prints a JSON list: how many calls there
were, then what was not as promised.

Python's own files are made of such calls by `_pyio`, the standard library's `io` in Python.
"""

from __future__ import annotations

import _pyio
import builtins
import errno
import gc
import importlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelsoup
from modelsoup.running.node import get_ready
from modelsoup.terminal.cli import main

ON_DESCRIPTORS = ("write", "pwrite", "ftruncate", "fsync", "sendfile")
ON_PATHS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir")
REMOVING = ("unlink", "remove", "rmdir")


class Faults:
    """Counts the calls that change something below a folder, and lets one of them fail."""

    def __init__(self, folder: Path, fail_at: int) -> None:
        self.folder = str(folder)
        self.fail_at = fail_at
        self.count = 0
        self.failed = ""
        self.paths: dict[int, str] = {}  # of open descriptors

    def next(self, call: str, path: str) -> None:
        self.count += 1
        if self.count == self.fail_at:
            self.failed = f"{call} {path.removeprefix(self.folder)}"
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def is_ours(self, path: Any, dir_fd: int | None) -> bool:
        if dir_fd is not None:
            return dir_fd in self.paths
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def install(self) -> None:
        exact = {name: getattr(os, name) for name in ("open", "close", *ON_DESCRIPTORS, *ON_PATHS)}

        def opens(path: Any, *more: Any, dir_fd: int | None = None) -> int:
            ours = self.is_ours(path, dir_fd)
            if ours:
                self.next("open", os.fsdecode(path))
            descriptor: int = exact["open"](path, *more, dir_fd=dir_fd)
            if ours:
                self.paths[descriptor] = os.fsdecode(path)
            return descriptor

        def closes(descriptor: int) -> None:
            path = self.paths.pop(descriptor, None)
            exact["close"](descriptor)  # it is closed, whatever it says
            if path is not None:
                self.next("close", path)

        def on_descriptor(name: str) -> Callable[..., Any]:
            def call(descriptor: int, *more: Any) -> Any:
                if descriptor in self.paths:
                    self.next(name, self.paths[descriptor])
                return exact[name](descriptor, *more)

            return call

        def on_path(name: str) -> Callable[..., Any]:
            def call(path: Any, *more: Any, **given: Any) -> Any:
                if self.is_ours(path, given.get("dir_fd")):
                    self.next(name, os.fsdecode(path))
                return exact[name](path, *more, **given)

            return call

        os.open, os.close = opens, closes  # type: ignore[assignment]
        for name in ON_DESCRIPTORS:
            setattr(os, name, on_descriptor(name))
        for name in ON_PATHS:
            setattr(os, name, on_path(name))
        builtins.open = io.open = _pyio.open  # type: ignore[assignment]


def carried_out(command: list[str]) -> Any:
    """The exit code of a command."""
    try:
        if command[0] == "threads":
            tree, _ = modelsoup.read_tree(command[1])
            modelsoup.run(tree, command[3], force="--force" in command)
            return 0
        main(command)
    except SystemExit as error:
        return error.code
    except modelsoup.SoupError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def attempt(folder: Path, command: list[str], fail_at: int) -> dict[str, Any]:
    """A command with one call that fails, in a fork: its exit code and what it said."""
    told, said = (folder.with_name(f"{folder.name}.{name}") for name in ("told", "said"))
    told.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.chdir(folder)
            faults = Faults(folder, fail_at)
            faults.install()
            code = carried_out(command)
            answer = {"code": code, "calls": faults.count, "failed": faults.failed}
            faults.fail_at = 0
            told.write_text(json.dumps(answer))
        except BaseException:  # noqa: BLE001  # it is told by what it said
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
    answer = json.loads(told.read_text()) if told.exists() else {"code": None, "failed": "?"}
    return {**answer, "said": said.read_text()}


def content(path: Path) -> Any:
    """All that is at a path; None for nothing."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes() if path.exists() else None


def wrong_with(
    result: dict[str, Any], before: Any, after: Any, made: Any, left: list[str]
) -> list[str]:
    """What is not as promised after one call failed."""
    removing = result["failed"].startswith(REMOVING)
    faults = {
        "a traceback": result["code"] not in (0, 1) or "Traceback" in result["said"],
        "a worker that was not lost": "worker was lost" in result["said"],
        "no sentence": result["code"] == 1 and f"\n{result['said']}".count("\nError: ") != 1,
        "half an output": after not in (before, made),
        "no output": result["code"] == 0 and after != made,
        f"left {left}": left and not removing,
    }
    return [fault for fault, is_so in faults.items() if is_so]


def main_program(template: Path, output: str, command: list[str]) -> list[str]:
    work = template.with_name(f"{template.name}.work")

    def fresh() -> Path:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(template, work, symlinks=True)
        return work

    used = [
        "modelsoup.running.runner",
        "modelsoup.running.executors",
        "modelsoup.trees.tree_yaml",
        "networkx",
    ]
    if command[0] == "convert":
        used += ["torch", "modelsoup.files.torch_convert"]
    for module in used:
        importlib.import_module(module)  # once, and not in each fork
    get_ready()
    gc.freeze()
    before = content(template / output)
    first = attempt(fresh(), command, 0)
    made = content(work / output)
    if first["code"] != 0 or made is None:
        return [f"it fails without a fault: {first}"]
    told = [f"{first['calls']} calls"]
    for call in range(1, first["calls"] + 1):
        result = attempt(fresh(), command, call)
        if not result["failed"]:
            continue  # one thread was quicker than the other, and needed a call less
        left = [str(p.relative_to(work)) for p in work.rglob("*") if ".soup-" in p.name]
        left = [name for name in left if not name.startswith(".soup-store")]
        wrong = wrong_with(result, before, content(work / output), made, left)
        again = attempt(work, [*command, *(["--force"] if "--force" not in command else [])], 0)
        if again["code"] != 0 or content(work / output) != made:
            wrong.append(f"no success afterwards: {again}")
        strays = [
            str(p.relative_to(work)) for p in work.rglob(".*")
            if p.name not in (".gitignore", ".soup-store")
        ]  # fmt: skip
        wrong += [f"left for ever {strays}"] if strays else []
        if wrong:
            told.append(f"{call}, {result['failed']}: {'; '.join(wrong)}: {result['said'][-3000:]}")
    return told


if __name__ == "__main__":
    print(json.dumps(main_program(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])))
