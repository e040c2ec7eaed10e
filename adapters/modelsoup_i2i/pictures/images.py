"""One picture file to and from one array: uint8, or uint16 where that is asked for, H × W × C.

Channels are 3, RGB; 1, grey; or 4, RGB with opacity: as many as a network has. Pillow decodes; what
is decided here is how anything else becomes so: 16-bit values are scaled and rounded; palettes are
looked up; what is transparent lies over white, unless opacity is a channel; a photo is turned as
its EXIF says. Of an animation or of several pages, the first counts. Colour profiles are ignored,
as every training of such networks does. Of any other number of channels are arrays, and TIFFs with
a grey page, or a band, for each: see `arrays.py`.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

import numpy as np

from modelsoup import OutputError, SoupError, how_to_install

from . import arrays

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", *arrays.SUFFIXES})
NOT_READ = frozenset({
    ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
    ".pcx", ".ico", ".svg", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw",
})  # fmt: skip
"""Pictures by their suffix that are left out, and named."""
CHANNELS = arrays.LOOKS
HOLD_ANY = (*arrays.SUFFIXES, ".tif", ".tiff")  # any number of channels
MAX_PIXELS = 1 << 26
"""A header that claims more than 8192² pixels is refused before anything is decoded."""

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError,
           ArithmeticError, struct.error, zlib.error, Warning)  # fmt: skip
"""What Pillow's decoders raise for damaged files; its warnings too, where they are errors."""


class ImageError(SoupError):
    """A picture, or a folder of pictures, is missing, damaged, or of a kind that is not read."""


class NonfiniteImageError(ImageError):
    """What a model made holds NaN or infinity."""


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures under a folder and its sub-folders, in natural order: `2.png` before `10.png`.

    Known by their suffix. Hidden files and folders are left out, links are followed. The order
    depends on nothing but the names below the folder.

    Raises:
        ImageError: there is no such folder, or it cannot be read.
    """
    return _listed(folder, SUFFIXES)


def list_not_read(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures there that `list_images` leaves out, for their suffix is of a kind not read.

    Raises:
        ImageError: as `list_images`.
    """
    return _listed(folder, NOT_READ)


def left_out(folder: str | os.PathLike[str]) -> str | None:
    """That some pictures of a folder are not read, as a sentence; None where there are none."""
    files = list_not_read(folder)
    if not files:
        return None
    kinds = ", ".join(sorted({file.suffix.lower() for file in files}))
    return f"{len(files)} of {folder}, whose kind is not read ({kinds}), such as {files[0].name}"


def read_image(
    path: str | os.PathLike[str], channels: int = 3, *, deep: bool = False
) -> np.ndarray:
    """Decode a PNG, JPEG, WebP, BMP, TIFF or numpy file, whatever its suffix says.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey, 4 for RGB with opacity; any other number, of arrays and of
            TIFFs.
        deep: keep 16 bits where the file has them.

    Returns:
        height × width × channels, its own memory: uint8; with `deep` uint16 of a file that has
        more than 8 bits a channel.

    Raises:
        ImageError: the file is missing, empty, truncated, damaged, no such picture, has more than
            16 bits a channel, other channels, or claims more than `MAX_PIXELS`.
        SoupError: a TIFF of several bands needs a package.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ImageError(f"the image {path} cannot be read: it is no regular file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"there is no image {path}") from None
    except OSError as error:
        raise ImageError(f"the image {path} cannot be read: {error.strerror}") from error
    return decode(data, str(path), channels, deep=deep)


def decode(data: bytes, name: str, channels: int = 3, *, deep: bool = False) -> np.ndarray:
    """The picture in a file's bytes, as `read_image` gives it; `name` is for its errors."""
    pillow = _pillow()
    try:
        if arrays.is_array(data):
            picture = arrays.array_in(data, channels, MAX_PIXELS)
            if picture.shape[0] * picture.shape[1] > MAX_PIXELS:
                raise _too_large(name, f"{picture.shape[1]} × {picture.shape[0]} pixels")
        elif channels in CHANNELS:
            picture = _look(data, name, channels)
        else:
            picture = _stack(data, name, channels)
        picture = picture if deep else arrays.in_8_bits(picture)
        return picture if channels not in CHANNELS else with_channels(picture, channels)
    except (pillow.Image.DecompressionBombError, pillow.Image.DecompressionBombWarning):
        raise _too_large(name, "twice as many pixels as any decoder takes") from None
    except pillow.UnidentifiedImageError:
        what = "is not a PNG, JPEG, WebP, BMP or TIFF image, or an array" if data else "is empty"
        raise ImageError(f"{name} {what}") from None
    except _BROKEN as error:
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def save_picture(picture: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write uint8 or uint16, height × width × channels; the file is whole or not there.

    PNG, where that can hold it; of another number of channels than 1, 3 and 4, by the path's
    suffix, `.npy`, `.npz`, or TIFF with a grey page for each.

    Raises:
        ImageError: the array has another shape or dtype.
        OutputError: the path has another suffix, or cannot be written.
    """
    path = Path(path)
    if picture.ndim == 3 and picture.shape[2] in CHANNELS:
        save_png(picture, path)
        return
    if picture.dtype not in (np.uint8, np.uint16) or picture.ndim != 3 or not picture.size:
        raise ImageError(
            f"{path}: a picture is uint8 or uint16 of the shape height × width × channels, not "
            f"{picture.dtype} of {list(picture.shape)}"
        )
    suffix = path.suffix.lower()
    if suffix not in HOLD_ANY:
        raise OutputError(
            f"{path} must end in {' or '.join(HOLD_ANY)}: no other format here holds "
            f"{picture.shape[2]} channels"
        )
    _write(path, lambda file: arrays.write(picture, file, suffix))


def save_png(array: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write uint8 or uint16, height × width × channels, as a PNG file, whole or not at all.

    Raises:
        ImageError: the array has another shape or dtype.
        OutputError: the path does not end in `.png`, or cannot be written.
    """
    path = Path(path)
    if (
        array.dtype not in (np.uint8, np.uint16) or array.ndim != 3
        or array.shape[2] not in CHANNELS or not array.size
    ):  # fmt: skip
        raise ImageError(
            f"{path}: an image is uint8 or uint16 of the shape height × width × 3, 1 or 4, not "
            f"{array.dtype} of {list(array.shape)}"
        )
    if path.suffix.lower() != ".png":
        raise OutputError(f"the image {path} must end in .png: no other format here is lossless")
    if array.dtype == np.uint16:
        _write(path, lambda file: file.write(arrays.as_png(array)))
    else:
        save_atomically(pillow_image(array), path)


def save_atomically(image: Any, path: Path) -> None:
    """Write a `PIL.Image` as PNG next to its place, and move it there."""
    _write(path, lambda file: image.save(file, format="PNG"))


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("x+b") as file:  # TIFF reads what it wrote
            write(file)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def pillow_image(array: np.ndarray) -> Any:
    """A `PIL.Image` of uint8, height × width × channels."""
    return _pillow().Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def resized(array: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """A picture in another height and width, anti-aliased where it shrinks.

    Args:
        array: height × width × channels.
        size: height and width.
        smooth: bicubic; else bilinear.
    """
    if array.shape[:2] == size:
        return array
    how = _pillow().Image.Resampling.BICUBIC if smooth else _pillow().Image.Resampling.BILINEAR
    wide = (size[1], size[0])
    if array.dtype == np.uint8 and array.shape[2] in CHANNELS:
        return np.asarray(pillow_image(array).resize(wide, how)).reshape(*size, array.shape[2])
    kind = np.uint8 if array.dtype == np.uint8 else np.float32  # modes of one channel
    as_numbers = [_pillow().Image.fromarray(np.ascontiguousarray(channel, kind))
                  for channel in np.moveaxis(array, 2, 0)]  # fmt: skip
    values = np.stack([np.asarray(one.resize(wide, how)) for one in as_numbers], axis=2)
    scaled: np.ndarray = np.rint(values).clip(0, 2 * half(array.dtype)).astype(array.dtype)
    return scaled


def as_rgb(array: np.ndarray) -> np.ndarray:
    """A picture of any channels as it looks: uint8, height × width × 3; opacity over white.

    Of 2 channels, or more than 4, the first looks grey, or the first three red, green and blue.
    """
    if array.shape[2] not in CHANNELS:
        array = array[:, :, : 1 if array.shape[2] == 2 else 3]
    return with_channels(arrays.in_8_bits(array), 3)


def with_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """A picture of 1, 3 or 4 channels with as many as are wanted of these."""
    if array.shape[2] == channels:
        return array
    if array.dtype == np.uint16:
        return arrays.with_looks(array, channels)
    return _with_channels(pillow_image(array), channels)


def half(dtype: np.dtype[Any]) -> float:
    """Half of the largest value: a picture over it is in [0, 2]."""
    return 32767.5 if dtype == np.uint16 else 127.5


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A picture, H × W × channels, as networks want it: float32, channels × H × W, in [−1, 1].

    0 becomes −1 and the largest value 1: x / 127.5 − 1, of 16 bits x / 32767.5 − 1.
    """
    import torch

    # A copy: the array may be read-only, or a cache's, and torch would share it.
    tensor: torch.Tensor = torch.from_numpy(np.array(array.transpose(2, 0, 1), np.float32))
    return tensor.div_(half(array.dtype)).sub_(1)


def to_image(tensor: torch.Tensor, *, deep: bool = False) -> np.ndarray:
    """The inverse: a float tensor, channels × H × W, rounded to uint8, H × W × channels.

    (x + 1) · 127.5, rounded to nearest even; what lies outside [−1, 1] is clamped. With `deep`,
    uint16 and 32767.5.

    Raises:
        ImageError: the tensor has another shape.
        NonfiniteImageError: it holds NaN or infinity.
    """
    if tensor.ndim != 3:
        raise ImageError(
            f"a picture is a tensor channels × height × width, not {list(tensor.shape)}"
        )
    values = tensor.detach().to("cpu").float()
    if not values.isfinite().all():
        raise NonfiniteImageError(
            "a picture holds NaN or infinity: the model that made it is broken"
        )
    dtype = np.dtype(np.uint16 if deep else np.uint8)
    scaled = values.add(1).mul_(half(dtype)).round_().clamp_(0, 2 * half(dtype))
    array: np.ndarray = np.ascontiguousarray(scaled.permute(1, 2, 0).numpy().astype(dtype))
    return array


def _look(data: bytes, name: str, channels: int) -> np.ndarray:
    """A picture of 1, 3 or 4 channels, of 16 bits where it has so many: of these any number."""
    pillow = _pillow()
    with _opened(data, name) as image:
        bits, white_is_zero = _stored_as(image)
        wide = _in_bytes(data, name, image)
        image.load()
        transparent = image.info.get("transparency")
        turned = pillow.ImageOps.exif_transpose(image)
        if turned.mode.startswith("I"):  # 16-bit grey, "I;16" or, in older versions, "I"
            values = np.asarray(turned)
            return _in_16_bits(values, bits, transparent, white_is_zero=white_is_zero)
        if wide is None:
            return _with_channels(turned, channels)
        if transparent is not None:
            opaque = np.where((wide == np.array(transparent)).all(axis=2), 0, 65535)
            wide = np.concatenate([wide, opaque[:, :, None].astype(np.uint16)], axis=2)
        return wide


def _stack(data: bytes, name: str, channels: int) -> np.ndarray:
    """The pages, or the bands, of a TIFF: a channel each."""
    pillow, pages = _pillow(), []
    if not data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        with _opened(data, name) as image:
            raise ValueError(
                f"it is {image.format} of {len(image.getbands())} channels, where {channels} are "
                f"expected, which arrays (.npy, .npz) and TIFFs have"
            )
    try:
        with _opened(data, name) as image:
            for page in range(min(image.n_frames, channels + 1)):
                image.seek(page)
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(name, f"{image.width} × {image.height} pixels")
                bits, white_is_zero = _stored_as(image)
                grey = image if image.mode.startswith("I") else image.convert("L")
                if len(image.getbands()) > 1:
                    return arrays.bands_in(data, channels)
                values = np.asarray(grey)
                if grey.mode.startswith("I"):
                    values = _in_16_bits(values, bits, None, white_is_zero=white_is_zero)[:, :, 0]
                pages.append(values)
    except (pillow.UnidentifiedImageError, SyntaxError):  # of such bands it knows no mode
        return arrays.bands_in(data, channels)
    return arrays.stacked(pages, channels)


def _opened(data: bytes, name: str) -> Any:
    """A `PIL.Image` that is not decoded yet, of a size that may be.

    Raises:
        ImageError: it is larger.
    """
    image = _pillow().Image.open(BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, f"{image.width} × {image.height} pixels")
    return image


_OTHER_BYTE = {";16B": ";16L", ";16L": ";16B"}


def _in_bytes(data: bytes, name: str, image: Any) -> np.ndarray | None:
    """A picture of 16 bits and several channels; None of any other one.

    Pillow's modes of several channels have 8 bits, for which its decoder takes the upper byte of
    each value: the first, or the second, as the file says. Told the other way, it takes the lower.
    Grey with opacity, told to be of four bytes, is all of them.
    """
    if len(image.tile) != 1 or image.mode not in ("RGB", "RGBA"):
        return None
    kind, extents, offset, args = image.tile[0]
    raw = args if isinstance(args, str) else args[0]
    raw = raw.replace(";16N", ";16L" if sys.byteorder == "little" else ";16B")
    upper = {f"{image.mode}{order}": image.mode + other for order, other in _OTHER_BYTE.items()}
    read = (upper | {"LA;16B": "RGBA"}).get(raw)
    if read is None:
        return None

    def decoded(raw: str) -> np.ndarray:
        with _opened(data, name) as again:
            told = raw if isinstance(args, str) else (raw, *args[1:])
            again.tile = [(kind, extents, offset, told)]
            return np.asarray(_pillow().ImageOps.exif_transpose(again)).astype(np.uint16)

    if raw not in upper:
        bytes_of = decoded(read)
        grey, opacity = (bytes_of[:, :, n] << 8 | bytes_of[:, :, n + 1] for n in (0, 2))
        return np.stack([grey, grey, grey, opacity], axis=2)
    wide: np.ndarray = decoded(raw) << 8 | decoded(read)
    return wide


def _with_channels(image: Any, channels: int) -> np.ndarray:
    pillow = _pillow()
    if channels == 4:
        return np.array(image.convert("RGBA"), dtype=np.uint8)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.Image.alpha_composite(white, image)
    if channels == 1:
        return np.array(image.convert("L"), dtype=np.uint8)[:, :, None]
    return np.array(image.convert("RGB"), dtype=np.uint8)


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_KINDS = {2: "signed integers", 3: "floating-point numbers"}


def _stored_as(image: Any) -> tuple[int, bool]:
    """How many bits a grey value has, and whether 0 is white.

    The decoder gives grey of 12 and 16 bits as it is stored, of whatever sign, and its values do
    not tell: those of 32 bits may all be small.

    Raises:
        ValueError: values are of a kind that is not read.
    """
    if image.format != "TIFF":
        return 16, False
    tags = image.tag_v2
    bits = max(tags.get(_BITS, (1,)))
    if bits > 16:
        raise ValueError(f"it has {bits} bits a channel, where 8 or 16 are expected")
    for kind in tags.get(_SAMPLE_FORMAT, ()):
        if kind in _KINDS:
            raise ValueError(f"its values are {_KINDS[kind]}, where unsigned ones are expected")
    return bits, tags.get(_PHOTOMETRIC) == 0


def _in_16_bits(
    grey: np.ndarray, bits: int, transparent: int | None, *, white_is_zero: bool
) -> np.ndarray:
    """Grey of 16 bits, height × width × 1; where one value is transparent, of 4 channels."""
    most = 2**bits - 1
    scaled = ((grey.astype(np.int64) * 65535 + most // 2) // most)[:, :, None]
    if white_is_zero:
        scaled = 65535 - scaled
    if transparent is not None:
        opaque = np.where(grey == transparent, 0, 65535)[:, :, None]
        scaled = np.concatenate([scaled, scaled, scaled, opaque], axis=2)
    made: np.ndarray = scaled.astype(np.uint16)
    return made


def _listed(folder: str | os.PathLike[str], suffixes: frozenset[str]) -> list[Path]:
    root = Path(folder)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ImageError(f"{root} {what}, where a folder of images is expected")
    return [root / name for name in sorted(_walk(root, suffixes), key=natural)]


def _walk(root: Path, suffixes: frozenset[str]) -> Iterator[str]:
    """The files below a folder, by their names from there, with slashes."""
    seen = set()
    for name, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        here = Path(name)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        above = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in suffixes:
                yield above + file


def _unreadable(error: OSError) -> None:
    raise ImageError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


def natural(text: str) -> tuple[Any, ...]:
    """The key of natural order of names: digits by their value, the rest without regard to case.

    The plain text decides a tie.
    """
    pieces = re.split(r"([0-9]+)", text.casefold())
    keys = [(int(piece), "") if at % 2 else (-1, piece) for at, piece in enumerate(pieces)]
    return keys, text


def _too_large(name: str, claim: str) -> ImageError:
    return ImageError(f"{name} claims {claim}, where at most {MAX_PIXELS} are decoded")


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise SoupError(f"images need Pillow: {how_to_install('i2i')} ({error})") from error
    return PIL
