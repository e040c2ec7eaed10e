"""The pictures of a training in memory, as far as they fit."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from modelsoup import TrainerError

from .images import ImageError, read_image
from .transforms import Transform


class Pictures:
    """The prepared pictures of one training: decoded once, kept while they fit into memory.

    All are decoded when they are opened, so that a damaged one is told before the training and not
    in its third hour.

    Attributes:
        sets: by what errors call them, the files that can be used.
        bad: a sentence for each that cannot.
        cached_bytes: of pictures in memory.
    """

    def __init__(
        self, sets: Mapping[str, Sequence[Path]], transform: Transform, *, cache_bytes: int,
        threads: int, on_bad_image: Literal["skip", "error"], channels: int = 3,
    ) -> None:  # fmt: skip
        self.transform = transform
        self.channels = channels
        self.bad: tuple[str, ...] = ()
        self.cached_bytes = 0
        self._budget = cache_bytes
        self._cache: dict[Path, np.ndarray] = {}
        self._lock = threading.Lock()
        files = list(dict.fromkeys(file for own in sets.values() for file in own))
        with ThreadPoolExecutor(threads) as pool:
            faults = dict(zip(files, pool.map(self._fault, files), strict=True))
        bad = {file: fault for file, fault in faults.items() if fault is not None}
        if bad and on_bad_image == "error":
            more = f" (and {len(bad) - 1} more images are bad)" if len(bad) > 1 else ""
            raise ImageError(f"{next(iter(bad.values()))}{more}; on_bad_image: skip leaves it out")
        self.bad = tuple(bad.values())
        self.sets = {
            name: tuple(file for file in own if file not in bad) for name, own in sets.items()
        }
        for name, own in self.sets.items():
            if len(own) < 2:
                raise TrainerError(
                    f"of the {len(sets[name])} images of {name}, {len(own)} can be used, where two "
                    f"or more must be"
                )

    @property
    def length(self) -> int:
        """Pictures in an epoch: those of the largest set."""
        return max(map(len, self.sets.values()))

    def __getitem__(self, file: Path) -> np.ndarray:
        """A prepared picture, from memory or decoded again."""
        kept = self._cache.get(file)
        return self._decoded(file) if kept is None else kept

    def _fault(self, file: Path) -> str | None:
        try:
            picture = self._decoded(file)
        except ImageError as error:
            return str(error)
        with self._lock:
            if self.cached_bytes + picture.nbytes <= self._budget:
                self.cached_bytes += picture.nbytes
                self._cache[file] = picture
        return None

    def _decoded(self, file: Path) -> np.ndarray:
        return self.transform.prepare(read_image(file, self.channels), file)
