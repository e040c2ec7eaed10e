"""The pictures of a training in memory, as far as they fit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

import numpy as np

from modelsoup import TrainerError

from .images import ImageError
from .picture import Images, Picture, labels_of, read_picture
from .transforms import Transform

LOOKED_AT = 5000
WITHOUT = 1000  # draws that are an epoch, where no pictures are among them
"""As many pictures are decoded when they are opened; of more, each when it is first drawn."""
_SKIP = "on_bad_image: skip leaves it out"

Together = tuple[Picture, ...]  # what is drawn together: one picture, or one of each aligned set


class Pictures:
    """The prepared pictures of one training: decoded once, kept while they fit into memory.

    Up to `LOOKED_AT` are decoded when they are opened, so that a damaged one is told before the
    training and not in its third hour. Of more, nothing is decoded before it is drawn.

    Attributes:
        sets: by what errors call them, the pictures that can be used, as far as is known.
        cached_bytes: of pictures in memory.
    """

    def __init__(
        self, sets: Images, transform: Transform, *, cache_bytes: int, threads: int,
        on_bad_image: Literal["skip", "error"], channels: int = 3,
        aligned: Iterable[tuple[str, ...]] = (), looked_at: int = LOOKED_AT, least: int = 2,
    ) -> None:  # fmt: skip
        """Open sets of pictures.

        Args:
            sets: of pictures.
            transform: what makes them ready.
            cache_bytes: for as many of them are kept.
            threads: that decode.
            on_bad_image: whether a damaged one is an error, or left out.
            channels: of each.
            aligned: names of sets of one length, whose pictures at one place belong together: they
                are used, or left out, together.
            looked_at: up to how many are decoded now.
            least: how many pictures of a set, and of each class of it, must be there.

        Raises:
            ImageError: a picture is damaged, and is not to be left out.
            TrainerError: fewer pictures of a set can be used.
        """
        self.transform = transform
        self.channels = channels
        self._least = least
        self.cached_bytes = 0
        self._budget = cache_bytes
        self._skip = on_bad_image == "skip"
        self._cache: dict[Picture, np.ndarray] = {}
        self._bad: dict[Together, str] = {}
        self._met: list[str] = []
        self._lock = threading.Lock()
        self._labels: dict[str, np.ndarray] = {}
        self._places: dict[str, list[np.ndarray]] = {}
        groups = list(dict.fromkeys(aligned))
        groups += [(name,) for name in sets if all(name not in group for group in groups)]
        every = {group: list(zip(*(sets[n] for n in group), strict=True)) for group in groups}
        if sum(len(own) for group in groups for own in every[group] for _ in group) <= looked_at:
            self._look(dict.fromkeys(own for group in groups for own in every[group]), threads)
        self.sets: dict[str, tuple[Picture, ...]] = dict.fromkeys(sets, ())
        for group, all_of in every.items():
            good = [own for own in all_of if own not in self._bad]
            for name, own in zip(group, zip(*good, strict=True), strict=False):
                self.sets[name] = own
        for name, own in self.sets.items():
            self._must_have(name, len(sets[name]), len(own))
            if len(labels_of(own)):
                self._sort(name, sets[name])
        self._met.clear()

    @property
    def bad(self) -> tuple[str, ...]:
        """A sentence for each picture that cannot be used, as far as they are known."""
        with self._lock:
            return tuple(dict.fromkeys(self._bad.values()))

    def met(self) -> list[str]:
        """A sentence for each damaged picture that was met since this was asked last."""
        with self._lock:
            found, self._met = self._met, []
        return list(dict.fromkeys(found))

    @property
    def length(self) -> int:
        """Pictures of the largest set; or what is drawn in an epoch without any."""
        return max(map(len, self.sets.values()), default=WITHOUT)

    def __getitem__(self, picture: Picture) -> np.ndarray:
        """A prepared picture, from memory or decoded again.

        Raises:
            ImageError: it is damaged.
        """
        kept = self._cache.get(picture)
        return self._decoded(picture) if kept is None else kept

    def take(
        self, names: Sequence[str], place: int, instead: Callable[[], np.random.Generator],
        among: np.ndarray | None = None,
    ) -> tuple[int, list[np.ndarray]]:  # fmt: skip
        """The pictures at a place of some sets, which are aligned where there are several.

        Where one is damaged and to be left out, it is those of another place, drawn from the
        generator that `instead` makes; of any, or of one among some.

        Returns:
            the place that was taken, and a picture of each set.

        Raises:
            ImageError: a picture is damaged, and is not to be left out.
            TrainerError: too few can be used.
        """
        own, rng = [self.sets[name] for name in names], None
        places = range(len(own[0])) if among is None else among
        while True:
            try:
                return place, self._read(tuple(files[place] for files in own))
            except ImageError as error:
                if not self._skip:
                    raise ImageError(f"{error}; {_SKIP}") from None
            if (
                len(self._bad) > len(places) - self._least
            ):  # of other sets too: it is counted where it may be
                good = sum(tuple(files[n] for files in own) not in self._bad for n in places)
                self._must_have(names[0], len(places), good)
            rng = rng or instead()
            place = int(places[int(rng.integers(len(places)))])

    def labels(self, name: str) -> np.ndarray:
        """The class of each picture of a set, whose pictures have one."""
        return self._labels[name]

    def classes_of(self, name: str) -> Sequence[np.ndarray]:
        """The places in a set of the pictures of each class."""
        return self._places[name]

    def first(self, name: str, count: int) -> list[Picture]:
        """The first pictures of a set that can be read, in its order, or all of them."""
        return list(islice((p for p in self.sets[name] if self._fault((p,)) is None), count))

    def _look(self, every: Iterable[Together], threads: int) -> None:
        """Decode all, and keep what fits."""
        with ThreadPoolExecutor(threads) as pool:
            faults = [fault for fault in pool.map(self._fault, every) if fault is not None]
        if faults and not self._skip:
            more = f" (and {len(faults) - 1} more images are bad)" if len(faults) > 1 else ""
            raise ImageError(f"{faults[0]}{more}; {_SKIP}")

    def _sort(self, name: str, every: Sequence[Picture]) -> None:
        """Find the classes of a set, each of which must have enough pictures that are good."""
        before, after = (labels_of(own) for own in (every, self.sets[name]))
        self._labels[name] = after
        self._places[name] = [np.flatnonzero(after == label) for label in range(before.max() + 1)]
        for label, places in enumerate(self._places[name]):
            known = np.flatnonzero(before == label)
            if len(known):  # a class may have its pictures in another set
                self._must_have(f"the class of {every[int(known[0])]}", len(known), len(places))

    def _must_have(self, name: str, count: int, good: int) -> None:
        if good < self._least:
            wanted = "two or more" if self._least > 1 else "one or more"
            raise TrainerError(
                f"of the {count} images of {name}, {good} can be used, where {wanted} must be"
            )

    def _fault(self, together: Together) -> str | None:
        try:
            self._read(together)
        except ImageError as error:
            return str(error)
        return None

    def _read(self, together: Together) -> list[np.ndarray]:
        known = self._bad.get(together)
        if known is not None:
            raise ImageError(known)
        try:
            made = [self[picture] for picture in together]
            _must_be_alike(together, made)
        except ImageError as error:
            with self._lock:
                if self._skip and together not in self._bad:
                    self._met.append(str(error))
                self._bad[together] = str(error)
            raise
        return made

    def _decoded(self, picture: Picture) -> np.ndarray:
        made = self.transform.prepare(read_picture(picture, self.channels, deep=True), picture)
        with self._lock:
            if self.cached_bytes + made.nbytes <= self._budget and picture not in self._cache:
                self.cached_bytes += made.nbytes
                self._cache[picture] = made
        return made


def _must_be_alike(together: Together, made: Sequence[np.ndarray]) -> None:
    """What is cropped alike must have one size."""
    sizes = [picture.shape[:2] for picture in made]
    if len(set(sizes)) > 1:
        said = " and ".join(f"{p} is {h} × {w}" for p, (h, w) in zip(together, sizes, strict=True))
        raise ImageError(f"{said}: a pair must have one size, where mode is not resize_and_crop")
