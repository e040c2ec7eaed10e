"""What ends a command from outside: signals, streams that are closed, readers that leave."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from trainers import network

SOUP = [sys.executable, "-m", "modelsoup"]
TESTS = str(Path(__file__).parent)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
# One method that waits in the middle of a merge until a file is there.
WAITS = """
import os, sys, time
from pathlib import Path
import modelsoup
from modelsoup.terminal.cli import main

@modelsoup.method("waits")
def waits(x):
    def waiting(b):
        Path("begun").touch()
        while not Path("go on").exists():
            time.sleep(0.02)
        return b.model(0)

    return waiting

main()
"""
SLOW = """soup: 1
models: {a: a.safetensors, b: b.safetensors}
tree: {of: [a, b], finetune: {trainer: "trainers:Sees", note: go on}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    for number, name in enumerate("ab"):
        save_file(network(number), tmp_path / f"{name}.safetensors")
    return tmp_path


def wait_for(what: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def begun(folder: Path, command: list[str], **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


@pytest.mark.parametrize("sign", CODES)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_signal_ends_a_merge_and_leaves_nothing_half_written(
    folder: Path, kind: str, sign: signal.Signals
) -> None:
    for name in "ab":
        (folder / f"f{name}").mkdir()
        save_file(network(1), folder / f"f{name}" / "model.safetensors")
    given = ["fa", "fb", "-o", "out"] if kind == "folder" else ["a.safetensors", "b.safetensors"]
    command = [sys.executable, "-c", WAITS, "merge", *given, "--method", "waits"]
    before = sorted(folder.iterdir())
    process = begun(folder, command)
    wait_for((folder / "begun").exists)
    assert [path for path in folder.iterdir() if path.name.endswith(".soup-partial")]
    process.send_signal(sign)
    time.sleep(0.3)
    process.send_signal(sign)  # as an impatient person does
    time.sleep(0.2)
    (folder / "go on").touch()  # what works on a slice is not torn from it
    said, stderr = process.communicate(timeout=20)
    assert process.returncode == CODES[sign]
    assert (said, stderr) == ("", "Interrupted.\n")
    assert sorted(folder.iterdir()) == sorted([*before, folder / "begun", folder / "go on"])


@pytest.mark.parametrize("sign", CODES)
def test_a_signal_ends_a_run_which_goes_on_afterwards(folder: Path, sign: signal.Signals) -> None:
    (folder / "tree.yaml").write_text(SLOW)
    command = [*SOUP, "run", "tree.yaml", "-o", "out.safetensors"]
    process = begun(folder, command)
    works = folder / ".soup-store" / "work"
    wait_for(lambda: works.is_dir() and list(works.iterdir()))
    process.send_signal(sign)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == CODES[sign]
    assert stderr.splitlines()[-1] == (
        "Interrupted. 1 finished result is kept in .soup-store; the same command goes on."
    )
    assert "Traceback" not in stderr
    (folder / "go on").touch()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "out.safetensors: 1 node computed, 1 reused\n"
    assert not [path for path in folder.rglob("*") if ".soup-partial" in path.name]


def test_a_signal_that_is_ignored_stays_so(folder: Path) -> None:
    """As `nohup` has it."""
    (folder / "tree.yaml").write_text(SLOW)
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "-", *SOUP, "run", "tree.yaml"]
    process = begun(folder, command)
    works = folder / ".soup-store" / "work"
    wait_for(lambda: works.is_dir() and list(works.iterdir()))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    (folder / "go on").touch()
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert (folder / "soup.safetensors").exists()


COMMANDS = [
    ("merge", "a.safetensors", "b.safetensors", "--force"),
    ("run", "tree.yaml", "--force"),
    ("inspect", "a.safetensors"),
    ("plan", "tree.yaml", "--json"),
    ("--help",),
]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that was run."""
    folder = tmp_path_factory.mktemp("once")
    for number, name in enumerate("ab"):
        save_file(network(number), folder / f"{name}.safetensors")
    (folder / "tree.yaml").write_text(SLOW)
    (folder / "go on").touch()
    environment = {**os.environ, "PYTHONPATH": TESTS}
    subprocess.run([*SOUP, "run", "tree.yaml", "-q"], cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture
def finished(once: Path, folder: Path) -> Path:
    shutil.copytree(once, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("closed", ["1", "0 1 2"])
def test_a_closed_stream_is_no_traceback_and_takes_no_files_place(
    finished: Path, command: tuple[str, ...], closed: str
) -> None:
    closing = " ".join(f"{number}>&-" for number in closed.split())
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closing}', "-", *SOUP, *command], cwd=finished, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for path in finished.glob("*.safetensors"):
        assert load_file(path).keys() == network(0).keys()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_reader_that_leaves_is_no_traceback(finished: Path, command: tuple[str, ...]) -> None:
    end, tell = os.pipe()
    os.close(end)
    done = subprocess.run(
        [*SOUP, *command], cwd=finished, stdout=tell, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(tell)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    for path in finished.glob("*.safetensors"):
        assert load_file(path).keys() == network(0).keys()


@pytest.mark.parametrize("large", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_merge_that_is_ended_at_any_moment_leaves_no_partial(folder: Path, large: bool) -> None:
    elements = 40_000_000 if large else 2_000_000
    for name in "ab":
        save_file({"w": np.ones(elements, np.float32)}, folder / f"{name}.safetensors")
    command = [*SOUP, "merge", "a.safetensors", "b.safetensors", "-q", "--force"]
    for moment in range(40 if large else 6):
        process = begun(folder, command)
        try:
            process.wait(0.15 + moment * (0.05 if large else 0.15))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode in (0, 143, -15)  # ended before it could listen
        assert "Traceback" not in stderr
        assert not list(folder.glob(".*"))
        if (folder / "soup.safetensors").exists():
            assert load_file(folder / "soup.safetensors")["w"].sum() == elements
