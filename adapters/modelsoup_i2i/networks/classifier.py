"""Classifiers, of whose last features distances of sets can be made, too.

`ResNet18` is He, Zhang, Ren and Sun, CVPR 2016, with torchvision's names.
"""

from __future__ import annotations

import torch
from torch import nn


class SmallClassifier(nn.Module):
    """Three convolutions, each halved, and a linear layer: 64 features."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        """Build it.

        Args:
            classes: how many are told apart.
            channels: of the images.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for ins, outs in ((channels, 32), (32, 64), (64, 64)):
            layers += [
                nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU(),
                nn.MaxPool2d(2),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(64, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × H × W in [−1, 1], of at least 8 pixels a side, to N × 64."""
        means: torch.Tensor = self.layers(images).mean(dim=(2, 3))
        return means

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × classes, before a softmax."""
        logits: torch.Tensor = self.fc(self.features(images))
        return logits


class Convolution(nn.Conv2d):
    """A convolution without bias that initialises itself as ResNets' do."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(ins, outs, kernel, stride=stride, padding=kernel // 2, bias=False)

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two convolutions beside what they are added to."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(ins, outs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = Convolution(outs, outs, 3)
        self.bn2 = nn.BatchNorm2d(outs)
        self.downsample: nn.Module | None = None
        if ins != outs:
            self.downsample = nn.Sequential(Convolution(ins, outs, 1, stride), nn.BatchNorm2d(outs))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × outs × H × W, by the stride smaller."""
        beside = images if self.downsample is None else self.downsample(images)
        made = self.bn1(self.conv1(images)).relu()
        result: torch.Tensor = (self.bn2(self.conv2(made)) + beside).relu()
        return result


class ResNet18(nn.Module):
    """Four stages of two blocks: 512 features."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        """Build it.

        Args:
            classes: how many are told apart; with 0 it has no last layer, and gives its features.
            channels: of the images.
        """
        super().__init__()
        self.conv1 = Convolution(channels, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, 1)
        self.layer2 = _stage(64, 128, 2)
        self.layer3 = _stage(128, 256, 2)
        self.layer4 = _stage(256, 512, 2)
        self.fc = nn.Linear(512, classes) if classes else None

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × H × W in [−1, 1] to N × 512."""
        values = self.maxpool(self.bn1(self.conv1(images)).relu())
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            values = stage(values)
        means: torch.Tensor = values.mean(dim=(2, 3))
        return means

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × classes, before a softmax."""
        features = self.features(images)
        logits: torch.Tensor = features if self.fc is None else self.fc(features)
        return logits


def _stage(ins: int, outs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(ins, outs, stride), BasicBlock(outs, outs, 1))
