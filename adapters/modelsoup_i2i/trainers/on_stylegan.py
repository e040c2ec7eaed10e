"""StyleGAN's networks, each of one domain: see `Family`. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..networks import stylegans
from ..networks.described import Network
from ..networks.shapes import Shape
from .family import Family


class StyleGan(Family):
    """StyleGAN, the first."""

    conditional = False
    translation, auxiliary = stylegans.TRANSLATION, stylegans.AUXILIARY
    eps = 1e-8
    shares: Mapping[str, float] = {f"G.{stylegans.MAPPING}": stylegans.MAPPING_RATE}

    def must_fit(self, o: Any) -> None:
        """See `Family`, as all that follows."""
        stylegans.must_be_a_size(o.size)

    def side(self, o: Any) -> int:
        """As its size says."""
        size: int = o.size
        return size

    def noise(self, o: Any) -> int:
        """As many as styles have."""
        code: int = o.code
        return code

    def taps(self, o: Any, least: int) -> Sequence[int]:
        """Up to 32, whatever the picture's side."""
        return tuple(side for side in stylegans.TAPS if side >= least)

    def deepest(self, o: Any, downs: int | None) -> int:
        """Always all of them."""
        return stylegans.DEEPEST

    def generator(self, o: Any) -> Network:
        """Of one domain."""
        return Network(stylegans.GENERATOR, self._of_generator(o))

    def discriminator(self, o: Any) -> Network:
        """Likewise."""
        return Network(stylegans.DISCRIMINATOR, self._of_pyramid(o))

    def encoder(self, o: Any) -> Network:
        """Likewise."""
        return Network(stylegans.ENCODER, self._of_pyramid(o))

    def adaptor(self, o: Any) -> Network:
        """All maps up to 32 × 32 are of one width."""
        sizes = {
            "width": o.width, "kind": "identity" if o.repeats else o.blocks, "only": o.adapted,
            "strength": o.strengths(),
        }  # fmt: skip
        return Network(stylegans.ADAPTOR, sizes)

    def own_blocks(self, o: Any, kept: int) -> Network:
        """And the layer that makes pictures; the mapping network is always common."""
        return Network(stylegans.OWN_BLOCKS, {"kept": kept, **self._of_generator(o)})

    def makes(self, o: Any) -> Sequence[str]:
        """The first has the constant."""
        return [f"G.generator.progression.{stylegans.draws(side)}.*"
                for side in stylegans.sides(o.size)]  # fmt: skip

    def judges(self, o: Any) -> Sequence[Sequence[str]]:
        """The first with the layer before it, which sees the picture."""
        own = [[f"D.progression.{stylegans.judges(side)}.*"]
               for side in reversed(stylegans.sides(o.size))]  # fmt: skip
        own[0].append("D.from_rgb.*")
        return own

    def shared(self) -> list[str]:
        """The mapping network."""
        return [f"G.{stylegans.MAPPING}*"]

    def pair_in(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Size, width, code and depth."""
        sizes = stylegans.generator_in(shapes, "G.")
        for network, find in (("D", stylegans.discriminator_in), ("E", stylegans.encoder_in)):
            if any(name.startswith(f"{network}.") for name in shapes):
                own = find(shapes, f"{network}.")
                stylegans.must_agree(sizes, own, f"G and {network}")
                sizes |= own
        return {"network": "stylegan", **sizes}

    def translator_in(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """And the adaptor's blocks."""
        found = self.pair_in(shapes)
        adaptor = stylegans.adaptor_in(shapes, "A.")
        if adaptor["kind"] == "identity":
            return {**found, "adaptor": "identity"}
        stylegans.must_agree(found, adaptor, "G and A")
        only = {"adaptor": adaptor["only"]} if "only" in adaptor else {}
        return {**found, "blocks": adaptor["kind"], **only}

    def _of_generator(self, o: Any) -> dict[str, Any]:
        names = ("size", "width", "code", "depth", "channels", "mixing")
        return {name: getattr(o, name) for name in names}

    def _of_pyramid(self, o: Any) -> dict[str, Any]:
        return {name: getattr(o, name) for name in ("size", "width", "channels", "rgb_activation")}
