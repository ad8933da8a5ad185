"""Random programs: a seed, or a list of steps, is a model; steps can be dropped one by one.

A program is `((kind, seed), ...)`. A step reads x [batch, tokens, channels] and returns the same
with its own number of channels; what it does in detail is drawn from its seed, so that a program
is short to write down and every sub-list of its steps is a program as well.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = tuple[str, int]
BATCH, TOKENS, CHANNELS, OUT = 3, 5, 12, 3
ACTS = (torch.relu, F.gelu, F.silu, torch.tanh)


class Part(nn.Module):
    """A step: `make` draws its layers, `forward` runs them; `out` is its number of channels."""

    def __init__(self, seed: int, channels: int) -> None:
        super().__init__()
        self.draw, self.inner, self.out = random.Random(seed), channels, channels
        self.make(channels)

    def pick(self, *items):
        return self.draw.choice(items)

    def make(self, channels: int) -> None: ...


class Mlp(Part):
    """Two layers, gated or not, with a residual or not, with an in-place activation or not."""

    def make(self, c):
        h = self.pick(4, 6, 8)
        self.gated, self.residual, self.inplace = (self.pick(True, False) for _ in range(3))
        self.act = self.pick(*ACTS)
        self.up = nn.Linear(c, 2 * h if self.gated else h, bias=self.pick(True, False))
        self.down = nn.Linear(h, c, bias=self.pick(True, False))

    def forward(self, x):
        y = self.up(x)
        if self.gated:
            gate, y = y.chunk(2, -1)
            y = self.act(gate) * y
        else:
            y = self.act(y)
        if self.inplace:
            y = y.add_(0.5)
        y = self.down(y)
        return x + y if self.residual else y


class Attention(Part):
    """Fused or separate Q, K, V in several layouts, grouped KV heads, rotary halves, a scale per
    head; the kernel or written out.
    """

    def make(self, c):
        self.kv, self.d = self.pick(1, 2), self.pick(4, 6)
        self.h = self.kv * self.pick(1, 2)
        self.layout = self.pick("apart", "qkv", "head", "last") if self.h == self.kv else "apart"
        self.written, self.rotary = self.pick(True, False), self.pick(True, False)
        self.residual, self.spread = self.pick(True, False), self.pick("gqa", "expand", "repeat")
        self.gain = nn.Parameter(torch.rand(self.h, 1, 1) + 0.5) if self.pick(True, False) else None
        h, d, bias = self.h * self.d, self.kv * self.d, self.pick(True, False)
        if self.layout == "apart":
            self.q, self.k, self.v = (nn.Linear(c, n, bias=bias) for n in (h, d, d))
        else:
            self.qkv = nn.Linear(c, 3 * h, bias=bias)
        self.o = nn.Linear(h, c)

    def heads(self, x):
        b, t, _ = x.shape
        if self.layout == "apart":
            pairs = ((self.q, self.h), (self.k, self.kv), (self.v, self.kv))
            return [f(x).view(b, t, n, self.d).transpose(1, 2) for f, n in pairs]
        y = self.qkv(x)
        if self.layout == "qkv":
            return y.view(b, t, 3, self.h, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "head":
            return y.view(b, t, self.h, 3 * self.d).transpose(1, 2).split(self.d, -1)
        return y.view(b, t, self.h, self.d, 3).permute(4, 0, 2, 1, 3).unbind(0)

    def turn(self, x):
        half = self.d // 2
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / (1 + torch.arange(half))
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        return x * cos.to(x.dtype) + torch.cat([-x[..., half:], x[..., :half]], -1) * sin.to(
            x.dtype
        )

    def widen(self, x):
        times = self.h // self.kv
        if self.spread == "repeat":
            return x.repeat_interleave(times, 1)
        b, n, t, d = x.shape
        return x[:, :, None].expand(b, n, times, t, d).reshape(b, n * times, t, d)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.heads(x)
        if self.rotary:
            q, k = self.turn(q), self.turn(k)
        grouped = self.h != self.kv
        if grouped and (self.written or self.spread != "gqa"):
            k, v, grouped = self.widen(k), self.widen(v), False
        if self.written:
            y = (q @ k.transpose(-1, -2) / self.d**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        y = y if self.gain is None else y * self.gain
        y = self.o(y.transpose(1, 2).reshape(b, t, self.h * self.d))
        return x + y if self.residual else y


class Conv(Part):
    """A convolution over the tokens: plain, depthwise or grouped; causal by padding."""

    def make(self, c):
        self.causal = self.pick(True, False)
        groups = self.pick(1, c, *(g for g in (2, 3) if c % g == 0))
        self.a = nn.Conv1d(c, c, 3, padding=0 if self.causal else 1, groups=groups)
        self.b = nn.Conv1d(c, self.pick(6, 8, 12), 1)
        self.out = self.b.out_channels
        self.norm = nn.BatchNorm1d(c) if self.pick(True, False) else nn.Identity()

    def forward(self, x):
        x = x.transpose(1, 2)
        x = F.pad(x, (2, 0)) if self.causal else x
        return self.b(torch.relu(self.norm(self.a(x)))).transpose(1, 2)


class Pieces(Part):
    """Split, work on the pieces, join them in another order."""

    def make(self, c):
        self.out = self.pick(8, 12)
        self.a = nn.Linear(c, self.out)
        first = self.pick(2, 3, self.out // 2)
        self.sizes = (first, self.out - first)
        self.swap, self.act = self.pick(True, False), self.pick(*ACTS)
        self.b = nn.Linear(self.out, self.out, bias=self.pick(True, False))

    def forward(self, x):
        left, right = self.a(x).split(self.sizes, -1)
        pair = [self.act(left), right * 0.5]
        return self.b(torch.cat(pair[::-1] if self.swap else pair, -1))


class Shuffle(Part):
    """Channels seen as a table: turned, flipped, rolled, stepped over or picked by constants."""

    def make(self, c):
        self.way = self.pick("turn", "flip", "roll", "step", "pick", "repeat", "fold", "pad")
        self.a, self.g = nn.Linear(c, 12), self.pick(2, 3, 4)
        order = list(range(12))
        self.draw.shuffle(order)
        self.register_buffer("order", torch.tensor(order))
        wide = {"step": 6, "repeat": 24, "pad": 15}.get(self.way, 12)
        self.b = nn.Linear(wide, 8)
        self.out = 8

    def forward(self, x):
        y, b, t = self.a(x), x.shape[0], x.shape[1]
        if self.way == "turn":
            y = y.view(b, t, self.g, 12 // self.g).transpose(2, 3).reshape(b, t, 12)
        elif self.way == "fold":
            y = y.view(b, t, self.g, 12 // self.g)
            y = (y * y.detach().sigmoid()).flatten(2)
        elif self.way in ("flip", "roll"):
            y = y.flip(-1) if self.way == "flip" else y.roll(self.g, -1)
        elif self.way == "step":
            y = y[..., ::2]
        elif self.way == "pick":
            y = y[..., self.order]
        elif self.way == "repeat":
            y = y.repeat(1, 1, 2)
        else:
            y = F.pad(y, (1, 2))
        return self.b(y)


class Norm(Part):
    """A normalisation between two layers, over all channels or per head."""

    def make(self, c):
        self.way = self.pick("layer", "rms", "head", "group", "fused", "response")
        self.a, self.b = nn.Linear(c, 12), nn.Linear(12, c)
        self.layer, self.group = nn.LayerNorm(12), nn.GroupNorm(3, 12)
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        y = self.a(x)
        if self.way == "layer":
            y = self.layer(y)
        elif self.way == "group":
            y = self.group(y.transpose(1, 2)).transpose(1, 2)
        elif self.way == "rms":
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)
        elif self.way == "fused":
            y = F.rms_norm(y, (12,), self.layer.weight)
        elif self.way == "response":  # of ConvNeXt V2
            size = torch.linalg.vector_norm(y, dim=1, keepdim=True)
            y = y + y * size / (size.mean(-1, keepdim=True) + 1e-3)
        else:
            y = y.view(*y.shape[:2], 3, 4)
            y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3) * self.gain).flatten(2)
        return x + self.b(torch.relu(y))


class Twice(Part):
    """One layer called twice, and a weight used turned as well."""

    def make(self, c):
        self.a, self.turned = nn.Linear(c, c), self.pick(True, False)
        self.act = self.pick(*ACTS)
        self.b = nn.Linear(c, 6)
        self.out = c

    def forward(self, x):
        y = self.a(self.act(self.a(x)))
        return F.linear(self.b(y), self.b.weight.T) if self.turned else y


class Inplace(Part):
    """Writes into a temporary or through a view of it."""

    def make(self, c):
        self.a, self.b = nn.Linear(c, 8), nn.Linear(8, c)
        self.way = self.pick("relu_", "slice", "mul_", "add_view", "copy", "place")

    def forward(self, x):
        y = self.a(x)
        if self.way == "relu_":
            y.relu_()
        elif self.way == "slice":
            y[..., :3] = 0.0
        elif self.way == "mul_":
            y.mul_(2.0).tanh_()
        elif self.way == "add_view":
            y[..., 2:].add_(1.0)
        elif self.way == "place":
            y[..., 3] = x[..., 0]
        else:
            y[..., :4] = y[..., 4:] * 2
        return self.b(y)


class Gate(Part):
    """A weight per channel from the mean over the tokens; or a soft choice among two branches."""

    def make(self, c):
        self.soft = self.pick(True, False)
        self.a, self.b, self.c = nn.Linear(c, 8), nn.Linear(c, 8), nn.Linear(8, c)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        y = self.a(x)
        w = self.b(x).softmax(-1) if self.soft else torch.sigmoid(self.b(x.mean(1, keepdim=True)))
        return self.c(torch.relu(y * w * self.scale))


class Products(Part):
    """Sums written as einsum or matmul between activations; a stack summed away."""

    def make(self, c):
        self.way = self.pick("einsum", "outer", "stack", "matmul")
        self.a, self.b, self.c = nn.Linear(c, 6), nn.Linear(c, 6), nn.Linear(6, c)
        self.w = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x):
        y, z = self.a(x), torch.tanh(self.b(x))
        if self.way == "einsum":
            return self.c(torch.einsum("btc,cd->btd", y, self.w)) + x
        if self.way == "outer":
            return self.c((y @ z.transpose(1, 2)) @ y / 4)
        if self.way == "stack":
            return self.c(torch.stack([y, z], 2).sum(2))
        return self.c((y.unsqueeze(-2) @ self.w).squeeze(-2) * z)


PARTS: dict[str, type[Part]] = {
    **{"mlp": Mlp, "attention": Attention, "conv": Conv, "pieces": Pieces, "shuffle": Shuffle},
    **{"norm": Norm, "twice": Twice, "inplace": Inplace, "gate": Gate, "products": Products},
}


class Program(nn.Module):
    """The steps one after the other, between a first and a last layer."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(4, CHANNELS)
        self.parts = nn.ModuleList()
        channels = CHANNELS
        for kind, seed in steps:
            part = PARTS[kind](seed, channels)
            self.parts.append(part)
            channels = part.out
        self.last = nn.Linear(channels, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for part in self.parts:
            x = part(x)
        return self.last(x)


@dataclass(frozen=True)
class Case:
    """A program and the seed of its pruning."""

    steps: tuple[Step, ...]
    pruning: int


def drawn(seed: int) -> Case:
    """The case of a seed: one to four steps."""
    draw = random.Random(seed)
    steps = tuple(
        (draw.choice(list(PARTS)), draw.randrange(10**6)) for _ in range(draw.randint(1, 4))
    )
    return Case(steps, draw.randrange(10**6))


def build(steps: tuple[Step, ...]) -> Program:
    """The model, in double precision and eval mode, with statistics off their defaults."""
    torch.manual_seed(0)
    model = Program(steps).double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def sample(seed: int) -> Tensor:
    """Inputs of every program."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, 4, dtype=torch.float64, generator=generator)
