"""Models of the Hugging Face Hub that lie in this machine's cache; nothing is fetched."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_REVISION = re.compile(r"[\w][\w./-]*", re.ASCII)


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched: `HF_HUB_CACHE`, or `hub` in `HF_HOME`."""
    if found := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(found).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model in the cache, None where it is not there.

    Args:
        name: as the Hub has it, `OWNER/MODEL`.
        revision: a branch, tag or commit; None is `main`.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        return None
    revision = revision or "main"
    if not _REVISION.fullmatch(revision) or ".." in revision:
        return None
    repository = cache_folder() / f"models--{name.replace('/', '--')}"
    with contextlib.suppress(OSError, ValueError):  # it is a commit
        revision = (repository / "refs" / revision).read_text("utf-8").strip()
    folder = repository / "snapshots" / revision
    return folder if _REVISION.fullmatch(revision) and folder.is_dir() else None


def name_in_cache(folder: Path) -> str | None:
    """What the Hub calls the model of a folder in its cache, None for any other folder."""
    for part in folder.absolute().parts:
        owner, _, model = part.removeprefix("models--").partition("--")
        if part.startswith("models--") and owner and model:
            return f"{owner}/{model}"
    return None
