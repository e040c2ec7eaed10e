"""Post-training quantisation by NNCF, and the quantised checkpoint: safetensors, no pickle.

NNCF keeps a float network as it is and puts fake quantisers before its operations: INT8 by its
values, float by its type, so it can go on being trained. They are modules below `__nncf_hooks`;
where each one stands is told by a configuration, which the checkpoint carries as JSON.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelsoup import (
    CheckpointError,
    MismatchError,
    ParameterError,
    TrainerError,
    nearest,
    placed,
)

from .versions import Say, load_nncf, silence

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .deploy import Inputs

HOOKS = "__nncf_hooks."
"""What the names of NNCF's own tensors begin with."""

FORMAT = "modelsoup.quantised"
CONFIG = "nncf"
MOST_IMAGES = 300

_INSTEAD = "epochs 0 calibrates it and trains nothing, which makes a model for the device too"

Mode = Literal["symmetric", "asymmetric"]


@dataclass(frozen=True)
class Quantisation:
    """How a network is quantised, by NNCF's names (`nncf.quantize`, its advanced parameters).

    Attributes:
        preset: `performance`: symmetric activations, which every INT8 operation of a CPU takes.
            `mixed`: asymmetric ones, a little finer; OpenVINO then computes some transposed
            convolutions in float32.
        subset_size: how many calibration images are looked at, 1 to 300.
        fast_bias_correction: False is NNCF's slower way.
        weights: mode of the weights; None is the preset's.
        activations: mode of the activations; None is the preset's.
        per_channel: a scale for each output channel of a weight, or one for all.
        overflow_fix: which weights use half of the 8-bit range (`first_layer_only`, `enable` for
            all), so that a CPU without VNNI does not saturate sums of two products.
        ignored_names: what stays float: a layer by its name in the checkpoint (`model.26`), or an
            operation by NNCF's (`model/26/conv2d/0`).
        ignored_patterns: the same by regular expressions over NNCF's names.
        ignored_types: the same by types of operations (`conv_transpose2d`).
    """

    preset: Literal["performance", "mixed"] = "performance"
    subset_size: int = MOST_IMAGES
    fast_bias_correction: bool = True
    weights: Mode | None = None
    activations: Mode | None = None
    per_channel: bool = True
    overflow_fix: Literal["disable", "first_layer_only", "enable"] = "first_layer_only"
    ignored_names: tuple[str, ...] = ()
    ignored_patterns: tuple[str, ...] = ()
    ignored_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.subset_size <= MOST_IMAGES:
            raise ValueError(
                f"subset_size is {self.subset_size}, but must be from 1 to {MOST_IMAGES}"
            )


def quantised(
    network: nn.Module, seen: Iterable[torch.Tensor | Inputs], how: Quantisation, *,
    frozen: Iterable[str] = (), say: Say,
) -> nn.Module:  # fmt: skip
    """A copy of a float network with NNCF's quantisers in it, calibrated on images.

    Args:
        network: in eval mode; stays as it is. Not an `nn.Sequential`, to which NNCF's own child
            would be one more layer.
        seen: what it is called with in use: images, float32 of 1 × channels × height × width each,
            or `Inputs`; the first `subset_size` are taken.
        how: presets and exceptions.
        frozen: names of its tensors that keep their value, which bias correction would change.
        say: is told what a user may want to know.

    Raises:
        VersionError: NNCF is missing or of another version.
        ParameterError: there is no image, or what is to be ignored is not in the network.
    """
    nncf = load_nncf(say)
    import torch

    chosen = [arguments(own) for own in islice(iter(seen), how.subset_size)]
    if not chosen:
        raise ParameterError("there is no calibration image, where 1 to 300 are expected")
    with silence(), _quiet():
        try:
            result: nn.Module = nncf.quantize(
                network,
                nncf.Dataset(chosen),
                preset=nncf.QuantizationPreset(how.preset),
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(chosen),
                fast_bias_correction=how.fast_bias_correction,
                ignored_scope=_ignored(nncf, network, chosen[0], how),
                advanced_parameters=_advanced(nncf, how),
            )
        except nncf.ValidationError as error:
            said = " ".join(str(error).split())
            raise ParameterError(f"NNCF refuses what is to be ignored: {said}") from error
        except re.error as error:
            raise ParameterError(
                f"{error.pattern!r} in what is to be ignored is no regular expression: {error}"
            ) from error
    before = network.state_dict()
    own = result.state_dict()
    with torch.no_grad():
        for name in frozen:
            own[name].copy_(before[name])  # state_dict() shares memory with the module
    return result


def arguments(call: torch.Tensor | Inputs) -> tuple[torch.Tensor, ...]:
    """What a network is called with: an image, or all of `Inputs`, in their order."""
    return tuple(call.values()) if isinstance(call, Mapping) else (call,)


def operations(network: nn.Module, example: torch.Tensor | Inputs) -> dict[str, set[str]]:
    """NNCF's names of a network's operations, such as `model/26/conv2d/0`, in their order.

    Each with the names of the network's own tensors that it computes with.
    """
    from copy import deepcopy

    from nncf.torch.function_hook import wrap_model
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    with silence():
        graph = build_nncf_graph(wrap_model(deepcopy(network)), arguments(example))
    own = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    return {
        node.node_name: own & {before.node_name for before in graph.get_previous_nodes(node)}
        for node in graph.get_all_nodes()
    }


def _ignored(
    nncf: Any, network: nn.Module, example: tuple[torch.Tensor, ...], how: Quantisation
) -> Any:
    if not (how.ignored_names or how.ignored_patterns or how.ignored_types):
        return None
    known = operations(network, dict(enumerate(example)))
    names: list[str] = []
    for name in how.ignored_names:
        # Where blocks are called in a loop, their place in it is not in NNCF's names.
        inside, of_layer = f"{name.replace('.', '/')}/", f"{name}."
        found = [
            node for node, tensors in known.items()
            if node == name or node.startswith(inside)
            or any(tensor.startswith(of_layer) for tensor in tensors)
        ]  # fmt: skip
        if not found:
            layers = [path for path, _ in network.named_modules() if path]
            raise ParameterError(
                f"the network has no layer or operation {name!r} to ignore"
                f"{nearest(name, [*known, *layers])}"
            )
        names += found
    return nncf.IgnoredScope(
        names=names, patterns=list(how.ignored_patterns), types=list(how.ignored_types)
    )


def _advanced(nncf: Any, how: Quantisation) -> Any:
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization.advanced_parameters import OverflowFix, QuantizationParameters

    return nncf.AdvancedQuantizationParameters(
        overflow_fix=OverflowFix(how.overflow_fix),
        weights_quantization_params=QuantizationParameters(
            mode=None if how.weights is None else QuantizationScheme(how.weights),
            per_channel=how.per_channel,
        ),
        activations_quantization_params=QuantizationParameters(
            mode=None if how.activations is None else QuantizationScheme(how.activations)
        ),
    )


def carried_over(made: nn.Module, plain: nn.Module, network: nn.Module) -> nn.Module:
    """A copy of a network with what calibration gave a plainer form of it: quantisers and biases.

    Spectral norms of a network for use are divided out (`spectral.folded`), which calibration
    wants; here they are not, so that it can be trained, and what it computes is the same.

    Args:
        made: the plain form, quantised.
        plain: the same before.
        network: what is to be trained.
    """
    from copy import deepcopy

    import nncf.torch
    import torch

    with silence():
        module: nn.Module = nncf.torch.load_from_config(
            deepcopy(network), nncf.torch.get_config(made)
        )
    before = plain.state_dict()
    changed = {
        name: value for name, value in made.state_dict().items()
        if name not in before or not torch.equal(value, before[name])
    }  # fmt: skip
    module.load_state_dict({**module.state_dict(), **changed})
    return module


def apart(whole: nn.Module, place: str, example: Inputs) -> Callable[..., Any]:
    """How a part of a quantised network is called alone: with the quantisers that it has within it.

    NNCF's names of operations count within a call of the whole. Called alone a part must make the
    same operations, in the same order, or its quantisers would stand elsewhere.

    Args:
        whole: what `quantised` or `load_quantised` gave, in evaluation mode.
        place: of the part in it, such as `E`.
        example: what it is called with.

    Raises:
        TrainerError: its operations are not its own; or, when it is called, are others.
    """
    import torch
    from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
    from nncf.torch.function_hook.wrapper import get_hook_storage

    hooks, part = get_hook_storage(whole), whole.get_submodule(place)
    inputs: dict[int, str] = {}  # which of its arguments are the whole's inputs
    before: dict[str, int] = {}
    counts: dict[str, int] = {}

    def enters(_: nn.Module, given: tuple[Any, ...]) -> None:
        before.update(mode.op_calls)
        inputs.update({n: names[id(value)] for n, value in enumerate(given) if id(value) in names})

    def leaves(*_: Any) -> None:
        counts.update(_since(before, mode.op_calls))

    watching = part.register_forward_pre_hook(enters), part.register_forward_hook(leaves)
    mode = FunctionHookMode(model=whole, hook_storage=hooks)
    with torch.no_grad(), silence(), mode:
        given, named = mode.process_model_inputs(arguments(example), {})
        signature = inspect.signature(whole.forward).parameters
        names = {id(value): name for name, value in zip(signature, given, strict=False)}
        whole.forward.orig_forward(*given, **named)  # type: ignore[attr-defined]
    for one in watching:
        one.remove()
    if any(before.get(name) for name in counts):
        raise TrainerError(f"{place} cannot be trained in INT8, for it is called twice: {_INSTEAD}")

    def call(*given: Any, **named: Any) -> Any:
        with FunctionHookMode(model=whole, hook_storage=hooks) as mode:
            own = [
                mode.execute_hooks_for_model_input(inputs[n], value) if n in inputs else value
                for n, value in enumerate(given)
            ]
            quantised = dict(mode.op_calls)
            result = part(*own, **named)
        if _since(quantised, mode.op_calls) != counts:
            raise TrainerError(
                f"{place} cannot be trained in INT8, for a loss has it compute otherwise than in "
                f"use: {_INSTEAD}"
            )
        return result

    return call


def _since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """How often more each operation was made."""
    more = {name: count - before.get(name, 0) for name, count in now.items()}
    return {name: count for name, count in more.items() if count}


def float_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The network's own tensors, by their names in the float network; quantisers left out."""
    return {
        name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if not name.startswith(HOOKS)
    }


def save_quantised(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a quantised network, whole or not at all: its tensors, and NNCF's configuration.

    Args:
        module: what `quantised` or `load_quantised` gave, trained or not.
        path: ends in `.safetensors`; what is there is replaced.
        metadata: more texts for the header.

    Raises:
        OutputError: it cannot be written.
    """
    import nncf.torch
    from safetensors.torch import save

    config = json.dumps(nncf.torch.get_config(module))
    # Copies: NNCF may have one quantiser in several places, and a file has each under its name.
    tensors = {
        name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()
    }
    header = {"format": "pt", **metadata, FORMAT: "1", CONFIG: config}
    with placed(path, force=True) as partial:
        partial.write_bytes(save(tensors, header))


def load_quantised(network: nn.Module, path: Path, *, say: Say) -> nn.Module:
    """A quantised network from its checkpoint, with the same outputs to the last bit.

    Args:
        network: the float network, of any values; stays as it is.
        path: what `save_quantised` wrote.
        say: as in `quantised`.

    Raises:
        VersionError: NNCF is missing or of another version.
        CheckpointError: the file is missing, damaged or no quantised checkpoint.
        MismatchError: it belongs to another network.
    """
    from copy import deepcopy

    tensors, header = read_quantised(path)
    nncf = load_nncf(say)
    try:
        with silence():
            module: nn.Module = nncf.torch.load_from_config(
                deepcopy(network), json.loads(header[CONFIG])
            )
        module.load_state_dict(tensors)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:300]
        raise MismatchError(f"{path} does not fit the network: {said}") from error
    return module


def read_quantised(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a quantised checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged or no quantised checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no quantised checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if header.get(FORMAT) != "1" or CONFIG not in header:
        raise CheckpointError(
            f"{path} is no quantised checkpoint: its header lacks {FORMAT!r} and NNCF's "
            f"configuration"
        )
    return tensors, header


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws progress bars on the terminal, whatever its log level."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as null,
        redirect_stdout(null),
        redirect_stderr(null),
    ):
        yield
