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
    (folder / "tree.yaml").write_text(TREE.replace("FINETUNE", ADD))
    (folder / "command.yaml").write_text(TREE.replace("FINETUNE", COMMAND))
    (folder / "folders.yaml").write_text(FOLDERS)
    return folder


def weights_of_torch(folder: Path) -> None:
    import torch

    weights = {name: torch.from_numpy(array) for name, array in network(0).items()}
    torch.save(weights, folder / "a.pth")
    (folder / "torch").mkdir()
    torch.save(weights, folder / "torch" / "pytorch_model.bin")
    (folder / "torch" / "config.json").write_text("{}")


def soup(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run(
        [sys.executable, "-m", "modelsoup", *arguments], cwd=folder, env=environment, check=True,
        capture_output=True,
    )  # fmt: skip


CASES = {
    "a run with a trainer": "threads tree.yaml -o out.safetensors",
    "a run with a command": "threads command.yaml -o out.safetensors",
    "a run to a folder": "threads folders.yaml -o out",
    "a run that replaces a folder": "threads folders.yaml -o out --force",
    "a run in processes that replaces a file": "run tree.yaml -o out.safetensors --force",
    "a run in processes to a folder": "run folders.yaml -o out",
    "a merge": "merge a.safetensors b.safetensors -o out.safetensors",
    "a merge that replaces a file": "merge a.safetensors b.safetensors -o out.safetensors --force",
    "a merge to a folder of shards": "merge a b -o out --shard-size 2kB",
    "a merge that replaces a folder": "merge a b -o out --shard-size 2kB --force",
    "a file converted": "convert a.pth out.safetensors",
    "a folder converted, to replace one": "convert torch out --force",
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.needs("torch")] if "converted" in case else [])
        for case in CASES
    ],
)
def test_a_call_that_fails_anywhere_is_a_sentence_and_loses_nothing(
    folder: Path, case: str
) -> None:
    command = CASES[case].split()
    output = next(word for word in command if word.startswith("out"))
    if "--force" in command:
        inputs = ["a.safetensors", "b.safetensors"] if "." in output else ["a", "b"]
        soup(folder, "merge", *inputs, "--beta", "0.9", "-o", output)
    if command[0] == "convert":
        weights_of_torch(folder)
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, TESTS / "faults.py", folder, output, *command], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls, *wrong = json.loads(done.stdout)
    assert wrong == []
    assert int(calls.split()[0]) > (20 if command[0] in ("run", "threads") else 5)
