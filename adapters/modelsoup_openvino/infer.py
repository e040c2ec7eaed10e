"""Using an exported model: OpenVINO, NumPy and Pillow, and never torch.

A model is reshaped to the size of an image, so that nothing is scaled. Sides that are no multiple
of what the network wants are continued by reflection, and the result is cut back.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from modelsoup_i2i.pictures.draws import Noise
from modelsoup_i2i.pictures.images import CHANNELS
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.use.translator import Translator as Described

from modelsoup import ParameterError, SoupError, listed, nearest

from . import export
from .deploy import CLASS
from .measure import compiled_for
from .report import as_pixels

_KEPT = 4  # sizes for which the compiled model is kept


class Translator:
    """A model for images, of as many channels as it has: 3, 1 (grey) or 4 (opacity).

    Of any size; but where the model has one, it sees an image's middle, at that size.

    Args:
        model: the path of an IR's `.xml`.
        precision: of what is not INT8: `f32`, or `bf16` where the CPU has it.

    Attributes:
        takes: names of what it is called with beside an image, such as `z` and `class`.
        classes: names of the classes that it makes images of, by their indices.
        noise: which of `takes` are noise.

    Raises:
        VersionError: OpenVINO is missing or of another version.
        CheckpointError: a file is missing or damaged.
        ParameterError: it is no model from images to images.
    """

    def __init__(self, model: Path, *, precision: str = "f32") -> None:
        self._path, self._model, self._precision = model, export.read(model), precision
        told = export.about(self._model)
        inputs, outputs = self._model.inputs, self._model.outputs
        ranks = [port.get_partial_shape().rank for port in (*inputs, *outputs)]
        four = [rank.is_static and rank.get_length() == 4 for rank in ranks]
        others = [port.get_any_name() for port in inputs[1:]]
        # Another's model of several inputs says nothing of what they are.
        if not inputs or len(outputs) != 1 or not (four[0] and four[-1]) or (others and not told):
            raise ParameterError(
                f"{model} has {len(inputs)} inputs and {len(outputs)} outputs, where one image in "
                f"and one out are expected"
            )
        self.takes = tuple(others)
        self.classes: tuple[str, ...] = tuple(json.loads(told.get("classes", "[]")))
        self.noise: tuple[str, ...] = tuple(json.loads(told.get("noise", "[]")))
        self.multiple = int(told.get("multiple", "1"))
        self.side = int(told["side"]) if "side" in told else None
        channels = inputs[0].get_partial_shape()[1]
        self.channels = channels.get_length() if channels.is_static else 0
        if self.channels not in CHANNELS:
            raise ParameterError(
                f"{model} wants {channels} channels, where pictures have 1, 3 or 4"
            )
        self._compiled: OrderedDict[tuple[int, int], Callable[[Any], Any]] = OrderedDict()

    def given(
        self, name: str = "", of_class: str | None = None, *, seed: int = 0,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """What it is called with beside an image: all of `takes`, by name.

        Noise is what `soup i2i translate` draws for a picture of this name, and this seed.

        Args:
            name: of the picture, within the folder that is translated.
            of_class: the name of the class that it becomes one of.
            seed: of the noise.
            arrays: what is not drawn: a style, say; or noise that is known.

        Raises:
            ParameterError: something lacks, is of another shape, or is not taken.
        """
        arrays = dict(arrays or {})
        if unknown := [own for own in arrays if own not in self.takes]:
            raise ParameterError(
                f"{self._path} takes no {unknown[0]!r}{nearest(unknown[0], self.takes)} (it takes "
                f"{', '.join(self.takes) or 'images alone'})"
            )
        if seed and not set(self.noise) - arrays.keys():
            raise ParameterError(f"{self._path} takes no noise that a seed would decide")
        if self.classes and CLASS not in arrays:
            arrays[CLASS] = np.array([self._index(of_class)], np.int64)
        elif of_class is not None:
            raise ParameterError(f"{self._path} takes no name of a class here: leave it out")
        found = {}
        for port in self._model.inputs[1:]:
            own, shape = port.get_any_name(), tuple(port.get_shape())
            if own in arrays:
                values = np.asarray(arrays[own], port.get_element_type().to_dtype())
            elif own in self.noise:
                (values,) = Described("", "", "", takes=(Noise(own, shape[1:]),)).given(
                    [name], seed=seed
                )
            else:
                raise ParameterError(
                    f"{self._path} takes {own!r}, {' × '.join(map(str, shape))} numbers, which are "
                    f"not given"
                )
            if values.shape not in (shape, shape[1:]):
                raise ParameterError(
                    f"{own!r} has the shape {list(values.shape)}, where {self._path} takes "
                    f"{list(shape)}"
                )
            found[own] = np.ascontiguousarray(values.reshape(shape))
        return found

    def _index(self, of_class: str | None) -> int:
        if of_class is None:
            raise ParameterError(
                f"{self._path} makes pictures of classes: name one (it has {listed(self.classes)})"
            )
        if of_class not in self.classes:
            raise ParameterError(
                f"{self._path} has no class {of_class!r}{nearest(of_class, self.classes)} (it has "
                f"{listed(self.classes)})"
            )
        return self.classes.index(of_class)

    def __call__(
        self, image: np.ndarray, given: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Translate uint8, H × W × channels, to the same type, and shape but for a model of one.

        Args:
            image: the picture.
            given: what else the model takes; None is `self.given()`.

        Raises:
            ParameterError: the picture is of another type, or has other channels than the model's.
        """
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ParameterError(
                f"the picture is an array of {image.dtype} and the shape {list(image.shape)}, "
                f"where the model translates uint8 of the shape height × width × channels"
            )
        channels = image.shape[2]
        if channels != self.channels:
            raise ParameterError(
                f"the picture has {channels} channels, where the model translates such of "
                f"{self.channels}"
            )
        others = self.given() if given is None else given
        if self.side is not None:
            side = (self.side, self.side)
            image = Transform("centre_crop", side, side).for_test(image)
        height, width = image.shape[:2]
        # Where a network has halved the sides as often as it does, its padding by reflection
        # needs two pixels.
        high, wide = (max(side, 2 * self.multiple) for side in (height, width))
        below = high + -high % self.multiple - height
        right = wide + -wide % self.multiple - width
        kind = "reflect" if below < height and right < width else "edge"
        padded = np.pad(image, ((0, below), (0, right), (0, 0)), mode=kind)  # type: ignore[call-overload]
        values = padded.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        call = self._for(padded.shape[0], padded.shape[1])
        made = call([np.ascontiguousarray(values), *(others[name] for name in self.takes)])[0]
        return as_pixels(np.asarray(made)[:, :, :height, :width])

    def _for(self, height: int, width: int) -> Callable[[Any], Any]:
        found = self._compiled.get((height, width))
        if found is None:
            try:
                self._model.reshape({0: [1, self.channels, height, width]})
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
    of_class: str | None = None, seed: int = 0, arrays: Mapping[str, np.ndarray] | None = None,
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
        of_class: as in `Translator.given`, and so are the next two.
        seed: of the noise.
        arrays: what is not drawn.
        progress: is told how many are done, and of how many.

    Raises:
        SoupError: as `Translator` and `use.places.translations`, or an image is damaged.
    """
    from modelsoup_i2i.pictures.images import read_image, save_png
    from modelsoup_i2i.use.places import translations

    with translations(source, target, force=force) as wanted:
        network = Translator(model, precision=precision)
        network.given("", of_class, seed=seed, arrays=arrays)
        root = source if source.is_dir() else source.parent
        for done, one in enumerate(wanted, 1):
            picture = read_image(one.source, network.channels)
            name = one.source.relative_to(root).as_posix()
            given = network.given(name, of_class, seed=seed, arrays=arrays)
            try:
                save_png(network(picture, given), one.partial)
            except SoupError as error:
                raise type(error)(f"{one.source}: {error}") from error
            if progress is not None:
                progress(done, len(wanted))
    return [one.output for one in wanted]
