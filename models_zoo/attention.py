"""Attention in the layouts that people write by hand, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from .entry import Entry, random_entry

VOCABULARY, WIDTH, HEADS, LENGTH = 101, 32, 4, 64


def _tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 11))


class MLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return self.down(gelu(self.up(x)))


class SplitAttention(nn.Module):
    """nanoGPT's attention: one linear layer, split into q, k, v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape, causal."""
        b, t, c = x.shape
        parts = self.qkv(x).split(c, 2)
        q, k, v = (p.view(b, t, self.heads, c // self.heads).transpose(1, 2) for p in parts)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class InterleavedAttention(nn.Module):
    """q, k and v lie interleaved in the last place: "b n (h d qkv)", or "b n (h qkv d)"."""

    def __init__(self, width: int, heads: int, last: bool) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        b, t, c = x.shape
        size = c // self.heads
        shape = (self.heads, size, 3) if self.last else (self.heads, 3, size)
        qkv = self.qkv(x).reshape(b, t, *shape)
        q, k, v = (p.transpose(1, 2) for p in qkv.unbind(-1 if self.last else -2))
        y = ((q @ k.transpose(-1, -2)) * size**-0.5).softmax(-1) @ v
        return self.out(y.permute(0, 2, 1, 3).flatten(2))


class GroupedAttention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys and rotary positions (Qwen3)."""

    def __init__(self, width: int, heads: int, groups: int, size: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.q, self.k = nn.Linear(width, heads * size), nn.Linear(width, groups * size)
        self.v, self.out = nn.Linear(width, groups * size), nn.Linear(heads * size, width)
        self.q_norm, self.k_norm = nn.RMSNorm(size), nn.RMSNorm(size)
        self.register_buffer("rate", 1e4 ** (-torch.arange(0, size, 2) / size))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape, causal."""
        b, t, _ = x.shape
        q = self.q_norm(self.q(x).view(b, t, self.heads, self.size)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(b, t, self.groups, self.size)).transpose(1, 2)
        v = self.v(x).view(b, t, self.groups, self.size).transpose(1, 2)
        y = scaled_dot_product_attention(
            self._turned(q), self._turned(k), v, is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(b, t, -1))

    def _turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * self.rate
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin


class BiasedAttention(nn.Module):
    """T5's attention: no scale, a learned bias per head and relative position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.bias = nn.Embedding(2 * LENGTH, heads)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        b, t, c = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        place = torch.arange(t, device=x.device)
        bias = self.bias(place[None] - place[:, None] + LENGTH).permute(2, 0, 1)
        y = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Experts(nn.Module):
    """A mixture of experts with dense dispatch: every expert runs, two count for each token."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner) / math.sqrt(width))
        self.gate = nn.Parameter(torch.randn(experts, width, inner) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, inner, width) / math.sqrt(inner))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        shares = self.router(x).softmax(-1)
        least = shares.topk(2, -1).values[..., -1:]
        shares = torch.where(shares >= least, shares, 0.0)
        h = silu(torch.einsum("btc,eci->ebti", x, self.gate)) * torch.einsum(
            "btc,eci->ebti", x, self.up
        )
        return torch.einsum("ebti,eic,bte->btc", h, self.down, shares)


class Block(nn.Module):
    """Pre-norm residual block of any mixer and any MLP."""

    def __init__(
        self, mixer: nn.Module, mlp: nn.Module, norm: type[nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer, self.mlp = norm(WIDTH), norm(WIDTH), mixer, mlp

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """Embedding, positions, blocks, norm, output head (tied where asked)."""

    def __init__(self, blocks: list[nn.Module], positions: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH) if positions else None
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, vocabulary]."""
        x = self.embed(ids)
        if self.place is not None:
            x = x + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Patches(nn.Module):
    """A vision transformer: patches, a class token, blocks, a head on the class token."""

    def __init__(self, blocks: list[nn.Module], patch: int = 4, places: int = 16) -> None:
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(3 * patch**2, WIDTH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.place = nn.Parameter(torch.randn(1, places + 1, WIDTH))
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 10]."""
        n, c, h, w = x.shape
        p = self.patch
        x = (
            x.reshape(n, c, h // p, p, w // p, p)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(n, -1, p * p * c)
        )
        x = torch.cat([self.token.expand(n, -1, -1), self.embed(x)], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class Seq2Seq(nn.Module):
    """torch.nn.Transformer as a translator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.core = nn.Transformer(WIDTH, HEADS, 1, 1, 48, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """[B, S], [B, T] -> [B, T, vocabulary]."""
        mask = torch.full((target.shape[1],) * 2, float("-inf")).triu(1)
        x, y = self.embed(source), self.embed(target)  # is_causal is said: torch would look for it
        return self.head(self.core(x, y, tgt_mask=mask, tgt_is_causal=True))


class TorchAttention(nn.Module):
    """torch.nn.MultiheadAttention as a mixer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        return self.core(x, x, x, need_weights=False)[0]


def nanogpt() -> Entry:
    """GPT as in nanoGPT: fused q, k, v by split, tied head."""
    blocks = [lambda: Block(SplitAttention(WIDTH, HEADS), MLP(WIDTH, 80))] * 2
    return random_entry("nanogpt", lambda: Language([b() for b in blocks], tied=True), _tokens)


def gqa() -> Entry:
    """Grouped-query attention with norms on queries and keys."""
    return random_entry(
        "gqa-qk-norm",
        lambda: Language(
            [Block(GroupedAttention(WIDTH, 4, 2, 8), MLP(WIDTH, 80), nn.RMSNorm) for _ in range(2)],
            positions=False,
        ),
        _tokens,
    )


def relative_bias() -> Entry:
    """Attention with a learned bias per head and distance."""
    return random_entry(
        "relative-bias",
        lambda: Language([Block(BiasedAttention(WIDTH, HEADS), MLP(WIDTH, 80))], positions=False),
        _tokens,
    )


def experts() -> Entry:
    """A mixture of four experts, densely dispatched."""
    return random_entry(
        "moe",
        lambda: Language([Block(SplitAttention(WIDTH, HEADS), Experts(WIDTH, 24, 4))]),
        _tokens,
    )


def transformer() -> Entry:
    """torch.nn.Transformer."""
    return random_entry(
        "nn-transformer", Seq2Seq, lambda: {"source": _tokens(), "target": _tokens()[:, :7]}
    )


def multihead() -> Entry:
    """torch.nn.MultiheadAttention."""
    return random_entry(
        "nn-multihead",
        lambda: Language([Block(TorchAttention(WIDTH, HEADS), MLP(WIDTH, 80))]),
        _tokens,
    )


def _patches(name: str, last: bool) -> Entry:
    return random_entry(
        name,
        lambda: Patches([Block(InterleavedAttention(WIDTH, HEADS, last), MLP(WIDTH, 80))]),
        lambda: torch.randn(3, 3, 16, 16),
    )


def vit_qkv_last() -> Entry:
    """A ViT whose fused weight is laid out (head, channel, qkv)."""
    return _patches("vit-h-d-qkv", True)


def vit_qkv_middle() -> Entry:
    """A ViT whose fused weight is laid out (head, qkv, channel)."""
    return _patches("vit-h-qkv-d", False)
