"""Small convolutional networks with cheap convolutions, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .entry import Entry, random_entry


def _image() -> Tensor:
    return torch.randn(3, 3, 16, 16)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al. 2018); the shortcut skips all three."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _conv(inputs, inner, 1)
        self.depthwise = _conv(inner, inner, 3, stride, inner)
        self.project = _conv(inner, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = nn.functional.relu6(self.expand(x))
        y = self.project(nn.functional.relu6(self.depthwise(y)))
        return x + y if self.shortcut else y


class Excite(nn.Module):
    """Squeeze and excite: a gate per channel from the mean over all places (Hu et al. 2018)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        gate = nn.functional.silu(self.down(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.up(gate))


class MBConv(nn.Module):
    """EfficientNet's block: an inverted residual with squeeze and excite (Tan, Le 2019)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = inputs * 4
        self.expand, self.depthwise = _conv(inputs, inner, 1), _conv(inner, inner, 5, stride, inner)
        self.excite, self.project = Excite(inner, inputs), _conv(inner, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = nn.functional.silu(self.depthwise(nn.functional.silu(self.expand(x))))
        y = self.project(self.excite(y))
        return x + y if self.shortcut else y


class DenseBlock(nn.Module):
    """Every layer reads all earlier ones, side by side (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [inputs + k * growth for k in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, inputs + layers * growth, H, W]."""
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return x


class ShuffleUnit(nn.Module):
    """Half of the channels pass; the other half is convolved; then both are shuffled (Ma et al.
    2018).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.first, self.last = _conv(half, half, 1), _conv(half, half, 1)
        self.depthwise = _conv(half, half, 3, 1, half)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        passed, y = x.chunk(2, 1)
        y = torch.relu(self.last(self.depthwise(torch.relu(self.first(y)))))
        n, c, h, w = x.shape
        return torch.cat([passed, y], 1).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(x.shape)


class Head(nn.Module):
    """Global mean, one linear layer."""

    def __init__(self, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, classes]."""
        return self.linear(x.mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm over channels, an MLP and a scale per channel (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(nn.functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def mobilenet() -> Entry:
    """MobileNetV2: inverted residuals, ReLU6."""
    return random_entry(
        "mobilenet",
        lambda: nn.Sequential(
            _conv(3, 8, 3, 2),
            nn.ReLU6(),
            InvertedResidual(8, 8, 1),
            InvertedResidual(8, 12, 2),
            InvertedResidual(12, 12, 1),
            Head(12),
        ),
        _image,
    )


def efficientnet() -> Entry:
    """EfficientNet: inverted residuals with squeeze and excite, SiLU."""
    return random_entry(
        "efficientnet",
        lambda: nn.Sequential(
            _conv(3, 8, 3, 2),
            nn.SiLU(),
            MBConv(8, 8, 1),
            MBConv(8, 12, 2),
            MBConv(12, 12, 1),
            Head(12),
        ),
        _image,
    )


def densenet() -> Entry:
    """DenseNet: two dense blocks and a transition that halves channels and places."""
    return random_entry(
        "densenet",
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            DenseBlock(8, 4, 3),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.Conv2d(20, 10, 1),
            nn.AvgPool2d(2),
            DenseBlock(10, 4, 2),
            nn.BatchNorm2d(18),
            nn.ReLU(),
            Head(18),
        ),
        _image,
    )


def shufflenet() -> Entry:
    """ShuffleNetV2: channel split, depthwise, channel shuffle."""
    return random_entry(
        "shufflenet",
        lambda: nn.Sequential(
            _conv(3, 16, 3, 2),
            nn.ReLU(),
            ShuffleUnit(16),
            ShuffleUnit(16),
            _conv(16, 24, 1),
            nn.ReLU(),
            Head(24),
        ),
        _image,
    )


def convnext() -> Entry:
    """ConvNeXt: a patch stem, two blocks, a strided convolution between them."""
    return random_entry(
        "convnext",
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 4, 4),
            ConvNeXtBlock(12),
            nn.Conv2d(12, 16, 2, 2),
            ConvNeXtBlock(16),
            Head(16),
        ),
        _image,
    )
