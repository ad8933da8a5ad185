"""Small convolutional networks in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .entry import Entry, random_entry


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels with zeros (option A of
    He et al. 2015).
    """

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.extra = stride, planes - inputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, planes, H / stride, W / stride]."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            half = self.extra // 2
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return torch.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR ResNet: three stages of n basic blocks with w, 2w, 4w channels, global
    pooling, one linear layer.
    """

    def __init__(self, n: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(3):
            planes = width * 2**stage
            blocks = []
            for b in range(n):
                blocks.append(BasicBlock(inputs, planes, 2 if stage and not b else 1))
                inputs = planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet() -> Entry:
    """A ResNet of 8 layers."""
    return random_entry("resnet", lambda: ResNet(1, 8), lambda: torch.randn(3, 3, 16, 16))
