"""A small trainer whose translator is made of parts of two networks, and takes all there is."""

from __future__ import annotations

from dataclasses import dataclass

from modelsoup_i2i.networks.described import Joined, Network
from modelsoup_i2i.pictures.draws import Classes, Noise, Unpaired
from modelsoup_i2i.training.losses import distance
from modelsoup_i2i.training.options import UnpairedOptions
from modelsoup_i2i.training.players import Player
from modelsoup_i2i.training.trainer import ImageTrainer
from modelsoup_i2i.training.turns import Turn
from modelsoup_i2i.use.translator import Style, Translator

STYLE = 4


@dataclass(frozen=True)
class ToyOptions(UnpairedOptions):
    d_lr: float = 0.1
    otherwise: bool = False


class JoinedToy(ImageTrainer):
    name, options = "joined-toy", ToyOptions

    def networks(self, o):
        return dict.fromkeys(("G_A", "G_B"), Network("joined_networks:AutoEncoder", {}))

    def joined(self, o):
        room, sizes = "joined_networks", {"source": "G_A", "target": "G_B"}
        return {
            "T": Joined(f"{room}:Translation", ("G_A", "G_B"), sizes),
            "R": Joined(f"{room}:Decoding", ("G_B",)), "S": Joined(f"{room}:Styling", ("G_B",)),
        }  # fmt: skip

    def translators(self, o):
        takes = (Style(STYLE, of_pictures="S", noise=STYLE), Classes("c", 2))
        return {"T": Translator("X", "Y", "A to B", takes=takes)}

    def classes(self, o):
        return ("red", "blue")

    def players(self, o):
        return {"G": Player(("G_A", "G_B"), o.lr, ema=0.5)}

    def draws(self, o):
        return Unpaired(("x", "y")), Noise("s", (STYLE,)), Classes("c", 2)

    def turns(self, o, step):
        return (Turn("make", ("G",), (self.make,)),)

    def make(self, s, b):
        content, _ = s["G_A"](b.x)
        made = s["R"](content.relu() if s.options.otherwise else content, b.s, b.c)
        return {"made": distance(made, b.y), "again": distance(s["G_B"](made)[1], b.s)}

    def options_in(self, shapes):
        return {}
