"""The networks of `joined_toys`, whose translator is made of parts of two of them, as MUNIT's."""

from __future__ import annotations

import torch
from torch import nn

WIDE, STYLE = 8, 4


class AutoEncoder(nn.Module):
    """What a picture shows and how it looks, and back."""

    channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.content = nn.Sequential(nn.Conv2d(3, WIDE, 3, padding=1), nn.BatchNorm2d(WIDE))
        self.style = nn.Conv2d(3, STYLE, 1)
        self.classes = nn.Embedding(2, STYLE)
        self.mlp = nn.Linear(STYLE, WIDE)
        self.decoder = nn.Sequential(nn.Conv2d(WIDE, 3, 3, padding=1), nn.Tanh())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.content(images), looks(self, images)


def looks(own: AutoEncoder, images: torch.Tensor) -> torch.Tensor:
    return own.style(images).mean((2, 3))


class Translation(nn.Module):
    """The content of one, in the style and of the class of the other."""

    channels = 3

    def __init__(self, source: str, target: str, **networks: AutoEncoder) -> None:
        super().__init__()
        self.content = networks[source].content
        self.decoding = Decoding(**{target: networks[target]})

    def forward(
        self, images: torch.Tensor, style: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        return self.decoding(self.content(images), style, classes)


class Decoding(nn.Module):
    def __init__(self, **networks: AutoEncoder) -> None:
        super().__init__()
        (own,) = networks.values()
        self.mlp, self.classes, self.decoder = own.mlp, own.classes, own.decoder

    def forward(
        self, content: torch.Tensor, style: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        strength = self.mlp(style + self.classes(classes))[:, :, None, None]
        return self.decoder(content + content * strength)


class Styling(nn.Module):
    def __init__(self, **networks: AutoEncoder) -> None:
        super().__init__()
        (self.own,) = networks.values()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return looks(self.own, images)
