"""Whatever the file, the picture is RGB of 8 bits; what is no picture is named."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.pictures.images import (
    ImageError,
    as_rgb,
    left_out,
    list_images,
    read_image,
    resized,
    save_png,
    to_image,
    to_tensor,
)
from PIL import Image

from modelsoup import OutputError, SoupError

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)


def noise(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif"])
def test_a_lossless_file_gives_its_pixels(suffix: str, tmp_path: Path):
    Image.fromarray(noise()).save(tmp_path / f"a.{suffix}", lossless=True)
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), noise())


def test_a_jpeg_gives_nearly_its_pixels(tmp_path: Path):
    smooth = np.zeros((16, 16, 3), np.uint8)
    smooth[:, :, 0] = np.arange(16) * 16
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - smooth).max() < 16


def test_a_file_is_known_by_its_content_not_by_its_suffix(tmp_path: Path):
    Image.fromarray(noise()).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), noise())


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path):
    grey = np.array([[0, 257, 30000, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png")[0, :, 0].tolist() == [0, 1, 117, 255]
    (tmp_path / "colour.png").write_bytes(png16(COLOURS))
    assert np.array_equal(read_image(tmp_path / "colour.png"), COLOURS)


@pytest.mark.parametrize("big", [False, True])
def test_tiff_of_sixteen_bits_is_scaled_and_of_more_is_refused(big: bool, tmp_path: Path):
    grey = np.array([[0, 257, 30000, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    assert read_image(tmp_path / "grey.tif")[0, :, 0].tolist() == [0, 1, 117, 255]
    (tmp_path / "colour.tiff").write_bytes(tiff16(COLOURS, big=big))
    assert np.array_equal(read_image(tmp_path / "colour.tiff"), COLOURS)
    for wide in (np.array([[0.5]], np.float32), np.array([[1000]], np.int32)):
        Image.fromarray(wide).save(tmp_path / "wide.tif")
        with pytest.raises(ImageError, match=r"wide\.tif .* 32 bits a channel, where 8 or 16 are"):
            read_image(tmp_path / "wide.tif")


def test_grey_of_a_tiff_is_what_its_tags_say(tmp_path: Path):
    """Whether 0 is white, and how many bits there are, values alone do not tell."""
    file = tmp_path / "grey.tif"
    values = np.array([0, 257, 30000, 65535], "<u2")
    file.write_bytes(grey_tiff(values.tobytes(), white_is_zero=True))
    assert read_image(file)[0, :, 0].tolist() == [255, 254, 138, 0]
    file.write_bytes(grey_tiff(bytes.fromhex("000010800fff"), bits=12))  # 0, 16, 2048, 4095
    assert read_image(file)[0, :, 0].tolist() == [0, 1, 128, 255]
    for bits, kind, said in (
        (16, 2, "its values are signed integers, where unsigned ones are expected"),
        (8, 2, "its values are signed integers"),
        (32, 1, "it has 32 bits a channel, where 8 or 16 are expected"),
    ):
        file.write_bytes(grey_tiff(np.arange(4, dtype=f"<u{bits // 8}").tobytes(), bits, kind))
        with pytest.raises(ImageError, match=f"grey.tif cannot be read as an image: {said}"):
            read_image(file)


def test_the_first_page_of_a_tiff_counts(tmp_path: Path):
    pages = [Image.fromarray(page) for page in (noise(), noise()[::-1])]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_image(tmp_path / "pages.tif"), noise())


def tiff16(pixels: np.ndarray, *, big: bool) -> bytes:
    """A TIFF of 16 bits a channel, which Pillow reads but does not write."""
    order = ">" if big else "<"
    data = (pixels.astype(int) * 257).astype(f"{order}u2").tobytes()
    height, width, channels = pixels.shape
    at = 8 + len(data)  # of the directory of ten entries
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, at + 2 + 120 + 4),
        (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, height),
        (279, 4, 1, len(data)), (284, 3, 1, 1),
    ]  # fmt: skip
    packed = b"".join(
        struct.pack(f"{order}HHI", *entry[:3])
        + (struct.pack(f"{order}HH", entry[3], 0) if entry[1:3] == (3, 1)
           else struct.pack(f"{order}I", entry[3]))
        for entry in entries
    )  # fmt: skip
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", at)
    directory = struct.pack(f"{order}H", len(entries)) + packed + struct.pack(f"{order}I", 0)
    return head + data + directory + struct.pack(f"{order}{channels}H", *[16] * channels)


def grey_tiff(data: bytes, bits: int = 16, kind: int = 1, *, white_is_zero: bool = False) -> bytes:
    """A TIFF of one row of four grey values, unsigned (1) or signed (2)."""
    tags = [
        (256, 4), (257, 1), (258, bits), (259, 1), (262, 1 - white_is_zero), (273, 8), (277, 1),
        (278, 1), (279, len(data)), (339, kind),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + packed + struct.pack("<I", 0)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.astype(int) * 257)
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return data


def test_grey_palettes_and_bits_become_rgb(tmp_path: Path):
    Image.fromarray(COLOURS).quantize(4).save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), COLOURS)
    Image.fromarray(COLOURS[:, :, 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png")[:, :, 2], COLOURS[:, :, 0])
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png")[0, :, 1].tolist() == [255, 0]


def test_what_is_transparent_lies_over_white(tmp_path: Path):
    rgba = np.dstack([COLOURS, np.array([[255, 0], [128, 255]], np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    read = read_image(tmp_path / "rgba.png")
    assert read[0, 0].tolist() == [255, 0, 0] and read[0, 1].tolist() == [255, 255, 255]
    assert read[1, 0].tolist() == [127, 127, 255]
    palette = Image.fromarray(COLOURS).quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((1, 1)))
    assert read_image(tmp_path / "p.png")[1, 1].tolist() == [255, 255, 255]
    grey = Image.fromarray(np.array([[5, 9]], np.uint16))
    grey.save(tmp_path / "g.png", transparency=5)
    assert read_image(tmp_path / "g.png")[0, :, 0].tolist() == [255, 0]


def test_as_many_channels_as_are_asked_for(tmp_path: Path):
    """Grey is that of luminance; opacity is a channel, or lies over white."""
    rgba = np.dstack([COLOURS, np.array([[255, 0], [128, 255]], np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png", 4), rgba)
    grey = read_image(tmp_path / "rgba.png", 1)
    assert grey.shape == (2, 2, 1) and grey[:, :, 0].tolist() == [[76, 255], [142, 18]]
    Image.fromarray(COLOURS).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png", 4)[:, :, 3].tolist() == [[255, 255], [255, 255]]
    deep = Image.fromarray(np.array([[0, 514, 65535]], np.uint16))
    deep.save(tmp_path / "deep.png", transparency=514)
    assert read_image(tmp_path / "deep.png", 1)[0, :, 0].tolist() == [0, 255, 255]
    assert read_image(tmp_path / "deep.png", 4)[0].tolist() == [
        [0, 0, 0, 255], [2, 2, 2, 0], [255, 255, 255, 255],
    ]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_channels_are_saved_resized_and_shown(channels: int, tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, channels), np.uint8)
    save_png(picture, tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", channels), picture)
    assert np.array_equal(as_rgb(picture), read_image(tmp_path / "a.png"))
    assert resized(picture, (3, 5)).shape == (3, 5, channels)
    assert np.array_equal(resized(picture, (6, 8)), picture)


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(noise()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(noise(), -1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_a_truncated_file_is_named(suffix: str, tmp_path: Path):
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(64, 64)).save(file)
    whole = file.read_bytes()
    for part in (0, 1, 9, len(whole) // 4, len(whole) // 2):
        file.write_bytes(whole[:part])
        with pytest.raises(ImageError, match=rf"cut\.{suffix}"):
            read_image(file)


def test_random_damage_is_an_error_or_a_picture_but_no_crash(tmp_path: Path):
    random = np.random.default_rng(1)
    for suffix in ("png", "jpg", "webp", "bmp", "tif"):
        file = tmp_path / f"bent.{suffix}"
        Image.fromarray(noise()).save(file)
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(60):
            bent = whole.copy()
            at = random.integers(0, len(bent), 4)
            bent[at] = random.integers(0, 256, 4)
            file.write_bytes(bent.tobytes())
            try:
                assert read_image(file).dtype == np.uint8
            except ImageError as error:
                assert file.name in str(error)


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_file_that_claims_too_many_pixels_is_not_decoded(side: int, tmp_path: Path):
    data = bytearray(png16(COLOURS))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"bomb\.png claims"):
        read_image(tmp_path / "bomb.png")


def test_what_is_no_picture_or_not_there_is_named(tmp_path: Path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ImageError, match=r"a\.png is not a PNG"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"no image .*b\.png"):
        read_image(tmp_path / "b.png")
    os.mkfifo(tmp_path / "pipe.png")
    for place in (tmp_path, tmp_path / "pipe.png"):  # nobody would ever write into it
        with pytest.raises(ImageError, match="cannot be read: it is no regular file"):
            read_image(place)


def test_a_folder_is_listed_in_natural_order_with_its_sub_folders(tmp_path: Path):
    names = ["10.png", "2.JPG", "B.webp", "a.jpeg", "sub/1.bmp", ".hidden.png", ".cache/a.png",
             "notes.txt", "LICENSE"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert left_out(tmp_path) is None
    listed = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert listed == ["2.JPG", "10.png", "a.jpeg", "B.webp", "sub/1.bmp"]


def test_pictures_of_a_kind_that_is_not_read_are_named(tmp_path: Path):
    for name in ("1.gif", "sub/2.HEIC", "3.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["3.tif"]
    assert left_out(tmp_path) == (
        f"2 of {tmp_path}, whose kind is not read (.gif, .heic), such as 1.gif"
    )


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ImageError, match="trainC does not exist"):
        list_images(tmp_path / "trainC")
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="file is not a folder"):
        list_images(tmp_path / "file")


def test_a_saved_picture_is_read_back_bit_for_bit(tmp_path: Path):
    save_png(noise(), tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), noise())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path):
    with pytest.raises(OutputError, match=r"a\.jpg must end in \.png"):
        save_png(noise(), tmp_path / "a.jpg")
    with pytest.raises(OutputError, match="cannot be written"):
        save_png(noise(), tmp_path / "missing" / "a.png")
    with pytest.raises(SoupError, match="height × width × 3"):
        save_png(noise().astype(np.float32), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_every_value_survives_the_way_to_a_tensor_and_back():
    every = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    tensor = to_tensor(every)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 16)
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_image(tensor), every)
    assert to_image(tensor * 3).max() == 255
    with pytest.raises(ImageError, match="NaN"):
        to_image(tensor * torch.nan)
    with pytest.raises(ImageError, match="channels × height × width"):
        to_image(tensor[None])
    for picture in (every[:, :, :1], np.dstack([every, every[:, :, :1]])):
        assert np.array_equal(to_image(to_tensor(picture)), picture)
