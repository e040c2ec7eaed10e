"""A trainer of one's own: a small GAN with all that a paper may ask of a loop."""

from dataclasses import dataclass

import torch
from modelsoup_i2i.networks import patch, resnet
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.pictures.draws import Classes, Noise, Unpaired
from modelsoup_i2i.training.losses import deceive, distance, judge
from modelsoup_i2i.training.options import UnpairedOptions
from modelsoup_i2i.training.players import Player
from modelsoup_i2i.training.trainer import ImageTrainer
from modelsoup_i2i.training.turns import Turn
from modelsoup_i2i.use.translator import Translator


@dataclass(frozen=True)
class ToyOptions(UnpairedOptions):
    width: int = 4
    warm_up: int = 2  # steps in which the generator learns to copy, alone


class Toy(ImageTrainer):
    name, options = "toy", ToyOptions

    def networks(self, o):
        generator = Network(resnet.MADE_BY, {"width": o.width, "blocks": 1})
        return {"G": generator, "D": Network(patch.MADE_BY, {"width": o.width, "layers": 1})}

    def translators(self, o):
        return {"G": Translator("X", "Y", "A to B")}

    def players(self, o):
        return {"G": Player(("G",), o.lr, ema=0.9), "D": Player(("D",), 2 * o.lr, "RMSprop")}

    def draws(self, o):
        return Unpaired(("x", "y")), Noise("z", (3, 1, 1)), Classes("c", 5)

    def turns(self, o, step):
        if step < o.warm_up:  # a phase
            return [Turn("copy", ("G",), (self.copy,))]
        lazy = [self.penalty] if step % 3 == 0 else []
        return [Turn("judge", ("D",), (self.judge, *lazy)), Turn("make", ("G",), (self.make,))]

    def copy(self, s, b):
        return {"copy": distance(s["G"](b.x), b.x)}

    def judge(self, s, b):
        b.fake = s["G"](b.x + 0.1 * b.z).detach()
        return {"judge": judge(s["D"](b.y), s["D"](b.fake), "hinge")}

    def penalty(self, s, b):  # R1: a gradient of a gradient
        real = b.y.requires_grad_()
        (slope,) = torch.autograd.grad(s["D"](real).sum(), real, create_graph=True)
        return {"penalty": slope.square().mean()}

    def make(self, s, b):
        made = s["G"](b.x + 0.1 * b.z)
        return {"gan": deceive(s["D"](made), "hinge"), "copy": distance(made, b.x)}
