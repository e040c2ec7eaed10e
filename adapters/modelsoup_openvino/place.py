"""The folder's place: what may be replaced there. Importable without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from modelsoup import OutputError, check_output

REPORT = "report.json"
ORIGIN = ("source_xxh3_128", "float_xxh3_128", "trainer", "network")
"""What the report of each such folder tells of where it came from."""


def must_be_free(out: Path, *, force: bool) -> None:
    """Check that a folder may be written, before hours of work.

    Raises:
        OutputError: there is something that may not be replaced, or no folder to put it into.
    """
    must_be_ours(out)
    check_output(out, force=force, kind="folder")


def must_be_ours(out: Path) -> None:
    """Check that what is there, if anything, is an empty folder or one that was written here.

    Raises:
        OutputError: it is not, and stays as it is.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file, where a folder is to be written")
    try:
        ours = not any(out.iterdir()) or _has_our_report(out)
    except OSError as error:
        raise OutputError(f"the folder {out} cannot be read: {error.strerror or error}") from error
    if not ours:
        raise OutputError(
            f"{out} is a folder of something else, without the {REPORT} of an earlier run, and is "
            f"not replaced: name another one"
        )


def _has_our_report(folder: Path) -> bool:
    try:
        told = json.loads((folder / REPORT).read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    origin = told.get("origin") if isinstance(told, dict) else None
    return isinstance(origin, dict) and origin.keys() >= set(ORIGIN)
