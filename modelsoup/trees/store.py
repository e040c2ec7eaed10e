"""Results named by what made them: a folder that runs share, and that survives their end.

objects/KEY/model.safetensors (or model/)   a node's checkpoint
objects/KEY/record.json                     what made it; there only once it is finished
work/KEY/                                   a trainer's own folder, until it is finished
logs/KEY.log, KEY.progress.json             what a node prints, and how far it is
locks/KEY                                   held by who works on it; a crash lets it go
digests/                                    of leaves, by path, size and time
roots/                                      the trees that were run here, for `gc` and `list`

What is being written has a hidden name beside its own, and a lock: one without was left by a kill.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StoreError, nearest
from ..files.checkpoint import SUFFIX, StrPath, open_checkpoint
from ..files.companions import companions
from ..files.digest import FileDigest, combined, content_of, digest_checkpoint, digest_file
from ..files.placing import PARTIAL_SUFFIX

Companions = Sequence[Sequence[str]]
"""Name and XXH3-128 digest of each file that goes along with a model folder's weights."""

Contents = Sequence[Sequence[str]]
"""Name and XXH3-128 digest of each file that a trainer names."""

DEFAULT_STORE = ".soup-store"
_FOLDERS = ("objects", "work", "logs", "locks", "digests", "roots")
_KEY = re.compile(r"[0-9a-f]{32}")
_NOTES = ("digests", "roots", "logs")  # where notes are written that no key's lock guards
_STRAY = re.compile(r"\..+\.[0-9a-f]{8}")

# Nanoseconds in which a file may change twice with one time: a few ticks of the kernel's clock; a
# file system that counts whole seconds, or two, shows it by its times.
_TICK = 20_000_000
_COARSE_TICK = 2_000_000_000


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


@dataclass(frozen=True)
class Pin:
    """A tree that was run here.

    Attributes:
        root: the key of its result.
        plan: what the plan was called; empty for a tree that was made in Python.
        keys: of all its results.
    """

    root: str
    plan: str
    keys: frozenset[str]


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
            raise store_error(self.folder, error) from error

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

    def has_log(self, key: str) -> bool:
        """Whether a node has said anything."""
        log = self.log(key)
        return log.exists() and log.stat().st_size > 0

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
        state = _state(_weights(output))
        whole = {**record, "key": key, "output": output.name, "state": state}
        try:
            write_note(target, json.dumps(whole, indent=2))
            shutil.rmtree(self.work(key), ignore_errors=True)
        except OSError as error:
            raise store_error(self.folder, error) from error
        return whole

    def drop(self, key: str) -> int:
        """Remove a result; returns how many bytes it had."""
        folder = self.folder_of(key)
        nbytes = _size(folder)
        (folder / "record.json").unlink(missing_ok=True)  # first: half a result must not count
        shutil.rmtree(folder, ignore_errors=True)
        return nbytes

    def intact(self, key: str) -> bool:
        """Whether a result still is what its record says, by its digest: all of it is read.

        One that is not is read by the next run, too, whatever its files' times.

        Raises:
            StoreError: there is no such result.
        """
        entry = self.entry(key)
        try:
            same = content_digest(entry.path) == entry.record.get("digest")
        except (CheckpointError, OSError):
            same = False
        if not same and "state" in entry.record:
            with self.lock(key, wait=False) as free:
                if free and self.has(key):
                    without = {n: v for n, v in self.entry(key).record.items() if n != "state"}
                    self._write(self.folder_of(key) / "record.json", json.dumps(without, indent=2))
        return same

    def is_damaged(self, key: str) -> bool:
        """Whether a result is there, but not as it was made; it is read if its files were touched.

        Raises:
            StoreError: the store cannot be read.
        """
        if not (self.folder_of(key) / "record.json").exists():
            return False
        try:
            entry = self.entry(key)
            if entry.record.get("state") == _state(_weights(entry.path)):
                return False
            return bool(self.digest_now(entry.path) != entry.record["digest"])
        except (NoResultError, CheckpointError, OSError):
            return True

    def _write(self, path: Path, text: str) -> None:
        try:
            write_note(path, text)
        except OSError as error:
            raise store_error(self.folder, error) from error

    # Locks

    @contextmanager
    def lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a key's lock: false if another holds it and `wait` is false.

        The kernel lets it go when its holder ends, however that happens. No program that the
        holder starts inherits it.
        """
        path = self.folder / "locks" / key
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise store_error(self.folder, error) from error
        try:
            yield _locked(descriptor, wait=wait)
        finally:
            os.close(descriptor)

    # Leaves

    def digest(self, path: Path) -> str | None:
        """The digest of a checkpoint's weights, if it was computed since they changed last."""
        known = self._noted("weights", path, _weights(path))
        return None if known is None else str(known)

    def digest_now(self, path: Path) -> str:
        """The digest of a checkpoint's weights, computed if it is not known.

        Raises:
            CheckpointError: it is missing or damaged.
            StoreError: the store cannot be written to.
        """
        known = self.digest(path)
        if known is None:
            known = self._note("weights", path, _weights(path), lambda: content_digest(path))
        return known

    def companions(self, path: Path) -> Companions | None:
        """What goes along with a model folder's weights, if it was read since it changed last."""
        found: Companions | None = self._noted("companions", path, list(companions(path)))
        return found

    def companions_now(self, path: Path) -> Companions:
        """What goes along with a model folder's weights, read if it is not known.

        Raises:
            CheckpointError: it changed meanwhile.
            StoreError: the store cannot be written to.
        """
        known = self.companions(path)
        if known is None:
            files = list(companions(path))
            known = self._note("companions", path, files, lambda: companions_of(path))
        return known

    def contents(self, files: Sequence[Path]) -> Contents | None:
        """Name and digest of files that a trainer names, if they were read since they changed."""
        found: Contents | None = self._noted(_all_of(files), files[0], files) if files else []
        return found

    def contents_now(self, files: Sequence[Path]) -> Contents:
        """Name and digest of files that a trainer names, read if they are not known.

        Raises:
            CheckpointError: one is missing, or changed meanwhile.
            StoreError: the store cannot be written to.
        """
        known = self.contents(files)
        if known is None:
            known = self._note(_all_of(files), files[0], files, lambda: content_of(files))
        return known

    def forget_digest(self, path: Path) -> None:
        """Have a checkpoint's digest computed again: the file is not what it was."""
        self._digest_file("weights", path).unlink(missing_ok=True)

    def _noted(self, what: str, path: Path, files: Sequence[Path]) -> Any:
        """What was found in files, unless they changed since."""
        try:
            known = json.loads(self._digest_file(what, path).read_bytes())
        except (OSError, ValueError):
            return None
        same = isinstance(known, dict) and known.get("state") == _state(files)
        return known.get("digest") if same else None

    def _note(self, what: str, path: Path, files: Sequence[Path], find: Callable[[], Any]) -> Any:
        """Find something in files, and note it with the state that they had."""
        try:
            _settle(files)
            state = _state(files)
            found = find()
            for file, then, now in zip(files, state, _state(files), strict=True):
                if then != now:
                    raise CheckpointError(f"{file} changed while it was read")
        except OSError as error:
            where = error.filename or path
            raise CheckpointError(f"cannot read {where}: {error.strerror or error}") from error
        text = json.dumps({"path": str(path), "state": state, "digest": found})
        self._write(self._digest_file(what, path), text)
        return found

    def _digest_file(self, what: str, path: Path) -> Path:
        name = f"{path.resolve()}{'' if what == 'weights' else f'/{what}'}"
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()
        return self.folder / "digests" / f"{digest[:32]}.json"

    # Care

    def pin(self, root: str, keys: Mapping[str, str], *, plan: str = "") -> None:
        """Note a tree that was run here: its root's key, node name → key, and its plan's name."""
        text = json.dumps({"plan": plan, "nodes": dict(keys)})
        self._write(self.folder / "roots" / f"{root}.json", text)

    def pins_changed(self) -> int:
        """A number that is another one after each `pin`."""
        return (self.folder / "roots").stat().st_mtime_ns

    def pinned(self, *, since: float = 0.0) -> list[Pin]:
        """The trees that were run since then (seconds since 1970)."""
        pins = []
        for file in sorted((self.folder / "roots").glob("*.json")):
            if file.stat().st_mtime < since:
                continue
            try:
                content = json.loads(file.read_bytes())
                keys = frozenset(content["nodes"].values())
                pins.append(Pin(file.stem, str(content.get("plan", "")), keys))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise StoreError(
                    f"{file} is damaged: run its plan again, or remove it ({error})"
                ) from error
        return pins

    def remove_strays(self) -> None:
        """Remove what killed runs left half-written beside notes; what is written is locked."""
        for folder in _NOTES:
            for path in (self.folder / folder).iterdir():
                if _STRAY.fullmatch(path.name):
                    _remove_stray(path)

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
            kept = set().union(*(pin.keys for pin in pins))
        if keep == "roots":
            kept = {pin.root for pin in pins}
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
        if not dry_run:
            self.remove_strays()
            for file in (self.folder / "roots").glob("*.json"):
                if file.stat().st_mtime < since:
                    file.unlink()
            for file in (self.folder / "digests").glob("*.json"):
                if not _names_a_file(file):
                    file.unlink()
        return Cleaned(tuple(removed), freed)


def content_digest(path: Path) -> str:
    """The XXH3-128 digest of a checkpoint's files, as lineages have it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return digest_of(digest_checkpoint(open_checkpoint(path)))


def companions_of(path: Path) -> Companions:
    """What goes along with a model folder's weights, all of it read."""
    return [[str(file.relative_to(path)), digest_file(file).xxh3_128] for file in companions(path)]


def digest_of(digests: Sequence[FileDigest]) -> str:
    """The XXH3-128 digest of a checkpoint from those of its files."""
    return digests[0].xxh3_128 if len(digests) == 1 else combined(list(digests), "xxh3_128")


def remove_strays(folder: Path) -> None:
    """Remove what a killed run left half-written beside a result, whose lock is held."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        name = path.name
        if name.endswith(PARTIAL_SUFFIX) or name.startswith("trained") or _STRAY.fullmatch(name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _weights(path: Path) -> Sequence[Path]:
    """The files that hold a checkpoint's tensors."""
    return [path] if path.is_file() and path.suffix == SUFFIX else open_checkpoint(path).files


def _all_of(files: Sequence[Path]) -> str:
    """A name for the whole of some files: one note for all, where there may be thousands."""
    places = "\0".join(map(os.path.abspath, files))
    return f"files/{hashlib.sha256(os.fsencode(places)).hexdigest()}"


def _state(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size, times and inode of files: what changes when their content does."""
    status = [(file.name, file.stat()) for file in files]
    return [
        [name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        for name, found in status
    ]


def _settle(files: Sequence[Path]) -> None:
    """Wait until a change of files that were just written would give them another time."""
    times = [t for file in files for t in (file.stat().st_mtime_ns, file.stat().st_ctime_ns)]
    coarse = all(moment % 1_000_000_000 == 0 for moment in times)
    tick = _COARSE_TICK if coarse else _TICK
    age = time.time_ns() - max(times, default=0)
    if age < tick:  # negative, where the clock of a file server is ahead
        time.sleep(min(tick, tick - age) / 1e9)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def write_note(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small file: all of it or nothing, and on the disk before it has its name.

    Args:
        path: where; missing folders are made.
        text: what.
        durable: wait for the disk; without, a power cut may leave anything.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
        with partial.open("x", encoding="utf-8") as file:
            try:
                if not _locked(file.fileno()) or not partial.exists():
                    continue  # it was taken for a stray just now
                file.write(text)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                os.replace(partial, path)
                return
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


def _locked(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file; false if another has and `wait` is false."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _remove_stray(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # it has its name by now, or is another user's
        return
    try:
        if _locked(descriptor):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _names_a_file(note: Path) -> bool:
    """Whether what a digest is of is still there."""
    try:
        return Path(json.loads(note.read_bytes())["path"]).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def store_error(folder: Path, error: OSError) -> StoreError:
    """What the system says of a store, as a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"the disk of the store {folder} is full")
    return StoreError(f"cannot write to the store {folder}: {error.strerror or error}")


def output_name(*, is_folder: bool) -> str:
    """What a result's checkpoint is called in the store."""
    return "model" if is_folder else f"model{SUFFIX}"
