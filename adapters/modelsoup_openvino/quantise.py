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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
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
    known = operations(network, dict(enumerate(example)))
    # Norms stay float, as instance norms do; and a scale of theirs is more than NNCF can quantise.
    names = [node for node in known if "group_norm" in node.split("/")]
    if not (names or how.ignored_names or how.ignored_patterns or how.ignored_types):
        return None
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


@contextmanager
def traced() -> Iterator[None]:
    """While a quantised network is traced, when sizes of tensors are tensors themselves.

    What is computed of them are operations then, which they are not when it is called, and NNCF
    would count them: quantisers would stand elsewhere.
    """
    if "nncf" not in sys.modules:  # so that nothing has quantisers
        yield
        return
    import torch
    from nncf.torch.function_hook import wrapper
    from torch.utils._pytree import tree_leaves

    usual = wrapper.FunctionHookMode

    class WithSizes(usual):  # type: ignore[misc, valid-type]
        """Leaves alone what is computed of sizes."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.computed: list[torch.Tensor] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            tensors = [own for own in tree_leaves((args, kwargs)) if isinstance(own, torch.Tensor)]
            if not tensors or not all(map(self.is_size, tensors)):
                return super().__torch_function__(func, types, args, kwargs)
            made = func(*args, **(kwargs or {}))
            self.computed += [own for own in tree_leaves(made) if isinstance(own, torch.Tensor)]
            return made

        def is_size(self, tensor: torch.Tensor) -> bool:
            if tensor.ndim == 0 and not tensor.is_floating_point():
                return True
            return any(tensor is own for own in self.computed)

    wrapper.FunctionHookMode = WithSizes
    try:
        yield
    finally:
        wrapper.FunctionHookMode = usual


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


@dataclass
class _Call:
    """A call of a part within one of the whole: where in it, and of which of the whole's inputs."""

    stack: list[nn.Module]
    inputs: dict[int, str]
    begun: int
    ended: int = 0


def trained_apart(whole: nn.Module, example: Inputs, others: Iterable[nn.Module]) -> None:
    """Have the parts of a quantised network quantise where they are called without it, too.

    Losses may call them so, alone or in something else. NNCF's names of operations count within a
    call of the whole: a part must begin with the operations that it makes there, or its quantisers
    would stand elsewhere.

    Args:
        whole: what was loaded `into` a network that is joined of others, in evaluation mode.
        example: what it is called with.
        others: all other networks, of whose modules its parts are.

    Raises:
        TrainerError: a part of it is called twice; or, when one is called, it computes otherwise.
    """
    import torch
    from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
    from nncf.torch.function_hook.wrapper import get_hook_storage

    hooks = get_hook_storage(whole)

    class Telling(FunctionHookMode):
        """Tells the operations, by their names in order."""

        def __init__(self) -> None:
            super().__init__(model=whole, hook_storage=hooks)
            self.made: list[str] = []

        def get_next_op_call_name(self, fn_name: str) -> str:
            found: str = super().get_next_op_call_name(fn_name)
            self.made.append(found)
            return found

    shared = {id(module) for other in others for module in other.modules()}
    calls: dict[str, list[_Call]] = {
        name: [] for name, module in whole.named_modules() if id(module) in shared
    }

    def enters(name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        own = {n: names[id(value)] for n, value in enumerate(given) if id(value) in names}
        calls[name].append(_Call(mode.module_call_stack[1:], own, len(mode.made)))

    def leaves(name: str, *_: Any) -> None:
        calls[name][-1].ended = len(mode.made)

    watching = [
        handle for name in calls for handle in (
            whole.get_submodule(name).register_forward_pre_hook(partial(enters, name)),
            whole.get_submodule(name).register_forward_hook(partial(leaves, name)),
        )
    ]  # fmt: skip
    mode = Telling()
    with torch.no_grad(), silence(), mode:
        given, named = mode.process_model_inputs(arguments(example), {})
        signature = inspect.signature(whole.forward).parameters
        names = {id(own): name for name, own in zip(signature, given, strict=False)}
        whole.forward.orig_forward(*given, **named)
    for handle in watching:
        handle.remove()

    def change(module: nn.Module, place: str) -> None:
        for name, child in module.named_children():
            within = f"{place}{name}"
            found = calls.get(within, [])
            if len(found) > 1 and any(True for _ in child.parameters()):
                raise TrainerError(
                    f"{within} cannot be trained in INT8, for in use it is called "
                    f"{len(found)} times: {_INSTEAD}"
                )
            if len(found) == 1:
                in_use = mode.made[found[0].begun : found[0].ended]
                child.forward = partial(
                    _apart, child.forward, child, within, Telling, found[0], in_use
                )
            else:
                change(child, f"{within}.")

    change(whole, "")


def _apart(
    forward: Callable[..., Any], part: nn.Module, name: str, mode_of: Callable[[], Any],
    within: _Call, in_use: Sequence[str], *given: Any, **named: Any,
) -> Any:  # fmt: skip
    """A part's forward pass, which quantises by itself unless what it is called in does."""
    if "_call_impl" in vars(part):  # NNCF puts it there while the whole, or a part, is called
        return forward(*given, **named)
    with mode_of() as mode:
        own = [
            mode.execute_hooks_for_model_input(within.inputs[n], value)
            if n in within.inputs else value for n, value in enumerate(given)
        ]  # fmt: skip
        begun = len(mode.made)
        for module in within.stack:
            mode.push_module_call_stack(module)
        result = forward(*own, **named)
    if mode.made[begun : begun + len(in_use)] != in_use:
        raise TrainerError(
            f"{name} cannot be trained in INT8, for a loss has it compute otherwise than in use: "
            f"{_INSTEAD}"
        )
    return result


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

    return load_into(deepcopy(network), path, say=say)


def load_into(network: nn.Module, path: Path, *, say: Say) -> nn.Module:
    """The same, of the network itself: it gets the quantisers, and the values of its tensors."""
    tensors, header = read_quantised(path)
    nncf = load_nncf(say)
    try:
        with silence():
            module: nn.Module = nncf.torch.load_from_config(network, json.loads(header[CONFIG]))
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
