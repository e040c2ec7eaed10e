"""Two folders of images, and the batches of unpaired images that a training sees.

What is drawn depends on the seed, the epoch and the place in the epoch, and on nothing before: a
training that goes on in the middle needs no state of the data but those numbers.
"""

from __future__ import annotations

import collections
import math
import random
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from modelsoup import ParameterError, TrainerError

from .images import ImageError, left_out, list_images, read_image, resized
from .shapes import MULTIPLE

if TYPE_CHECKING:
    import torch

Mode = Literal["resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"]
Size = int | tuple[int, int]

_AHEAD = 4  # batches that are prepared while one is trained on, for each thread


@dataclass(frozen=True)
class Domains:
    """The training images of both domains, in order, as they are used.

    Attributes:
        a: images of X, the rich domain where one is.
        b: images of Y.
    """

    a: tuple[Path, ...]
    b: tuple[Path, ...]

    @property
    def length(self) -> int:
        """Images of each domain in an epoch: that of the larger domain."""
        return max(len(self.a), len(self.b))


def folders_of(
    data: Path | None, data_a: Path | None, data_b: Path | None, part: str = "train"
) -> tuple[Path, Path]:
    """The folders of both domains: `trainA` and `trainB` of one folder, or any two.

    Raises:
        ParameterError: neither or both are given, or there are no such folders.
    """
    if (data is None) == (data_a is None and data_b is None) or (data_a is None) != (
        data_b is None
    ):
        raise ParameterError(
            "the data are either one folder (data, with trainA and trainB in it) or two (data_a "
            "and data_b)"
        )
    if data is None:
        assert data_a is not None and data_b is not None
        return data_a, data_b
    root = data
    if not root.is_dir():
        raise ParameterError(f"there is no folder {root.absolute()}")
    places = root / f"{part}A", root / f"{part}B"
    for place in places:
        if not place.is_dir():
            there = sorted(p.name for p in root.iterdir() if p.is_dir())
            has = f"it has {', '.join(there[:5])}" if there else "it has no folders"
            raise ParameterError(f"{root} has no folder {place.name} ({has})")
    return places


def subset_size(rich: int, imbalance: float) -> int:
    """How many images of Y make an imbalance of so many percent: round(|X| · (1 − I / 100)).

    Half is rounded up, which gives the tree paper's Table II.

    Raises:
        ParameterError: not in [0, 100).
    """
    if not 0 <= imbalance < 100:
        raise ParameterError(f"the imbalance is {imbalance} %, but must be in [0, 100)")
    # 995 · 0.1 must be 99.5: percent first, and what binary fractions lack is forgiven.
    return math.floor(rich * (100 - imbalance) / 100 + 0.5 + 1e-9)


def choose(files: Sequence[Path], count: int, seed: int) -> tuple[Path, ...]:
    """A random subset, in its random order; a smaller one of the same seed lies within it.

    Raises:
        ParameterError: there are not that many files, or fewer than one is asked for.
    """
    if not 1 <= count <= len(files):
        raise ParameterError(
            f"a subset of {count} images is asked for, but must be of 1 to {len(files)}, all that "
            f"there are"
        )
    # Python's shuffle is the same in all its versions, and a prefix of it is nested.
    order = list(range(len(files)))
    random.Random(seed).shuffle(order)  # noqa: S311  # no secret
    return tuple(files[index] for index in order[:count])


def find_domains(
    folders: tuple[Path, Path], *, imbalance: float | None = None, count_b: int | None = None,
    seed: int = 0,
) -> Domains:  # fmt: skip
    """The images of both folders, Y cut down to a subset where that is asked for.

    Raises:
        ParameterError: a folder without images, with a single one, or with too few for the subset.
        ImageError: a folder is missing.
    """
    found = []
    for folder in folders:
        files = list_images(folder)
        if not files:
            rest = left_out(folder)
            raise ParameterError(
                f"there are no images in {folder} (PNG, JPEG, WebP, BMP or TIFF)"
                + ("" if rest is None else f": there are {rest}")
            )
        if len(files) == 1:
            raise ParameterError(
                f"{folder} has one image, where a domain must have two or more to be learnt"
            )
        found.append(tuple(files))
    a, b = found
    if imbalance is not None:
        count_b = subset_size(len(a), imbalance)
        if count_b > len(b):
            raise ParameterError(
                f"an imbalance of {imbalance:g} % beside the {len(a)} images of {folders[0]} wants "
                f"{count_b} images, but {folders[1]} has {len(b)}"
            )
    if count_b is not None:
        if not 2 <= count_b <= len(b):
            raise ParameterError(
                f"a subset of {count_b} images of {folders[1]} is asked for, but must be of 2 to "
                f"{len(b)}, the images that there are"
            )
        b = choose(b, count_b, seed)
    return Domains(a, b)


@dataclass(frozen=True)
class Transform:
    """From a picture of any size to what a network is trained on.

    Attributes:
        mode: `resize_and_crop`: to the load size, whatever the ratio of sides, then a random crop;
            `crop`: only that; `scale_width`: to the load size's width, the ratio kept;
            `scale_width_and_crop`; `none`: sides rounded to multiples of four.
        load: height and width.
        crop: height and width.
        flip: mirror left and right with probability ½.
    """

    mode: Mode = "resize_and_crop"
    load: tuple[int, int] = (286, 286)
    crop: tuple[int, int] = (256, 256)
    flip: bool = True

    def __post_init__(self) -> None:
        for name, size in (("load_size", self.load), ("crop_size", self.crop)):
            if min(size) < 1:
                raise ParameterError(f"{name} is {list(size)}, but must be at least 1")
        smaller = self.load[0] < self.crop[0] or self.load[1] < self.crop[1]
        if self.mode == "resize_and_crop" and smaller:
            raise ParameterError(
                f"load_size {list(self.load)} is smaller than crop_size {list(self.crop)}, so that "
                f"nothing can be cropped out of it"
            )
        if self.mode == "scale_width_and_crop" and self.load[1] < self.crop[1]:
            raise ParameterError(
                f"load_size is {self.load[1]} wide, but must be at least as wide as crop_size, "
                f"{self.crop[1]}"
            )

    @property
    def crops(self) -> bool:
        """Whether all results have one size."""
        return self.mode.endswith("crop")

    def prepare(self, image: np.ndarray, name: object) -> np.ndarray:
        """What is the same each time: the resized picture, uint8.

        Raises:
            ImageError: it is smaller than the crop.
        """
        height, width = image.shape[:2]
        if self.mode == "resize_and_crop":
            wanted = self.load
        elif self.mode in ("scale_width", "scale_width_and_crop"):
            wanted = (max(round(self.load[1] * height / width), 1), self.load[1])
            if self.mode == "scale_width_and_crop":
                wanted = (max(wanted[0], self.crop[0]), wanted[1])
        elif self.mode == "none":
            wanted = (_rounded(height), _rounded(width))
        else:
            wanted = (height, width)
        if self.crops and (wanted[0] < self.crop[0] or wanted[1] < self.crop[1]):
            raise ImageError(
                f"{name} is {height} × {width}, smaller than the crop of {self.crop[0]} × "
                f"{self.crop[1]} (height × width)"
            )
        return resized(image, wanted)

    def draw(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What is drawn each time: the crop, and whether it is mirrored."""
        if self.crops:
            top = int(rng.integers(image.shape[0] - self.crop[0] + 1))
            left = int(rng.integers(image.shape[1] - self.crop[1] + 1))
            image = image[top : top + self.crop[0], left : left + self.crop[1]]
        if self.flip and rng.integers(2):
            image = image[:, ::-1]
        return image

    def for_test(self, image: np.ndarray) -> np.ndarray:
        """The whole picture at the size of training, nothing drawn: for sheets and measuring."""
        height, width = image.shape[:2]
        if self.mode == "resize_and_crop":
            return resized(image, self.crop)
        if self.mode.startswith("scale_width"):
            wide = self.crop[1] if self.crops else self.load[1]
            return resized(image, (max(round(wide * height / width), 1), wide))
        return resized(image, (_rounded(height), _rounded(width)))


def _rounded(side: int) -> int:
    return max(round(side / MULTIPLE) * MULTIPLE, MULTIPLE)


class Pictures:
    """The prepared pictures of one training: decoded once, kept while they fit into memory.

    All are decoded when they are opened, so that a damaged one is told before the training and not
    in its third hour.
    """

    def __init__(
        self, domains: Domains, transform: Transform, *, cache_bytes: int, threads: int,
        on_bad_image: Literal["skip", "error"], channels: int = 3,
    ) -> None:  # fmt: skip
        self.transform = transform
        self.channels = channels
        self.bad: tuple[str, ...] = ()
        self.cached_bytes = 0
        self._budget = cache_bytes
        self._cache: dict[Path, np.ndarray] = {}
        self._lock = threading.Lock()
        files = list(dict.fromkeys((*domains.a, *domains.b)))
        with ThreadPoolExecutor(threads) as pool:
            faults = dict(zip(files, pool.map(self._fault, files), strict=True))
        bad = {file: fault for file, fault in faults.items() if fault is not None}
        if bad and on_bad_image == "error":
            more = f" (and {len(bad) - 1} more images are bad)" if len(bad) > 1 else ""
            raise ImageError(f"{next(iter(bad.values()))}{more}; on_bad_image: skip leaves it out")
        self.bad = tuple(bad.values())
        self.a = tuple(file for file in domains.a if file not in bad)
        self.b = tuple(file for file in domains.b if file not in bad)
        for name, own, before in (("X", self.a, domains.a), ("Y", self.b, domains.b)):
            if len(own) < 2:
                raise TrainerError(
                    f"of the {len(before)} images of {name}, {len(own)} can be used, where two or "
                    f"more must be"
                )

    @property
    def length(self) -> int:
        """Images of each domain in an epoch."""
        return max(len(self.a), len(self.b))

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


@dataclass(frozen=True)
class Sampler:
    """Which images are seen when: unaligned, an epoch as long as the larger domain.

    A's images come in a random order, each as often as the others, and once an epoch where A is the
    larger domain. Beside each comes one of B, drawn anew each time.

    Attributes:
        pictures: what is drawn from.
        seed: of everything drawn.
        batch: images of each domain in a batch.
    """

    pictures: Pictures
    seed: int
    batch: int = 1

    def pair(self, epoch: int, index: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images at one place of an epoch, uint8."""
        pictures = self.pictures
        place = int(order[index % len(order)])
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        chosen = (
            pictures.a[place % len(pictures.a)],
            pictures.b[int(rng.integers(len(pictures.b)))],
        )
        first, second = (pictures.transform.draw(pictures[file], rng) for file in chosen)
        return first, second

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch."""
        rng = np.random.default_rng((self.seed, epoch, 0))
        return rng.permutation(self.pictures.length)

    def batch_at(
        self, epoch: int, first: int, order: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both domains' images from one place on, N × C × H × W, float32 in [−1, 1]."""
        import torch

        pairs = [self.pair(epoch, first + n, order) for n in range(self.batch)]
        both = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
        a, b = (
            torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))
            .div_(127.5)
            .sub_(1)
            for images in both
        )
        return a, b


def batches(
    sampler: Sampler, places: Iterator[tuple[int, int]], threads: int
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """The batches at places (epoch, index of the first image), prepared ahead by threads.

    With 0 threads they are prepared when they are asked for. The batches are the same.
    """
    epoch_of, order = -1, np.empty(0, np.int64)
    waiting: collections.deque[Future[tuple[torch.Tensor, torch.Tensor]]] = collections.deque()
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
