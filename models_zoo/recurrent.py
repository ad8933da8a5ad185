"""Networks with a state: LSTM, GRU, a Mamba block, an RWKV block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

from .entry import Entry, random_entry

VOCABULARY, WIDTH = 101, 24


def _tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 9))


class Recurrent(nn.Module):
    """Embedding, a recurrent layer of torch, the mean of its states, an MLP."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], both: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.core = cell(WIDTH, 20, batch_first=True, bidirectional=both)
        self.up, self.down = nn.Linear(20 * (1 + both), 32), nn.Linear(32, 6)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, 6]."""
        states, _ = self.core(self.embed(ids))
        return self.down(torch.relu(self.up(states.mean(1))))


class Mamba(nn.Module):
    """A selective state space, its scan written as a loop (Gu, Dao 2023)."""

    def __init__(self, width: int, inner: int, state: int, rank: int) -> None:
        super().__init__()
        self.state, self.rank = state, rank
        self.into = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, groups=inner)
        self.select = nn.Linear(inner, rank + 2 * state, bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_rate = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.skip, self.out = nn.Parameter(torch.ones(inner)), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        x, gate = self.into(x).chunk(2, -1)
        x = silu(self.conv(pad(x.transpose(1, 2), (2, 0)))).transpose(1, 2)
        step, write, read = self.select(x).split([self.rank, self.state, self.state], -1)
        step = softplus(self.step(step))
        decay = torch.exp(-step[..., None] * self.log_rate.exp())
        drive = (step * x)[..., None] * write[:, :, None]
        held, outs = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            held = decay[:, t] * held + drive[:, t]
            outs.append((held * read[:, t, None]).sum(-1))
        return self.out((torch.stack(outs, 1) + self.skip * x) * silu(gate))


class RWKV(nn.Module):
    """Time mixing by an exponential moving average of k * v, its loop written out (Peng et al.
    2023).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(3, width))
        self.decay, self.first = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.k, self.v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.r, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        last = pad(x, (0, 0, 1, -1))
        a, b, c = (x * m + last * (1 - m) for m in self.mix.unbind(0))
        k, v, r = self.k(a).exp(), self.v(b), torch.sigmoid(self.r(c))
        decay, first = torch.exp(-self.decay.exp()), self.first.exp()
        top, bottom = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        outs = []
        for t in range(x.shape[1]):
            outs.append((top + first * k[:, t] * v[:, t]) / (bottom + first * k[:, t]))
            top, bottom = decay * top + k[:, t] * v[:, t], decay * bottom + k[:, t]
        return self.out(r * torch.stack(outs, 1))


class ChannelMix(nn.Module):
    """RWKV's MLP: squared ReLU behind a gate."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.r = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the same shape."""
        return torch.sigmoid(self.r(x)) * self.v(torch.relu(self.k(x)) ** 2)


class Stack(nn.Module):
    """Embedding, pre-norm residual layers, a head."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, vocabulary]."""
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def lstm() -> Entry:
    """A bidirectional LSTM classifier."""
    return random_entry("lstm", lambda: Recurrent(nn.LSTM, True), _tokens)


def gru() -> Entry:
    """A GRU classifier."""
    return random_entry("gru", lambda: Recurrent(nn.GRU, False), _tokens)


def mamba() -> Entry:
    """Two Mamba blocks."""
    return random_entry(
        "mamba-block", lambda: Stack([Mamba(WIDTH, 32, 4, 3) for _ in range(2)]), _tokens
    )


def rwkv() -> Entry:
    """An RWKV block: time mixing, channel mixing."""
    return random_entry("rwkv-block", lambda: Stack([RWKV(WIDTH), ChannelMix(WIDTH, 40)]), _tokens)
