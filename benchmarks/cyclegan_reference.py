"""The original CycleGAN step, plainly: what `modelsoup_i2i` is measured against.

Written from Zhu et al. 2017 and a description of the official code, to do what that does in its
order: a forward pass for each of six translations, one backward pass for both generators while the
discriminators' parameters require no gradients, then for each discriminator a pass over real images
and one over images from a pool, and `torch.optim.Adam` as it comes.
"""

from __future__ import annotations

import itertools
import random

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7)]
        layers += [nn.InstanceNorm2d(width), nn.ReLU(True)]
        for n in (width, 2 * width):
            layers += [nn.Conv2d(n, 2 * n, 3, 2, 1), nn.InstanceNorm2d(2 * n), nn.ReLU(True)]
        layers += [Block(4 * width) for _ in range(blocks)]
        for n in (4 * width, 2 * width):
            layers += [
                nn.ConvTranspose2d(n, n // 2, 3, 2, 1, output_padding=1),
                nn.InstanceNorm2d(n // 2), nn.ReLU(True),
            ]  # fmt: skip
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Discriminator(nn.Module):
    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        n = width
        for index in range(1, layers + 1):
            wide = width * min(2**index, 8)
            stride = 2 if index < layers else 1
            parts += [nn.Conv2d(n, wide, 4, stride, 1), nn.InstanceNorm2d(wide)]
            parts += [nn.LeakyReLU(0.2, True)]
            n = wide
        parts += [nn.Conv2d(n, 1, 4, 1, 1)]
        self.model = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Pool:
    """The last images of a generator, of which a discriminator sees half."""

    def __init__(self, size: int = 50) -> None:
        self.size = size
        self.images: list[torch.Tensor] = []

    def query(self, images: torch.Tensor) -> torch.Tensor:
        given = []
        for image in images.detach():
            one = image.unsqueeze(0)
            if len(self.images) < self.size:
                self.images.append(one)
                given.append(one)
            elif random.random() > 0.5:
                index = random.randrange(self.size)
                given.append(self.images[index].clone())
                self.images[index] = one
            else:
                given.append(one)
        return torch.cat(given)


class Original:
    """Four networks and their step; attributes are named as the paper names what they are."""

    def __init__(
        self, width: int = 64, blocks: int = 9, d_width: int = 64, d_layers: int = 3, *,
        lr: float = 2e-4, cycle: float = 10.0, identity: float = 5.0, pool: int = 50,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.G_A = Generator(width, blocks).to(device)
        self.G_B = Generator(width, blocks).to(device)
        self.D_A = Discriminator(d_width, d_layers).to(device)
        self.D_B = Discriminator(d_width, d_layers).to(device)
        for module in self.networks().modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0, 0.02)
                nn.init.zeros_(module.bias)
        self.cycle, self.identity = cycle, identity
        self.pool_A, self.pool_B = Pool(pool), Pool(pool)
        g = itertools.chain(self.G_A.parameters(), self.G_B.parameters())
        d = itertools.chain(self.D_A.parameters(), self.D_B.parameters())
        self.optimizer_G = torch.optim.Adam(g, lr=lr, betas=(0.5, 0.999))
        self.optimizer_D = torch.optim.Adam(d, lr=lr, betas=(0.5, 0.999))

    def networks(self) -> nn.ModuleDict:
        return nn.ModuleDict({"G_A": self.G_A, "G_B": self.G_B, "D_A": self.D_A, "D_B": self.D_B})

    def step(self, real_a: torch.Tensor, real_b: torch.Tensor) -> dict[str, torch.Tensor]:
        fake_b = self.G_A(real_a)
        rec_a = self.G_B(fake_b)
        fake_a = self.G_B(real_b)
        rec_b = self.G_A(fake_a)

        self._require([self.D_A, self.D_B], False)
        self.optimizer_G.zero_grad()
        losses = {
            "idt_A": l1(self.G_A(real_b), real_b) * self.identity,
            "idt_B": l1(self.G_B(real_a), real_a) * self.identity,
            "G_A": to_constant(self.D_A(fake_b), 1.0),
            "G_B": to_constant(self.D_B(fake_a), 1.0),
            "cycle_A": l1(rec_a, real_a) * self.cycle,
            "cycle_B": l1(rec_b, real_b) * self.cycle,
        }
        sum(losses.values()).backward()
        self.optimizer_G.step()

        self._require([self.D_A, self.D_B], True)
        self.optimizer_D.zero_grad()
        pooled_b = self.pool_B.query(fake_b)
        losses["D_A"] = self._judge(self.D_A, real_b, pooled_b)
        pooled_a = self.pool_A.query(fake_a)
        losses["D_B"] = self._judge(self.D_B, real_a, pooled_a)
        self.optimizer_D.step()
        return losses

    def _judge(self, network: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        of_real = to_constant(network(real), 1.0)
        of_fake = to_constant(network(fake.detach()), 0.0)
        loss = (of_real + of_fake) * 0.5
        loss.backward()
        return loss

    @staticmethod
    def _require(networks: list[nn.Module], wanted: bool) -> None:
        for network in networks:
            for parameter in network.parameters():
                parameter.requires_grad = wanted


def l1(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nn.functional.l1_loss(made, wanted)


def to_constant(verdicts: torch.Tensor, value: float) -> torch.Tensor:
    return nn.functional.mse_loss(verdicts, torch.full_like(verdicts, value))
