"""Encoders whose embeddings are clustered, and what labels pictures by the clusters.

`resnet18` is BalaGAN's (Patashnik et al. 2021): SimCLR's encoder and projection head (Chen et al.
2020). `vae` is the variational autoencoder of its ablation (Kingma and Welling 2014), in the sizes
of PyTorch-VAE. `small` is for pictures of 32 pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from .classifier import ResNet18
from .modalities import LATENT

Encoder = Literal["resnet18", "small", "vae"]
WIDTHS = {"resnet18": (512, 256), "small": (128, 64), "vae": (LATENT, LATENT)}
"""Of an embedding h, and of z, to which the head projects it."""


class SmallEncoder(nn.Module):
    """Four convolutions of stride 2: 128 features."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for ins, outs in ((channels, 32), (32, 64), (64, 128), (128, 128)):
            layers += [
                nn.Conv2d(ins, outs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outs),
                nn.ReLU(),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × H × W to N × 128."""
        means: torch.Tensor = self.layers(images).mean(dim=(2, 3))
        return means


class VariationalEncoder(nn.Module):
    """Five convolutions of stride 2, and of what they leave a mean and the log of a variance."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for ins, outs in ((channels, 32), (32, 64), (64, 128), (128, 256), (256, 512)):
            layers += [
                nn.Conv2d(ins, outs, 3, stride=2, padding=1),
                nn.BatchNorm2d(outs),
                nn.LeakyReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.mean = nn.Linear(512 * 4, LATENT)
        self.log_variance = nn.Linear(512 * 4, LATENT)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × 64 × 64 in [−1, 1] to the means, N × 128."""
        means: torch.Tensor = self.mean(self.layers(images))
        return means

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The means, and the logarithms of the variances."""
        values = self.layers(images)
        return self.mean(values), self.log_variance(values)


class VariationalDecoder(nn.Module):
    """From a code to a picture of 64 × 64."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(LATENT, 512 * 4), nn.Unflatten(1, (512, 2, 2))]
        for ins, outs in ((512, 256), (256, 128), (128, 64), (64, 32), (32, 32)):
            layers += [
                nn.ConvTranspose2d(ins, outs, 3, stride=2, padding=1, output_padding=1),
                nn.BatchNorm2d(outs), nn.LeakyReLU(),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers, nn.Conv2d(32, channels, 3, padding=1), nn.Tanh())

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """N × 128 to N × channels × 64 × 64 in [−1, 1]."""
        made: torch.Tensor = self.layers(codes)
        return made


class Labeller(nn.Module):
    """An encoder, and the centroids of its embeddings' clusters, nearest to which a picture is."""

    def __init__(
        self, encoder: Encoder = "resnet18", size: int = 128, k: int = 1, channels: int = 3,
        embedding: Literal["h", "z"] = "h",
    ) -> None:  # fmt: skip
        """Build it.

        Args:
            encoder: which.
            size: the side of the pictures that it sees. It is kept, and pictures of another size
                are brought to it before they are embedded.
            k: clusters, of both domains together.
            channels: of the pictures.
            embedding: what is clustered: what the encoder gives, or what the head makes of it.
        """
        super().__init__()
        self.kind, self.embedding, self.channels = encoder, embedding, channels
        self.head: nn.Module | None = None
        self.decoder: nn.Module | None = None
        wide, narrow = WIDTHS[encoder]
        if encoder == "vae":
            self.encoder: nn.Module = VariationalEncoder(channels)
            self.decoder = VariationalDecoder(channels)
        else:
            self.encoder = (
                ResNet18(0, channels) if encoder == "resnet18" else SmallEncoder(channels)
            )
            self.head = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, narrow))
        self.register_buffer("centroids", torch.zeros(k, wide if embedding == "h" else narrow))
        self.register_buffer("belongs", torch.zeros(k, dtype=torch.int64))
        self.register_buffer("side", torch.tensor(size, dtype=torch.int64))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """h, of images of its size in [−1, 1]; contrastive encoders see them in [0, 1]."""
        made: torch.Tensor = self.encoder.features(
            images if self.kind == "vae" else (images + 1) / 2
        )
        return made

    def embedded(self, images: torch.Tensor) -> torch.Tensor:
        """What is clustered: N × channels × H × W in [−1, 1] to N × d."""
        side = int(self.side)
        if tuple(images.shape[2:]) != (side, side):
            images = nn.functional.interpolate(
                images, (side, side), mode="bilinear", antialias=True, align_corners=False
            )
        made = self.features(images)
        return made if self.head is None or self.embedding == "h" else self.head(made)

    def nearest(self, embeddings: torch.Tensor, domain: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The label of each embedding, and its cosine to that centroid.

        Args:
            embeddings: N × d.
            domain: 0 for A, 1 for B: whose centroids. Where it has none it is one class, whose
                label follows all others, and whose cosine is NaN.
        """
        cosines = nn.functional.normalize(embeddings.float(), dim=1) @ self.centroids.T
        own = self.belongs == domain
        best, labels = cosines.masked_fill(~own, -torch.inf).max(dim=1)
        labels = torch.where(own.any(), labels, len(own))
        return labels, torch.where(own.any(), best, torch.nan)

    def forward(self, images: torch.Tensor, domain: int = 0) -> torch.Tensor:
        """The labels of images: N integers."""
        return self.nearest(self.embedded(images), domain)[0]


class Projection(nn.Module):
    """z of a labeller's encoder and head, which NT-Xent compares."""

    def __init__(self, M: Labeller) -> None:  # noqa: N803
        super().__init__()
        self.labeller = M

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × H × W in [−1, 1] to N × d."""
        assert self.labeller.head is not None
        made: torch.Tensor = self.labeller.head(self.labeller.features(images))
        return made


class Reconstruction(nn.Module):
    """What a labeller's VAE makes of pictures."""

    def __init__(self, M: Labeller) -> None:  # noqa: N803
        super().__init__()
        self.labeller = M

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pictures made again, the means, and the logarithms of the variances.

        Args:
            images: N × channels × 64 × 64 in [−1, 1].
            noise: N × 128 from N(0, 1).
        """
        assert self.labeller.decoder is not None
        mean, log_variance = self.labeller.encoder(images)
        return self.labeller.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance
