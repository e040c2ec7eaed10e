"""One picture file to and from one array: uint8, height × width × channels.

Channels are 3, RGB; 1, grey; or 4, RGB with opacity: as many as a network has. Pillow decodes; what
is decided here is how anything else becomes so: 16-bit values are scaled, not clipped; palettes are
looked up; what is transparent lies over white, unless opacity is a channel; a photo is turned as
its EXIF says. Of an animation or of several pages, the first counts. Colour profiles are ignored,
as every training of such networks does.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from modelsoup import OutputError, SoupError, how_to_install

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
NOT_READ = frozenset({
    ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
    ".pcx", ".ico", ".svg", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw",
})  # fmt: skip
"""Pictures by their suffix that are left out, and named."""
CHANNELS = (1, 3, 4)
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


def read_image(path: str | os.PathLike[str], channels: int = 3) -> np.ndarray:
    """Decode a PNG, JPEG, WebP, BMP or TIFF file, whatever its suffix says.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey, 4 for RGB with opacity.

    Returns:
        uint8, height × width × channels, its own memory.

    Raises:
        ImageError: the file is missing, empty, truncated, damaged, no such picture, has more than
            16 bits a channel, or claims more than `MAX_PIXELS`.
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
    return decode(data, str(path), channels)


def decode(data: bytes, name: str, channels: int = 3) -> np.ndarray:
    """The picture in a file's bytes, as `read_image` gives it; `name` is for its errors."""
    pillow = _pillow()
    try:
        with pillow.Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(name, f"{image.width} × {image.height} pixels")
            bits, white_is_zero = _stored_as(image)
            image.load()
            transparent = image.info.get("transparency")
            turned = pillow.ImageOps.exif_transpose(image)
            if turned.mode.startswith("I"):  # 16-bit grey, "I;16" or, in older versions, "I"
                values = np.asarray(turned)
                turned = _in_8_bits(values, bits, transparent, white_is_zero=white_is_zero)
            return _with_channels(turned, channels)
    except (pillow.Image.DecompressionBombError, pillow.Image.DecompressionBombWarning):
        raise _too_large(name, "twice as many pixels as any decoder takes") from None
    except pillow.UnidentifiedImageError:
        what = "is not a PNG, JPEG, WebP, BMP or TIFF image" if data else "is empty"
        raise ImageError(f"{name} {what}") from None
    except _BROKEN as error:
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def save_png(array: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write uint8, height × width × channels, as a PNG file; the file is whole or not there.

    Raises:
        ImageError: the array has another shape or dtype.
        OutputError: the path does not end in `.png`, or cannot be written.
    """
    path = Path(path)
    if (
        array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in CHANNELS
        or not array.size
    ):  # fmt: skip
        raise ImageError(
            f"{path}: an image is uint8 of the shape height × width × 3, 1 or 4, not {array.dtype} "
            f"of {list(array.shape)}"
        )
    if path.suffix.lower() != ".png":
        raise OutputError(f"the image {path} must end in .png: no other format here is lossless")
    save_atomically(pillow_image(array), path)


def save_atomically(image: Any, path: Path) -> None:
    """Write a `PIL.Image` as PNG next to its place, and move it there."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            image.save(file, format="PNG")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def pillow_image(array: np.ndarray) -> Any:
    """A `PIL.Image` of uint8, height × width × channels."""
    return _pillow().Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def resized(array: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """A picture, uint8, in another height and width, anti-aliased where it shrinks.

    Args:
        array: height × width × channels.
        size: height and width.
        smooth: bicubic; else bilinear.
    """
    if array.shape[:2] == size:
        return array
    how = _pillow().Image.Resampling.BICUBIC if smooth else _pillow().Image.Resampling.BILINEAR
    made = np.asarray(pillow_image(array).resize((size[1], size[0]), how))
    return made.reshape(*size, array.shape[2])


def as_rgb(array: np.ndarray) -> np.ndarray:
    """A picture of any channels as it looks: uint8, height × width × 3; opacity over white."""
    return with_channels(array, 3)


def with_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """A picture of 1, 3 or 4 channels with as many as are wanted of these."""
    if array.shape[2] == channels:
        return array
    return _with_channels(pillow_image(array), channels)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """uint8, H × W × channels, as the networks want it: float32, channels × H × W, in [−1, 1].

    0 becomes −1 and 255 becomes 1: x / 127.5 − 1.
    """
    import torch

    # A copy: the array may be read-only, or a cache's, and torch would share it.
    tensor: torch.Tensor = torch.from_numpy(np.array(array.transpose(2, 0, 1), np.float32))
    return tensor.div_(127.5).sub_(1)


def to_image(tensor: torch.Tensor) -> np.ndarray:
    """The inverse: a float tensor, channels × H × W, rounded to uint8, H × W × channels.

    (x + 1) · 127.5, rounded to nearest even; what lies outside [−1, 1] is clamped.

    Raises:
        ImageError: the tensor has another shape.
        NonfiniteImageError: it holds NaN or infinity.
    """
    if tensor.ndim != 3 or tensor.shape[0] not in CHANNELS:
        raise ImageError(
            f"a picture is a tensor 3 × height × width, or one with 1 or 4 channels, not "
            f"{list(tensor.shape)}"
        )
    values = tensor.detach().to("cpu").float()
    if not values.isfinite().all():
        raise NonfiniteImageError(
            "a picture holds NaN or infinity: the model that made it is broken"
        )
    scaled = values.add(1).mul_(127.5).round_().clamp_(0, 255)
    array: np.ndarray = np.ascontiguousarray(scaled.permute(1, 2, 0).numpy().astype(np.uint8))
    return array


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


def _in_8_bits(grey: np.ndarray, bits: int, transparent: int | None, *, white_is_zero: bool) -> Any:
    """8-bit grey, and where one value is transparent, its opacity."""
    most = 2**bits - 1
    scaled = ((grey.astype(np.int64) * 255 + most // 2) // most).astype(np.uint8)
    if white_is_zero:
        scaled = 255 - scaled
    image = _pillow().Image.fromarray(scaled)
    if transparent is not None:
        opaque = np.where(grey == transparent, 0, 255).astype(np.uint8)
        image.putalpha(_pillow().Image.fromarray(opaque))
    return image


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
