"""Every command and every piece of Python in the README and docs/ runs as it stands."""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.numpy import load_file

import modelsoup
from modelsoup.trees.trainer import carry_out

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = "examples/quickstart/quickstart.py"
EXAMPLES = ROOT / "examples" / "quickstart"
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


def run(command: str, folder: Path) -> str:
    """What a command prints that does what it was asked to."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


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
    shutil.copytree(trained / ".soup-store", tmp_path / ".soup-store")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands(page):
        if not command.startswith((SETUP, "python benchmarks/")):
            assert run(command, tmp_path) or command.startswith("soup run"), f"{command}: silent"
            words = shlex.split(command)
            for option, name in pairwise(words):
                if option in ("-o", "--svg") and "--dry-run" not in words:
                    assert (tmp_path / name).exists(), f"{command}: no {name}"


def test_the_readmes_first_run_finds_all_that_the_quickstart_made(trained: Path, tmp_path: Path):
    shutil.copytree(trained / ".soup-store", tmp_path / ".soup-store")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = next(c for c in commands(ROOT / "README.md") if c.startswith("soup run "))
    run(f"{command} > said", tmp_path)
    assert (tmp_path / "said").read_text().endswith(": 0 nodes computed, 10 reused\n")
    made = [folder / name for folder, name in ((tmp_path, "tree"), (trained / "runs", "root"))]
    assert len({file.with_suffix(".safetensors").read_bytes() for file in made}) == 1


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
    assert extras.keys() - named == {"mutants"}

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
        printed = run(f"python -W error {script}", tmp_path)
        assert bool(printed) == ("print(" in block), f"{page.name}, block {number}: {printed!r}"


def test_the_recipe_file_of_the_docs_merges(trained: Path, tmp_path: Path):
    models = f"{trained}/runs/rate-0.1.safetensors {trained}/runs/rate-0.4.safetensors"
    for number, block in enumerate(blocks(ROOT / "docs" / "merging.md", "yaml")):
        assert yaml.safe_load(block)["method"] == "slerp"
        (tmp_path / "merge.yaml").write_text(block)
        run(f"soup merge {models} --config merge.yaml -o {number}.safetensors", tmp_path)
    assert number == 1


def test_the_entry_points_of_the_docs_are_toml():
    (block,) = blocks(ROOT / "docs" / "library.md", "toml")
    assert set(tomllib.loads(block)["project"]["entry-points"]) == {
        "modelsoup.methods", "modelsoup.trainers", "modelsoup.commands",
    }  # fmt: skip


def test_the_method_of_the_examples_swaps_what_is_near(trained: Path):
    printed = run(f"python {EXAMPLES / 'own_method.py'}", trained)
    assert re.fullmatch(r"runs/swap_near\.safetensors: 9\d\.\d% of the held-out .*\n", printed)
    a, b, made = (
        load_file(trained / "runs" / f"{name}.safetensors")
        for name in ("rate-0.1", "rate-0.4", "swap_near")
    )
    assert made.keys() == a.keys()
    for name in a:
        share = np.minimum(0.01 / np.maximum(np.abs(a[name] - b[name]), 1e-6), 1)
        expected = share * b[name] + (1 - share) * a[name]
        np.testing.assert_allclose(made[name], expected, rtol=1e-5, atol=1e-7)


def test_the_greedy_soup_of_the_examples_is_never_worse_than_its_best_run(trained: Path):
    printed = run(f"python {EXAMPLES / 'greedy_soup.py'}", trained)
    best, *tried = printed.splitlines()
    reached = float(best.rpartition(" ")[2].rstrip("%"))
    for line in (line for line in tried if line.startswith("with ")):
        value = float(re.search(r"([\d.]+)%", line)[1])  # type: ignore[index]
        assert line.endswith("kept" if value >= reached else "left out"), printed
        reached = max(reached, value)
    kept = printed.count("kept")
    assert len(list((trained / "runs").glob("rate-*"))) == 1 + kept + printed.count("left out")
    if kept:
        assert tried[-1] == f"runs/greedy.safetensors: {reached}%, of {1 + kept} runs"


def test_the_quickstarts_tree_is_the_same_by_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another way to train, the same arithmetic; only the seeds come from other options."""
    monkeypatch.syspath_prepend(EXAMPLES)
    trees = [
        modelsoup.parse_tree((EXAMPLES / name).read_text("utf-8"), folder=EXAMPLES)[0]
        for name in ("tree.yaml", "tree_command.yaml")
    ]
    first, second = ({*tree.graph.edges} for tree in trees)
    assert first == second and len(first) == 9
    run(f"soup run {EXAMPLES / 'tree_command.yaml'} -o out.safetensors --workers 2", tmp_path)
    assert "are sound" in run("soup verify out.safetensors", tmp_path)

    by_command, by_trainer = (tmp_path / f"{name}.safetensors" for name in ("command", "trainer"))
    given = "--seed 7 --rate 0.2 --epochs 2"
    run(f"python {EXAMPLES / 'train_digits.py'} --out {by_command} {given}", tmp_path)
    trainer = modelsoup.get_trainer("digits:Digits")
    carry_out(
        trainer, trainer.options(0.2, 2), start=None, output=by_trainer, work=tmp_path / "work",
        frozen=(), seed=7,
    )  # fmt: skip
    by_command, by_trainer = load_file(by_command), load_file(by_trainer)
    assert by_command.keys() == by_trainer.keys()
    assert all(np.array_equal(by_command[name], by_trainer[name]) for name in by_command)


def test_the_plan_of_the_docs_is_a_plan(trained: Path, tmp_path: Path):
    block = blocks(ROOT / "docs" / "plans.md", "yaml")[0]
    (tmp_path / "runs").mkdir()
    for name, leaf in (("slow", "rate-0.1"), ("start", "start")):
        shutil.copy(
            trained / "runs" / f"{leaf}.safetensors", tmp_path / "runs" / f"{name}.safetensors"
        )
    shutil.copy(ROOT / "examples" / "quickstart" / "digits.py", tmp_path)
    (tmp_path / "tree.yaml").write_text(block)
    assert "0 steps to do" not in run("soup plan tree.yaml", tmp_path)
    run("soup run tree.yaml", tmp_path)
    assert "0 steps to do" in run("soup plan tree.yaml", tmp_path)
    made = modelsoup.read_lineage(modelsoup.open_checkpoint(tmp_path / "soup.safetensors"))
    assert made is not None and made["operation"] == "finetune"


def test_every_file_that_the_readme_names_is_there():
    for page in PAGES:
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([\w./-]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_every_module_has_its_room_in_the_architecture_page():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for module in (ROOT / "modelsoup").rglob("*.py"):
        if module.stat().st_size and module.parent.name != "methods" and module.stem != "__main__":
            assert re.search(rf"[ `]{module.name}\s", text), module


def test_every_module_has_tests_that_its_mutants_must_fail():
    """And every file of tests belongs to some module, but for those of examples and of pages."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    assert spec is not None and spec.loader is not None
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    tests = {module: mutants.tests_of(module) for module in mutants.modules()}
    assert [module for module, files in tests.items() if not files] == []
    listed = {f"{package}/{name}.py" for package, names in mutants.TESTS.items() for name in names}
    assert listed <= tests.keys()
    used = {file for files in tests.values() for file in files}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert there - used == {
        "tests/i2i/test_i2i_paper.py", "tests/i2i/test_i2i_rows.py", "tests/test_docs.py",
        "tests/test_io_errors.py", "tests/test_real_models.py",
    }  # fmt: skip
    assert used <= there


def test_the_sizes_that_the_docs_tell_are_those_of_the_code():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    stream = importlib.import_module("modelsoup.merging.engine")
    jobs = importlib.import_module("modelsoup.merging.jobs")
    for said, own in (
        ("slices of 1 Mi elements", stream.SLICE == 1 << 20),
        ("all buffers stay under 48 MB", stream._BUFFERS == 48 << 20),
        ("blocks of 64 Ki elements", stream.BLOCK == 64 << 10),
        ("at most 2048 tensors", jobs.MOST == 2048),
        ("with 256 MB of input", jobs.GROUP == 256 << 20),
        ("32 MB of what is gathered", jobs.STATE == 32 << 20),
        ("less\nthan 256 Mi elements use numpy", stream._WORTH_LOOPS == 256 << 20),
    ):
        assert said in page and own, said
