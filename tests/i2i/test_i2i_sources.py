"""Ready sets are whole or not there, and made of the very packages that are named."""

import contextlib
import errno
import hashlib
import io
import json
import os
import resource
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.pictures import packages, sources
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
