"""What a step of a training draws: pictures, classes, noise; and batches of it, prepared ahead.

What is drawn depends on the seed, the epoch and the place in the epoch, and on nothing before: a
training that goes on in the middle needs no state of its draws but those numbers.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np

from .augmentation import NUMBERS
from .cache import Pictures
from .images import half, to_tensor
from .picture import Attributed
from .views import NUMBERS as OF_VIEWS

if TYPE_CHECKING:
    import torch

_OF_A_VIEW = sum(OF_VIEWS.values())
_AHEAD = 4  # batches that are prepared while one is trained on, for each thread


@dataclass(frozen=True)
class Spot:
    """A place in a training: what is drawn there, is drawn there again.

    Attributes:
        seed: of the training.
        epoch: from 0.
        index: in the epoch, from 0; it may lie beyond its end.
        order: the permutation of the epoch.
    """

    seed: int
    epoch: int
    index: int
    order: np.ndarray

    @property
    def turn(self) -> int:
        """Whose turn it is in the epoch's order."""
        return int(self.order[self.index % len(self.order)])

    def rng(self, what: int | str) -> np.random.Generator:
        """A generator for what is drawn here under some name."""
        number = what if isinstance(what, int) else crc32(what.encode())
        return np.random.default_rng((self.seed, self.epoch, self.index, number))

    def turn_of(self, what: str, count: int) -> int:
        """Whose turn it is of so many, each of which has one in `count` places."""
        cycle, place = divmod(self.index, count)
        return int(_shuffled((self.seed, self.epoch, cycle, crc32(what.encode())), count)[place])

    def instead(self, name: str) -> Callable[[], np.random.Generator]:
        """What draws a picture of a set in the place of a damaged one."""
        return partial(self.rng, f"in place of {name}")


@lru_cache(maxsize=8)
def _shuffled(key: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


class Draw(Protocol):
    """Something that is drawn for each place.

    Attributes:
        names: of what it gives, in a batch.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """One for each array of `at`."""

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """An array for each name: pictures, uint8 or uint16, H × W × channels; or numbers."""


@dataclass(frozen=True)
class Unpaired:
    """A picture of one set, and beside it any of another: unaligned domains.

    The first set's pictures come in a random order, each as often as the others, and once an epoch
    where it is the larger one. Beside each comes one of the second, drawn anew each time.

    Attributes:
        names: of both in a batch.
        sets: of which sets of pictures they are.
    """

    names: tuple[str, ...] = ("a", "b")
    sets: tuple[str, str] = ("X", "Y")

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """Two pictures."""
        first, second = (len(pictures.sets[name]) for name in self.sets)
        rng = spot.rng(1)
        places = spot.turn % first, int(rng.integers(second))
        chosen = [
            pictures.take((name,), place, spot.instead(name))[1][0]
            for name, place in zip(self.sets, places, strict=True)
        ]
        return tuple(pictures.transform.draw(picture, rng) for picture in chosen)


@dataclass(frozen=True)
class Paired:
    """A picture of one set and its partner of another: the same crop of both, both mirrored or not.

    Each pair comes once an epoch, in a random order.

    Attributes:
        names: of both in a batch.
        sets: of which sets of pictures they are; they have their partners at the same places.
    """

    names: tuple[str, ...] = ("a", "b")
    sets: tuple[str, ...] = ("X", "Y")

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """Two pictures."""
        place = spot.turn % len(pictures.sets[self.sets[0]])
        _, pair = pictures.take(self.sets, place, spot.instead(self.sets[0]))
        # They have one size, for which the same numbers say the same.
        return tuple(pictures.transform.draw(picture, spot.rng(1)) for picture in pair)


@dataclass(frozen=True)
class Labelled:
    """A picture and the index of its class; or several, drawn apart, of one class.

    All pictures come in a random order, each once in as many places as there are; or with
    `balanced` all classes do, and of each any picture. Draws of other names are independent.

    Attributes:
        names: in a batch, of each picture, and last of their class.
        sets: of which sets of pictures they are, which count as one.
        balanced: draw each class equally often.
    """

    names: tuple[str, ...] = ("x", "c")
    sets: tuple[str, ...] = ("data",)
    balanced: bool = False

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """A picture for each name but the last, and an integer."""
        own, among = " ".join(self.names), None
        rng = spot.rng(f"of {own}")
        if self.balanced:
            classes = [(name, places) for name in self.sets
                       for places in pictures.classes_of(name) if len(places)]  # fmt: skip
            of, among = classes[spot.turn_of(f"class of {own}", len(classes))]
            place = int(among[int(rng.integers(len(among)))])
        else:
            of, place = _turn_of_all(own, self.sets, pictures, spot)
        taken, (picture,) = pictures.take((of,), place, spot.instead(own), among)
        drawn = [pictures.transform.draw(picture, rng)]
        label = pictures.labels(of)[taken]
        for _ in self.names[2:]:
            others = pictures.classes_of(of)[label]
            place = int(others[int(rng.integers(len(others)))])
            _, (picture,) = pictures.take((of,), place, spot.instead(own), others)
            drawn.append(pictures.transform.draw(picture, rng))
        return *drawn, np.asarray(label)


@dataclass(frozen=True)
class WithAttributes:
    """A picture and its attributes.

    All pictures come in a random order, as `Labelled` has them: by the same names the same ones.

    Attributes:
        names: in a batch, of the picture and of its attributes.
        set: of which set of pictures it is.
    """

    names: tuple[str, str] = ("x", "c")
    set: str = "data"

    @property
    def sets(self) -> tuple[str, ...]:
        """Of which it is."""
        return (self.set,)

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """A picture, and float32, 0 or 1 for each attribute."""
        own = " ".join(self.names)
        _, place = _turn_of_all(own, self.sets, pictures, spot)
        taken, (picture,) = pictures.take(self.sets, place, spot.instead(own))
        of = pictures.sets[self.set][taken]
        assert isinstance(of, Attributed)
        drawn = pictures.transform.draw(picture, spot.rng(f"of {own}"))
        return drawn, np.frombuffer(of.attributes, np.uint8).astype(np.float32)


@dataclass(frozen=True)
class Noise:
    """Independent numbers, each from N(0, 1).

    Attributes:
        name: in a batch.
        shape: of an item.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """float32 of the shape."""
        return (spot.rng(self.name).standard_normal(self.shape, np.float32),)


@dataclass(frozen=True)
class Uniform:
    """Independent numbers, each as likely as the others in [0, 1).

    Attributes:
        names: in a batch, each with numbers of its own.
        shape: of an item.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] = ()

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """float32 of the shape, for each name."""
        return tuple(np.asarray(spot.rng(n).random(self.shape, np.float32)) for n in self.names)


@dataclass(frozen=True)
class Augmentation:
    """The numbers by which pictures are augmented, those of each name independent of the others'.

    Attributes:
        names: in a batch, of what is given to `augmentation.augmented`.
    """

    names: tuple[str, ...] = ("augment_real", "augment_fake")

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """float32 in [0, 1), as many as a picture wants, for each name."""
        return tuple(spot.rng(name).random(NUMBERS, np.float32) for name in self.names)


@dataclass(frozen=True)
class Single:
    """A picture of any of some sets.

    All come in a random order, each once in as many places as there are pictures in these sets.

    Attributes:
        name: in a batch.
        sets: of which sets of pictures it is.
    """

    name: str = "x"
    sets: tuple[str, ...] = ("data",)

    @property
    def names(self) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """A picture."""
        of, place = _turn_of_all(self.name, self.sets, pictures, spot)
        _, (picture,) = pictures.take((of,), place, spot.instead(self.name))
        return (pictures.transform.draw(picture, spot.rng(f"of {self.name}")),)


def _turn_of_all(what: str, sets: Sequence[str], pictures: Pictures, spot: Spot) -> tuple[str, int]:
    """Whose turn it is of sets that count as one: the set, and the place in it."""
    place = spot.turn_of(what, sum(len(pictures.sets[name]) for name in sets))
    *others, last = sets
    for name in others:
        if place < len(pictures.sets[name]):
            return name, place
        place -= len(pictures.sets[name])
    return last, place


def epoch(draws: Sequence[Draw], pictures: Pictures) -> int:
    """How many pictures are drawn in an epoch: the largest set, or sets that count as one, once."""
    unions = (own.sets for own in draws if isinstance(own, Labelled | WithAttributes | Single))
    return max(pictures.length, *(sum(len(pictures.sets[n]) for n in own) for own in unions), 0)


@dataclass(frozen=True)
class Views:
    """The numbers by which pictures are seen in several ways, each independent of the others.

    Attributes:
        names: in a batch, of what is given to `views.view`.
    """

    names: tuple[str, ...] = ("first", "second")

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """float32 in [0, 1), as many as all augmentations of a picture want, for each name."""
        return tuple(spot.rng(name).random(_OF_A_VIEW, np.float32) for name in self.names)


@dataclass(frozen=True)
class Classes:
    """A class, each as likely as the others.

    Attributes:
        name: in a batch.
        count: how many there are.
    """

    name: str
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """An integer in [0, count)."""
        return (np.asarray(spot.rng(self.name).integers(self.count)),)


@dataclass(frozen=True)
class Attributes(Classes):
    """Attributes, of which a picture may have several; drawn, each alone as likely as the others.

    Attributes:
        name: in a batch.
        count: how many there are.
    """

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """float32: a one among `count` numbers."""
        made = np.zeros(self.count, np.float32)
        made[super().at(pictures, spot)[0]] = 1
        return (made,)


@dataclass(frozen=True)
class Places:
    """Places in maps of a picture, none of them twice in a map.

    Attributes:
        name: in a batch.
        maps: how many places each has.
        count: how many are drawn in each; all, where there are fewer.
    """

    name: str
    maps: tuple[int, ...]
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)

    @property
    def counts(self) -> list[int]:
        """How many are drawn in each map."""
        return [min(self.count, size) for size in self.maps]

    def at(self, pictures: Pictures, spot: Spot) -> tuple[np.ndarray, ...]:
        """int64: those in the first map, in [0, its size), then those in the second, and so on."""
        rng = spot.rng(self.name)
        drawn = [rng.choice(size, count, replace=False)
                 for size, count in zip(self.maps, self.counts, strict=True)]  # fmt: skip
        return (np.concatenate(drawn),)


@dataclass(frozen=True)
class Sampler:
    """The batches of a training.

    Attributes:
        pictures: what pictures are drawn from.
        draws: what is drawn for each place.
        seed: of everything drawn.
        batch: items in a batch.
    """

    pictures: Pictures
    draws: Sequence[Draw]
    seed: int
    batch: int = 1

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch."""
        rng = np.random.default_rng((self.seed, epoch, 0))
        return rng.permutation(self.pictures.length)

    def batch_at(self, epoch: int, first: int, order: np.ndarray) -> dict[str, torch.Tensor]:
        """What is drawn from one place on, by name.

        Pictures are N × C × H × W, float32 in [−1, 1]; numbers have one dimension more.
        """
        spots = [Spot(self.seed, epoch, first + n, order) for n in range(self.batch)]
        made: dict[str, Any] = {}
        for draw in self.draws:
            items = [draw.at(self.pictures, spot) for spot in spots]
            for name, own in zip(draw.names, zip(*items, strict=True), strict=True):
                made[name] = _tensor(own)
        return made


def _tensor(items: Sequence[np.ndarray]) -> torch.Tensor:
    """Numbers as they are; pictures, which may differ in depth, in [−1, 1]."""
    import torch

    depths = {item.dtype for item in items}
    if not depths <= {np.dtype(np.uint8), np.dtype(np.uint16)}:
        numbers: torch.Tensor = torch.from_numpy(np.stack(items))
        return numbers
    if len(depths) > 1:
        return torch.stack([to_tensor(item) for item in items])
    images = np.ascontiguousarray(np.stack(items).transpose(0, 3, 1, 2), np.float32)
    made: torch.Tensor = torch.from_numpy(images).div_(half(*depths)).sub_(1)
    return made


def batches(
    sampler: Sampler, places: Iterator[tuple[int, int]], threads: int
) -> Generator[dict[str, torch.Tensor], None, None]:
    """The batches at places (epoch, index of the first item), prepared ahead by threads.

    With 0 threads they are prepared when they are asked for. The batches are the same.
    """
    epoch_of, order = -1, np.empty(0, np.int64)
    waiting: collections.deque[Future[dict[str, torch.Tensor]]] = collections.deque()
    pool = ThreadPoolExecutor(threads, "i2i-data") if threads else None
    try:
        for epoch, first in places:
            if epoch != epoch_of:
                epoch_of, order = epoch, sampler.order(epoch)
            if pool is None:
                yield sampler.batch_at(epoch, first, order)
                continue
            waiting.append(pool.submit(sampler.batch_at, epoch, first, order))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
