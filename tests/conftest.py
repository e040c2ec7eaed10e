"""What every test starts from: no setting of the user's, a cache of its own, and what it needs."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import tempfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import modelsoup.trees.trainer
from modelsoup.merging.methods import registry

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["project"]
# The extra that all tests of a folder or a file need; a single one is marked with `needs`.
NEEDS = {
    "i2i": "i2i",
    "openvino": "openvino",
    "test_compiled_loops.py": "fast",
    "test_convert.py": "torch",
    "test_docs.py": "examples",
    "test_lora_peft.py": "peft",
    "test_pickles.py": "torch",
    "test_torch_bridge.py": "torch",
}
_OF_THE_USER = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")


def is_installed(extra: str) -> bool:
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            if not all(map(is_installed, requirement.extras)):
                return False
        elif not any(metadata.distributions(name=requirement.name)):
            return False
    return True


class Absent(pytest.Module):
    """A file of tests that is not imported, because an extra is not installed."""

    extra: str

    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"needs modelsoup[{self.extra}]", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    for part in module_path.relative_to(HERE).parts:
        if part in NEEDS and not is_installed(NEEDS[part]):
            absent: Absent = Absent.from_parent(parent, path=module_path)
            absent.extra = NEEDS[part]
            return absent
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for extra in (extra for mark in item.iter_markers("needs") for extra in mark.args):
            if not is_installed(extra):
                item.add_marker(pytest.mark.skip(reason=f"needs modelsoup[{extra}]"))


def pytest_configure() -> None:
    """A torchvision that does not fit torch is made importable, here and in what a test starts.

    And that can be ended, even where a shell had this ignore it: SIGINT for a background job,
    SIGHUP under `nohup`.
    """
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL),
    ):  # fmt: skip
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    site = HERE / "site"
    runpy.run_path(str(site / "sitecustomize.py"))
    path = [str(site), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No MODELSOUP_* variable, no colour setting, and compiled loops in a folder of the session."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("MODELSOUP_", "_SOUP_")) or name in _OF_THE_USER:
                patch.delenv(name)
        patch.setenv("MODELSOUP_CACHE", str(tmp_path_factory.mktemp("modelsoup-cache")))
        yield


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that a process which has dropped root can reach; pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="soup-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def trainers_of_a_test_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would be in the hints of whatever runs next in the process."""
    monkeypatch.setattr(
        modelsoup.trees.trainer, "_trainers", dict(modelsoup.trees.trainer._trainers)
    )


@pytest.fixture
def own_methods() -> Iterator[None]:
    """Forget the methods that a test registers."""
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)
