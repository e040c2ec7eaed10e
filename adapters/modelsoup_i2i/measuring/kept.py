"""Features of real pictures, kept in the user's cache folder: they are the same each time.

What names them is the content of the pictures as an extractor gets them, decoded and at their size,
with the extractor, its weights, its resizing, versions and the device: nothing else decides them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .extractors import Extractor

MOST = 1 << 30
"""Bytes that are kept; those that were not used for longest go first."""
_DIGEST = 32  # bytes of the SHA-256 before the array


@dataclass(frozen=True)
class Kept:
    """A folder of features.

    Attributes:
        folder: where they lie; it is made when there is something to keep.
        say: is told what cannot be read or written there; they are computed then.
        most: bytes of all of them.
    """

    folder: Path
    say: Callable[[str], None]
    most: int = MOST

    def features(
        self, extractor: Extractor, device: str, pictures: Sequence[np.ndarray],
        compute: Callable[[], np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """Those of some pictures, float32 N × d: as they were kept, or computed and kept.

        Args:
            extractor: what they are seen through.
            device: where.
            pictures: uint8, height × width × channels, as it gets them.
            compute: makes them.
        """
        file = self.folder / f"{_key(extractor, device, pictures)}.npy"
        found = self._read(file, (len(pictures), extractor.dimension))
        if found is None:
            found = np.asarray(compute(), np.float32)
            self._write(file, found)
        return found

    def _read(self, file: Path, shape: tuple[int, int]) -> np.ndarray | None:
        try:
            whole = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.say(f"features are computed, since {file} cannot be read: {error.strerror}")
            return None
        told, content = whole[:_DIGEST], whole[_DIGEST:]
        found = None
        if hashlib.sha256(content).digest() == told:
            found = np.load(io.BytesIO(content), allow_pickle=False)
        if found is None or found.shape != shape:
            self.say(f"features are computed again, since {file} is damaged")
            return None
        with suppress(OSError):  # one that may only be read is as good
            os.utime(file)
        return np.asarray(found)

    def _write(self, file: Path, found: np.ndarray) -> None:
        written = io.BytesIO()
        np.save(written, found, allow_pickle=False)
        content = written.getvalue()
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(hashlib.sha256(content).digest() + content)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
            self._make_room()
        except OSError as error:
            self.say(f"features are not kept in {self.folder}: {error.strerror}")

    def _make_room(self) -> None:
        """Remove those that were not used for longest until the rest fits."""
        held = []
        for file in self.folder.glob("*.npy"):
            with suppress(FileNotFoundError):  # another process makes room, too
                state = file.stat()
                held.append((state.st_mtime_ns, file.name, state.st_size))
        total = sum(size for _, _, size in held)
        for _, name, size in sorted(held):
            if total <= self.most:
                return
            (self.folder / name).unlink(missing_ok=True)
            total -= size


def _key(extractor: Extractor, device: str, pictures: Sequence[np.ndarray]) -> str:
    told = [
        extractor.name, extractor.sha256, extractor.resize, str(extractor.dimension), device,
        *(f"{name} {version}" for name, version in sorted(extractor.versions.items())),
    ]  # fmt: skip
    digest = hashlib.sha256("\0".join(told).encode())
    for picture in pictures:
        digest.update(f"\0{picture.shape}\0".encode())
        digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()
