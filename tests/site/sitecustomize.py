"""Makes torchvision importable beside a build of torch that its compiled half does not fit.

PyPI's torchvision looks for CUDA's libraries. Beside a torch without them it lacks two operators
that it wants to describe, and with it torchmetrics and lpips cannot be imported. Nothing that is
tested calls these operators, so their schemas will do. Every interpreter that a test starts finds
this on its path; it costs nothing until torchvision is imported.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

KEPT = []


class Loader(SourceFileLoader):
    """torchvision, and where that fails for an operator, torchvision with the schemas."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)  # its end would take the schemas away
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            super().exec_module(module)


class Finder(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name == "torchvision" else None
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
