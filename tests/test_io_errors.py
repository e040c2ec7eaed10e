"""Every call that writes fails once: a sentence, the old output or the new, success afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from trainers import network

TESTS = Path(__file__).parent
TREE = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree: {of: [{of: [a, b]}, c], finetune: FINETUNE}
"""
ADD = '{trainer: "trainers:Add", steps: 2}'
COMMAND = "{command: [sh, -c, 'cp $0 $1', '{start}', '{output}']}"
FOLDERS = "soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b]}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    folder.mkdir()
    for number, name in enumerate("abc"):
        save_file(network(number), folder / f"{name}.safetensors")
    for name in "ab":
        (folder / name).mkdir()
        save_file(network(3), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    return folder


def soup(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run(
        [sys.executable, "-m", "modelsoup", *arguments], cwd=folder, env=environment, check=True,
        capture_output=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("how", "case"),
    [("threads", "trainer"), ("threads", "command"), ("threads", "folder"), ("run", "replaced"),
     ("run", "folder")],
)  # fmt: skip
def test_a_call_that_fails_anywhere_in_a_run_is_a_sentence_and_loses_nothing(
    folder: Path, how: str, case: str
) -> None:
    finetune = {"command": COMMAND}.get(case, ADD)
    is_folder = case.startswith("folder")
    output = "out" if is_folder else "out.safetensors"
    text = FOLDERS if is_folder else TREE.replace("FINETUNE", finetune)
    (folder / "tree.yaml").write_text(text)
    command = [how, "tree.yaml", "-o", output]
    if case.endswith("replaced"):
        soup(folder, "merge", *(["a", "b"] if is_folder else ["a.safetensors", "b.safetensors"]),
             "--beta", "0.9", "-o", output)  # fmt: skip
        command.append("--force")
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, TESTS / "faults.py", folder, output, *command], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls, *wrong = json.loads(done.stdout)
    assert wrong == []
    assert int(calls.split()[0]) > 20
