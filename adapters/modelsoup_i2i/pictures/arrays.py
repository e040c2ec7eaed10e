"""Pictures that Pillow has no mode for: of any number of channels, or with 16 bits in several.

What is wrong with a file is a ValueError here, which `images.py` makes a sentence of.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np

from modelsoup import SoupError, how_to_install

SUFFIXES = (".npy", ".npz")
LOOKS = (1, 3, 4)  # as many channels as what people look at has: grey, RGB, RGB with opacity
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_NAME = "image"  # of the array in a file of several
_HEADER = 1 << 16  # bytes that an array's header may have


def is_array(data: bytes) -> bool:
    """Whether a file's bytes are those of numpy arrays."""
    return data.startswith((_NPY, _ZIP))


def array_in(data: bytes, channels: int, most: int) -> np.ndarray:
    """The array of an `.npy` file, or that of an `.npz` file which is alone or called `image`.

    Args:
        data: the file's bytes.
        channels: that are wanted, first or last.
        most: pixels that it may have.

    Returns:
        uint8 or uint16, height × width × channels: as many as are wanted, or else 1, 3 or 4.

    Raises:
        ValueError: it is damaged, larger, or of another kind.
    """
    return _laid_out(_plain(_member(data, channels, most) if data.startswith(_ZIP) else data),
                     channels)  # fmt: skip


def stacked(pages: Sequence[np.ndarray], channels: int) -> np.ndarray:
    """Grey pages, each of which is a channel, as one picture: height × width × channels.

    Raises:
        ValueError: they are not so many, or not alike.
    """
    if len(pages) != channels:
        raise ValueError(
            f"it has {len(pages)} {'page' if len(pages) == 1 else 'pages'}, where {channels} are "
            f"expected, a channel each"
        )
    kinds = {(page.shape, page.dtype.name) for page in pages}
    if len(kinds) > 1:
        raise ValueError("its pages differ in size or depth, where each is a channel of a picture")
    return np.stack(pages, axis=2)


def bands_in(data: bytes, channels: int) -> np.ndarray:
    """A TIFF of more bands than Pillow knows: height × width × channels.

    Raises:
        ValueError: it is damaged, or has another number of channels or another kind of values.
        SoupError: tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise SoupError(
            f"a TIFF of {channels} bands needs tifffile: {how_to_install('tiff')} ({error})"
        ) from error
    return _laid_out(np.ascontiguousarray(tifffile.imread(BytesIO(data))), channels)


def in_8_bits(picture: np.ndarray) -> np.ndarray:
    """A picture as uint8: 16 bits are scaled and rounded."""
    if picture.dtype == np.uint8:
        return picture
    scaled: np.ndarray = ((picture.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)
    return scaled


def with_looks(picture: np.ndarray, channels: int) -> np.ndarray:
    """A picture of 16 bits and 1, 3 or 4 channels with as many of these as are wanted.

    As Pillow does it in 8 bits: what is transparent lies over white, grey is ITU-R 601's luma.
    """
    white, have = 65535, picture.shape[2]
    if have == channels:
        return picture
    values = picture.astype(np.int64)
    if channels == 4:
        colours = np.repeat(values, 3, axis=2) if have == 1 else values
        made = np.concatenate([colours, np.full_like(values[:, :, :1], white)], axis=2)
        return made.astype(np.uint16)
    if have == 4:
        opacity = values[:, :, 3:]
        values = (values[:, :, :3] * opacity + white * (white - opacity) + white // 2) // white
    if channels == 1 and values.shape[2] == 3:
        values = (values @ np.array([19595, 38470, 7471]) + 32768 >> 16)[:, :, None]
    elif channels == 3 and values.shape[2] == 1:
        values = np.repeat(values, 3, axis=2)
    return values.astype(np.uint16)


def as_png(picture: np.ndarray) -> bytes:
    """A picture of 16 bits and 1, 3 or 4 channels as the bytes of a PNG file (RFC 2083)."""
    height, width, channels = picture.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    lines = np.ascontiguousarray(picture.astype(">u2")).view(np.uint8).reshape(height, -1)
    before = np.zeros_like(lines)
    before[:, 2 * channels :] = lines[:, : -2 * channels]
    filtered = np.empty((height, lines.shape[1] + 1), np.uint8)
    filtered[:, 0], filtered[:, 1:] = 1, lines - before  # the filter Sub: beside the pixel before
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b""))
    told = [
        struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own))
        for name, own in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


def write(picture: np.ndarray, file: BinaryIO, suffix: str) -> None:
    """Write a picture of any channels: `.npy`, `.npz`, or TIFF with a page for each."""
    if suffix == ".npy":
        np.save(file, picture)
    elif suffix == ".npz":
        np.savez_compressed(file, image=picture)
    else:
        from PIL import Image

        first, *others = (Image.fromarray(np.ascontiguousarray(page))
                          for page in np.moveaxis(picture, 2, 0))  # fmt: skip
        first.save(file, format="TIFF", save_all=True, append_images=others,
                   compression="tiff_adobe_deflate")  # fmt: skip


def _member(data: bytes, channels: int, most: int) -> bytes:
    """The bytes of an array in an archive."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            arrays = [one for one in archive.infolist() if one.filename.endswith(".npy")]
            named = [one for one in arrays if one.filename == f"{_NAME}.npy"]
            if len(arrays) != 1 and not named:
                raise ValueError(f"it has {len(arrays)} arrays, none of which is called {_NAME}")
            (chosen,) = named[:1] or arrays
            if chosen.file_size > 2 * most * max(channels, 4) + _HEADER:  # 16 bits
                raise ValueError(f"its array has {chosen.file_size} bytes, more than are read")
            return archive.read(chosen)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"it is no whole archive: {error}") from error


def _plain(data: bytes) -> np.ndarray:
    """The array of an `.npy` file, whose header must claim what is there."""
    file, form = BytesIO(data), np.lib.format
    read: Any = form.read_array_header_1_0
    if form.read_magic(file) != (1, 0):
        read = form.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise ValueError(f"its values are {dtype}, where uint8 or uint16 are expected")
    count, there = int(np.prod(shape, dtype=object)), len(data) - file.tell()
    if there != count * dtype.itemsize or not count:
        raise ValueError(f"its header claims {list(shape)} of {dtype}, and {there} bytes are there")
    values = np.frombuffer(data, dtype, offset=file.tell())
    plain: np.ndarray = values.reshape(shape, order="F" if by_columns else "C")
    return plain.astype(dtype.newbyteorder("="))


def _laid_out(values: np.ndarray, channels: int) -> np.ndarray:
    """Height × width × channels."""
    if values.dtype.kind != "u" or values.dtype.itemsize > 2:
        raise ValueError(f"its values are {values.dtype}, where uint8 or uint16 are expected")
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim == 3:
        for wanted in ((channels,), LOOKS if channels in LOOKS else ()):
            if values.shape[2] in wanted:
                return np.ascontiguousarray(values)
            if values.shape[0] in wanted:
                return np.ascontiguousarray(np.moveaxis(values, 0, 2))
    raise ValueError(
        f"it has the shape {list(values.shape)}, where {channels} channels are expected, first or "
        f"last (the option channels says how many)"
    )
