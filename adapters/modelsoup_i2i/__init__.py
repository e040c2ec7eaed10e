"""Image-to-image trainers for modelsoup: data, networks, losses, metrics, and `soup i2i`.

A name is imported when it is first used; those that need torch import it then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .networks.patch import PatchDiscriminator
    from .networks.resnet import ResnetGenerator
    from .networks.unet import UnetGenerator
    from .pictures.images import ImageError, list_images, read_image, save_png, to_image, to_tensor
    from .trainers.cyclegan import CycleGAN, CycleGANOptions
    from .trainers.pix2pix import Pix2Pix, Pix2PixOptions
    from .training.session import Session
    from .use.official_cam import import_nice_gan, import_ugatit
    from .use.official_cyclegan import import_folder
    from .use.official_gan import import_biggan, import_deepi2i, import_stylegan
    from .use.official_stargan import import_stargan
    from .use.official_starganv2 import import_starganv2

_HOMES = {
    "trainers.cyclegan": ("CycleGAN", "CycleGANOptions"),
    "trainers.pix2pix": ("Pix2Pix", "Pix2PixOptions"),
    "pictures.images": (
        "ImageError",
        "list_images",
        "read_image",
        "save_png",
        "to_image",
        "to_tensor",
    ),
    "networks.patch": ("PatchDiscriminator",),
    "networks.resnet": ("ResnetGenerator",),
    "networks.unet": ("UnetGenerator",),
    "use.official_cam": ("import_nice_gan", "import_ugatit"),
    "use.generators": ("load_generator", "load_model"),
    "use.official_cyclegan": ("import_folder",),
    "use.official_gan": ("import_biggan", "import_deepi2i", "import_stylegan"),
    "use.official_stargan": ("import_stargan",),
    "use.official_starganv2": ("import_starganv2",),
    "training.session": ("Session",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CycleGAN",
    "CycleGANOptions",
    "ImageError",
    "PatchDiscriminator",
    "Pix2Pix",
    "Pix2PixOptions",
    "ResnetGenerator",
    "Session",
    "UnetGenerator",
    "import_biggan",
    "import_deepi2i",
    "import_folder",
    "import_nice_gan",
    "import_stargan",
    "import_starganv2",
    "import_stylegan",
    "import_ugatit",
    "list_images",
    "load_generator",
    "load_model",
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
