"""Every command and every piece of Python in the README and docs/ runs as it stands."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = "examples/quickstart/quickstart.py"
SETUP = "python3 -m venv .venv && "
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def needed(page: Path) -> list[pytest.MarkDecorator]:
    """A page is called after the extra that it is about."""
    extras = ("torch", "i2i", "openvino")
    return [pytest.mark.needs(extra) for extra in extras if page.name.startswith(extra)]


each_page = pytest.mark.parametrize(
    "page", [pytest.param(page, marks=needed(page), id=page.name) for page in PAGES]
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "console") for line in block.splitlines() if line]


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
    done = subprocess.run(
        [sys.executable, ROOT / QUICKSTART], cwd=folder, capture_output=True, text=True, check=True
    )
    assert len(re.findall(r"^  \d+\.\d%", done.stdout, re.M)) == 7  # leaves, average, root, alone
    return folder


@each_page
def test_the_commands_of_a_page_run_as_they_stand(page: Path, trained: Path, tmp_path: Path):
    (tmp_path / "runs").symlink_to(trained / "runs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands(page):
        if not command.startswith((SETUP, "python benchmarks/")):
            run(command, tmp_path)


def test_the_readme_sets_up_and_runs_with_two_commands():
    """`trained` runs what the first one installs, and this runs in what the second one does."""
    first, second = (c for c in commands(ROOT / "README.md") if c.startswith(SETUP))
    pip = ".venv/bin/pip install -q"
    assert first == f"{SETUP}{pip} -e '.[examples]' && .venv/bin/python {QUICKSTART}"
    assert second == f"{SETUP}{pip} -c constraints.txt -e '.[test]' && .venv/bin/python -m pytest"
    assert commands(ROOT / "CONTRIBUTING.md")[0] == second


def test_the_suite_is_set_up_with_every_extra_at_one_version_of_each_package():
    extras = PROJECT["optional-dependencies"]
    named = {"test"}
    for name in named_by(extras["test"]):
        named |= {name, *named_by(extras[name])}
    assert named == extras.keys()

    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pinned}
    direct = [*map(Requirement, chain(PROJECT["dependencies"], *extras.values()))]
    wanted = [need for need in direct if need.name != PROJECT["name"]]
    assert versions.keys() == {canonicalize_name(need.name) for need in wanted}
    for need in wanted:
        version = versions[canonicalize_name(need.name)].removeprefix("==")
        assert need.specifier.contains(version), f"{need}, but {version} in constraints.txt"


def named_by(extra: list[str]) -> set[str]:
    """The extras that an extra is made of."""
    needs = map(Requirement, extra)
    return {name for need in needs if need.name == PROJECT["name"] for name in need.extras}


@each_page
def test_the_python_of_a_page_runs_as_it_stands(page: Path, trained: Path, tmp_path: Path):
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
