"""A network by its class and its sizes, which tells its tensors without torch.

    Network("modelsoup_i2i.networks.resnet:ResnetGenerator", {"width": 32})

Networks are plain torch modules, in files that import torch at their top. To plan with them, names
and shapes are enough: then such a file is read a second time, for itself, with a stand-in for torch
whose layers know what they hold and compute nothing. So an architecture is said once, a plan is
checked in a moment, and that torch is not installed does not matter.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modelsoup import ParameterError

from .shapes import Shape

if TYPE_CHECKING:
    from torch import nn

AVERAGED = "_ema"  # what follows a network's name in that of its average over steps
_ROOM = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Network:
    """A network that may be built.

    Attributes:
        made_by: `module:Class`, a `torch.nn.Module`.
        sizes: what it is called with, by keyword: numbers and words.
    """

    made_by: str
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[str, Shape]]:
        """Name → (safetensors dtype, shape), in the order of its state dict; without torch."""
        module, _, name = self.made_by.partition(":")
        made = getattr(_read(module), name)(**self.sizes)
        return dict(made.told())

    def buffers(self) -> set[str]:
        """The names of those that are no parameters."""
        module, _, name = self.made_by.partition(":")
        return set(getattr(_read(module), name)(**self.sizes).kept())

    def shapes(self) -> dict[str, Shape]:
        """Name → shape, likewise."""
        return {name: shape for name, (_, shape) in self.tensors().items()}

    def build(self) -> nn.Module:
        """The network, with initial weights of whatever generator torch has now."""
        module, _, name = self.made_by.partition(":")
        made: nn.Module = getattr(importlib.import_module(module), name)(**self.sizes)
        return made

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.sizes.items())


@dataclass(frozen=True)
class Joined:
    """A module that is made of a trainer's networks, and has no tensors but theirs.

    Attributes:
        made_by: `module:Class`, a `torch.nn.Module`.
        parts: the networks that it is called with, each by its name as the keyword.
        sizes: what else it is called with.
    """

    made_by: str
    parts: tuple[str, ...]
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def build(self, networks: Mapping[str, nn.Module]) -> nn.Module:
        """The module, of those that there are."""
        module, _, name = self.made_by.partition(":")
        parts = {part: networks[part] for part in self.parts}
        made: nn.Module = getattr(importlib.import_module(module), name)(**parts, **self.sizes)
        return made


def parameters(tensors: Mapping[str, tuple[str, Shape]]) -> int:
    """How many numbers are trained or kept in some tensors."""
    return sum(math.prod(shape) for _, shape in tensors.values())


@cache
def _read(module: str) -> Any:
    """A file of networks with the stand-in for torch, and whatever it imports of its own room."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    made = ModuleType(module)
    made.__dict__.update(
        __file__=spec.origin, __package__=module.rpartition(".")[0],
        __builtins__={**vars(builtins), "__import__": _imported},
    )  # fmt: skip
    text = Path(spec.origin).read_text("utf-8")
    exec(compile(text, spec.origin, "exec", dont_inherit=True), made.__dict__)  # noqa: S102
    return made


def _imported(
    name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
) -> Any:
    """What `import` does within a file that is read so."""
    if name.partition(".")[0] == "torch" and not level:
        found: Any = TORCH
        for part in name.split(".")[1:] if fromlist else ():
            found = getattr(found, part)
        return found
    if level == 1 and globals["__package__"] == _ROOM and name:
        return _read(f"{_ROOM}.{name}")
    return builtins.__import__(name, globals, locals, fromlist, level)


class _Nothing(type):
    """Whatever else torch has: it may be called, subclassed and asked for more, to no effect."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_arguments: Any, **_named: Any) -> Any:
        return cls

    __add__ = __sub__ = __mul__ = __truediv__ = __rmul__ = __getitem__ = __call__


class Nothing(metaclass=_Nothing):
    """See `_Nothing`."""


class Tensor:
    """A shape and a dtype, of which there is no value."""

    def __init__(self, *shape: int, dtype: str = "F32") -> None:
        self.shape: Shape = shape
        self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def _computed(self, *_others: Any) -> Any:
        return Nothing

    __add__ = __sub__ = __mul__ = __truediv__ = __rmul__ = __getitem__ = _computed


class Parameter(Tensor):
    """A tensor that is trained."""

    def __init__(self, data: Tensor, requires_grad: bool = True) -> None:
        super().__init__(*data.shape, dtype=data.dtype)


class Module:
    """Named parameters, buffers and modules, as torch's would hold them."""

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        self._parameters: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._modules: dict[str, Module] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Parameter):
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value
        object.__setattr__(self, name, value)

    def register_parameter(self, name: str, value: Tensor | None) -> None:
        """As torch's."""
        setattr(self, name, value)

    def register_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """As torch's."""
        if value is not None and persistent:
            self._buffers[name] = value
        object.__setattr__(self, name, value)

    def add_module(self, name: str, module: Module) -> None:
        """As torch's."""
        setattr(self, name, module)

    def told(self, prefix: str = "") -> Iterator[tuple[str, tuple[str, Shape]]]:
        """Names, dtypes and shapes, in the order of torch's state dict."""
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            yield f"{prefix}{name}", (tensor.dtype, tensor.shape)
        for name, module in self._modules.items():
            yield from module.told(f"{prefix}{name}.")

    def kept(self, prefix: str = "") -> Iterator[str]:
        """Names of buffers."""
        yield from (f"{prefix}{name}" for name in self._buffers)
        for name, module in self._modules.items():
            yield from module.kept(f"{prefix}{name}.")

    def apply(self, _of: Any) -> Any:
        """Nothing to initialise."""
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int):
            return list(self._modules.values())[at]
        return self._modules[at]


class _Several(Module):
    def __init__(self, *modules: Any) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            named: Iterable[tuple[str, Any]] = modules[0].items()
        else:
            listed = modules[0] if len(modules) == 1 and isinstance(modules[0], list) else modules
            named = ((str(n), module) for n, module in enumerate(listed))
        for name, module in named:
            self._modules[name] = module

    def append(self, module: Module) -> None:
        self._modules[str(len(self._modules))] = module


class _Convolution(Module):
    transposed = False

    def __init__(
        self, ins: int, outs: int, kernel: int | Shape, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, bias: bool = True, **_named: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        first, second = (ins, outs) if self.transposed else (outs, ins)
        self.weight = Parameter(Tensor(first, second // groups, *sides))
        self.bias = Parameter(Tensor(outs)) if bias else None


class _Transposed(_Convolution):
    transposed = True


class _Linear(Module):
    def __init__(self, ins: int, outs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(outs, ins))
        self.bias = Parameter(Tensor(outs)) if bias else None


class _Embedding(Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(count, width))


class _Norm(Module):
    usually = (True, True)

    def __init__(
        self, features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool | None = None,
        track_running_stats: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        scaled = self.usually[0] if affine is None else affine
        tracked = self.usually[1] if track_running_stats is None else track_running_stats
        if scaled:
            self.weight, self.bias = (Parameter(Tensor(features)) for _ in range(2))
        if tracked:
            self.register_buffer("running_mean", Tensor(features))
            self.register_buffer("running_var", Tensor(features))
            self.register_buffer("num_batches_tracked", Tensor(dtype="I64"))


class _InstanceNorm(_Norm):
    usually = (False, False)


def _spectral_norm(
    layer: Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12,
    dim: int | None = None,
) -> Module:  # fmt: skip
    """As `torch.nn.utils.spectral_norm`: a weight by another name, and two singular vectors."""
    weight = layer._parameters.pop(name)
    layer._parameters[f"{name}_orig"] = weight
    along = int(isinstance(layer, _Transposed)) if dim is None else dim
    outs = weight.shape[along]
    layer._buffers[f"{name}_u"] = Tensor(outs)
    layer._buffers[f"{name}_v"] = Tensor(math.prod(weight.shape) // outs)
    return layer


class _Named(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class _Unknown(ModuleType):
    """What may hold parameters, and is not known here: it may be named, and not be made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper() or "utils" in self.__name__:
            return _unknown(f"{self.__name__}.{name}")
        return Nothing


def _unknown(name: str) -> type[Module]:
    def refuse(self: Module, *_arguments: Any, **_named: Any) -> None:
        raise ParameterError(
            f"{name} is not known to networks/described.py, which tells names and shapes without "
            f"torch: write it with layers that are (torch.nn.Parameter is), or add it there"
        )

    return type(name, (Module,), {"__init__": refuse})


def _made(*shape: Any, dtype: Any = None, **_named: Any) -> Tensor:
    sizes = shape[0] if shape and isinstance(shape[0], tuple | list) else shape
    return Tensor(*sizes, dtype=dtype if isinstance(dtype, str) else "F32")


def _listed(values: Any, dtype: Any = None, **_named: Any) -> Tensor:
    return _made([len(values)] if isinstance(values, list | tuple) else [], dtype=dtype)


def _no_parameters(name: str) -> type[Module]:
    return type(name, (Module,), {})


_UTILS = _Unknown("torch.nn.utils")
_UTILS.__dict__.update(
    spectral_norm=_spectral_norm, parametrizations=_Unknown("torch.nn.utils.parametrizations")
)
_NN = _Unknown("torch.nn")
_NN.__dict__.update(
    {
        "Module": Module, "Parameter": Parameter, "Sequential": _Several, "ModuleList": _Several,
        "ModuleDict": _Several, "Conv2d": _Convolution, "ConvTranspose2d": _Transposed,
        "Linear": _Linear, "Embedding": _Embedding, "BatchNorm2d": _Norm,
        "InstanceNorm2d": _InstanceNorm, "utils": _UTILS,
    }
    | {
        name: _no_parameters(name)
        for name in ("AvgPool2d", "Dropout", "Flatten", "Identity", "LeakyReLU", "MaxPool2d",
                     "ReLU", "ReflectionPad2d", "ReplicationPad2d", "Sigmoid", "Tanh", "Upsample",
                     "ZeroPad2d", "PixelShuffle", "AdaptiveAvgPool2d", "GELU", "SiLU", "ELU",
                     "Softplus", "Softmax", "ConstantPad2d", "Unflatten")
    }
)  # fmt: skip
TORCH = _Named("torch")
TORCH.__dict__.update(
    nn=_NN,
    Tensor=Tensor,
    int64="I64",
    zeros=_made,
    ones=_made,
    empty=_made,
    randn=_made,
    rand=_made,
    tensor=_listed,
)
