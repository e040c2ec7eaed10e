"""The folder's place: what may be replaced there, and replacing it. Importable without torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from modelsoup import OutputError

REPORT = "report.json"
ORIGIN = ("source_xxh3_128", "float_xxh3_128", "trainer", "network")
"""What the report of each such folder tells of where it came from."""


def must_be_free(out: Path, *, force: bool) -> None:
    """Check that a folder may be written, before hours of work.

    Raises:
        OutputError: there is something that may not be replaced, or no folder to put it into.
    """
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {out.absolute().parent} to put {out.name} into")
    must_be_ours(out)
    if not force and out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} exists already (--force replaces it)")


def must_be_ours(out: Path) -> None:
    """Check that what is there, if anything, is an empty folder or one that was written here.

    Raises:
        OutputError: it is not, and stays as it is.
    """
    if not out.exists():
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


def must_not_hold(out: Path, start: Path) -> None:
    """Check that replacing a folder would not remove the checkpoint that it is made from.

    Raises:
        OutputError: it would.
    """
    place = start.resolve()
    if out.resolve() in (place, *place.parents):
        raise OutputError(f"{out} would replace its own input {start}")


def take_the_place(folder: Path, out: Path) -> None:
    """Rename a finished folder; what was there goes only when it stands.

    Raises:
        OutputError: since the run began, something else has been put there.
        OSError: it cannot be renamed.
    """
    must_be_ours(out)
    old: Path | None = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent)) / out.name
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old is not None:
            with suppress(OSError):
                old.rename(out)
        raise
    finally:
        if old is not None and out.exists():
            shutil.rmtree(old.parent, ignore_errors=True)


def _has_our_report(folder: Path) -> bool:
    try:
        told = json.loads((folder / REPORT).read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    origin = told.get("origin") if isinstance(told, dict) else None
    return isinstance(origin, dict) and origin.keys() >= set(ORIGIN)
