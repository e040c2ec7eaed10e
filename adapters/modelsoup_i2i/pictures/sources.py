"""Ready sets, each made from packages that ship real pictures.

| set | domain A | domain B | pairs |
|---|---|---|---|
| emoji | Noto (Google) | Twemoji (Twitter) | the same emoji has the same file name |
| day-night | tiles of the Earth by day | by night | the same tile has the same file name |
| animals | cut-out photos of animals | Noto's animals | none |

`fashion` is of classes: grey photographs of ten kinds of clothes.

A set of domains is a folder of `trainA trainB testA testB`, one of classes has an HDF5 file for
each part, as pictures by the ten thousand are read fastest. Beside them are `LICENCES.md` and
`set.json`, which says what the set was made from. It appears whole or not at all.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from modelsoup import OutputError, ParameterError, check_output, listed, nearest, placed

from .hdf5 import Labelled, must_write, write_rows
from .images import decode, save_png
from .packages import Package, Say, debian, npm, obtain, read_files

RECORD = "set.json"
FOLDERS = ("trainA", "trainB", "testA", "testB")
TEST_SHARE = 5
"""One picture in five is for testing."""
LIGHTS = 0.005
"""The share of a night tile's pixels that must be lit: the rest is ocean, ice and desert."""

NOTO = npm(
    "emoji-datasource-google", "16.0.0", 74_344_091,
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)  # fmt: skip
TWEMOJI = npm(
    "emoji-datasource-twitter", "16.0.0", 61_683_754,
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)  # fmt: skip
EARTH = debian(
    "xplanet", "xplanet-images", "1.3.1-3", 424_292,
    "72ea3f8686c9cc5f8db4797194aff10da30283ad6bce850e6f38401884d21d59",
)  # fmt: skip
STAMPS = debian(
    "tuxpaint-stamps", "tuxpaint-stamps-default", "2022.06.04-1", 160_880_444,
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)  # fmt: skip
FASHION = debian(
    "dataset-fashion-mnist", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", 30_900_652,
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)  # fmt: skip
CLOTHES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip
"""By their labels in Fashion-MNIST."""
CLOTHES_SIDE = 28

_NOTO_LICENCE = (
    "Noto Emoji, © Google LLC, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0), "
    "https://github.com/googlefonts/noto-emoji. Changed here: laid over white"
)
_TWEMOJI_LICENCE = (
    "Twemoji, © Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), https://github.com/jdecked/twemoji. "
    "Changed here: laid over white"
)
_EARTH_LICENCE = (
    "Xplanet's maps of the Earth, © Hari Nair, GPL-2+ "
    "(https://www.gnu.org/licenses/old-licenses/gpl-2.0.html), http://xplanet.sourceforge.net. "
    "Changed here: cut into tiles"
)
_STAMPS_LICENCE = (
    "Tux Paint's stamps, © the Tux Paint developers and contributors, GPL-2 "
    "(https://www.gnu.org/licenses/old-licenses/gpl-2.0.html), https://tuxpaint.org. Changed "
    "here: laid over white, made square, scaled"
)
_FASHION_LICENCE = (
    "Fashion-MNIST, © 2017 Zalando SE, https://tech.zalando.com, Expat (MIT) License "
    "(https://opensource.org/license/mit), https://github.com/zalandoresearch/fashion-mnist. "
    "Changed here: a black border"
)

Pictures = dict[str, np.ndarray]
Split = Mapping[str, Pictures | Labelled]
"""By the name of a part: pictures by file name, which become a folder, or those of one file."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a set: see `prepare`."""

    size: int
    count: int | None
    seed: int
    pretrain: int

    def draw(self) -> random.Random:
        """What draws."""
        return random.Random(self.seed)  # noqa: S311  # no secret


@dataclass(frozen=True)
class Source:
    """A ready set: its packages, whose work it is, and how the packages' files become pictures.

    Attributes:
        about: what it is, for people.
        packages: what it is made from.
        licences: of each work.
        make: from the packages' files by name, and what is asked: the parts, in order.
        most: how many pictures of a domain, or to train on, there are at any size, where a large
            package would have to be fetched to find out.
        size: height and width, where none are asked for.
        least: the smallest there may be.
        takes: which of what can be asked it knows.
        needed: raises what is missing to write it.
    """

    about: str
    packages: tuple[Package, ...]
    licences: tuple[str, ...]
    make: Callable[[Mapping[str, Path], Wanted], Split]
    most: int | None = None
    size: int = 64
    least: int = 16
    takes: tuple[str, ...] = ("size", "count", "seed")
    needed: Callable[[], None] = lambda: None


def prepare(
    name: str,
    output: str | os.PathLike[str],
    *,
    files: Iterable[str | os.PathLike[str]] = (),
    size: int | None = None,
    count: int | None = None,
    seed: int = 0,
    pretrain: int = 0,
    force: bool = False,
    say: Say = lambda _: None,
) -> dict[str, int]:
    """Make a ready set in a new folder, and return how many pictures each of its parts has.

    Args:
        name: a key of `SOURCES`.
        output: the folder; it must not exist.
        files: the package files, to fetch nothing.
        size: the pictures' height and width, 16 to 512; None is the set's own.
        count: pictures of a domain, train and test together; None for all there are.
        seed: decides which pictures are taken, and which of them are for testing.
        pretrain: of classes, so many of the first training pictures are a part of their own,
            `pretrain`, which shares none with `train`.
        force: replace a set that was made by this function.
        say: is told what is fetched and from where.

    Raises:
        ParameterError: no such set, too few pictures for `count`, something that it has not, or
            wrong package files.
        OutputError: the folder exists, or cannot be written.
        SoupError: a package cannot be fetched, or is not what was expected; or an extra is missing.
    """
    source = SOURCES.get(name)
    if source is None:
        raise ParameterError(
            f"there is no ready set {name!r}{nearest(name, SOURCES)}; there are "
            f"{', '.join(SOURCES)}"
        )
    wanted = Wanted(source.size if size is None else size, count, seed, pretrain)
    _must_be_known(name, source, wanted)
    output = Path(output)
    _may_be_made(output, force)
    source.needed()
    with tempfile.TemporaryDirectory(prefix="modelsoup-i2i-") as folder:
        archives = obtain(source.packages, map(Path, files), Path(folder), say)
        split = source.make(archives, wanted)
    record = {
        "set": name, **{asked: getattr(wanted, asked) for asked in source.takes},
        "packages": [
            {"file": package.file, "sha256": package.sha256, "from": package.page}
            for package in source.packages
        ],
    }  # fmt: skip
    with placed(output, force=force, fsync=False) as made:
        made.mkdir()
        for part, pictures in split.items():
            if isinstance(pictures, Labelled):
                write_rows(made / f"{part}.h5", pictures)
                continue
            (made / part).mkdir()
            for file, picture in pictures.items():
                save_png(picture, made / part / file)
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        (made / "LICENCES.md").write_text(_licences(source), "utf-8")
        _may_be_made(output, force)  # still
    return {part: len(pictures) for part, pictures in split.items()}


def _must_be_known(name: str, source: Source, wanted: Wanted) -> None:
    """Check what can be checked before anything is fetched.

    Raises:
        ParameterError: something that the set has not, or out of its range.
    """
    for asked in ("count", "seed", "pretrain"):
        value = getattr(wanted, asked)
        if value and asked not in source.takes:
            raise ParameterError(
                f"{asked} is {value}, but {name} takes only {listed([*source.takes])}"
            )
    if not source.least <= wanted.size <= 512:
        raise ParameterError(f"size is {wanted.size}, where {source.least} to 512 is expected")
    if wanted.count is not None and wanted.count < 2:
        raise ParameterError(f"count is {wanted.count}: a domain needs at least 2 pictures")
    if wanted.count is not None and source.most is not None:
        _enough(wanted.count, source.most)
    if wanted.pretrain and not 0 < wanted.pretrain < (source.most or 0):
        raise ParameterError(
            f"pretrain is {wanted.pretrain}, where 1 to {(source.most or 0) - 1}, or 0 for none, "
            f"is expected"
        )


def _emoji(archives: Mapping[str, Path], wanted: Wanted) -> Split:
    """The emoji that both styles draw, but for flags, which they draw alike, and skin tones."""
    names = sorted(
        emoji["image"] for emoji in _emoji_list(archives[NOTO.name])
        if emoji["has_img_google"] and emoji["has_img_twitter"]
        and emoji["category"] not in ("Flags", "Component")
    )  # fmt: skip
    train, test = _divide(names, wanted.count, wanted.draw())
    noto = _pngs(archives[NOTO.name], {*train, *test}, wanted.size)
    twemoji = _pngs(archives[TWEMOJI.name], {*train, *test}, wanted.size)
    return _parts(train, test, noto, twemoji)


def _day_night(archives: Mapping[str, Path], wanted: Wanted) -> Split:
    """Lit tiles of one map, by day and by night.

    Training tiles overlap each other by half, but no test tile; those are one in ten, for each of
    them rules out its neighbours.
    """
    folder, size, count = PurePosixPath("usr/share/xplanet/images"), wanted.size, wanted.count
    found = read_files(archives[EARTH.name], lambda path: path.parent == folder)
    day, night = (decode(found[folder / name], name) for name in ("earth.jpg", "night.jpg"))
    height, width = day.shape[:2]
    lit = night.max(axis=2) > 80
    places = [
        (top, left)
        for top in range(0, height - size + 1, size // 2)
        for left in range(0, width - size + 1, size // 2)
        if lit[top : top + size, left : left + size].mean() >= LIGHTS
    ]
    wanted.draw().shuffle(places)
    test: list[tuple[int, int]] = []
    goal = max(1, min(len(places) if count is None else count, len(places)) // 10)
    for place in places:
        if len(test) < goal and not _overlaps(place, test, size):
            test.append(place)
    train = [place for place in places if not _overlaps(place, test, size)]
    if count is not None:
        _enough(count, len(train) + len(test))
        train = train[: count - len(test)]
    tiles = [
        {
            f"{top:04}-{left:04}.png": image[top : top + size, left : left + size]
            for top, left in places
        }
        for image in (day, night)
    ]
    names = [[f"{top:04}-{left:04}.png" for top, left in part] for part in (train, test)]
    return _parts(names[0], names[1], *tiles)


def _animals(archives: Mapping[str, Path], wanted: Wanted) -> Split:
    """Photos of animals on white, and Noto's drawings of animals; no pairs."""
    root, draw = PurePosixPath("usr/share/tuxpaint/stamps/animals"), wanted.draw()
    stamps = read_files(
        archives[STAMPS.name],
        lambda path: (
            path.suffix == ".png" and path.is_relative_to(root) and "cartoon" not in path.parts
        ),
    )
    photos = {}
    for path, data in sorted(stamps.items()):
        picture = decode(data, str(path))
        if min(picture.shape[:2]) >= 64:  # smaller ones are icons
            photos["-".join(path.relative_to(root).parts)] = _square(picture, wanted.size)
    names = sorted(
        emoji["image"] for emoji in _emoji_list(archives[NOTO.name])
        if emoji["has_img_google"] and emoji["category"] == "Animals & Nature"
        and not emoji["subcategory"].startswith("plant")
    )  # fmt: skip
    drawn = _pngs(archives[NOTO.name], set(names), wanted.size)
    parts: dict[str, Pictures] = {part: {} for part in FOLDERS}
    for domain, pictures in (("A", photos), ("B", drawn)):
        train, test = _divide(sorted(pictures), wanted.count, draw)
        parts[f"train{domain}"] = {name: pictures[name] for name in train}
        parts[f"test{domain}"] = {name: pictures[name] for name in test}
    return parts


def _fashion(archives: Mapping[str, Path], wanted: Wanted) -> Split:
    """Fashion-MNIST in its own order, in the middle of a black square.

    Kept grey: who trains on three channels gets it three times, and the file is a third as large.
    """
    root = PurePosixPath("usr/share/datasets/fashion-mnist")
    found = read_files(archives[FASHION.name], lambda path: path.parent == root)
    before = (wanted.size - CLOTHES_SIDE) // 2
    after = wanted.size - CLOTHES_SIDE - before
    parts = {}
    for part, of_file in (("train", "train"), ("test", "t10k")):
        # IDX: a header of four numbers, or two, each of four bytes, then a byte for each value.
        images, labels = (
            np.frombuffer(
                gzip.decompress(found[root / f"{of_file}-{kind}-ubyte.gz"])[header:], np.uint8
            )
            for kind, header in (("images-idx3", 16), ("labels-idx1", 8))
        )
        grey = images.reshape(len(labels), 1, CLOTHES_SIDE, CLOTHES_SIDE)
        border = ((0, 0), (0, 0), (before, after), (before, after))
        parts[part] = Labelled(np.pad(grey, border), labels, CLOTHES)
    if not wanted.pretrain:
        return parts
    first, train = parts["train"].divided(wanted.pretrain)
    return {"pretrain": first, "train": train, "test": parts["test"]}


SOURCES: dict[str, Source] = {
    "emoji": Source(
        "Noto ↔ Twemoji, paired by name", (NOTO, TWEMOJI), (_NOTO_LICENCE, _TWEMOJI_LICENCE),
        _emoji, 1636,
    ),
    "day-night": Source(
        "the Earth by day ↔ by night, paired by name", (EARTH,), (_EARTH_LICENCE,), _day_night
    ),
    "animals": Source(
        "photos of animals ↔ Noto's", (STAMPS, NOTO), (_STAMPS_LICENCE, _NOTO_LICENCE), _animals,
        126,
    ),
    "fashion": Source(
        "Fashion-MNIST: ten classes of clothes", (FASHION,), (_FASHION_LICENCE,), _fashion, 60_000,
        size=32, least=CLOTHES_SIDE, takes=("size", "pretrain"), needed=must_write,
    ),
}  # fmt: skip


def _divide(
    names: list[str], count: int | None, draw: random.Random
) -> tuple[list[str], list[str]]:
    """Shuffled, cut to `count`; the first fifth is for testing."""
    names = list(names)
    draw.shuffle(names)
    if count is not None:
        _enough(count, len(names))
        names = names[:count]
    cut = max(1, len(names) // TEST_SHARE)
    return names[cut:], names[:cut]


def _enough(count: int, there: int) -> None:
    if count > there:
        raise ParameterError(f"count is {count}, but this set has {there} pictures of a domain")


def _parts(train: list[str], test: list[str], a: Pictures, b: Pictures) -> Split:
    parts = [
        {name: pictures[name] for name in names} for names in (train, test) for pictures in (a, b)
    ]
    return dict(zip(FOLDERS, parts, strict=True))


def _overlaps(place: tuple[int, int], others: list[tuple[int, int]], size: int) -> bool:
    return any(abs(place[0] - y) < size and abs(place[1] - x) < size for y, x in others)


def _emoji_list(archive: Path) -> list[dict[str, Any]]:
    (text,) = read_files(archive, lambda path: str(path) == "package/emoji.json").values()
    listed: list[dict[str, Any]] = json.loads(text)
    return listed


def _pngs(archive: Path, names: set[str], size: int) -> Pictures:
    """Pictures of an emoji package by file name, over white, scaled where 64 is not wanted."""
    found = read_files(archive, lambda path: path.parent.name == "64" and path.name in names)
    pictures = {}
    for path, data in found.items():
        pictures[path.name] = _square(decode(data, str(path)), size)
    return pictures


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    """In the middle of a white square, scaled to `size`."""
    height, width = picture.shape[:2]
    side = max(height, width)
    if (height, width) != (side, side):
        square = np.full((side, side, 3), 255, np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = picture
        picture = square
    if side == size:
        return picture
    from PIL import Image

    scaled = Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS)
    return np.array(scaled, dtype=np.uint8)


def _may_be_made(output: Path, force: bool) -> None:
    check_output(output, force=force, kind="folder")
    is_empty = output.is_dir() and not output.is_symlink() and not any(output.iterdir())
    if os.path.lexists(output) and not is_empty and not (output / RECORD).is_file():
        raise OutputError(f"{output} is not a set that was made here, and is not replaced")


def _licences(source: Source) -> str:
    lines = [f"# Licences\n\n{source.about[0].upper()}{source.about[1:]}.\n"]
    lines += [f"- {licence}." for licence in source.licences]
    lines += [f"- Taken from the package {p.name} {p.version} ({p.page})." for p in source.packages]
    return "\n".join(lines) + "\n"
