"""Ready sets are whole or not there, and made of the very packages that are named."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import resource
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.pictures import packages, sources
from modelsoup_i2i.pictures.hdf5 import find_rows
from modelsoup_i2i.pictures.images import list_images, read_image
from PIL import Image

from modelsoup import OutputError, ParameterError, SoupError

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji"


def png(colour: tuple[int, ...], size: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (size, size), colour).save(out, "PNG")
    return out.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    """As `ar` lays a Debian package out."""
    made = b"!<arch>\n"
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": archive(files)}
    for name, data in members.items():
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        made += data + b"\n" * (len(data) % 2)
    return made


@pytest.fixture
def emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Small stand-ins of the two packages, of their layout, pinned by their own digests."""
    listed, pictures = [], {"google": {}, "twitter": {}}
    for at in range(12):
        name = f"{at:04x}.png"
        listed.append({
            "image": name, "has_img_google": at != 0, "has_img_twitter": True,
            "category": "Flags" if at == 1 else "Objects", "subcategory": "tool",
        })  # fmt: skip
        for style, kind in enumerate(pictures):
            pictures[kind][f"package/img/{kind}/64/{name}"] = png((at, 100 * style, 0, 255))
    files = []
    for kind, package in (("google", sources.NOTO), ("twitter", sources.TWEMOJI)):
        content = {"package/emoji.json": json.dumps(listed).encode(), **pictures[kind]}
        file = tmp_path / package.file
        file.write_bytes(archive(content))
        files.append(file)
    pinned = tuple(
        replace(package, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        for package, file in zip((sources.NOTO, sources.TWEMOJI), files, strict=True)
    )
    changed = replace(sources.SOURCES["emoji"], packages=pinned)
    monkeypatch.setitem(sources.SOURCES, "emoji", changed)
    return files


def test_pairs_have_one_name_and_no_picture_is_in_two_folders(emoji: list[Path], tmp_path: Path):
    counts = sources.prepare("emoji", tmp_path / "out", files=emoji)
    assert counts == {"trainA": 8, "trainB": 8, "testA": 2, "testB": 2}
    names = {
        part: {file.name for file in list_images(tmp_path / "out" / part)}
        for part in sources.FOLDERS
    }
    assert names["trainA"] == names["trainB"] and names["testA"] == names["testB"]
    assert not names["trainA"] & names["testA"]
    assert not {"0000.png", "0001.png"} & (names["trainA"] | names["testA"])  # one style; a flag
    for name in names["testA"]:
        number = int(name[:4], 16)
        assert read_image(tmp_path / "out" / "testA" / name)[5, 5].tolist() == [number, 0, 0]
        assert read_image(tmp_path / "out" / "testB" / name)[5, 5].tolist() == [number, 100, 0]
    assert "CC-BY 4.0" in (tmp_path / "out" / "LICENCES.md").read_text()
    assert json.loads((tmp_path / "out" / "set.json").read_text())["seed"] == 0


def test_a_seed_decides_what_is_taken(emoji: list[Path], tmp_path: Path):
    taken = []
    for at, seed in enumerate((1, 1, 2)):
        sources.prepare("emoji", tmp_path / str(at), files=emoji, count=5, size=32, seed=seed)
        found = list_images(tmp_path / str(at))
        assert len(found) == 10 and read_image(found[0]).shape == (32, 32, 3)
        taken.append([file.relative_to(tmp_path / str(at)) for file in found])
    assert taken[0] == taken[1] != taken[2]


def test_tiles_by_day_and_night_are_registered_and_tests_are_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    random = np.random.default_rng(0)
    night = np.repeat(random.integers(60, 256, (256, 512, 1), np.uint8), 3, 2)
    folder, content = "./usr/share/xplanet/images", {}
    for name, picture in (("earth.jpg", 255 - night), ("night.jpg", night)):
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG")  # known by content
        content[f"{folder}/{name}"] = out.getvalue()
    file = tmp_path / sources.EARTH.file
    file.write_bytes(deb(content))
    pinned = replace(sources.EARTH, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    source = replace(sources.SOURCES["day-night"], packages=(pinned,))
    monkeypatch.setitem(sources.SOURCES, "day-night", source)
    counts = sources.prepare("day-night", tmp_path / "out", files=[file], size=32)
    assert counts["testA"] > 2 and counts["trainA"] > counts["testA"]
    places = {}
    for part in ("train", "test"):
        for day in list_images(tmp_path / "out" / f"{part}A"):
            dark = read_image(tmp_path / "out" / f"{part}B" / day.name)
            assert np.array_equal(read_image(day), 255 - dark)
            places.setdefault(part, []).append(tuple(map(int, day.stem.split("-"))))
    assert not any(sources._overlaps(place, places["test"], 32) for place in places["train"])


CLOTHES_MADE = {"train": 40, "t10k": 20}


def shot(part: str, at: int) -> np.ndarray:
    """A grey picture whose values say which it is: none of them 0, as a border is."""
    return np.full((28, 28), 1 + at + (100 if part == "t10k" else 0), np.uint8)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in of the package: two or four pictures of each class, in turn."""
    content = {}
    for part, count in CLOTHES_MADE.items():
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.stack([shot(part, at) for at in range(count)])
        for kind, magic, values in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = b"".join(n.to_bytes(4, "big") for n in (magic, *values.shape))
            name = f"./usr/share/datasets/fashion-mnist/{part}-{kind}-ubyte.gz"
            content[name] = gzip.compress(header + values.tobytes())
    file = tmp_path / sources.FASHION.file
    file.write_bytes(deb(content))
    pinned = replace(sources.FASHION, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    source = replace(sources.SOURCES["fashion"], packages=(pinned,), most=40)
    monkeypatch.setitem(sources.SOURCES, "fashion", source)
    return file


@pytest.mark.needs("hdf5")
def test_clothes_lie_in_a_black_square_in_the_order_of_their_data_set(
    fashion: Path, tmp_path: Path
):
    counts = sources.prepare("fashion", tmp_path / "out", files=[fashion])
    assert counts == {"train": 40, "test": 20}
    for part, of_file in (("train", "train"), ("test", "t10k")):
        names, rows = find_rows(tmp_path / "out" / f"{part}.h5")
        assert names == sources.CLOTHES and names[9] == "ankle-boot"
        assert [row.label for row in rows] == [n % 10 for n in range(CLOTHES_MADE[of_file])]
        for at, row in enumerate(rows):
            picture = row.read(3)  # three channels alike, whatever the file has
            assert picture.shape == (32, 32, 3)
            assert (picture[2:30, 2:30] == shot(of_file, at)[..., None]).all()
            assert picture.astype(int).sum() == 3 * shot(of_file, at).astype(int).sum()
    assert "Zalando SE" in (tmp_path / "out" / "LICENCES.md").read_text()
    record = json.loads((tmp_path / "out" / "set.json").read_text())
    assert record == {"set": "fashion", "size": 32, "pretrain": 0, "packages": record["packages"]}


@pytest.mark.needs("hdf5")
def test_what_is_pretrained_on_is_never_trained_on(fashion: Path, tmp_path: Path):
    counts = sources.prepare("fashion", tmp_path / "out", files=[fashion], pretrain=15)
    assert counts == {"pretrain": 15, "train": 25, "test": 20}
    seen = {
        part: [int(row.read(1).max()) for row in find_rows(tmp_path / "out" / f"{part}.h5")[1]]
        for part in ("pretrain", "train")
    }
    assert seen == {"pretrain": list(range(1, 16)), "train": list(range(16, 41))}


@pytest.mark.needs("hdf5")
def test_a_set_of_classes_has_the_same_bytes_each_time(fashion: Path, tmp_path: Path):
    """Results are named by the content of their files."""
    for name in ("a", "b"):
        sources.prepare("fashion", tmp_path / name, files=[fashion], size=28)
    for part in ("train.h5", "test.h5"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()


@pytest.mark.needs("hdf5")
def test_a_set_of_classes_is_written_whole_or_not_at_all(fashion: Path, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(OutputError, match=r"train\.h5 cannot be written: File too large"):
            sources.prepare("fashion", tmp_path / "out", files=[fashion])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_set_has_not_is_told_before_anything_is_fetched(tmp_path: Path):
    said: list[str] = []
    for name, settings, refusal in (
        ("fashion", {"count": 9}, "count is 9, but fashion takes only size, pretrain"),
        ("fashion", {"seed": 3}, "seed is 3, but fashion takes only"),
        ("fashion", {"size": 27}, "size is 27, where 28 to 512 is expected"),
        ("fashion", {"pretrain": -1}, "pretrain is -1, where 1 to 59999, or 0 for none"),
        ("fashion", {"pretrain": 60_000}, "pretrain is 60000, where 1 to 59999"),
        ("emoji", {"pretrain": 9}, "pretrain is 9, but emoji takes only size, count, seed"),
    ):
        with pytest.raises(ParameterError, match=refusal):
            sources.prepare(name, tmp_path / "out", say=said.append, **settings)
    assert said == [] and list(tmp_path.iterdir()) == []


def test_a_set_of_classes_without_h5py_says_how_to_get_it(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    said: list[str] = []
    with pytest.raises(SoupError, match=r"needs h5py: .*\[hdf5\]"):
        sources.prepare("fashion", tmp_path / "out", say=said.append)
    assert said == []  # and nothing was fetched for it


def test_an_existing_folder_is_refused_and_only_a_set_is_replaced(
    emoji: list[Path], tmp_path: Path
):
    out = tmp_path / "out"
    sources.prepare("emoji", out, files=emoji)
    with pytest.raises(OutputError, match=r"out exists and is not empty \("):
        sources.prepare("emoji", out, files=emoji)
    assert sources.prepare("emoji", out, files=emoji, count=4, force=True)["trainA"] == 3
    assert len(list_images(out)) == 8
    (out / "set.json").unlink()
    with pytest.raises(OutputError, match="not a set that was made here"):
        sources.prepare("emoji", out, files=emoji, force=True)
    assert len(list_images(out)) == 8


def test_a_set_is_replaced_by_a_whole_one_or_stays(emoji: list[Path], tmp_path: Path, monkeypatch):
    """Whichever way of renaming there is, its second step fails."""
    out = tmp_path / "out"
    sources.prepare("emoji", out, files=emoji, count=4)
    rename, calls = os.rename, []

    def failing(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(*paths)

    monkeypatch.setattr(os, "rename", failing)
    with contextlib.suppress(OutputError):
        sources.prepare("emoji", out, files=emoji, count=5, force=True)
    assert len(list_images(out)) == 2 * json.loads((out / "set.json").read_text())["count"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failure_leaves_nothing(emoji: list[Path], tmp_path: Path):
    """A limit on what a file may have stands for a disk that is full."""
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(OutputError, match=r"\.png cannot be written: File too large"):
            sources.prepare("emoji", tmp_path / "out", files=emoji)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before


def test_a_package_file_is_known_by_its_digest_alone(emoji: list[Path], tmp_path: Path):
    renamed = emoji[0].rename(tmp_path / "some.tgz")
    assert sources.prepare("emoji", tmp_path / "a", files=[emoji[1], renamed])["testA"] == 2
    renamed.write_bytes(renamed.read_bytes() + b"x")
    with pytest.raises(ParameterError, match=r"some\.tgz has the SHA-256"):
        sources.prepare("emoji", tmp_path / "b", files=[emoji[1], renamed])
    with pytest.raises(ParameterError, match="add emoji-datasource-google"):
        sources.prepare("emoji", tmp_path / "b", files=[emoji[1]])
    with pytest.raises(ParameterError, match="no package file"):
        sources.prepare("emoji", tmp_path / "b", files=[tmp_path / "none.tgz"])
    assert not (tmp_path / "b").exists()


def test_what_was_fetched_is_said_and_checked(
    emoji: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A client on the path, as npm is, that copies the file or another one."""
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\nname=${{2%@*}}\ncp {tmp_path}/$name-16.0.0.tgz .\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent), prepend=":")
    said: list[str] = []
    assert sources.prepare("emoji", tmp_path / "a", say=said.append)["testA"] == 2
    assert "npm pack emoji-datasource-google@16.0.0" in said[0] and "74.3 MB" in said[0]
    emoji[0].write_bytes(b"changed on the way")
    with pytest.raises(SoupError, match=r"google-16\.0\.0\.tgz has the SHA-256 .* not used"):
        sources.prepare("emoji", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_client_that_fails_is_named_and_the_public_host_is_asked(
    emoji: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text("#!/bin/sh\necho no such registry >&2\nexit 1\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent), prepend=":")
    pinned = sources.SOURCES["emoji"].packages
    nowhere = tuple(replace(p, url=(tmp_path / "gone").as_uri()) for p in pinned)
    monkeypatch.setitem(
        sources.SOURCES, "emoji", replace(sources.SOURCES["emoji"], packages=nowhere)
    )
    said: list[str] = []
    with pytest.raises(SoupError, match=r"cannot be fetched .* give the file with --from"):
        sources.prepare("emoji", tmp_path / "out", say=said.append)
    assert said[1] == "npm could not: no such registry" and "gone" in said[2]


def test_a_damaged_package_is_named(tmp_path: Path):
    (tmp_path / "a.tgz").write_bytes(b"not a tar")
    (tmp_path / "a.deb").write_bytes(b"!<arch>\nshort")
    for name in ("a.tgz", "a.deb"):
        with pytest.raises(SoupError, match=f"{name} cannot be read as a package"):
            packages.read_files(tmp_path / name, lambda _: True)


def test_what_is_asked_wrongly_is_one_sentence(tmp_path: Path):
    for settings, said in (
        ({"size": 8}, "size is 8"), ({"count": 1}, "at least 2 pictures"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=said):
            sources.prepare("emoji", tmp_path / "out", **settings)
    with pytest.raises(OutputError, match="nowhere of the output out does not exist"):
        sources.prepare("emoji", tmp_path / "nowhere" / "out")
    result = CliRunner().invoke(i2i, ["data", "emojis", str(tmp_path / "out")])
    assert isinstance(result.exception, ParameterError) and "day-night" in str(result.exception)


def test_more_pictures_than_there_are_is_an_error(emoji: list[Path], tmp_path: Path):
    with pytest.raises(ParameterError, match="count is 11, but this set has 10"):
        sources.prepare("emoji", tmp_path / "out", files=emoji, count=11)


def test_more_pictures_than_there_are_is_told_before_anything_is_fetched(tmp_path: Path):
    told: list[str] = []
    with pytest.raises(ParameterError, match="count is 1637, but this set has 1636 pictures"):
        sources.prepare("emoji", tmp_path / "out", count=1637, say=told.append)
    assert told == [] and list(tmp_path.iterdir()) == []


def test_the_example_is_what_its_readme_says():
    counts = {part: len(list_images(EXAMPLE / part)) for part in sources.FOLDERS}
    assert counts == {"trainA": 160, "trainB": 160, "testA": 40, "testB": 40}
    assert read_image(EXAMPLE / "testA" / list_images(EXAMPLE / "testA")[0].name).shape == (
        64, 64, 3,
    )  # fmt: skip
    record = json.loads((EXAMPLE / "set.json").read_text())
    assert [p["sha256"] for p in record["packages"]] == [
        sources.NOTO.sha256, sources.TWEMOJI.sha256,
    ]  # fmt: skip
