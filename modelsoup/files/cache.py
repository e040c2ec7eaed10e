"""Where a user keeps what can be made again: compiled loops, features, other packages' builds."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder in `MODELSOUP_CACHE`, else in `modelsoup` of the user's cache folder.

    It may not be there yet. Without a home it is one that can neither be read nor made.

    Args:
        name: what is kept in it.
    """
    if given := os.environ.get("MODELSOUP_CACHE"):
        return Path(given, name)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache", "modelsoup", name)


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # there is no HOME, and the system does not know the user
        return Path(os.devnull)
