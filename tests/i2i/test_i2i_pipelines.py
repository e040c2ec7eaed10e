"""The template of examples/transferi2i: plans that are checked, and one that is killed twice."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
h5py = pytest.importorskip("h5py")

import modelsoup  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("T-shirt", "trouser", "pullover")
SMALL = {
    "stylegan": {"size": 64, "width": 8, "code": 8, "depth": 2},
    "biggan": {"size": "32s", "ch": 8, "chunk": 4, "shared": 8, "attention": 0},
}
FAST = {"batch": 2, "sheet_every": 0, "device": "cpu", "threads": 0, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def template() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan", EXAMPLES / "transferi2i" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    (root / "fashion").mkdir()
    drawn = np.random.default_rng(0)
    for part in ("pretrain", "train"):
        with h5py.File(root / "fashion" / f"{part}.h5", "w") as file:
            file["imgs"] = drawn.integers(0, 256, (12, 32, 32, 1), np.uint8)
            file["labels"] = np.arange(12) % 3
            file.attrs["classes"] = list(NAMES)
    return root


def small(template: ModuleType, network: str, method: str = "transferi2i", **more: Any) -> str:
    given: dict[str, Any] = {"per_class": None, "steps": (2, 2, 2, 2), "more": FAST, **more}
    content = template.plan(network, method, sizes=SMALL[network], **given)
    return str(template.text(content))


@pytest.mark.parametrize(
    ("words", "example"),
    [([], "transferi2i"), (["--network", "biggan", "--method", "deepi2i"], "deepi2i")],
)
def test_the_trees_beside_the_template_are_what_it_says(words: list[str], example: str):
    command = [sys.executable, EXAMPLES / "transferi2i" / "plan.py", *words]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == (EXAMPLES / example / "tree.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("network", "method", "more", "nodes"),
    [
        ("stylegan", "transferi2i", {}, "pretrained source target parts fits root"),
        ("stylegan", "transferi2i", {"beta": 0.25}, "pretrained source target parts fits root"),
        ("stylegan", "deepi2i", {}, "pretrained source target parts root"),
        ("biggan", "transferi2i", {"classes": NAMES[:2]}, "pretrained tuned fits root"),
        ("biggan", "deepi2i", {}, "pretrained root"),
    ],
)
def test_each_plan_of_the_template_can_be_run(
    template: ModuleType, folder: Path, network: str, method: str, more: Any, nodes: str
):
    text = small(template, network, method, **more)
    plan = modelsoup.check(modelsoup.parse_tree(text, folder=folder)[0])
    assert plan.problems == ()
    assert {node.partition("#")[0] for node in plan.nodes} == set(nodes.split())
    signature = plan.nodes["root"].signature
    assert signature is not None
    assert {name.partition(".")[0] for name in signature} == {"E", "A", "G", "D"}
    if "parts" in nodes:
        merged = plan.nodes["parts"].merged
        assert {name.partition(".")[0] for name in merged} == ({"G", "D"} if more else set())


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--classes", "bag"], "--classes SOURCE TARGET"),
     (["--network", "biggan", "--beta", "0.5"], "--beta is of StyleGAN")],
)  # fmt: skip
def test_parameters_that_make_no_plan_are_told(words: list[str], said: str):
    command = [sys.executable, EXAMPLES / "transferi2i" / "plan.py", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", sorted(SMALL))
def test_a_whole_transferi2i_goes_on_where_it_was_killed(
    template: ModuleType, folder: Path, network: str, tmp_path: Path
):
    more = {"classes": NAMES[::2], "steps": (8, 8, 8, 8)}
    more |= {"beta": 0.25} if network == "stylegan" else {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fashion").symlink_to(folder / "fashion")
        (tmp_path / name / "tree.yaml").write_text(small(template, network, **more), "utf-8")
    command = [sys.executable, "-m", "modelsoup", "run", "tree.yaml", "-o", "out.safetensors"]
    subprocess.run(command, cwd=tmp_path / "whole", check=True)
    place, killed = tmp_path / "killed", []
    for made in (0, 3):  # of the pretraining, and of the last or the last but one
        process = subprocess.Popen(command, cwd=place)
        while process.poll() is None:
            results = len(list((place / ".soup-store").rglob("record.json")))
            if results >= made and list((place / ".soup-store").rglob("state.pt")):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        killed.append(process.returncode)
        assert not (place / "out.safetensors").exists()
    assert killed == [-signal.SIGKILL] * 2
    subprocess.run(command, cwd=place, check=True)
    outputs = [(tmp_path / name / "out.safetensors").read_bytes() for name in ("whole", "killed")]
    assert outputs[0] == outputs[1]
