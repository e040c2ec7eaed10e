"""torchvision's wheel does not fit every build of torch: then two operators are declared first."""

import sys
from importlib.util import find_spec

import torch

_KEPT = []


def make_importable() -> None:
    """For this process; without torchvision nothing is to be done."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # its end would take the operators away
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
