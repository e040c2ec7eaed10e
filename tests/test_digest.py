"""Digests that are made while a file is read for something else are the file's own digests."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from modelsoup import CheckpointError, FileDigest, digest_file, digest_files, open_checkpoint
from modelsoup.files.digest import FileReader, combined, digest_checkpoint

SIZE = 6_000
DATA = random.Random(0).randbytes(SIZE)
LARGE = random.Random(1).randbytes((3 << 20) + 12_345)  # more than is skipped at once

Slices = list[tuple[int, int]]


@st.composite
def slices(draw: st.DrawFn, largest: int = 2_000) -> Slices:
    """Slices of the file: (offset, length), which may overlap, repeat and be empty."""
    offsets = st.integers(0, SIZE)
    drawn = draw(st.lists(st.tuples(offsets, st.integers(0, largest)), max_size=30))
    return [(offset, min(length, SIZE - offset)) for offset, length in drawn]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digest") / "data.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digest") / "large.bin"
    path.write_bytes(LARGE)
    return path


def read(reader: FileReader, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    with reader.lock:
        reader.read(memoryview(buffer), offset)
    return bytes(buffer)


def true_digest(path: Path, *, sha256: bool = False) -> FileDigest:
    data = path.read_bytes()
    return FileDigest(
        path.name,
        len(data),
        xxhash.xxh3_128(data).hexdigest(),
        hashlib.sha256(data).hexdigest() if sha256 else None,
    )


@settings(max_examples=400, deadline=None)
@given(
    slices=st.one_of(
        slices(),
        slices().map(sorted),
        slices().map(lambda s: sorted(s, reverse=True)),
        slices(largest=20),
    ),
    sha256=st.booleans(),
)
def test_the_order_of_reads_does_not_change_the_digest(
    file: Path, slices: Slices, sha256: bool
) -> None:
    with closing(FileReader(file, sha256=sha256)) as reader:
        for offset, length in slices:
            assert read(reader, offset, length) == DATA[offset : offset + length]
        assert reader.finish() == true_digest(file, sha256=sha256)
        assert reader.extra_bytes <= SIZE, "no byte is read for the digest twice"


@settings(max_examples=300, deadline=None)
@given(slices=slices().map(sorted))
def test_in_order_only_what_no_slice_covers_is_read_for_the_digest_alone(
    file: Path, slices: Slices
) -> None:
    with closing(FileReader(file)) as reader:
        for offset, length in slices:
            read(reader, offset, length)
        reader.finish()
        covered = {byte for offset, length in slices for byte in range(offset, offset + length)}
        assert reader.extra_bytes == SIZE - len(covered)


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), slices()), max_size=4))
def test_peeking_takes_no_part_in_the_digest(file: Path, steps: list[tuple[bool, Slices]]) -> None:
    with closing(FileReader(file)) as reader, closing(FileReader(file)) as unpeeked:
        for peek, parts in steps:
            for offset, length in parts:
                if peek:
                    buffer = bytearray(length)
                    reader.peek(memoryview(buffer), offset)
                    assert buffer == DATA[offset : offset + length]
                else:
                    read(reader, offset, length)
                    read(unpeeked, offset, length)
        assert reader.finish() == true_digest(file)
        unpeeked.finish()
        assert reader.extra_bytes == unpeeked.extra_bytes


def test_a_whole_file_read_in_order_costs_no_extra_read(large: Path) -> None:
    with closing(FileReader(large)) as reader:
        for offset in range(0, len(LARGE), 100_000):
            read(reader, offset, min(100_000, len(LARGE) - offset))
        assert reader.extra_bytes == 0
        assert reader.finish() == true_digest(large)
        assert reader.extra_bytes == 0


@pytest.mark.parametrize("sha256", [False, True])
def test_a_long_jump_is_hashed_in_pieces(large: Path, sha256: bool) -> None:
    with closing(FileReader(large, sha256=sha256)) as reader:
        tail = len(LARGE) - 1_000
        assert read(reader, tail, 500) == LARGE[tail : tail + 500]
        assert reader.extra_bytes == tail
        assert read(reader, 0, 1_000) == LARGE[:1_000], "what lies behind can still be read"
        assert reader.finish() == true_digest(large, sha256=sha256)
        assert reader.extra_bytes == tail + 500


def test_a_merge_that_reads_all_tensors_in_file_order_reads_only_the_header_extra(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"layer.{n}": np.arange(n * 1_000, dtype=np.float32) for n in range(20)}
    save_file(tensors, path, {"format": "pt"})
    infos = open_checkpoint(path).tensors.values()
    with closing(FileReader(path)) as reader:
        for info in infos:
            read(reader, info.start, info.nbytes)
        assert reader.finish() == true_digest(path)
        assert reader.extra_bytes == min(info.start for info in infos)
    with closing(FileReader(path)) as reader:
        skipped = list(infos)[3]
        for info in infos:
            if info is not skipped:
                read(reader, info.start, info.nbytes)
        assert reader.finish() == true_digest(path)
        assert reader.extra_bytes == min(info.start for info in infos) + skipped.nbytes


def test_threads_that_take_the_lock_may_read_in_any_order(large: Path) -> None:
    places = list(range(0, len(LARGE), 50_001))
    random.Random(2).shuffle(places)
    with closing(FileReader(large)) as reader, ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda at: read(reader, at, min(50_001, len(LARGE) - at)), places)
        assert all(part == LARGE[at : at + 50_001] for at, part in zip(places, parts, strict=True))
        assert reader.finish() == true_digest(large)


def test_a_change_of_any_byte_changes_the_digests(tmp_path: Path) -> None:
    path = tmp_path / "f"
    seen = set()
    for position in (None, 0, 3_000, SIZE - 1):
        data = bytearray(DATA)
        if position is not None:
            data[position] ^= 1
        path.write_bytes(data)
        digest = digest_file(path, sha256=True)
        seen |= {digest.xxh3_128, digest.sha256}
    assert len(seen) == 8


@pytest.mark.parametrize("content", [b"", b"x", DATA])
def test_a_file_alone_has_the_digests_of_its_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a file"
    path.write_bytes(content)
    assert digest_file(path) == true_digest(path)
    assert digest_file(path).sha256 is None, "SHA-256 costs time: only where it is asked for"
    assert digest_file(path, sha256=True) == true_digest(path, sha256=True)


def test_a_digest_is_published_in_the_form_that_everybody_prints(tmp_path: Path) -> None:
    """Known values: the empty input, from the specifications of XXH3 and of SHA-2."""
    (tmp_path / "empty").touch()
    digest = digest_file(tmp_path / "empty", sha256=True)
    assert digest.xxh3_128 == "99aa06d3014798d86001c324468d497f"
    assert digest.sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_digest_of_some_kilobytes_is_the_published_one(tmp_path: Path) -> None:
    """xxHash's own test vector: the upper bytes of 2654435761 · 11400714785074694797ⁿ mod 2⁶⁴."""
    value, data = 2654435761, bytearray()
    for _ in range(4160):
        data.append(value >> 56)
        value = value * 11400714785074694797 % 2**64
    (tmp_path / "f").write_bytes(data)
    assert digest_file(tmp_path / "f").xxh3_128 == "67140711c1e3e3354f323b15321e94e1"
    (tmp_path / "f").write_bytes(b"abc")  # FIPS 180-4
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_file(tmp_path / "f", sha256=True).sha256 == expected


def test_a_file_that_shrinks_meanwhile_is_an_error_and_not_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    with closing(FileReader(path)) as reader:
        read(reader, 0, 100)
        os.truncate(path, 2_000)
        with pytest.raises(CheckpointError, match=rf"^{path} ended at byte 2000, .*truncated"):
            reader.finish()


def digests_of_parts() -> Iterator[FileDigest]:
    for n in range(3):
        yield FileDigest(f"{n}.safetensors", n, f"{n}" * 32, f"{n}" * 64)


def test_several_files_have_one_digest_that_depends_on_their_order() -> None:
    parts = list(digests_of_parts())
    text = "".join("012"[n] * 32 for n in range(3))
    assert combined(parts, "xxh3_128") == xxhash.xxh3_128(text.encode()).hexdigest()
    text = "".join("012"[n] * 64 for n in range(3))
    assert combined(parts, "sha256") == hashlib.sha256(text.encode()).hexdigest()
    assert combined(parts[::-1], "sha256") != combined(parts, "sha256")


def test_a_checkpoints_digests_come_in_the_order_of_its_files(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        file = tmp_path / f"model-0000{number}-of-00003.safetensors"
        save_file({f"t{number}": np.ones(3, np.float32)}, file)
    checkpoint = open_checkpoint(tmp_path)
    assert digest_checkpoint(checkpoint) == [true_digest(file) for file in checkpoint.files]
    assert [digest.name[10] for digest in digest_checkpoint(checkpoint)] == ["1", "2", "3"]


def test_a_file_that_changes_while_it_is_digested_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    with closing(FileReader(path)) as reader:
        read(reader, 0, 100)
        os.utime(path, ns=(1, 1))
        with pytest.raises(CheckpointError, match=rf"^{path} changed while it was read"):
            reader.finish()


def test_files_have_one_digest_of_their_names_and_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x")
    b.write_bytes(b"x")
    found = digest_files([a, b])
    assert found == digest_files(iter([str(a), b]))
    assert len({found, digest_files([b, a]), digest_files([a]), digest_files([a, a])}) == 4
    time_ns = b.stat().st_mtime_ns
    for content, later in ((b"yy", 0), (b"y", 1), (b"z", 2)):
        b.write_bytes(content)
        os.utime(b, ns=(time_ns + later, time_ns + later))  # a clock may be too coarse to tell
        told = f"a\0{digest_file(a).xxh3_128}\0b\0{digest_file(b).xxh3_128}\0"
        assert digest_files([a, b]) == xxhash.xxh3_128(told.encode()).hexdigest() != found
    with pytest.raises(FileNotFoundError):
        digest_files([tmp_path / "c"])
