"""Using an exported model: OpenVINO, NumPy and Pillow, and never torch.

A model is reshaped to the size of an image, so that nothing is scaled. Sides that are no multiple
of what the network wants are continued by reflection, and the result is cut back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from modelsoup_i2i.pictures.images import CHANNELS

from modelsoup import ParameterError, SoupError

from . import export
from .measure import compiled_for
from .report import as_pixels

_KEPT = 4  # sizes for which the compiled model is kept


class Translator:
    """A model for images of any size, of as many channels as it has: 3, 1 (grey) or 4 (opacity).

    Args:
        model: the path of an IR's `.xml`.
        precision: of what is not INT8: `f32`, or `bf16` where the CPU has it.

    Raises:
        VersionError: OpenVINO is missing or of another version.
        CheckpointError: a file is missing or damaged.
        ParameterError: it is no model from images to images.
    """

    def __init__(self, model: Path, *, precision: str = "f32") -> None:
        self._model, self._precision = export.read(model), precision
        inputs, outputs = self._model.inputs, self._model.outputs
        four = [p.get_partial_shape().rank.get_length() == 4 for p in (*inputs, *outputs)
                if p.get_partial_shape().rank.is_static]  # fmt: skip
        if len(inputs) != 1 or len(outputs) != 1 or four != [True, True]:
            raise ParameterError(
                f"{model} has {len(inputs)} inputs and {len(outputs)} outputs, where one image in "
                f"and one out are expected"
            )
        told = export.about(self._model)
        self.multiple = int(told.get("multiple", "1"))
        channels = inputs[0].get_partial_shape()[1]
        self.channels = channels.get_length() if channels.is_static else 0
        if self.channels not in CHANNELS:
            raise ParameterError(
                f"{model} wants {channels} channels, where pictures have 1, 3 or 4"
            )
        self._compiled: OrderedDict[tuple[int, int], Callable[[Any], Any]] = OrderedDict()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Translate uint8, H × W × channels, to the same shape and type."""
        height, width, channels = image.shape
        if channels != self.channels:
            raise ParameterError(
                f"the picture has {channels} channels, where the model translates such of "
                f"{self.channels}"
            )
        # Where a network has halved the sides as often as it does, its padding by reflection
        # needs two pixels.
        high, wide = (max(side, 2 * self.multiple) for side in (height, width))
        below = high + -high % self.multiple - height
        right = wide + -wide % self.multiple - width
        kind = "reflect" if below < height and right < width else "edge"
        padded = np.pad(image, ((0, below), (0, right), (0, 0)), mode=kind)  # type: ignore[call-overload]
        values = padded.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        made = self._for(padded.shape[0], padded.shape[1])(np.ascontiguousarray(values))[0]
        return as_pixels(np.asarray(made)[:, :, :height, :width])

    def _for(self, height: int, width: int) -> Callable[[Any], Any]:
        found = self._compiled.get((height, width))
        if found is None:
            try:
                self._model.reshape([1, self.channels, height, width])
                found = compiled_for(self._model, "LATENCY", precision=self._precision)
            except RuntimeError as error:
                said = " ".join(str(error).split())[-200:]
                raise ParameterError(
                    f"the model cannot be reshaped to images of {height} × {width}: {said}"
                ) from error
            self._compiled[height, width] = found
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end((height, width))
        return found


def translate(
    model: Path, source: Path, target: Path, *, force: bool = False, precision: str = "f32",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:  # fmt: skip
    """Translate a picture, or all of a folder; what was written.

    Pictures are put in place when all are made, so that a failure leaves no part of them.

    Args:
        model: the path of an IR's `.xml`.
        source: an image, or a folder of them.
        target: a `.png` file or a folder that exists; for a folder a folder, which is made.
        force: replace what is there.
        precision: as in `Translator`.
        progress: is told how many are done, and of how many.

    Raises:
        SoupError: as `Translator` and `use.places.translations`, or an image is damaged.
    """
    from modelsoup_i2i.pictures.images import read_image, save_png
    from modelsoup_i2i.use.places import translations

    with translations(source, target, force=force) as wanted:
        network = Translator(model, precision=precision)
        for done, one in enumerate(wanted, 1):
            picture = read_image(one.source, network.channels)
            try:
                save_png(network(picture), one.partial)
            except SoupError as error:
                raise type(error)(f"{one.source}: {error}") from error
            if progress is not None:
                progress(done, len(wanted))
    return [one.output for one in wanted]
