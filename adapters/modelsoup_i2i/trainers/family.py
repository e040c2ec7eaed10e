"""What differs between the GANs that trainers work with: networks, noise, names. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..networks.described import Network
from ..networks.shapes import Shape


class Family(Protocol):
    """A generator and a discriminator, and the encoder and adaptor that go with them.

    All are called alike: `G(z, c, features)`, `D(images, c)`, `E(images)`, `A(features)`.

    Attributes:
        conditional: whether they are told classes; otherwise a network is of one domain.
        translation: what joins E, A and G, as `module:Class`.
        auxiliary: what joins G and `own_blocks`.
        eps: of Adam.
        shares: of the rate: see `Player`.
        estimates: see `Description.estimates`.
    """

    conditional: bool
    translation: str
    auxiliary: str
    eps: float
    shares: Mapping[str, float] = {}
    estimates: Sequence[str] = ()

    def must_fit(self, o: Any) -> None:
        """Raise a ValueError or a ParameterError for sizes that there are no networks of."""

    def side(self, o: Any) -> int:
        """Pixels of a picture's side."""

    def noise(self, o: Any) -> int:
        """How many numbers `z` has."""

    def taps(self, o: Any, least: int) -> Sequence[int]:
        """The sides of the maps that an adaptor may see, from `least` on."""

    def deepest(self, o: Any, downs: int | None) -> int:
        """The side of the encoder's maps after so many halvings; None is as many as there are."""

    def generator(self, o: Any) -> Network:
        """`G`."""

    def discriminator(self, o: Any) -> Network:
        """`D`."""

    def encoder(self, o: Any) -> Network:
        """`E`."""

    def adaptor(self, o: Any) -> Network:
        """`A`, of a translator's options."""

    def own_blocks(self, o: Any, kept: int) -> Network:
        """What of an auxiliary generator is not the first `kept` blocks of G."""

    def makes(self, o: Any) -> Sequence[str]:
        """Patterns over names: each block of the generator, the deepest first."""

    def judges(self, o: Any) -> Sequence[Sequence[str]]:
        """Likewise of each block of the discriminator, the one that sees the picture first."""

    def shared(self) -> list[str]:
        """Patterns over names: what leads to the condition of every block."""

    def rows(self, o: Any) -> Mapping[str, str]:
        """Network → the tensor of it that has a row for each class."""
        return {}

    def pair_in(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The options that a checkpoint's generator decides, and its discriminator agrees to.

        Raises:
            MismatchError: there is no such generator, or the two are of different sizes.
        """

    def translator_in(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The same, and what encoder and adaptor decide.

        Raises:
            MismatchError: likewise.
        """
