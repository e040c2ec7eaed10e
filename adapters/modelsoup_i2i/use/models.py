"""A translator as it is used: pictures or noise in, pictures out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from modelsoup import MismatchError, ParameterError, listed, nearest

from ..networks.described import Joined
from ..networks.layers import at_any_size, padded
from ..pictures.draws import Classes, Noise
from ..pictures.images import to_image, to_tensor
from ..pictures.transforms import Transform
from .classes import switched
from .translator import Label, Style, Switched, Translator

ALL = "all"  # in place of names: every class
AT_ONCE = 16  # pictures that are made in one pass


@dataclass(frozen=True)
class Wanted:
    """A picture that is to be made.

    Attributes:
        picture: of what, uint8, height × width × channels; None where the model sees none.
        given: what else it is called with, each 1 × …: see `Model.given`.
    """

    picture: np.ndarray | None
    given: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Model:
    """A network, or one joined of several, and what it is for.

    Attributes:
        name: what the trainer calls it.
        how: what it sees, makes and takes.
        module: on its device.
        classes: the names of those that it makes pictures of, by their indices, where it has such.
        origin: the checkpoint, for errors; empty for one in training.
        makers: what makes styles, by name.
    """

    name: str
    how: Translator
    module: nn.Module
    classes: tuple[str, ...] = ()
    origin: str = ""
    makers: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Of its pictures."""
        return int(self.module.channels)

    @property
    def size(self) -> int | None:
        """The side of its pictures, which are square; None where they have any size."""
        side = getattr(self.module, "size", None)
        return None if side is None else int(side)

    @property
    def called(self) -> str:
        """What errors call it."""
        return f"{self.name} of {self.origin}" if self.origin else self.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """By their indices; the indices themselves where a checkpoint has no names."""
        return self.classes or tuple(map(str, range(self.how.classes)))

    @property
    def noise(self) -> tuple[str, ...]:
        """The names of what it takes that is noise as it is, each number from N(0, 1)."""
        plain = [own for own in self.how.takes if isinstance(own, Noise)
                 or (isinstance(own, Style) and own.noise and own.of_noise is None)]  # fmt: skip
        return tuple(own.name for own in plain)

    def called_so(self, label: Label) -> str:
        """The name of a class; or of attributes, as `labels` takes it."""
        if isinstance(label, int):
            return self.class_names[label]
        on, off = ([self.class_names[place] for place in own] for own in (label.on, label.off))
        return "+".join([*on, *(f"{name}=0" for name in off)])

    def labels(self, classes: str | Sequence[str] | None) -> list[Label]:
        """The indices of classes; or, of a model of attributes, which are to be there.

        Args:
            classes: a name, or several; `all` for every one; None where it has none. In the place
                of a name attributes, `Blond_Hair+Male`; `Male=0` is to be gone: see `Switched`.

        Raises:
            ParameterError: none is given though it has classes, or the other way round; or one
                that it has not.
        """
        known = self.class_names
        if not known:
            if classes is not None:
                raise ParameterError(f"{self.called} makes pictures of no classes: name none")
            return []
        if classes is None or not classes:
            raise ParameterError(
                f"{self.called} makes pictures of {self.how.called}: name one of them, or several, "
                f"or all (it has {listed(known)})"
            )
        if classes == ALL:
            every = range(len(known))
            return [Switched((n,)) for n in every] if self.how.has_attributes else [*every]
        found: list[Label] = []
        for name in [classes] if isinstance(classes, str) else classes:
            if self.how.has_attributes:
                label = switched(name, known, self.called)
                if label in found:
                    raise ParameterError(f"{name!r} is asked for twice")
                found.append(label)
                continue
            if name not in known:
                raise ParameterError(
                    f"{self.called} has no class {name!r}{nearest(name, known)} (it has "
                    f"{listed(known)})"
                )
            if known.index(name) in found:
                raise ParameterError(f"the class {name!r} is named twice")
            found.append(known.index(name))
        return found

    def to(self, device: torch.device) -> None:
        """Bring all of it to a device."""
        for module in (self.module, *self.makers.values()):
            module.to(device)

    def eval(self) -> Model:
        """Have it be as in use, for good."""
        for module in (self.module, *self.makers.values()):
            module.eval()
        return self

    def given(
        self, names: Sequence[str], label: Label = 0, *, seed: int = 0, sample: int = 0,
        style: np.ndarray | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        """What it is called with beside pictures: see `Translator.given`; a style is made here.

        Args:
            names: of the pictures, one for each.
            label: the class's index, or attributes.
            seed: of noise.
            sample: which of several for one picture.
            style: what `style_of` made, float32, 1 or as many × size; None is one of noise for
                each.

        Raises:
            ParameterError: there is none, and it makes none of noise.
        """
        given = self.how.given(names, label, seed=seed, sample=sample)
        own = self.how.style
        if own is None:
            return given
        place = self.how.takes.index(own)
        if style is not None:
            given[place] = np.repeat(style, len(names) // len(style), axis=0)
        elif self.how.wants_reference:
            raise ParameterError(
                f"{self.called} makes pictures that look like others: it wants a picture, or a "
                f"folder of them, as reference (--reference)"
            )
        elif own.of_noise is not None:
            given[place] = self._made_by(own.of_noise, torch.from_numpy(given[place]), label)
        return given

    def style_of(self, pictures: Sequence[np.ndarray], label: Label = 0) -> np.ndarray:
        """The style of reference pictures: the mean of each one's, float32, 1 × size.

        Args:
            pictures: uint8, height × width × channels, of any sizes.
            label: the index of their class, where styles have one.

        Raises:
            ParameterError: its styles are not those of pictures.
        """
        own = self.how.style
        if own is None or own.of_pictures is None:
            raise ParameterError(f"{self.called} does not look at reference pictures: give none")
        multiple = int(getattr(self.makers[own.of_pictures], "multiple", 1))
        made = []
        for picture in pictures:
            image = padded(to_tensor(self.seen(picture))[None], multiple)
            made.append(self._made_by(own.of_pictures, image, label))
        return mean_of(made)

    def _made_by(self, maker: str, values: torch.Tensor, label: Label) -> np.ndarray:
        module = self.makers[maker]
        inputs = [values.to(self.device)]
        if self.how.style is not None and self.how.style.classes:
            assert isinstance(label, int)  # styles are of no attributes
            inputs.append(torch.full((len(values),), label, device=self.device))
        with torch.no_grad(), in_use(module):
            made: np.ndarray = module(*inputs).float().cpu().numpy()
        return made

    def without_source(self) -> Model:
        """What makes its pictures without seeing any: of a joined one, its generator.

        Raises:
            MismatchError: there is none: it sees pictures, and is one network.
        """
        if self.how.source is None:
            return self
        if self.how.alone is None:
            raise MismatchError(f"{self.called} makes pictures of others, and of nothing else")
        alone = self.module.get_submodule(self.how.alone)
        how = dataclasses.replace(self.how, source=None, alone=None)
        return dataclasses.replace(self, name=self.how.alone, how=how, module=alone)

    def mixed(self, given: Sequence[np.ndarray], first: Label, second: Label, share: float) -> Any:
        """What is given, with a mixture of two classes' rows of the embedding in the class's place.

        Args:
            given: see `Translator.given`.
            first: the index of a class, or attributes …
            second: … and another one, or others.
            share: of the second, from 0 to 1.

        Raises:
            ParameterError: it embeds no classes.
        """
        of_class = [isinstance(draw, Classes) for draw in self.how.takes]
        if not any(of_class) or not hasattr(self.module, "embedded"):
            raise ParameterError(f"{self.called} embeds no classes that could be mixed")
        place = of_class.index(True)
        with torch.no_grad():
            both = [self.how.given([""], label)[place] for label in (first, second)]
            rows = self.module.embedded(torch.from_numpy(np.concatenate(both)).to(self.device))
            one, other = rows.float().cpu().numpy()
        mixture = (np.float32(1 - share) * one + np.float32(share) * other)[None]
        return [mixture if is_class else own
                for is_class, own in zip(of_class, given, strict=True)]  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def seen(self, picture: np.ndarray) -> np.ndarray:
        """A picture as the network sees it: of a network of one size, its middle, at that size."""
        if self.size is None:
            return picture
        side = (self.size, self.size)
        return Transform("centre_crop", side, side).for_test(picture)

    def made(
        self, pictures: Sequence[np.ndarray] | None, given: Sequence[np.ndarray] = (), *,
        context: AbstractContextManager[Any] | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        """What becomes of a batch.

        Args:
            pictures: uint8 or uint16, height × width × channels, of one size; None where it sees
                none.
            given: an array for each draw of `how.takes`: see `Translator.given`.
            context: of the computation, such as autocast.

        Returns:
            height × width × channels; each of its picture's depth, or else uint8.

        Raises:
            NonfiniteImageError: one holds NaN or infinity.
        """
        others = [torch.from_numpy(values).to(self.device) for values in given]
        with torch.no_grad(), in_use(self.module), context or nullcontext():
            if pictures is None:
                result = self.module(*others)
            else:
                images = torch.stack([to_tensor(self.seen(picture)) for picture in pictures])
                multiple = getattr(self.module, "multiple", 1)
                # What it takes beside images is of no size.
                result = at_any_size(lambda own: self.module(own, *others), images.to(self.device),
                                     multiple)  # fmt: skip
        deep = [picture.dtype == np.uint16 for picture in pictures or ()] or [False] * len(result)
        return [to_image(image.float(), deep=own) for image, own in zip(result, deep, strict=True)]

    def each(self, wanted: Iterable[Wanted], batch: int = AT_ONCE) -> Iterator[np.ndarray]:
        """Pictures one after the other, made `batch` at a time; no more are in memory.

        Neighbours of one size are a batch. Which ones they are may decide how pictures are rounded.
        """
        group: list[Wanted] = []
        for one in wanted:
            picture = None if one.picture is None else self.seen(one.picture)
            if group and (len(group) == batch or _shape(group[0].picture) != _shape(picture)):
                yield from self._group(group)
                group = []
            group.append(Wanted(picture, one.given))
        if group:
            yield from self._group(group)

    def _group(self, group: Sequence[Wanted]) -> list[np.ndarray]:
        pictures = [one.picture for one in group if one.picture is not None]
        given = [np.concatenate(own) for own in zip(*(one.given for one in group), strict=True)]
        return self.made(pictures or None, given)


def mean_of(styles: Sequence[np.ndarray]) -> np.ndarray:
    """Of styles, each 1 × size."""
    mean: np.ndarray = np.concatenate(styles).mean(axis=0, keepdims=True)
    return mean


def model_of(
    name: str, how: Translator, joined: Mapping[str, Joined], networks: Mapping[str, nn.Module], *,
    classes: Sequence[str] = (), origin: str = "",
) -> Model:  # fmt: skip
    """A translator, of networks that there are: see `translator.parts_of`."""
    module, *makers = (
        joined[own].build(networks) if own in joined else networks[own]
        for own in (name, *how.modules)
    )
    made = dict(zip(how.modules, makers, strict=True))
    return Model(name, how, module, tuple(classes), origin, made)


def _shape(picture: np.ndarray | None) -> tuple[int, ...]:
    return () if picture is None else picture.shape


@contextmanager
def in_use(network: nn.Module) -> Iterator[None]:
    """As it is after the training: no dropout, and statistics that are used and not moved."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
