"""What a trainer says of itself: networks, players, draws and turns. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..networks.described import AVERAGED, Joined, Network
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

    def joined(self, o: Any) -> dict[str, Joined]:
        """Modules that are made of several networks, for losses and for use."""
        return {}

    def averages(self, o: Any) -> dict[str, tuple[str, float]]:
        """Networks that follow others: name → whom, and the share of the old that a step keeps."""
        return {
            f"{name}{AVERAGED}": (name, player.ema)
            for player in self.players(o).values() if player.ema is not None
            for name in player.networks
        }  # fmt: skip

    def begin_as(self, o: Any) -> dict[str, str]:
        """Networks that begin with another's weights where a start lacks them: name → whose."""
        return {}

    def fixed(self, o: Any) -> Sequence[str]:
        """Patterns over names of tensors that stay as they begin, beside what a plan freezes."""
        return ()

    def knows_more(self, o: Any) -> bool:
        """Whether its networks may know classes after those of the data."""
        return False

    def rows(self, o: Any) -> Mapping[str, int]:
        """Tensors with a row for each class, and how many; a start's are re-made for so many."""
        return {}

    def written(self, o: Any) -> dict[str, str]:
        """Which network's weights a checkpoint has under which name; a state has them all."""
        return {name: name for name in {**self.networks(o), **self.averages(o)}}

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
        """The networks, or those joined, that are used afterwards; the most wanted one first."""
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

    def estimates(self, o: Any) -> Sequence[str]:
        """Patterns of tensors that are found anew where a start lacks them; merges leave them out.

        Such are the vectors of spectral norm: their signs are arbitrary, so that a mean may be
        anything.
        """
        return ()

    def images(self, o: Any) -> Images:
        """The sets of training images, by what errors call them.

        Raises:
            ParameterError: the data are not there, or do not fit the options.
        """
        found: Images = o.images()
        return found

    def sorting(self, o: Any, s: Any) -> Mapping[str, Sequence[int]]:
        """Labels of the training images by sets, where a network that does not move finds them.

        They are found once, before the first step, and kept beside the state. `s` is the session.
        """
        return {}

    def classes(self, o: Any) -> Sequence[str]:
        """The classes that the networks know, by their indices; they are kept in checkpoints."""
        names: Sequence[str] = o.class_names()
        return names

    def has_attributes(self, o: Any) -> bool:
        """Whether these are attributes, of which a picture may have several."""
        return False

    def pools(self, o: Any) -> dict[str, int]:
        """Names and sizes of pools of images that were made before."""
        return {}

    def weights(self, o: Any, images: Images) -> dict[str, float]:
        """The weight of each term of a loss, by its name; 1 where there is none."""
        return {}

    def notes(self, o: Any, images: Images) -> dict[str, Any]:
        """What else a node's record should hold, as plain data."""
        return {}

    def finish(self, s: Any, log: Callable[[str], None]) -> dict[str, float]:
        """What is found after the last step, such as buffers that say something of all pictures.

        `s` is the session. It may set what networks hold, by what they and the pictures are and
        nothing else: after a crash it is done again. The figures are told.
        """
        return {}

    def remarks(self, o: Any) -> Sequence[str]:
        """What whoever reads a result must know of its options: the log and comparisons say it."""
        return ()

    def opening(self, o: Any, images: Images) -> Iterable[str]:
        """What else the log should say before the first step."""
        return ()
