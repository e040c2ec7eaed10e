"""What every torch trainer needs: load a start checkpoint, freeze by name, save back.

    network = Network()
    load_into(network, job.start, seed=job.seed)
    freeze(network, job.frozen)
    optimizer = torch.optim.SGD(trainable(network), lr=0.01)
    …
    save_from(network, job.output, like=job.start, frozen=job.frozen)

Names are those of `module.state_dict()`. Trainers import this, the core never does: it needs
`modelsoup[torch]`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from ..errors import MismatchError, OutputError, TrainerError, counted, listed, nearest
from ..files.checkpoint import SUFFIX, Checkpoint, StrPath, TensorInfo, open_checkpoint
from ..files.dtypes import DTYPES
from ..files.placing import LINEAGE_KEY
from ..files.writer import CheckpointWriter, OutputTensor, layout

_TORCH = {d.name: getattr(torch, d.numpy, None) for d in DTYPES.values() if d.numpy}
_ITERATIONS = 30  # of the power method
_NAMES = {dtype: name for name, dtype in _TORCH.items() if dtype is not None}


def load_into(
    module: nn.Module, checkpoint: StrPath | None, *, seed: int | None = None
) -> tuple[str, ...]:
    """Copy a checkpoint into a module, tensor by tensor; initialise and return what it lacks.

    Floats are converted to the module's dtype, other dtypes must agree. The names of a tied tensor
    are one tensor: none is missing if the checkpoint has one of them.

    Args:
        module: on any device but `meta`; its devices, dtypes and `Parameter` objects stay.
        checkpoint: a file, a model folder or an index; None, as a trainer's start may be, holds
            nothing.
        seed: None leaves what is missing as the constructor made it. A number, in [0, 2⁶³), calls
            `reset_parameters` of the modules that own it, each with generators seeded by the number
            and the module's name, so that no value depends on what else is missing. The vectors of
            spectral norm are then found for the weights that were loaded, by power iteration from
            the number; other buffers that no `reset_parameters` sets stay as constructed. The
            caller's generators stay as they are.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        MismatchError: a name that the module lacks, another shape or kind of dtype (the module is
            as before then), or two values for one tied tensor.
        TrainerError: the module's state is not all tensors, or no `reset_parameters` sets a missing
            parameter, which holds NaN then.
    """
    own = _tensors(module)
    given = None if checkpoint is None else open_checkpoint(checkpoint)
    infos = {} if given is None else given.tensors
    unknown = [name for name in infos if name not in own]
    if unknown:
        near = nearest(unknown[0], [name for name in own if name not in infos] or own)
        raise MismatchError(
            f"{checkpoint} has {counted(len(unknown), 'tensor')} that the module lacks: "
            f"{listed(unknown)}{near}"
        )
    for name, info in infos.items():
        _must_fit(info, own[name])
    places = {_place(own[name]) for name in infos}
    missing = tuple(name for name, tensor in own.items() if _place(tensor) not in places)
    if seed is not None and missing:
        # Before anything is loaded: a module whose bias is missing resets its weight too.
        _initialise(module, missing, seed)
        own = _tensors(module)
    first: dict[tuple[object, ...], str] = {}
    for name in infos:
        assert given is not None
        value, tied = _read(given, name), first.setdefault(_place(own[name]), name)
        if tied == name:
            own[name].detach().copy_(value)
        elif not _holds(own[name], value):
            raise MismatchError(
                f"{checkpoint} has different values for {tied!r} and {name!r}, which are one "
                f"tied tensor in the module"
            )
    if seed is not None and missing:
        _normalise(module, set(missing), seed)
    return missing


def freeze(module: nn.Module, names: Iterable[str]) -> None:
    """Keep tensors as they are through any training, in `train()` mode too.

    A parameter requires no gradient any more, under any of its names if it is tied. A module that
    owns a frozen buffer, such as a BatchNorm's running statistics, is put into eval mode before
    each of its forward passes, whatever `train()` said: it normalises by those statistics and does
    not update them. Its children are not; copies of it, such as an EMA, are as well.

    Raises:
        TrainerError: the module has no such name; nothing was frozen.
    """
    own, names = _tensors(module), list(names)
    for name in names:
        if name not in own:
            raise TrainerError(f"the module has no tensor {name!r} to freeze{nearest(name, own)}")
    for name in names:
        if isinstance(own[name], nn.Parameter):
            own[name].requires_grad_(False)
            own[name].grad = None  # an optimizer that knows it would go on applying it
            continue
        owner = _owner(module, name)
        # A hook, because train() of the whole network sets every module's mode; a function of this
        # file, because it can be pickled; the first, because spectral_norm's updates buffers.
        if _stay_in_eval not in owner._forward_pre_hooks.values():
            owner.register_forward_pre_hook(_stay_in_eval, prepend=True)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen, each once: what an optimizer gets."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def save_from(
    module: nn.Module, path: StrPath, *, like: StrPath | None = None, frozen: Iterable[str] = (),
    lineage: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a module's tensors to a safetensors file, all or nothing, replacing what is there.

    Tied tensors are written under each of their names. One tensor at a time is copied.

    Args:
        module: as in `load_into`.
        path: ends in `.safetensors`.
        like: the checkpoint that was loaded. A tensor is rounded to the dtype that it has there;
            floats that it lacks, to that of its floats if that is one. None: the module's dtypes.
        frozen: names whose bytes are copied from `like`.
        lineage: what it was made by, as `record_training` tells it; None for what a node of a tree
            makes, which gets one there.
        metadata: what else is to be said in the file's `__metadata__`.

    Raises:
        CheckpointError: `like` is missing or damaged.
        MismatchError: `like` has another shape or kind of dtype.
        TrainerError: a frozen name is not in both, or does not have its value of `like` any more;
            or the module's state is not all tensors that safetensors can hold.
        OutputError: the path is no `.safetensors` file, or cannot be written.
    """
    path, frozen, own = Path(path), set(frozen), _tensors(module)
    if path.suffix != SUFFIX:
        raise OutputError(f"the output {path} must end in {SUFFIX}")
    source = None if like is None else open_checkpoint(like)
    infos = {} if source is None else source.tensors
    for name in sorted(frozen):
        for names, said in ((own, "the module"), (infos, f"the start {like}")):
            if name not in names:
                raise TrainerError(f"{said} has no tensor {name!r} to freeze{nearest(name, names)}")
    floats = {info.dtype for info in infos.values() if DTYPES[info.dtype].kind == "float"}
    described = []
    for name, tensor in own.items():
        dtype = _NAMES.get(tensor.dtype)
        if dtype is None or tensor.layout != torch.strided:
            raise TrainerError(
                f"the module's tensor {name!r} is {tensor.dtype} and {tensor.layout}, where "
                f"safetensors holds only strided tensors of its own dtypes"
            )
        if name in infos:
            _must_fit(infos[name], tensor)
            dtype = infos[name].dtype
        elif len(floats) == 1 and tensor.is_floating_point():
            (dtype,) = floats
        described.append(OutputTensor(name, dtype, tuple(tensor.shape)))
    (file,) = layout(described, file_name=path.name, shard_size=None)
    told = {**(metadata or {}), "format": "pt"}
    if lineage is not None:
        told[LINEAGE_KEY] = json.dumps(lineage, separators=(",", ":"))
    with CheckpointWriter(path, [file], told, force=True) as writer:
        offset = 0
        for entry in file.tensors:
            value = own[entry.name]
            if source is not None and entry.name in frozen:
                stored = _read(source, entry.name)
                if not _holds(value, stored):
                    raise TrainerError(
                        f"the frozen tensor {entry.name!r} is not what it is in {like}: it must be "
                        f"loaded from there, and given to freeze() before the training"
                    )
                value = stored
            data = _bytes(value.detach().to("cpu", _TORCH[entry.dtype]))
            writer.write(file.name, data.data, offset)
            offset += entry.nbytes
        writer.commit()


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and persistent buffers, not copies, by all of their names."""
    state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_meta:
            what = "on the meta device" if isinstance(value, torch.Tensor) else "no tensor"
            raise TrainerError(f"the module's {name!r} is {what}: it cannot be loaded or saved")
    return state


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _stay_in_eval(module: nn.Module, _inputs: object) -> None:
    module.training = False


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that are tied, be it as one object or by their storage."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _must_fit(info: TensorInfo, own: torch.Tensor) -> None:
    said = f"{info.file}: tensor {info.name!r} has the"
    if info.shape != tuple(own.shape):
        raise MismatchError(f"{said} shape {list(info.shape)}, but in the module {list(own.shape)}")
    stored = _TORCH.get(info.dtype)
    if stored is None or (
        stored != own.dtype and not (stored.is_floating_point and own.is_floating_point())
    ):
        raise MismatchError(
            f"{said} dtype {info.dtype}, but in the module {_NAMES.get(own.dtype, own.dtype)}, "
            f"and only floats are converted"
        )


def _initialise(module: nn.Module, names: Iterable[str], seed: int) -> None:
    own = _tensors(module)
    wanted = {name: _owner(module, name) for name in names}
    parameters = [
        name for name in wanted
        if isinstance(own[name], nn.Parameter) and own[name].is_floating_point()
    ]  # fmt: skip
    gpus = sorted({tensor.device.index for tensor in own.values() if tensor.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        for name in parameters:
            own[name].fill_(torch.nan)  # what still has it afterwards was not set
        # Children before their parents, as in constructors: a parent's word is the last.
        for path, owner in reversed(list(module.named_modules())):
            # MultiheadAttention and Transformer have it under the private name.
            reset = getattr(owner, "reset_parameters", getattr(owner, "_reset_parameters", None))
            if reset is None or owner not in wanted.values():
                continue
            stream = xxhash.xxh3_64_intdigest(path.encode(), seed=seed)
            # torch.manual_seed would seed every GPU, also those that are not forked here.
            for generator in (
                torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)
            ):  # fmt: skip
                generator.manual_seed(stream)
            reset()
    own = _tensors(module)
    for name in parameters:
        if own[name].isnan().any():
            raise TrainerError(
                f"no reset_parameters sets the missing {name!r} of {type(wanted[name]).__name__}: "
                f"construct the module after torch.manual_seed, and load without a seed"
            )


def _normalise(module: nn.Module, missing: Collection[str], seed: int) -> None:
    """Find the vectors of spectral norm that were missing, for the weights that are there now.

    A constructor draws them from torch's global generator, and for the weights that it made itself:
    by those a loaded weight would be divided by anything.
    """
    for path, owner in module.named_modules():
        for weight, names in _spectral(module, path, owner):
            u, v, sigma = (getattr(owner, name, None) for name in names)
            wanted = [f"{path}.{name}".removeprefix(".") in missing for name in names]
            if u is None or not any(wanted):
                continue
            matrix = weight.detach().to("cpu", torch.float32)
            found = u.detach().to("cpu", torch.float32).flatten()
            if wanted[0]:
                stream = xxhash.xxh3_64_intdigest(f"{path}.{names[0]}".encode(), seed=seed)
                found = torch.randn(len(found), generator=torch.Generator().manual_seed(stream))
                for _ in range(_ITERATIONS):
                    right = nn.functional.normalize(matrix.T @ found, dim=0)
                    found = nn.functional.normalize(matrix @ right, dim=0)
            right = nn.functional.normalize(matrix.T @ found, dim=0)
            values = (found, right, found @ matrix @ right)
            for own, value, is_wanted in zip((u, v, sigma), values, wanted, strict=True):
                if own is not None and is_wanted:
                    own.detach().copy_(value.reshape(own.shape))


def _spectral(
    module: nn.Module, path: str, owner: nn.Module
) -> Iterator[tuple[torch.Tensor, tuple[str, str, str]]]:
    """Weights as matrices that a module divides by their largest singular value.

    Beside each, the names of its buffers: the left and the right vector, and the value; not every
    implementation has all. Known are torch's two, and that of BigGAN's code (`u0`, `sv0`,
    and `u1`, `sv1`, … where it follows several values).
    """
    if hasattr(owner, "_reshape_weight_to_matrix"):  # torch.nn.utils.parametrizations
        weight = _owner(module, path).original
        yield owner._reshape_weight_to_matrix(weight), ("_u", "_v", "")
    for hook in owner._forward_pre_hooks.values():
        if hasattr(hook, "reshape_weight_to_matrix"):  # torch.nn.utils.spectral_norm
            weight = getattr(owner, f"{hook.name}_orig")
            names = (f"{hook.name}_u", f"{hook.name}_v", "")
            yield hook.reshape_weight_to_matrix(weight), names
    # To ask for any other layer's weight could be a step of torch's own power iteration.
    if "u0" in owner._buffers and isinstance(getattr(owner, "weight", None), torch.Tensor):
        matrix = owner.weight.detach().flatten(1)
        for number in range(len(matrix)):
            u = owner._buffers.get(f"u{number}")
            if u is None:
                break
            yield matrix, (f"u{number}", "", f"sv{number}")
            # The next pair is the first one of what this one, found by now, leaves over.
            left = nn.functional.normalize(u.detach().flatten().to(matrix.dtype), dim=0)
            matrix = matrix - torch.outer(left, left @ matrix)


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor in its stored dtype; not mapped, so that a truncated file is an error, no crash."""
    info = checkpoint.tensors[name]
    raw = torch.from_numpy(checkpoint[name].reshape(-1).view(np.uint8))
    return raw.view(_TORCH[info.dtype]).reshape(info.shape)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor on the CPU, a copy only if it is not contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # One element is contiguous with any stride, but can be seen as bytes only with stride 1.
    raw: np.ndarray = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
    return raw


def _holds(own: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a module's tensor has the bits that loading `stored` gives, NaN included."""
    return bool(np.array_equal(_bytes(own.detach().cpu()), _bytes(stored.to(own.dtype))))
