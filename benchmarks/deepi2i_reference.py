"""The published DeepI2I step, plainly: what `modelsoup_i2i` is measured against.

Written from Wang, Yu and van de Weijer 2020 and a description of the official code, which is
BigGAN's, to do what that does in its order: a pass of all networks for the discriminator's turn, a
second one, of other noise, for the others', pictures that are real and made in one batch, the
source's features beside those of its translation, spectral norms by a step of power iteration in
each pass, and `torch.optim.Adam` as it comes. Tensors have the official names.

Not reproduced: the code compares the features of a batch's first two pictures, whatever they are;
here all pairs of source and translation are compared, as the paper says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

EPS = 1e-6
# Side, G's widths in and out, D's widths in (3 channels first) and out, which of D's blocks halve.
ARCHITECTURES = {
    "32s": (32, (8, 8, 4), (8, 4, 2), (1, 2, 4), (1, 2, 4, 8), (1, 1, 1, 0)),
    "64s": (64, (8, 8, 8, 4), (8, 8, 4, 2), (1, 2, 4, 8), (1, 2, 4, 8, 8), (1, 1, 1, 1, 0)),
    "64": (64, (16, 16, 8, 4), (16, 8, 4, 2), (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 1, 1, 1, 0)),
    "128": (
        128, (16, 16, 8, 4, 2), (16, 8, 4, 2, 1), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 16),
        (1, 1, 1, 1, 1, 0),
    ),
}  # fmt: skip


class SN:
    """A weight over its first singular value."""

    def prepare(self, outs: int) -> None:
        nn.init.orthogonal_(self.weight)
        self.register_buffer("u0", torch.randn(1, outs))
        self.register_buffer("sv0", torch.ones(1))

    def normed(self) -> torch.Tensor:
        matrix = self.weight.reshape(self.weight.shape[0], -1)
        with torch.no_grad():
            v = F.normalize(torch.matmul(self.u0, matrix), eps=EPS)
            u = F.normalize(torch.matmul(v, matrix.t()), eps=EPS)
            if self.training:
                self.u0[:] = u
        sv = torch.squeeze(torch.matmul(torch.matmul(v, matrix.t()), u.t()))
        if self.training:
            with torch.no_grad():
                self.sv0[:] = sv
        return self.weight / sv


class SNConv2d(nn.Conv2d, SN):
    def __init__(self, ins: int, outs: int, kernel: int, bias: bool = True) -> None:
        super().__init__(ins, outs, kernel, padding=kernel // 2, bias=bias)
        self.prepare(outs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.normed(), self.bias, padding=self.padding)


class SNLinear(nn.Linear, SN):
    def __init__(self, ins: int, outs: int, bias: bool = True) -> None:
        super().__init__(ins, outs, bias)
        self.prepare(outs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.normed(), self.bias)


class SNEmbedding(nn.Embedding, SN):
    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.prepare(count)

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        return F.embedding(c, self.normed())


class BatchNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, 1e-5
        )


class CCBN(BatchNorm):
    """Its gain and bias are made of the class and of noise."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__(channels)
        self.gain = SNLinear(condition, channels, bias=False)
        self.bias = SNLinear(condition, channels, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gain = (1 + self.gain(y)).view(y.size(0), -1, 1, 1)
        bias = self.bias(y).view(y.size(0), -1, 1, 1)
        return self.normed(x) * gain + bias


class BN(BatchNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normed(x) * self.gain.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.theta = SNConv2d(channels, channels // 8, 1, bias=False)
        self.phi = SNConv2d(channels, channels // 8, 1, bias=False)
        self.g = SNConv2d(channels, channels // 2, 1, bias=False)
        self.o = SNConv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, height, width = x.shape
        theta = self.theta(x).view(n, self.channels // 8, height * width)
        phi = F.max_pool2d(self.phi(x), 2).view(n, self.channels // 8, height * width // 4)
        g = F.max_pool2d(self.g(x), 2).view(n, self.channels // 2, height * width // 4)
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        found = torch.bmm(g, beta.transpose(1, 2)).view(n, self.channels // 2, height, width)
        return self.gamma * self.o(found) + x


class GBlock(nn.Module):
    def __init__(self, ins: int, outs: int, condition: int) -> None:
        super().__init__()
        self.conv1 = SNConv2d(ins, outs, 3)
        self.conv2 = SNConv2d(outs, outs, 3)
        self.conv_sc = SNConv2d(ins, outs, 1)
        self.bn1 = CCBN(ins, condition)
        self.bn2 = CCBN(outs, condition)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2)
        h = self.conv2(F.relu(self.bn2(self.conv1(h), y)))
        return h + self.conv_sc(F.interpolate(x, scale_factor=2))


class DBlock(nn.Module):
    def __init__(self, ins: int, outs: int, *, down: bool, preactivation: bool) -> None:
        super().__init__()
        self.down, self.preactivation = down, preactivation
        self.conv1 = SNConv2d(ins, outs, 3)
        self.conv2 = SNConv2d(outs, outs, 3)
        if down or ins != outs:
            self.conv_sc = SNConv2d(ins, outs, 1)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.preactivation:
            x = self.conv_sc(x) if hasattr(self, "conv_sc") else x
            return F.avg_pool2d(x, 2) if self.down else x
        x = F.avg_pool2d(x, 2) if self.down else x
        return self.conv_sc(x) if hasattr(self, "conv_sc") else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x) if self.preactivation else x)))
        return (F.avg_pool2d(h, 2) if self.down else h) + self.shortcut(x)


class Generator(nn.Module):
    def __init__(
        self, arch: str, ch: int, classes: int, chunk: int, shared: int, attention: int
    ) -> None:
        super().__init__()
        _, ins, outs, *_ = ARCHITECTURES[arch]
        self.chunk, self.dim_z = chunk, chunk * (len(ins) + 1)
        self.shared = nn.Embedding(classes, shared)
        nn.init.orthogonal_(self.shared.weight)
        self.linear = SNLinear(chunk, 16 * ins[0] * ch)
        self.blocks = nn.ModuleList()
        for n, (wide_in, wide_out) in enumerate(zip(ins, outs, strict=True)):
            block = [GBlock(wide_in * ch, wide_out * ch, shared + chunk)]
            if attention == 8 * 2**n:
                block.append(Attention(wide_out * ch))
            self.blocks.append(nn.ModuleList(block))
        self.output_layer = nn.Sequential(
            BN(outs[-1] * ch), nn.ReLU(inplace=True), SNConv2d(outs[-1] * ch, 3, 3)
        )

    def forward(
        self, z: torch.Tensor, y: torch.Tensor, features: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Of rows of `shared`; features are added where their resolution is reached."""
        zs = torch.split(z, self.chunk, 1)
        h = self.linear(zs[0])
        h = h.view(h.size(0), -1, 4, 4)
        if 4 in features:
            h = h + features[4]
        for n, block in enumerate(self.blocks):
            condition = torch.cat([y, zs[n + 1]], 1)
            h = block[0](h, condition)
            for layer in block[1:]:
                h = layer(h)
            if h.size(-1) in features:
                h = h + features[h.size(-1)]
        return torch.tanh(self.output_layer(h))


class Pyramid(nn.Module):
    def __init__(self, arch: str, ch: int, attention: int) -> None:
        super().__init__()
        side, _, _, ins, outs, down = ARCHITECTURES[arch]
        self.side, self.width = side, outs[-1] * ch
        widths = [3, *(wide * ch for wide in ins)]
        self.blocks = nn.ModuleList()
        for n, wide in enumerate(outs):
            block = [DBlock(widths[n], wide * ch, down=bool(down[n]), preactivation=n > 0)]
            side = side // 2 if down[n] else side
            if attention == side and down[n]:
                block.append(Attention(wide * ch))
            self.blocks.append(nn.ModuleList(block))

    def taps(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The last block's output; and the last of each resolution, up to a quarter of the side."""
        found = {}
        for block in self.blocks:
            for layer in block:
                x = layer(x)
            if 4 * x.size(-1) <= self.side:
                found[x.size(-1)] = x
        return x, found


class Discriminator(Pyramid):
    def __init__(self, arch: str, ch: int, classes: int, attention: int) -> None:
        super().__init__(arch, ch, attention)
        self.linear = SNLinear(self.width, 1)
        self.embed = SNEmbedding(classes, self.width)

    def forward(
        self, x: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        h, found = self.taps(x)
        h = torch.sum(F.relu(h), [2, 3])
        return self.linear(h) + torch.sum(self.embed(c) * h, 1, keepdim=True), found


class Encoder(Pyramid):
    """The discriminator's layers; its last map is rectified, as an in-place ReLU does."""

    def __init__(self, arch: str, ch: int, classes: int, attention: int, *, dead: bool) -> None:
        super().__init__(arch, ch, attention)
        if dead:  # the official module has layers that nothing calls
            self.linear = SNLinear(self.width, 1)
            self.embed = SNEmbedding(classes, self.width)

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        h, found = self.taps(x)
        return {**found, h.size(-1): F.relu(h)}


class Adaptor(nn.Module):
    def __init__(self, arch: str, ch: int, classes: int, *, dead: bool) -> None:
        super().__init__()
        side, ins, outs, _, widths, down = ARCHITECTURES[arch]
        made = {4 * 2**n: wide * ch for n, wide in enumerate((ins[0], *outs))}
        seen, r = {}, side
        for wide, halved in zip(widths, down, strict=True):
            r = r // 2 if halved else r
            seen[r] = wide * ch
        self.sides = [r for r in sorted(seen, reverse=True) if 4 * r <= side]
        self.blocks = nn.ModuleList(
            nn.ModuleList([DBlock(seen[r], made[r], down=False, preactivation=True)])
            for r in self.sides
        )
        if dead:
            self.linear = SNLinear(widths[-1] * ch, 1)
            self.embed = SNEmbedding(classes, widths[-1] * ch)

    def forward(self, features: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {r: block[0](features[r]) for r, block in zip(self.sides, self.blocks, strict=True)}


class Original:
    """Four networks and their step.

    Args:
        arch, ch, classes, chunk, shared, attention: the size of the networks.
        phase: steps in which only A and D are trained.
        scratch: nothing was pre-trained: all four are trained from the first step on.
        rec: `l1`, the paper's distance between features, or `mse`, the code's.
        dead: build the layers of E and A that nothing calls, as the official code does.
    """

    def __init__(
        self, arch: str = "128", ch: int = 96, classes: int = 1000, chunk: int = 20,
        shared: int = 128, attention: int = 64, *, phase: int = 500, scratch: bool = False,
        rec: str = "l1", lr_g: float = 1e-4, lr_d: float = 4e-4, dead: bool = False,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.phase, self.scratch, self.steps, self.device = phase, scratch, 0, device
        self.classes, self.distance = classes, {"l1": F.l1_loss, "mse": F.mse_loss}[rec]
        self.G = Generator(arch, ch, classes, chunk, shared, attention).to(device)
        self.D = Discriminator(arch, ch, classes, attention).to(device)
        self.E = Encoder(arch, ch, classes, attention, dead=dead).to(device)
        self.A = Adaptor(arch, ch, classes, dead=dead).to(device)
        top = max(self.A.sides)
        self.alpha = {r: 0.01 if r == top else 0.1 for r in self.A.sides}
        self.w = {r: 1.0 if scratch and r != top else 0.1 for r in self.A.sides}
        self.optimizers = {
            name: torch.optim.Adam(
                getattr(self, name).parameters(), lr=lr, betas=(0.0, 0.999), eps=1e-6
            )
            for name, lr in (("G", lr_g), ("D", lr_d), ("E", lr_d), ("A", lr_d))
        }
        if not scratch:
            self.E.eval()  # frozen: nothing of it moves

    def networks(self) -> dict[str, nn.Module]:
        return {"G": self.G, "D": self.D, "E": self.E, "A": self.A}

    def translate(self, x: torch.Tensor, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        made = self.A(self.E(x))
        features = {r: self.w[r] * feature for r, feature in made.items()}
        return self.G(z, self.G.shared(c), features)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.randn(count, self.G.dim_z, device=self.device),
            torch.randint(self.classes, (count,), device=self.device),
        )

    def step(self, *passes: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """One of each optimiser; each pass is sources, their classes, reals and theirs."""
        losses = self.judge(passes)
        losses |= self.deceive(passes)
        self.steps += 1
        return losses

    def judge(self, passes: tuple[tuple[torch.Tensor, ...], ...]) -> dict[str, torch.Tensor]:
        self._require("D")
        self.optimizers["D"].zero_grad()
        for x, _, y, c_y in passes:
            z, c = self.draw(len(x))
            with torch.no_grad():
                fake = self.translate(x, z, c)
            verdicts, _ = self.D(torch.cat([fake, y]), torch.cat([c, c_y]))
            of_fake, of_real = torch.split(verdicts, [len(x), len(y)])
            losses = {
                "D_real": torch.mean(F.relu(1.0 - of_real)),
                "D_fake": torch.mean(F.relu(1.0 + of_fake)),
            }
            ((losses["D_real"] + losses["D_fake"]) / len(passes)).backward()
        self.optimizers["D"].step()
        return losses

    def deceive(self, passes: tuple[tuple[torch.Tensor, ...], ...]) -> dict[str, torch.Tensor]:
        trained = "GEA" if self.scratch else "A" if self.steps < self.phase else "GA"
        self._require(trained)
        for name in trained:
            self.optimizers[name].zero_grad()
        for x, c_x, _, _ in passes:
            z, c = self.draw(len(x))
            fake = self.translate(x, z, c)
            verdicts, found = self.D(torch.cat([fake, x]), torch.cat([c, c_x]))
            rec = 0.0
            for r, alpha in self.alpha.items():
                of_fake, of_source = torch.split(found[r], len(x))
                rec = rec + alpha * self.distance(of_fake, of_source.detach())
            losses = {"G_adv": -torch.mean(verdicts[: len(x)]), "rec": rec}
            ((losses["G_adv"] + losses["rec"]) / len(passes)).backward()
        for name in trained:
            self.optimizers[name].step()
        return losses

    def _require(self, trained: str) -> None:
        for name, network in self.networks().items():
            network.requires_grad_(name in trained)
