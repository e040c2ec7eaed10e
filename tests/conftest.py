"""What every test starts from: no setting of the user's, and a cache of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
