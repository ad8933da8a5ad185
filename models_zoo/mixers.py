"""Networks that mix without attention, or within windows: MLP-Mixer, Swin, WaveNet, KAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from .entry import Entry, random_entry


class MixerBlock(nn.Module):
    """An MLP over places, then one over channels (Tolstikhin et al. 2021)."""

    def __init__(self, places: int, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.place1, self.place2 = nn.Linear(places, inner), nn.Linear(inner, places)
        self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(2 * inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, places, width] -> the same shape."""
        y = self.place2(gelu(self.place1(self.norm1(x).transpose(1, 2))))
        x = x + y.transpose(1, 2)
        return x + self.down(gelu(self.up(self.norm2(x))))


class Mixer(nn.Module):
    """Patches, blocks, mean, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(16, 24, 20) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 16, 16] -> [N, 10]."""
        x = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class WindowAttention(nn.Module):
    """Attention in 4x4 windows, shifted by roll, with a bias table per head (Liu et al. 2021)."""

    def __init__(self, width: int, heads: int, shift: int, window: int = 4) -> None:
        super().__init__()
        self.heads, self.shift, self.window = heads, shift, window
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = place[:, None] - place[None] + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> the same shape."""
        n, h, w, c = x.shape
        k = self.window
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(n, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, k * k, c)
        qkv = self.qkv(x).view(-1, k * k, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.flatten()].view(k * k, k * k, -1).permute(2, 0, 1)
        y = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias[None])
        y = self.out(y.transpose(1, 2).reshape(-1, k * k, c))
        y = y.view(n, h // k, w // k, k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(y, (self.shift, self.shift), (1, 2))


class WindowBlock(nn.Module):
    """Pre-norm window attention and an MLP."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, shift)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Windows(nn.Module):
    """Two stages with patch merging between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, 2)
        self.first = nn.Sequential(WindowBlock(16, 2, 0), WindowBlock(16, 2, 2))
        self.norm, self.merge = nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
        self.second, self.head = WindowBlock(32, 4, 0), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 16, 16] -> [N, 10]."""
        x = self.first(self.embed(x).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.second(self.merge(self.norm(torch.cat(corners, -1))))
        return self.head(x.mean((1, 2)))


class Gated(nn.Module):
    """WaveNet's layer: dilated causal convolution, tanh * sigmoid, residual and skip."""

    def __init__(self, width: int, inner: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Conv1d(width, 2 * inner, 2, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(inner, width, 1), nn.Conv1d(inner, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, T] -> the same shape, and [N, skip, T]."""
        left, right = self.conv(nn.functional.pad(x, (self.dilation, 0))).chunk(2, 1)
        y = torch.tanh(left) * torch.sigmoid(right)
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """A stack of gated layers whose skips are added (van den Oord et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 12, 1)
        self.layers = nn.ModuleList(Gated(12, 16, 20, 2**k) for k in range(3))
        self.mid, self.out = nn.Conv1d(20, 24, 1), nn.Conv1d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, T] -> [N, 8, T]."""
        x = self.stem(x)
        total = x.new_zeros(())
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.out(torch.relu(self.mid(torch.relu(total))))


class KANLayer(nn.Module):
    """A learned function on every edge: radial bumps on a grid and a SiLU (Liu et al. 2024)."""

    def __init__(self, inputs: int, outputs: int, grid: int = 5) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, grid))
        self.base = nn.Linear(inputs, outputs)
        self.spline = nn.Parameter(torch.randn(outputs, inputs, grid) / (inputs * grid) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        bumps = torch.exp(-((x[..., None] - self.grid) ** 2))
        return self.base(nn.functional.silu(x)) + torch.einsum("nig,oig->no", bumps, self.spline)


def mixer() -> Entry:
    """MLP-Mixer."""
    return random_entry("mlp-mixer", Mixer, lambda: torch.randn(3, 3, 16, 16))


def windows() -> Entry:
    """Swin-like window attention with patch merging."""
    return random_entry("window-attention", Windows, lambda: torch.randn(3, 3, 16, 16))


def wavenet() -> Entry:
    """WaveNet."""
    return random_entry("wavenet", WaveNet, lambda: torch.randn(3, 1, 40))


def kan() -> Entry:
    """A Kolmogorov-Arnold network of three layers."""
    return random_entry(
        "kan",
        lambda: nn.Sequential(KANLayer(7, 16), KANLayer(16, 12), KANLayer(12, 5)),
        lambda: torch.randn(3, 7),
    )
