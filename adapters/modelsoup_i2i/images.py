"""One picture file to and from one array: uint8, height × width × 3, RGB.

Pillow decodes; what is decided here is how anything that is not 8-bit RGB becomes so: 16-bit values
are scaled, not clipped; palettes are looked up; what is transparent lies over white; a photo is
turned as its EXIF says. Of an animation, the first frame counts. Colour profiles are ignored, as
every training of such networks does.
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

from modelsoup import OutputError, SoupError

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_PIXELS = 1 << 26
"""A header that claims more than 8192² pixels is refused before anything is decoded."""

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError,
           struct.error, zlib.error)  # fmt: skip
"""What Pillow's decoders raise for damaged files."""


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
    root = Path(folder)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ImageError(f"{root} {what}, where a folder of images is expected")
    return sorted(_walk(root), key=lambda path: _natural(path.relative_to(root)))


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode a PNG, JPEG, WebP or BMP file, whatever its suffix says.

    Returns:
        uint8, height × width × 3, RGB, its own memory.

    Raises:
        ImageError: the file is missing, empty, truncated, damaged, no such picture, or claims more
            than `MAX_PIXELS`.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"there is no image {path}") from None
    except OSError as error:
        raise ImageError(f"the image {path} cannot be read: {error.strerror}") from error
    return decode(data, str(path))


def decode(data: bytes, name: str) -> np.ndarray:
    """The picture in a file's bytes, as `read_image` gives it; `name` is for its errors."""
    pillow = _pillow()
    try:
        with pillow.Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(name, f"{image.width} × {image.height} pixels")
            image.load()
            return _as_rgb(pillow.ImageOps.exif_transpose(image))
    except (pillow.Image.DecompressionBombError, pillow.Image.DecompressionBombWarning):
        raise _too_large(name, "twice as many pixels as any decoder takes") from None
    except pillow.UnidentifiedImageError:
        what = "is not a PNG, JPEG, WebP or BMP image" if data else "is empty"
        raise ImageError(f"{name} {what}") from None
    except _BROKEN as error:
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def save_png(array: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write uint8, height × width × 3, as a PNG file; the file is whole or not there.

    Raises:
        ImageError: the array has another shape or dtype.
        OutputError: the path does not end in `.png`, or cannot be written.
    """
    pillow = _pillow()
    path = Path(path)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ImageError(
            f"{path}: an image is uint8 of the shape height × width × 3, not {array.dtype} "
            f"of {list(array.shape)}"
        )
    if path.suffix.lower() != ".png":
        raise OutputError(f"the image {path} must end in .png: no other format here is lossless")
    save_atomically(pillow.Image.fromarray(array), path)


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


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """uint8, height × width × 3, as the networks want it: float32, 3 × height × width, in [−1, 1].

    0 becomes −1 and 255 becomes 1: x / 127.5 − 1.
    """
    import torch

    # A copy: the array may be read-only, or a cache's, and torch would share it.
    tensor: torch.Tensor = torch.from_numpy(np.array(array.transpose(2, 0, 1), np.float32))
    return tensor.div_(127.5).sub_(1)


def to_image(tensor: torch.Tensor) -> np.ndarray:
    """The inverse: a float tensor, 3 × height × width, rounded to uint8, height × width × 3.

    (x + 1) · 127.5, rounded to nearest even; what lies outside [−1, 1] is clamped.

    Raises:
        ImageError: the tensor has another shape.
        NonfiniteImageError: it holds NaN or infinity.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ImageError(f"a picture is a tensor 3 × height × width, not {list(tensor.shape)}")
    values = tensor.detach().to("cpu").float()
    if not values.isfinite().all():
        raise NonfiniteImageError(
            "a picture holds NaN or infinity: the model that made it is broken"
        )
    scaled = values.add(1).mul_(127.5).round_().clamp_(0, 255)
    array: np.ndarray = np.ascontiguousarray(scaled.permute(1, 2, 0).numpy().astype(np.uint8))
    return array


def _as_rgb(image: Any) -> np.ndarray:
    pillow = _pillow()
    if image.mode.startswith("I"):  # 16-bit grey, "I;16" or, in older versions of Pillow, "I"
        return _from_16_bit(np.asarray(image, dtype=np.int64), image.info.get("transparency"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _from_16_bit(grey: np.ndarray, transparent: int | None) -> np.ndarray:
    scaled = ((grey * 255 + 32767) // 65535).astype(np.uint8)
    if transparent is not None:
        scaled[grey == transparent] = 255
    return np.repeat(scaled[:, :, None], 3, axis=2)


def _walk(root: Path) -> Iterator[Path]:
    seen = set()
    for name, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        here = Path(name)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in files:
            if not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES:
                yield here / file


def _unreadable(error: OSError) -> None:
    raise ImageError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


def _natural(path: Path) -> tuple[Any, ...]:
    """Digits by their value, the rest without regard to case; the plain text decides a tie."""
    text = path.as_posix()
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
        raise SoupError(f"images need Pillow: pip install 'modelsoup[i2i]' ({error})") from error
    return PIL
