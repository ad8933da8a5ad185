"""U-shaped networks: skip connections that are joined channel by channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from .entry import Entry, random_entry


class Double(nn.Module):
    """Two 3x3 convolutions with batch norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H, W]."""
        return torch.relu(self.norm(self.b(torch.relu(self.a(x)))))


class UNet(nn.Module):
    """Two levels, transposed convolutions upwards (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.first, self.second = Double(3, width), Double(width, 2 * width)
        self.bottom = Double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.back2 = Double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.back1, self.out = Double(2 * width, width), nn.Conv2d(width, classes, 1)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes, H, W]."""
        pool = nn.functional.max_pool2d
        one = self.first(x)
        two = self.second(pool(one, 2))
        y = self.up2(self.bottom(pool(two, 2)))
        y = self.up1(self.back2(torch.cat([two, y], 1)))
        return self.out(self.back1(torch.cat([one, y], 1)))


class TimedBlock(nn.Module):
    """GroupNorm, convolution, a bias from the time step, convolution, shortcut (Ho et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, time: int, groups: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[N, inputs, H, W], [N, time] -> [N, outputs, H, W]."""
        y = self.conv1(silu(self.norm1(x))) + self.time(silu(time))[:, :, None, None]
        return self.conv2(silu(self.norm2(y))) + self.shortcut(x)


class PlaceAttention(nn.Module):
    """Attention among the places of an image; q, k and v from one 1x1 convolution."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        y = scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(n, c, h, w))


class DiffusionUNet(nn.Module):
    """One level of a denoising U-Net: time embedding, attention at the bottom, upsampling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self.stem = width, nn.Conv2d(3, width, 3, padding=1)
        self.embed = nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, 32))
        self.down, self.reduce = TimedBlock(width, width, 32), nn.Conv2d(width, width, 3, 2, 1)
        self.middle, self.attention = TimedBlock(width, 24, 32), PlaceAttention(24)
        self.up = TimedBlock(24 + width, width, 32)
        self.norm, self.out = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """[N, 3, H, W], [N] -> the noise [N, 3, H, W]."""
        half = torch.arange(self.width // 2, device=x.device)
        rate = torch.exp(-math.log(1e4) * half / len(half))
        angle = step[:, None] * rate
        time = self.embed(torch.cat([angle.sin(), angle.cos()], 1))
        high = self.down(self.stem(x), time)
        low = self.attention(self.middle(self.reduce(high), time))
        y = self.up(torch.cat([interpolate(low, scale_factor=2.0), high], 1), time)
        return self.out(silu(self.norm(y)))


def unet() -> Entry:
    """A segmentation U-Net."""
    return random_entry("unet", UNet, lambda: torch.randn(3, 3, 16, 16))


def diffusion() -> Entry:
    """A denoising U-Net with attention."""
    return random_entry(
        "diffusion-unet",
        DiffusionUNet,
        lambda: {"x": torch.randn(3, 3, 8, 8), "step": 10 * torch.rand(3)},
    )
