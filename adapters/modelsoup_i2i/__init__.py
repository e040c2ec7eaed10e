"""Image-to-image trainers for modelsoup: data, networks, losses, metrics, and `soup i2i`.

A name is imported when it is first used; those that need torch import it then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cyclegan import CycleGAN, CycleGANOptions
    from .images import ImageError, list_images, read_image, save_png, to_image, to_tensor
    from .networks import PatchDiscriminator, ResnetGenerator, load_generator
    from .official import import_folder
    from .session import Session
    from .shapes import DiscriminatorShape, GeneratorShape

_HOMES = {
    "cyclegan": ("CycleGAN", "CycleGANOptions"),
    "images": ("ImageError", "list_images", "read_image", "save_png", "to_image", "to_tensor"),
    "networks": ("PatchDiscriminator", "ResnetGenerator", "load_generator"),
    "official": ("import_folder",),
    "session": ("Session",),
    "shapes": ("DiscriminatorShape", "GeneratorShape"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CycleGAN",
    "CycleGANOptions",
    "DiscriminatorShape",
    "GeneratorShape",
    "ImageError",
    "PatchDiscriminator",
    "ResnetGenerator",
    "Session",
    "import_folder",
    "list_images",
    "load_generator",
    "read_image",
    "save_png",
    "to_image",
    "to_tensor",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'modelsoup_i2i' has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return __all__
