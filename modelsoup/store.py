"""Results named by what made them: a folder that runs share, and that survives their end.

objects/KEY/model.safetensors (or model/)   a node's checkpoint
objects/KEY/record.json                     what made it; there only once it is finished
work/KEY/                                   a trainer's own folder, until it is finished
logs/KEY.log, KEY.progress.json             what a node prints, and how far it is
locks/KEY                                   held by who works on it; a crash lets it go
digests/                                    of leaves, by path, size and time
roots/                                      the trees that were run here, for `gc`
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import SUFFIX, StrPath, open_checkpoint
from .digest import FileDigest, combined, digest_checkpoint
from .errors import CheckpointError, StoreError, nearest
from .writer import PARTIAL_SUFFIX

DEFAULT_STORE = ".soup-store"
_FOLDERS = ("objects", "work", "logs", "locks", "digests", "roots")
_KEY = re.compile(r"[0-9a-f]{32}")


class NoResultError(StoreError):
    """There is no such result, or its record is damaged: it can be made again."""


@dataclass(frozen=True)
class Entry:
    """One finished result.

    Attributes:
        key: what it is named by.
        path: its checkpoint.
        record: what made it: operation, inputs, seed, times, host, versions, metrics, digest.
        nbytes: the checkpoint's bytes.
    """

    key: str
    path: Path
    record: Mapping[str, Any]
    nbytes: int


@dataclass(frozen=True)
class Cleaned:
    """What `Store.gc` removed.

    Attributes:
        keys: of results.
        nbytes: bytes that were freed, work folders included.
    """

    keys: tuple[str, ...]
    nbytes: int


class Store:
    """A folder of results.

    Args:
        folder: where.
        create: make it where it is missing.

    Raises:
        StoreError: it cannot be made or written to.
    """

    def __init__(self, folder: StrPath, *, create: bool = True) -> None:
        self.folder = Path(folder)
        if not create:
            if not (self.folder / "objects").is_dir():
                raise StoreError(f"there is no store at {folder}")
            return
        try:
            made = not self.folder.exists()
            for name in _FOLDERS:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            if made:  # a folder of our own, which no repository wants
                (self.folder / ".gitignore").write_text("*\n")
        except OSError as error:
            raise _store_error(self.folder, error) from error

    # Results

    def folder_of(self, key: str) -> Path:
        """Where a result and its record are."""
        return self.folder / "objects" / key

    def work(self, key: str) -> Path:
        """A trainer's own folder."""
        return self.folder / "work" / key

    def log(self, key: str) -> Path:
        """What a node prints."""
        return self.folder / "logs" / f"{key}.log"

    def progress(self, key: str) -> Path:
        """How far a node is."""
        return self.folder / "logs" / f"{key}.progress.json"

    def has(self, key: str) -> bool:
        """Whether a result is finished; one whose record is damaged is not.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            self.entry(key)
        except NoResultError:
            return False
        return True

    def entry(self, key: str) -> Entry:
        """A finished result.

        Raises:
            NoResultError: there is none of that key, or its record is damaged.
            StoreError: the store cannot be read.
        """
        record_file = self.folder_of(key) / "record.json"
        try:
            record = json.loads(record_file.read_bytes())
            path = self.folder_of(key) / record["output"]
            beside = record["output"] in (output_name(is_folder=False), output_name(is_folder=True))
            if not beside or not isinstance(record["digest"], str) or not path.exists():
                raise ValueError("it names no checkpoint beside it")
        except FileNotFoundError:
            raise NoResultError(f"{self.folder} has no result {key!r}") from None
        except OSError as error:
            raise StoreError(f"cannot read {record_file}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise NoResultError(f"{record_file} is damaged: {error}") from error
        return Entry(key, path, record, _size(path))

    def damaged_records(self) -> list[str]:
        """Keys of results whose record cannot be read: a run makes them again."""
        folders = sorted((self.folder / "objects").iterdir())
        return [f.name for f in folders if (f / "record.json").exists() and not self.has(f.name)]

    def entries(self) -> Iterator[Entry]:
        """All finished results, by key."""
        for folder in sorted((self.folder / "objects").iterdir()):
            if self.has(folder.name):
                yield self.entry(folder.name)

    def find(self, start: str) -> Entry:
        """The one result whose key begins with `start`.

        Raises:
            StoreError: none does, or several do.
        """
        keys = [entry.key for entry in self.entries()]
        found = [key for key in keys if key.startswith(start)]
        if len(found) != 1:
            what = f"{len(found)} results begin" if found else "no result begins"
            raise StoreError(f"{self.folder}: {what} with {start!r}{nearest(start, keys)}")
        return self.entry(found[0])

    def put(self, key: str, output: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """Finish a result, whose checkpoint is in `folder_of(key)` already; its whole record.

        Raises:
            StoreError: the disk is full, or the like.
        """
        target = self.folder_of(key) / "record.json"
        whole = {**record, "key": key, "output": output.name}
        try:
            _write(target, json.dumps(whole, indent=2))
            shutil.rmtree(self.work(key), ignore_errors=True)
        except OSError as error:
            raise _store_error(self.folder, error) from error
        return whole

    def drop(self, key: str) -> int:
        """Remove a result; returns how many bytes it had."""
        folder = self.folder_of(key)
        nbytes = _size(folder)
        (folder / "record.json").unlink(missing_ok=True)  # first: half a result must not count
        shutil.rmtree(folder, ignore_errors=True)
        return nbytes

    def intact(self, key: str) -> bool:
        """Whether a result still is what its record says, by its digest.

        Raises:
            StoreError: there is no such result.
        """
        entry = self.entry(key)
        try:
            return content_digest(entry.path) == entry.record.get("digest")
        except (CheckpointError, OSError):
            return False

    # Locks

    @contextmanager
    def lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a key's lock: false if another holds it and `wait` is false.

        The kernel lets it go when its holder ends, however that happens. Programs that the holder
        starts inherit it: while one of them still works, nobody else begins.
        """
        path = self.folder / "locks" / key
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _store_error(self.folder, error) from error
        try:
            os.set_inheritable(descriptor, True)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    # Leaves

    def digest(self, path: Path) -> str | None:
        """A checkpoint's digest, if it was computed since the files changed last."""
        file = self._digest_file(path)
        try:
            known = json.loads(file.read_bytes())
        except (OSError, ValueError):
            return None
        if isinstance(known, dict) and known.get("state") == _state(path):
            return str(known.get("digest"))
        return None

    def digest_now(self, path: Path) -> str:
        """A checkpoint's digest, computed if it is not known.

        Raises:
            CheckpointError: it is missing or damaged.
            StoreError: the store cannot be written to.
        """
        known = self.digest(path)
        if known is None:
            state = _state(path)
            known = content_digest(path)
            try:
                text = json.dumps({"path": str(path), "state": state, "digest": known})
                _write(self._digest_file(path), text)
            except OSError as error:
                raise _store_error(self.folder, error) from error
        return known

    def forget_digest(self, path: Path) -> None:
        """Have a checkpoint's digest computed again: the file is not what it was."""
        self._digest_file(path).unlink(missing_ok=True)

    def _digest_file(self, path: Path) -> Path:
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
        return self.folder / "digests" / f"{name}.json"

    # Care

    def pin(self, root: str, keys: Mapping[str, str]) -> None:
        """Note a tree that was run here: its root's key, and node name → key."""
        try:
            _write(self.folder / "roots" / f"{root}.json", json.dumps({"nodes": dict(keys)}))
        except OSError as error:
            raise _store_error(self.folder, error) from error

    def pins_changed(self) -> int:
        """A number that is another one after each `pin`."""
        return (self.folder / "roots").stat().st_mtime_ns

    def pinned(self, *, since: float = 0.0) -> dict[str, set[str]]:
        """Root key → keys of its tree, for trees that were run since then (seconds since 1970)."""
        pins = {}
        for file in sorted((self.folder / "roots").glob("*.json")):
            if file.stat().st_mtime < since:
                continue
            try:
                pins[file.stem] = set(json.loads(file.read_bytes())["nodes"].values())
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise StoreError(
                    f"{file} is damaged: run its plan again, or remove it ({error})"
                ) from error
        return pins

    def gc(
        self, *, keep: str = "trees", older_than: float | None = None, dry_run: bool = False
    ) -> Cleaned:  # fmt: skip
        """Remove what no tree needs.

        Args:
            keep: `trees` keeps every result of the trees that were run here; `roots` only their
                final results; `none` nothing.
            older_than: days; trees that were not run for longer do not count, and are forgotten.
            dry_run: remove nothing, only say what would be.

        What a run works on at the moment is left alone.

        Raises:
            StoreError: `keep` is something else.
        """
        if keep not in ("trees", "roots", "none"):
            known = ("trees", "roots", "none")
            raise StoreError(
                f"keep is {keep!r}{nearest(keep, known)} (expected {', '.join(known)})"
            )
        since = 0.0 if older_than is None else time.time() - older_than * 86400
        pins = self.pinned(since=since)
        kept: set[str] = set()
        if keep == "trees":
            kept = set().union(*pins.values()) if pins else set()
        if keep == "roots":
            kept = set(pins)
        removed, freed = [], 0
        keys = {
            path.name for name in ("objects", "work") for path in (self.folder / name).iterdir()
            if _KEY.fullmatch(path.name)
        }  # fmt: skip
        for key in sorted(keys - kept):
            with self.lock(key, wait=False) as free:
                if not free:
                    continue
                removed.append(key)
                freed += _size(self.folder_of(key)) + _size(self.work(key))
                if dry_run:
                    continue
                self.drop(key)
                shutil.rmtree(self.work(key), ignore_errors=True)
                self.log(key).unlink(missing_ok=True)
                self.progress(key).unlink(missing_ok=True)
        for file in (self.folder / "roots").glob("*.json"):
            if file.stat().st_mtime < since and not dry_run:
                file.unlink()
        return Cleaned(tuple(removed), freed)


def content_digest(path: Path) -> str:
    """The XXH3-128 digest of a checkpoint's files, as lineages have it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return digest_of(digest_checkpoint(open_checkpoint(path)))


def digest_of(digests: Sequence[FileDigest]) -> str:
    """The XXH3-128 digest of a checkpoint from those of its files."""
    return digests[0].xxh3_128 if len(digests) == 1 else combined(list(digests), "xxh3_128")


def remove_strays(folder: Path) -> None:
    """Remove what a killed run left half-written beside a result."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.endswith(PARTIAL_SUFFIX) or path.name.startswith("trained"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _state(path: Path) -> list[list[Any]]:
    """Name, size and time of every file of a checkpoint: what changes when it does."""
    files = open_checkpoint(path).files
    status = [(str(file.resolve()), file.stat()) for file in files]
    return [
        [name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        for name, found in status
    ]


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def _write(path: Path, text: str) -> None:
    """All of it or nothing, and on the disk before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _store_error(folder: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"the disk of the store {folder} is full")
    return StoreError(f"cannot write to the store {folder}: {error.strerror or error}")


def output_name(*, is_folder: bool) -> str:
    """What a result's checkpoint is called in the store."""
    return "model" if is_folder else f"model{SUFFIX}"
