"""BigGAN's networks, of classes: see `Family`. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..networks import biggans
from ..networks.described import Network
from ..networks.shapes import Shape
from .family import Family


class BigGan(Family):
    """BigGAN."""

    conditional = True
    translation, auxiliary = biggans.TRANSLATION, biggans.AUXILIARY
    eps = 1e-6
    estimates = biggans.ESTIMATES

    def must_fit(self, o: Any) -> None:
        """See `Family`, as all that follows."""
        biggans.must_be_a_size(_arch(o))
        if o.rows is not None and o.rows < o.class_count:
            raise ValueError(f"rows is {o.rows}, fewer than the {o.class_count} classes")

    def side(self, o: Any) -> int:
        """As its size says."""
        return biggans.side(_arch(o))

    def noise(self, o: Any) -> int:
        """A chunk for the first layer and each block."""
        return biggans.noise(_arch(o), o.chunk, o.first)

    def taps(self, o: Any, least: int) -> Sequence[int]:
        """To a quarter of the picture's."""
        return biggans.taps(_arch(o), least)

    def deepest(self, o: Any, downs: int | None) -> int:
        """Two at least."""
        return biggans.deepest(_arch(o), downs)

    def generator(self, o: Any) -> Network:
        """Of as many classes as there are rows."""
        return Network(biggans.GENERATOR, self._of_generator(o))

    def discriminator(self, o: Any) -> Network:
        """Likewise."""
        return Network(biggans.DISCRIMINATOR, self._of_both(o) | {"classes": o.count})

    def encoder(self, o: Any) -> Network:
        """Down to the deepest maps."""
        return Network(biggans.ENCODER, self._of_both(o) | {"least": o.least})

    def adaptor(self, o: Any) -> Network:
        """With maps as wide as the generator's."""
        sizes = {
            "arch": _arch(o), "ch": o.ch, "only": o.adapted, "least": o.least,
            "identity": o.repeats, "strength": o.strengths(),
        }  # fmt: skip
        return Network(biggans.ADAPTOR, sizes)

    def own_blocks(self, o: Any, kept: int) -> Network:
        """And the last layers."""
        return Network(biggans.OWN_BLOCKS, {"kept": kept, **self._of_generator(o)})

    def makes(self, o: Any) -> Sequence[str]:
        """The first layer is before all of them."""
        return [f"G.blocks.{n}.*" for n in range(len(biggans.made(_arch(o))) - 1)]

    def judges(self, o: Any) -> Sequence[Sequence[str]]:
        """With the attention that follows."""
        return [[f"D.blocks.{n}.*"] for n in range(len(biggans.seen(_arch(o))))]

    def shared(self) -> list[str]:
        """The embeddings."""
        return ["G.shared.*", "D.embed.*"]

    def rows(self, o: Any) -> Mapping[str, str]:
        """The embeddings."""
        return {"G": "shared.weight", "D": "embed.weight"}

    def pair_in(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Arch, ch, classes and what noise there is."""
        sizes = biggans.generator_in(shapes, "G.")
        if any(name.startswith("D.") for name in shapes):
            biggans.must_agree(sizes, biggans.discriminator_in(shapes, "D."))
        arch = sizes["arch"]
        return {
            "size": int(arch) if arch.isdigit() else arch, "rows": sizes["classes"],
            **{name: sizes[name] for name in ("ch", "chunk", "shared", "attention", "channels")},
        }  # fmt: skip

    def translator_in(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """And how often a picture is halved."""
        found = self.pair_in(shapes)
        sizes = biggans.generator_in(shapes, "G.")
        encoder = biggans.encoder_in(shapes, sizes, "E.")
        adaptor = biggans.adaptor_in(shapes, encoder, "A.")
        if encoder["least"] > biggans.DEEPEST:
            side = biggans.side(sizes["arch"])
            found["n_down"] = (side // encoder["least"]).bit_length() - 1
        if sizes["least"] > biggans.DEEPEST:
            found["n_down_mode"] = "bottleneck"
        if adaptor.get("identity"):
            found["adaptor"] = "identity"
        elif "only" in adaptor:
            found["adaptor"] = adaptor["only"]
        return found

    def _of_both(self, o: Any) -> dict[str, Any]:
        return {
            "arch": _arch(o), "ch": o.ch, "attention": o.attention, "channels": o.channels,
        }  # fmt: skip

    def _of_generator(self, o: Any) -> dict[str, Any]:
        own = {"classes": o.count, "chunk": o.chunk, "shared": o.shared, "least": o.first}
        return self._of_both(o) | own


def _arch(o: Any) -> biggans.Arch:
    arch: biggans.Arch = str(o.size)  # type: ignore[assignment]
    return arch
