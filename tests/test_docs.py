"""Every command and every piece of Python in the README and docs/ runs as it stands."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

pytest.importorskip("sklearn", reason="the examples need scikit-learn: modelsoup[examples]")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "torch.md": ["torch"],
    "i2i.md": ["torch", "PIL", "torchmetrics"],
    "i2i_metrics.md": ["torch", "PIL", "torchmetrics"],
    "i2i_training.md": ["torch", "PIL"],
    "i2i_use.md": ["torch", "PIL"],
    "openvino.md": ["torch", "nncf", "openvino"],
}
SETUP = "python3 -m venv .venv && "


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "console") for line in block.splitlines() if line]


def must_be_there(page: Path) -> None:
    """Skip a page whose extras are not installed."""
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)


def environment() -> dict[str, str]:
    """`soup` and the interpreter of this very environment come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "120"}


def run(command: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's first command leaves behind."""
    folder = tmp_path_factory.mktemp("trained")
    script = ROOT / "examples" / "quickstart" / "quickstart.py"
    done = subprocess.run(
        [sys.executable, script], cwd=folder, capture_output=True, text=True, check=True
    )
    assert len(re.findall(r"^  \d+\.\d%", done.stdout, re.M)) == 7  # leaves, average, root, alone
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_as_they_stand(page: Path, trained: Path, tmp_path: Path):
    must_be_there(page)
    (tmp_path / "runs").symlink_to(trained / "runs")
    shutil.copytree(trained / ".soup-store", tmp_path / ".soup-store")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands(page):
        if not command.startswith((SETUP, "python benchmarks/")):
            run(command, tmp_path)


def test_the_readmes_first_run_finds_all_that_the_quickstart_made(trained: Path, tmp_path: Path):
    shutil.copytree(trained / ".soup-store", tmp_path / ".soup-store")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = next(c for c in commands(ROOT / "README.md") if c.startswith("soup run "))
    run(f"{command} > said", tmp_path)
    assert (tmp_path / "said").read_text().endswith(": 0 nodes computed, 10 reused\n")
    made = [folder / name for folder, name in ((tmp_path, "tree"), (trained / "runs", "root"))]
    assert len({file.with_suffix(".safetensors").read_bytes() for file in made}) == 1


def test_the_readme_sets_up_and_runs_with_two_commands():
    setups = [c for c in commands(ROOT / "README.md") if c.startswith(SETUP)]
    assert len(setups) == 2
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for command in setups:
        named = re.search(r"\.\[([\w,]+)\]", command)
        assert named is not None and set(named[1].split(",")) <= extras.keys()
    assert setups[0].endswith("examples/quickstart/quickstart.py")  # `trained` runs it
    assert setups[1].endswith("-m pytest")  # this runs in it


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_as_it_stands(page: Path, trained: Path, tmp_path: Path):
    must_be_there(page)
    (tmp_path / "runs").symlink_to(trained / "runs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for number, block in enumerate(blocks(page, "python")):
        script = tmp_path / f"block{number}.py"
        script.write_text(block, "utf-8")
        run(f"python {script}", tmp_path)


def test_the_recipe_file_of_the_docs_merges(trained: Path, tmp_path: Path):
    (block,) = blocks(ROOT / "docs" / "merging.md", "yaml")
    assert yaml.safe_load(block)["method"] == "slerp"
    (tmp_path / "merge.yaml").write_text(block)
    models = f"{trained}/runs/rate-0.1.safetensors {trained}/runs/rate-0.4.safetensors"
    run(f"soup merge {models} --config merge.yaml", tmp_path)


def test_the_entry_points_of_the_docs_are_toml():
    (block,) = blocks(ROOT / "docs" / "library.md", "toml")
    assert set(tomllib.loads(block)["project"]["entry-points"]) == {
        "modelsoup.methods", "modelsoup.trainers", "modelsoup.commands",
    }  # fmt: skip


@pytest.mark.parametrize("script", ["own_method.py", "greedy_soup.py"])
def test_an_example_runs_on_what_the_first_one_left(script: str, trained: Path):
    run(f"python {ROOT / 'examples' / 'quickstart' / script}", trained)


def test_the_quickstarts_tree_is_the_same_by_commands(trained: Path, tmp_path: Path):
    """Another way to train, the same arithmetic; only the seeds come from other options."""
    plan = ROOT / "examples" / "quickstart" / "tree_command.yaml"
    run(f"soup run {plan} -o out.safetensors --workers 2", tmp_path)
    run("soup verify out.safetensors", tmp_path)


def test_the_plan_of_the_docs_is_a_plan(trained: Path, tmp_path: Path):
    block = blocks(ROOT / "docs" / "plans.md", "yaml")[0]
    (tmp_path / "runs").mkdir()
    for name, leaf in (("slow", "rate-0.1"), ("start", "start")):
        shutil.copy(
            trained / "runs" / f"{leaf}.safetensors", tmp_path / "runs" / f"{name}.safetensors"
        )
    shutil.copy(ROOT / "examples" / "quickstart" / "digits.py", tmp_path)
    (tmp_path / "tree.yaml").write_text(block)
    run("soup plan tree.yaml && soup run tree.yaml", tmp_path)


def test_every_file_that_the_readme_names_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([\w./-]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_every_module_has_its_room_in_the_architecture_page():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for module in (ROOT / "modelsoup").glob("*.py"):
        if module.name != "__main__.py":
            assert f"  {module.name} " in text, module.name
