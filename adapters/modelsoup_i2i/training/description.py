"""What a trainer says of itself: networks, players, draws and turns. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..networks.described import Network
from ..pictures.draws import Draw
from ..pictures.picture import Images
from ..use.translator import Translator
from .players import Player
from .turns import Turn


class Description:
    """What is different from trainer to trainer; the rest follows from it.

    Attributes:
        name: what plans call it.
        options: its options: a dataclass that inherits `training.ranges.Options`, and in which
            each has a default.
        version: changes when results do.
        called: how else plans, and with them lineages, may call it: `module:Class`.
    """

    name: str
    options: type
    version = "1"
    called: tuple[str, ...] = ()

    def networks(self, o: Any) -> dict[str, Network]:
        """All networks, in the checkpoint's order: its names are `network.tensor`."""
        raise NotImplementedError

    def players(self, o: Any) -> dict[str, Player]:
        """Who is updated, by which optimiser."""
        raise NotImplementedError

    def draws(self, o: Any) -> Sequence[Draw]:
        """What is drawn for a step."""
        raise NotImplementedError

    def turns(self, o: Any, step: int) -> Sequence[Turn]:
        """Who moves on which loss in a step, counted from 0, and in which order."""
        raise NotImplementedError

    def translators(self, o: Any) -> dict[str, Translator]:
        """The networks that are used after the training, the most wanted one first."""
        raise NotImplementedError

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The options that names and shapes in a checkpoint decide; none if a trainer cannot tell.

        Raises:
            MismatchError: it holds no such networks.
        """
        return {}

    def groups(self, o: Any) -> dict[str, list[str]]:
        """Layer groups for rules: name → patterns over tensor names."""
        return {name: [f"{name}.*"] for name in self.networks(o)}

    def images(self, o: Any) -> Images:
        """The sets of training images, by what errors call them.

        Raises:
            ParameterError: the data are not there, or do not fit the options.
        """
        found: Images = o.images()
        return found

    def classes(self, o: Any) -> Sequence[str]:
        """The classes that the networks know, by their indices; they are kept in checkpoints."""
        names: Sequence[str] = o.class_names()
        return names

    def pools(self, o: Any) -> dict[str, int]:
        """Names and sizes of pools of images that were made before."""
        return {}

    def weights(self, o: Any, images: Images) -> dict[str, float]:
        """The weight of each term of a loss, by its name; 1 where there is none."""
        return {}

    def notes(self, o: Any, images: Images) -> dict[str, Any]:
        """What else a node's record should hold, as plain data."""
        return {}

    def opening(self, o: Any, images: Images) -> Iterable[str]:
        """What else the log should say before the first step."""
        return ()
