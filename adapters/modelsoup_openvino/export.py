"""From a torch network, fake-quantised or float, to OpenVINO's IR: two files, `.xml` and `.bin`.

The graph is that of the network but for two places, which compute the same numbers. Group norms of
single channels are spelt out. And a wide convolution with very few output channels (the last one of
a generator: 64 to 3, 7 × 7) would leave most of a vector register empty. Four neighbouring pixels
become channels instead: the weights are laid four times, each shifted by a pixel, into one kernel
that is a pixel larger, with stride 2; what it makes is put back in order by a depth-to-space.
Integers are copied, never rounded again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelsoup import CheckpointError, OutputError, SoupError

from .deploy import IMAGE, Inputs
from .quantise import arguments, traced
from .versions import load_openvino, silence

if TYPE_CHECKING:
    import torch
    from torch import nn

SECTION = "modelsoup"
"""Where in an IR's `rt_info` our texts are."""

NARROW = 4
"""A convolution with so few output channels is folded."""

LEAST_AGREEMENT = 30.0
"""dB between a network's outputs and those of its export, below which the export is refused."""


def converted(network: nn.Module, example: torch.Tensor | Inputs, *, fold: bool = True) -> Any:
    """An `openvino.Model` that computes what a network does, on images of one size.

    Args:
        network: fake-quantised or float, in eval mode, on the CPU.
        example: what it is called with, whose names its inputs get; or an image alone, 1 × channels
            × height × width, float32.
        fold: put pixels into the channels of narrow convolutions.

    Raises:
        VersionError: OpenVINO is missing or of another version.
        SoupError: OpenVINO cannot convert it.
    """
    ov = load_openvino()
    inputs = example if isinstance(example, Mapping) else {IMAGE: example}
    try:
        with silence(), traced():
            model = ov.convert_model(
                network, example_input=tuple(inputs.values()),
                input=[list(values.shape) for values in inputs.values()],
            )  # fmt: skip
    except Exception as error:  # whatever the tracer or one of many conversions raises
        said = " ".join(str(error).split())[:300]
        raise SoupError(f"OpenVINO cannot convert the network: {said}") from error
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    # Folded by copying constants, which are what conversion made of the fake-quantised weights.
    for node in model.get_ordered_ops():
        if fold and node.get_type_name() == "Convolution":
            _fold(ov, model, node)
        if node.get_type_name() == "GroupNormalization":
            _spell_out(ov, node)
    model.validate_nodes_and_infer_types()
    return model


def write(model: Any, path: Path, about: Mapping[str, str], *, half: bool = False) -> None:
    """Write an IR: both files, or neither; what is there under these names is replaced.

    Args:
        model: what `converted` gave.
        path: of the `.xml`; the `.bin` goes beside it.
        about: texts for the section `modelsoup` of its `rt_info`.
        half: store float32 weights as float16.

    Raises:
        OutputError: it cannot be written.
    """
    ov = load_openvino()
    if path.suffix != ".xml":
        raise OutputError(f"the model {path} must end in .xml")
    for name, text in about.items():
        model.set_rt_info(text, [SECTION, name])
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        ov.save_model(model, folder / path.name, compress_to_fp16=half)
        # The weights first: an .xml without its .bin is never seen.
        (folder / path.name).with_suffix(".bin").replace(path.with_suffix(".bin"))
        (folder / path.name).replace(path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read(path: Path) -> Any:
    """An IR as an `openvino.Model`, with its weights.

    Raises:
        VersionError: OpenVINO is missing or of another version.
        CheckpointError: a file of the two is missing, or they are damaged.
    """
    if path.suffix != ".xml":
        raise CheckpointError(f"{path} is no OpenVINO model: its .xml file is expected")
    for file, what in ((path, "model"), (path.with_suffix(".bin"), "weights")):
        if not file.is_file():
            beside = "" if what == "model" else f", which belong to {path.name}"
            raise CheckpointError(f"there is no file {file} with the {what}{beside}")
    ov = load_openvino()
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        said = " ".join(str(error).split())[-200:]
        raise CheckpointError(f"{path} is damaged, or not of this OpenVINO: {said}") from error


def about(model: Any) -> dict[str, str]:
    """The texts that `write` put into a model; none if it is another's."""
    if not model.has_rt_info(SECTION):
        return {}
    section = model.get_rt_info(SECTION)
    return {name: str(model.get_rt_info([SECTION, name]).value) for name in section.value}


def integer_operations(model: Any) -> dict[str, tuple[int, int]]:
    """How many convolutions and products of a graph are INT8, and how many there are, by type.

    An operation is INT8 if its weights are stored as 8-bit integers and its input is quantised to
    at most 256 levels, through nothing but layers that only move values.
    """
    found: dict[str, tuple[int, int]] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "MatMul"):
            continue
        whole = _is_quantised(node.input_value(0)) and _stored_as_integers(node.input_value(1))
        integer, total = found.get(kind, (0, 0))
        found[kind] = (integer + whole, total + 1)
    return found


def executed_operations(compiled: Any) -> dict[str, Counter[str]]:
    """How OpenVINO carries a compiled model out: operation type → precision → how many."""
    found: dict[str, Counter[str]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = node.get_rt_info()
        kind = str(told["layerType"].astype(str))
        precision = str(told["runtimePrecision"].astype(str))
        found.setdefault(kind, Counter())[precision] += 1
    return found


def agreement(network: nn.Module, model: Any, example: torch.Tensor | Inputs) -> float:
    """PSNR in dB between the outputs of a network and of its export, on one image.

    Images are taken to be in [−1, 1], so that the peak is 2; or more where a network's are not.

    Raises:
        SoupError: it is below `LEAST_AGREEMENT`: the export does not compute what the network does.
    """
    import torch

    from .measure import PEAK, compiled_for, psnr, saturates

    inputs = arguments(example)
    with torch.inference_mode():
        expected = network(*inputs).numpy()
    got = compiled_for(model, "LATENCY")([values.numpy() for values in inputs])[0]
    found = psnr(got, expected, max(PEAK, float(np.ptp(expected))))
    if not found >= LEAST_AGREEMENT:
        integer = any(own for own, _ in integer_operations(model).values())
        hint = "; this CPU has no VNNI and may cut sums off, which overflow_fix 'enable' avoids"
        raise SoupError(
            f"the exported model does not compute what the network does: {found:.1f} dB between "
            f"their outputs, where at least {LEAST_AGREEMENT:g} dB are expected"
            + (hint if integer and saturates() else "")
        )
    return found


def _fold(ov: Any, model: Any, node: Any) -> None:
    """Replace a narrow convolution by the same with four pixels in its channels."""
    weights = _constant_weights(node.input_value(1).get_node())
    output = node.get_output_partial_shape(0)
    if weights is None or output.is_dynamic:
        return
    integers, scale = weights
    _, channels, height, width = (int(side) for side in output.get_shape())
    plain = (
        [*node.get_strides()] == [1, 1] and [*node.get_dilations()] == [1, 1]
        and node.get_auto_pad() == "explicit"
    )  # fmt: skip
    below, right = integers.shape[2:]
    if not plain or channels > NARROW or min(below, right) < 3 or height % 2 or width % 2:
        return
    op = ov.opset13
    wide = np.zeros((4 * channels, integers.shape[1], below + 1, right + 1), integers.dtype)
    for down in range(2):
        for across in range(2):
            wide[2 * down + across :: 4, :, down : down + below, across : across + right] = integers
    kernel = op.constant(wide)
    if wide.dtype != np.float32:
        kernel = op.convert(kernel, "f32")
    if scale is not None:
        own = scale if scale.shape[0] == 1 else np.repeat(scale, 4, axis=0)
        kernel = op.multiply(kernel, op.constant(own))
    folded = op.convolution(
        node.input_value(0), kernel, [2, 2], node.get_pads_begin(), node.get_pads_end(), [1, 1]
    )
    last = node
    readers = list(node.output(0).get_target_inputs())
    if len(readers) == 1 and readers[0].get_node().get_type_name() == "Add":
        add = readers[0].get_node()
        bias = _constant(add.input_value(1).get_node())
        if bias is not None and bias.shape == (1, channels, 1, 1):
            folded = op.add(folded, op.constant(np.repeat(bias, 4, axis=1)))
            last = add
    ordered = op.depth_to_space(folded, "depth_first", 2)
    ordered.set_friendly_name(last.get_friendly_name())
    for reader in list(last.output(0).get_target_inputs()):
        reader.replace_source_output(ordered.output(0))


def _spell_out(ov: Any, node: Any) -> None:
    """Replace a group norm of one channel a group by what it is: a norm, a product and a sum.

    OpenVINO 2026.4 crashes where it compiles such a one for float32.
    """
    channels, told = node.get_output_partial_shape(0)[1], node.get_attributes()
    if channels.is_dynamic or told["num_groups"] != channels.get_length():
        return
    op = ov.opset13
    data, *others = node.input_values()
    scale, bias = (op.reshape(own, op.constant([1, -1, 1, 1]), False) for own in others)
    normal = op.mvn(data, op.constant([2, 3]), True, told["epsilon"], "inside_sqrt")
    made = op.add(op.multiply(normal, scale), bias)
    made.set_friendly_name(node.get_friendly_name())
    for reader in list(node.output(0).get_target_inputs()):
        reader.replace_source_output(made.output(0))


def _constant(node: Any) -> np.ndarray | None:
    return np.array(node.data) if node.get_type_name() == "Constant" else None


def _constant_weights(node: Any) -> tuple[np.ndarray, np.ndarray | None] | None:
    """A weight as stored, and its scale: what Constant → Convert → Multiply holds; else None."""
    if node.get_type_name() == "Constant":
        return np.array(node.data), None
    if node.get_type_name() != "Multiply":
        return None
    scale = _constant(node.input_value(1).get_node())
    convert = node.input_value(0).get_node()
    if scale is None or scale.ndim != 4 or convert.get_type_name() != "Convert":
        return None
    integers = _constant(convert.input_value(0).get_node())
    return None if integers is None else (integers, scale)


_MOVES = ("Pad", "Reshape", "Transpose", "DepthToSpace", "SpaceToDepth", "Squeeze", "Unsqueeze",
          "Split", "VariadicSplit", "StridedSlice", "Gather", "Broadcast")  # fmt: skip


def _is_quantised(source: Any) -> bool:
    node = source.get_node()
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Concat":
        return all(_is_quantised(one) for one in node.input_values())
    levels = node.get_levels() if node.get_type_name() == "FakeQuantize" else 0
    return bool(1 < levels <= 256)


def _stored_as_integers(source: Any) -> bool:
    node = source.get_node()
    while node.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant" and node.get_element_type().size == 1)


def digest_of(checkpoint: Path) -> str:
    """XXH3-128 of a checkpoint's bytes, as `soup inspect` tells; of a folder, of all its shards."""
    from modelsoup import digest_file, open_checkpoint

    files = sorted({info.file for info in open_checkpoint(checkpoint).tensors.values()})
    return " ".join(digest_file(file).xxh3_128 for file in files)
