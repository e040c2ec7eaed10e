"""The files that a merge reads, open, with their digests under way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import SoupError
from ..files.checkpoint import Checkpoint
from ..files.digest import FileDigest, FileReader
from ..files.dtypes import numpy_dtype, widen
from .lineage import Digests
from .sources import Stored
from .threads import default_workers


class Inputs:
    """The open files of checkpoints, each one's for itself: two of them may be the same file."""

    def __init__(self, models: tuple[Checkpoint, ...], *, sha256: bool = False) -> None:
        self._models = models
        self._readers: dict[tuple[int, Path], FileReader] = {}
        try:
            for model in models:
                for file in model.files:
                    self._readers[id(model), file] = FileReader(file, of=model, sha256=sha256)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise SoupError(f"cannot read {error.filename}: {error.strerror}") from error
            raise

    def reader(self, stored: Stored) -> FileReader:
        """What reads a stored tensor."""
        return self._readers[id(stored.model), stored.info.file]

    def peek(self, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Elements, as float32 or float64, outside of the order in which a file is streamed."""
        info, kind = stored.info, numpy_dtype(stored.info.dtype)
        found = np.empty(stop - start, kind)
        view = found.view(np.uint8).data
        self.reader(stored).peek(view, info.start + start * kind.itemsize)
        wide = np.empty(stop - start, np.float64 if info.dtype == "F64" else np.float32)
        widen(found, wide)
        return wide

    @property
    def extra_bytes(self) -> int:
        """Bytes that were read for digests alone."""
        return sum(reader.extra_bytes for reader in self._readers.values())

    def digests(self) -> Digests:
        """Finish the digests; what the merge had no use for is read now."""
        with ThreadPoolExecutor(default_workers()) as pool:
            finished = pool.map(FileReader.finish, self._readers.values())
            by_model: dict[int, list[FileDigest]] = {id(model): [] for model in self._models}
            for (model, _), digest in zip(self._readers, finished, strict=True):
                by_model[model].append(digest)
        return {model: by_model[id(model)] for model in self._models}

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
