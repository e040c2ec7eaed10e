"""The original CUT step, plainly: what `modelsoup_i2i` is measured against.

Written from Park et al. 2020 and a description of the official code, to do what that does in its
order: one pass of the generator for both domains' images; the discriminator's step on made and real
ones, each in a pass of its own; then, with fixed weights of the discriminator, the generator's: for
each comparison a pass of its encoder over what was made and one over what that was made of, whose
graph is built and not used; all negatives in one product, the positives apart; `torch.optim.Adam`
as it comes, three of them. The filters are depthwise convolutions. Tensors have the official names.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

TAPS = (0, 4, 8, 12, 16)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        filt = row[:, None] * row
        self.register_buffer("filt", (filt / filt.sum()).repeat(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.filt, stride=2, groups=x.shape[1])


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        filt = row[:, None] * row
        self.register_buffer("filt", (filt / filt.sum() * 4).repeat(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        made = F.conv_transpose2d(x, self.filt, stride=2, padding=2, groups=x.shape[1])
        return made[:, :, 1:-1, 1:-1]


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
            layers += [nn.Conv2d(n, 2 * n, 3, 1, 1), nn.InstanceNorm2d(2 * n), nn.ReLU(True)]
            layers += [Down(2 * n)]
        layers += [Block(4 * width) for _ in range(blocks)]
        for n in (4 * width, 2 * width):
            layers += [Up(n), nn.Conv2d(n, n // 2, 3, 1, 1), nn.InstanceNorm2d(n // 2)]
            layers += [nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for n, layer in enumerate(self.model):
            x = layer(x)
            if n in TAPS:
                maps.append(x)
            if n == TAPS[-1]:
                break
        return maps


class Discriminator(nn.Module):
    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts = [nn.Conv2d(3, width, 4, 1, 1), nn.LeakyReLU(0.2, True), Down(width)]
        n = width
        for index in range(1, layers + 1):
            wide = width * min(2**index, 8)
            parts += [nn.Conv2d(n, wide, 4, 1, 1), nn.InstanceNorm2d(wide)]
            parts += [nn.LeakyReLU(0.2, True)]
            parts += [Down(wide)] if index < layers else []
            n = wide
        self.model = nn.Sequential(*parts, nn.Conv2d(n, 1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Patches(nn.Module):
    def __init__(self, width: int = 256, of: int = 64) -> None:
        super().__init__()
        for n, wide in enumerate((3, 2 * of, 4 * of, 4 * of, 4 * of)):
            mlp = nn.Sequential(nn.Linear(wide, width), nn.ReLU(), nn.Linear(width, width))
            self.add_module(f"mlp_{n}", mlp)

    def forward(self, maps: list[torch.Tensor], places: list[torch.Tensor]) -> list[torch.Tensor]:
        made = []
        for n, (x, at) in enumerate(zip(maps, places, strict=True)):
            rows = x.permute(0, 2, 3, 1).flatten(1, 2)[:, at].flatten(0, 1)
            rows = getattr(self, f"mlp_{n}")(rows)
            made.append(rows / (rows.pow(2).sum(1, keepdim=True).pow(0.5) + 1e-7))
        return made


class Original:
    """Three networks and their step; FastCUT without `identity`, with `flip` and `nce` 10."""

    def __init__(
        self, width: int = 64, blocks: int = 9, d_width: int = 64, d_layers: int = 3,
        f_width: int = 256, *, lr: float = 2e-4, nce: float = 1.0, identity: bool = True,
        temperature: float = 0.07, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.G = Generator(width, blocks).to(device)
        self.D = Discriminator(d_width, d_layers).to(device)
        self.F = Patches(f_width, width).to(device)
        for module in self.networks().modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight, 0.02)
                nn.init.zeros_(module.bias)
        self.nce, self.identity, self.temperature = nce, identity, temperature
        self.optimizer_G, self.optimizer_D, self.optimizer_F = (
            torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))
            for network in (self.G, self.D, self.F)
        )

    def networks(self) -> nn.ModuleDict:
        return nn.ModuleDict({"G": self.G, "D": self.D, "F": self.F})

    def step(
        self, x: torch.Tensor, y: torch.Tensor, in_x: list[torch.Tensor],
        in_y: list[torch.Tensor] | None = None, flip: bool = False,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        real = torch.cat([x, y]) if self.identity else x
        made = self.G(torch.flip(real, [3]) if flip else real)
        fake, same = made[: len(x)], made[len(x) :]

        self._require(True)
        self.optimizer_D.zero_grad()
        of_fake = to_constant(self.D(fake.detach()), 0.0)
        losses = {"D": (of_fake + to_constant(self.D(y), 1.0)) * 0.5}
        losses["D"].backward()
        self.optimizer_D.step()

        self._require(False)
        self.optimizer_G.zero_grad()
        self.optimizer_F.zero_grad()
        losses["G_GAN"] = to_constant(self.D(fake), 1.0)
        losses["NCE"] = both = self._compare(x, fake, in_x, flip)
        if self.identity and in_y is not None:
            losses["NCE_Y"] = self._compare(y, same, in_y, flip)
            both = (both + losses["NCE_Y"]) * 0.5
        (losses["G_GAN"] + both).backward()
        self.optimizer_G.step()
        self.optimizer_F.step()
        return losses

    def _compare(
        self, source: torch.Tensor, made: torch.Tensor, places: list[torch.Tensor], flip: bool
    ) -> torch.Tensor:
        of_made = self.G.encode(made)
        if flip:
            of_made = [torch.flip(own, [3]) for own in of_made]
        keys = self.F(self.G.encode(source), places)
        queries = self.F(of_made, places)
        losses = [self._nce(q, k.detach(), len(made)) for q, k in zip(queries, keys, strict=True)]
        return self.nce * sum(losses) / len(losses)

    def _nce(self, queries: torch.Tensor, keys: torch.Tensor, batch: int) -> torch.Tensor:
        width = queries.shape[1]
        own = torch.bmm(queries.view(-1, 1, width), keys.view(-1, width, 1)).view(-1, 1)
        q, k = queries.view(batch, -1, width), keys.view(batch, -1, width)
        count = q.shape[1]
        others = torch.bmm(q, k.transpose(2, 1))
        others.masked_fill_(torch.eye(count, dtype=torch.bool, device=q.device)[None], -10.0)
        every = torch.cat([own, others.view(-1, count)], 1) / self.temperature
        first = torch.zeros(len(every), dtype=torch.long, device=q.device)
        return F.cross_entropy(every, first, reduction="none").mean()

    def _require(self, wanted: bool) -> None:
        for parameter in self.D.parameters():
            parameter.requires_grad = wanted


def to_constant(verdicts: torch.Tensor, value: float) -> torch.Tensor:
    return F.mse_loss(verdicts, torch.full_like(verdicts, value))
