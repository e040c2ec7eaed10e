"""The published BalaGAN step, plainly: what `modelsoup_i2i` is measured against.

Written from Patashnik, Danon, Zhang and Cohen-Or 2020 and a description of the official code, which
is FUNIT's with a second head, to do what that does in its order: the discriminator's turn
translates once without gradients, judges references, takes R1 of that pass, and judges the
translation; the generator's turn translates anew, into both styles, and looks at four sets of
pictures with the discriminator, whose weights get gradients that nobody uses, also through the
features of real ones. `torch.optim.RMSprop` as it comes. Tensors have the official names.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class AdaIN(nn.Module):
    """Its weight and bias are set before each pass."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c = x.shape[:2]
        made = F.batch_norm(
            x.reshape(1, n * c, *x.shape[2:]), None, None, self.weight, self.bias, True, 0.1, 1e-5
        )
        return made.view(n, c, *x.shape[2:])


class Conv2dBlock(nn.Module):
    def __init__(
        self, ins: int, outs: int, kernel: int, stride: int, padding: int, norm: str = "none",
        activation: str = "relu", *, bias: bool = True, first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pad = nn.ReflectionPad2d(padding)
        self.norm = {
            "none": nn.Identity, "in": lambda: nn.InstanceNorm2d(outs), "adain": lambda: AdaIN(outs)
        }[norm]()  # fmt: skip
        self.activation = {
            "none": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh,
            "lrelu": lambda: nn.LeakyReLU(0.2),
        }[activation]()  # fmt: skip
        self.conv = nn.Conv2d(ins, outs, kernel, stride, bias=bias)
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            return self.norm(self.conv(self.pad(self.activation(x))))
        return self.activation(self.norm(self.conv(self.pad(x))))


class ResBlock(nn.Module):
    def __init__(self, dim: int, norm: str) -> None:
        super().__init__()
        self.model = nn.Sequential(
            Conv2dBlock(dim, dim, 3, 1, 1, norm), Conv2dBlock(dim, dim, 3, 1, 1, norm, "none")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + x


class ResBlocks(nn.Module):
    def __init__(self, count: int, dim: int, norm: str) -> None:
        super().__init__()
        self.model = nn.Sequential(*(ResBlock(dim, norm) for _ in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Model(nn.Module):
    """Layers one after the other, under the name that official checkpoints have for them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class LinearBlock(nn.Module):
    def __init__(self, ins: int, outs: int, activation: str) -> None:
        super().__init__()
        self.fc = nn.Linear(ins, outs)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.fc(x))


class Generator(nn.Module):
    def __init__(
        self, width: int, downs: int, blocks: int, style_downs: int, latent: int, mlp: int
    ) -> None:
        super().__init__()
        style: list[nn.Module] = [Conv2dBlock(3, width, 7, 1, 3)]
        wide = width
        for _ in range(style_downs):
            outs = min(2 * wide, 4 * width)
            style.append(Conv2dBlock(wide, outs, 4, 2, 1))
            wide = outs
        style += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, latent, 1)]
        self.enc_class_model = Model(*style)
        content: list[nn.Module] = [Conv2dBlock(3, width, 7, 1, 3, "in")]
        wide = width
        for _ in range(downs):
            content.append(Conv2dBlock(wide, 2 * wide, 4, 2, 1, "in"))
            wide *= 2
        self.enc_content = Model(*content, ResBlocks(blocks, wide, "in"))
        given = 4 * blocks * wide
        self.mlp = Model(
            LinearBlock(latent, mlp, "relu"), LinearBlock(mlp, mlp, "relu"),
            LinearBlock(mlp, given, "none"),
        )  # fmt: skip
        decoder: list[nn.Module] = [ResBlocks(blocks, wide, "adain")]
        for _ in range(downs):
            decoder += [
                nn.Upsample(scale_factor=2), Conv2dBlock(wide, wide // 2, 5, 1, 2, "in")
            ]  # fmt: skip
            wide //= 2
        self.dec = Model(*decoder, Conv2dBlock(wide, 3, 7, 1, 3, "none", "tanh"))

    def decode(self, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        given = self.mlp(style.flatten(1))
        for layer in self.dec.modules():
            if isinstance(layer, AdaIN):
                layer.bias = given[:, : layer.channels].reshape(-1)
                layer.weight = given[:, layer.channels : 2 * layer.channels].reshape(-1)
                given = given[:, 2 * layer.channels :]
        return self.dec(content)

    def translate(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.decode(self.enc_content(x), self.enc_class_model(y))


class ActFirstResBlock(nn.Module):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        least, act = min(ins, outs), {"activation": "lrelu", "first": True}
        self.conv_0 = Conv2dBlock(ins, least, 3, 1, 1, **act)
        self.conv_1 = Conv2dBlock(least, outs, 3, 1, 1, **act)
        self.learned = ins != outs
        if self.learned:
            self.conv_s = Conv2dBlock(ins, outs, 1, 1, 0, activation="none", bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beside = self.conv_s(x) if self.learned else x
        return beside + self.conv_1(self.conv_0(x))


class Discriminator(nn.Module):
    def __init__(self, classes: int, width: int, halvings: int, most: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv2dBlock(3, width, 7, 1, 3, activation="none")]
        wide = width
        for _ in range(halvings):
            outs = min(2 * wide, most)
            layers += [
                ActFirstResBlock(wide, wide), ActFirstResBlock(wide, outs),
                nn.ReflectionPad2d(1), nn.AvgPool2d(3, 2),
            ]  # fmt: skip
            wide = outs
        self.cnn_f = nn.Sequential(*layers, *(ActFirstResBlock(wide, wide) for _ in range(2)))
        head = {"activation": "lrelu", "first": True}
        self.cnn_c = nn.Sequential(Conv2dBlock(wide, classes, 1, 1, 0, **head))
        self.cnn_classifier = nn.Sequential(Conv2dBlock(wide, classes, 1, 1, 0, **head))

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The verdicts of the pictures' classes, features, and the classifier's logits."""
        features = self.cnn_f(x)
        verdicts = self.cnn_c(features)
        chosen = verdicts[torch.arange(len(x), device=x.device), labels]
        return chosen, features, self.cnn_classifier(features).mean(3).mean(2)


class Original:
    """Two networks and their step.

    Args:
        classes: of the discriminator.
        width, downs, blocks, style_downs, latent, mlp, halvings, most: the size of the networks.
        r1: `funit`, the code's penalty, or `per_sample`, the paper's.
    """

    def __init__(
        self, classes: int = 41, width: int = 64, downs: int = 3, blocks: int = 2,
        style_downs: int = 4, latent: int = 64, mlp: int = 256, halvings: int = 4,
        most: int = 1024, *, r1: str = "funit", lr: float = 1e-4, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.r1 = r1
        self.G = Generator(width, downs, blocks, style_downs, latent, mlp).to(device)
        self.D = Discriminator(classes, width, halvings, most).to(device)
        for network in (self.G, self.D):
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        self.G_ema = copy.deepcopy(self.G)
        self.optimizers = {
            network: torch.optim.RMSprop(network.parameters(), lr=lr, weight_decay=1e-4)
            for network in (self.G, self.D)
        }

    def networks(self) -> dict[str, nn.Module]:
        return {"G": self.G, "D": self.D, "G_ema": self.G_ema}

    def step(
        self, x: torch.Tensor, c_x: torch.Tensor, y: torch.Tensor, c_y: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """One of each optimiser, the discriminator's first."""
        losses = self.judge(x, y, c_y)
        losses |= self.translate(x, c_x, y, c_y)
        with torch.no_grad():
            for average, own in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
                average.copy_(torch.lerp(own, average, 0.999))
        return losses

    def judge(self, x: torch.Tensor, y: torch.Tensor, c_y: torch.Tensor) -> dict[str, torch.Tensor]:
        self.optimizers[self.D].zero_grad()
        y = y.detach().requires_grad_()
        verdicts, _, logits = self.D(y, c_y)
        losses = {"real": F.relu(1 - verdicts).mean(), "classes": F.cross_entropy(logits, c_y)}
        (losses["real"] + losses["classes"]).backward(retain_graph=True)
        of = verdicts.mean() if self.r1 == "funit" else verdicts.mean((1, 2)).sum()
        (slope,) = torch.autograd.grad(of, y, create_graph=True)
        losses["r1"] = slope.square().sum() / len(y)
        (10 * losses["r1"]).backward()
        with torch.no_grad():
            fake = self.G.translate(x, y)
        losses["made"] = F.relu(1 + self.D(fake.detach(), c_y)[0]).mean()
        losses["made"].backward()
        self.optimizers[self.D].step()
        return losses

    def translate(
        self, x: torch.Tensor, c_x: torch.Tensor, y: torch.Tensor, c_y: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        self.optimizers[self.G].zero_grad()
        content = self.G.enc_content(x)
        own, other = self.G.enc_class_model(x), self.G.enc_class_model(y)
        made, again = self.G.decode(content, other), self.G.decode(content, own)
        of_made, seen, _ = self.D(made, c_y)
        of_again, seen_again, _ = self.D(again, c_x)
        _, wanted, _ = self.D(y, c_y)
        _, wanted_again, _ = self.D(x, c_x)
        losses = {"gan": 0.5 * (-of_made.mean() - of_again.mean()), "rec": F.l1_loss(again, x)}
        losses["features"] = sum(
            F.l1_loss(a.mean(3).mean(2), b.mean(3).mean(2))
            for a, b in ((seen_again, wanted_again), (seen, wanted))
        )
        (losses["gan"] + 0.1 * losses["rec"] + losses["features"]).backward()
        self.optimizers[self.G].step()
        return losses
