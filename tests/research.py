"""Small models as a researcher would write them, in plain PyTorch; each takes one tensor.

MODELS: name -> (class, shape of the input without the batch).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        h = torch.relu(self.a(x))
        gate = torch.sigmoid(self.up(torch.relu(self.down(h.mean((2, 3))))))
        return self.b(h * gate[:, :, None, None]).mean((2, 3))


class Cbam(nn.Module):
    """Channel attention by mean and maximum, then spatial attention by the same of the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.mlp = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
        self.place = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        h = torch.relu(self.a(x))
        gate = torch.sigmoid(self.mlp(h.mean((2, 3))) + self.mlp(h.amax((2, 3))))
        h = h * gate[:, :, None, None]
        both = torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1)
        return self.b(h * torch.sigmoid(self.place(both)))


class GatedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g = nn.Conv1d(3, 8, 3, padding=2), nn.Conv1d(3, 8, 3, padding=2)
        self.b = nn.Conv1d(8, 4, 1)

    def forward(self, x):
        n = x.shape[-1]
        return self.b(torch.tanh(self.a(x)[..., :n]) * torch.sigmoid(self.g(x)[..., :n]))


class GluConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x):
        value, gate = self.a(x).chunk(2, 1)
        return self.b(value * torch.sigmoid(gate))


class HyperNetwork(nn.Module):
    """The weights of one layer are made from the input."""

    def __init__(self):
        super().__init__()
        self.first, self.make = nn.Linear(6, 10), nn.Linear(10, 8 * 6)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        weight = self.make(torch.relu(self.first(x))).view(-1, 8, 6)
        return self.last(torch.relu(torch.einsum("boi,bi->bo", weight, x)))


class Film(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.condition = nn.Sequential(nn.Linear(3, 10), nn.SiLU(), nn.Linear(10, 16))

    def forward(self, x):
        scale, shift = self.condition(x.mean((2, 3))).chunk(2, -1)
        h = self.norm(self.a(x)) * (1 + scale[..., None, None]) + shift[..., None, None]
        return self.b(torch.relu(h))


class MixtureOfSoftmaxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 12)
        self.prior, self.latent, self.out = nn.Linear(12, 4), nn.Linear(12, 4 * 8), nn.Linear(8, 7)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        prior = self.prior(h).softmax(-1)
        latent = torch.tanh(self.latent(h)).view(-1, 4, 8)
        return torch.log((prior[..., None] * self.out(latent).softmax(-1)).sum(1))


class Perceiver(nn.Module):
    """Learnt latents attend to the input."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, 8))
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.o, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        q, k, v = (
            y.view(len(x), -1, 2, 4).transpose(1, 2)
            for y in (self.q(latents), self.k(x), self.v(x))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 5, 8)
        h = latents + self.o(y)
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h.mean(1))


class GraphAttention(nn.Module):
    """Nodes on a fixed ring; scores along edges, softmax over the edges of a node by scatter."""

    def __init__(self):
        super().__init__()
        self.a, self.score = nn.Linear(6, 8), nn.Linear(16, 1)
        self.b = nn.Linear(8, 3)
        ring = torch.arange(5)
        self.register_buffer("source", torch.cat([ring, ring]))
        self.register_buffer("target", torch.cat([(ring + 1) % 5, ring]))

    def forward(self, x):  # [batch, 5 nodes, 6]
        h = self.a(x)
        ends = torch.cat([h[:, self.source], h[:, self.target]], -1)
        weight = F.leaky_relu(self.score(ends), 0.2).exp()
        total = torch.zeros(len(x), 5, 1, dtype=x.dtype).index_add(1, self.target, weight)
        message = h[:, self.source] * weight / total[:, self.target]
        out = torch.zeros_like(h).index_add(1, self.target, message)
        return self.b(F.elu(out))


class Capsules(nn.Module):
    """Two rounds of routing by agreement."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 24)
        self.vote = nn.Parameter(torch.randn(4, 3, 6, 8) * 0.3)
        self.last = nn.Linear(24, 5)

    def squash(self, s):
        square = (s * s).sum(-1, keepdim=True)
        return s * square / (1 + square) / (square + 1e-8).sqrt()

    def forward(self, x):
        u = self.squash(self.first(x).view(-1, 4, 6))
        votes = torch.einsum("bid,ijde->bije", u, self.vote)
        logits = torch.zeros(len(x), 4, 3, dtype=x.dtype)
        for _ in range(2):
            v = self.squash((logits.softmax(2)[..., None] * votes).sum(1))
            logits = logits + (votes * v[:, None]).sum(-1)
        return self.last(v.flatten(1))


class SlotAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(3, 8))
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.gru, self.norm = nn.GRUCell(8, 8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        n = len(x)
        slots, k, v = self.slots.expand(n, -1, -1), self.k(x), self.v(x)
        for _ in range(2):
            weights = (k @ self.q(self.norm(slots)).transpose(1, 2) / math.sqrt(8)).softmax(-1)
            weights = weights / weights.sum(1, keepdim=True)
            update = weights.transpose(1, 2) @ v
            slots = self.gru(update.reshape(-1, 8), slots.reshape(-1, 8)).view(n, 3, 8)
            slots = slots + self.mlp(self.norm(slots))
        return self.head(slots)


class FourierMixing(nn.Module):
    """FNet: tokens and channels are mixed by the real part of an FFT."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.enter(x)
        h = self.norm(h + torch.fft.fft2(h).real)
        return self.head(h + self.down(F.gelu(self.up(h))))


class SpectralConv(nn.Module):
    """A layer of a Fourier neural operator: few modes, complex weights."""

    def __init__(self):
        super().__init__()
        self.lift, self.mlp, self.head = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.real = nn.Parameter(torch.randn(8, 8, 3) * 0.2)
        self.imag = nn.Parameter(torch.randn(8, 8, 3) * 0.2)

    def forward(self, x):  # [batch, places, 6]
        h = self.lift(x).transpose(1, 2)
        modes = torch.fft.rfft(h)[..., :3]
        mixed = torch.einsum("bik,iok->bok", modes, torch.complex(self.real, self.imag))
        y = torch.fft.irfft(mixed, n=x.shape[1])
        return self.head(torch.relu(self.mlp((h + y).transpose(1, 2))))


class StateSpaceConv(nn.Module):
    """S4D: each channel is convolved with a kernel of exponentials, by FFT."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.rate, self.c = nn.Parameter(torch.rand(8, 4)), nn.Parameter(torch.randn(8, 4))
        self.d = nn.Parameter(torch.randn(8))

    def forward(self, x):
        n = x.shape[1]
        u = self.enter(x).transpose(1, 2)
        time = torch.arange(n, dtype=x.dtype)
        kernel = (self.c[..., None] * torch.exp(-self.rate[..., None] * time)).sum(1)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(kernel, n=2 * n), n=2 * n)
        return self.leave(F.gelu((y[..., :n] + u * self.d[:, None]).transpose(1, 2)))


class PointerNetwork(nn.Module):
    """Additive attention points at inputs; the chosen one is fed back."""

    def __init__(self):
        super().__init__()
        self.encoder, self.cell = nn.GRU(6, 8, batch_first=True), nn.GRUCell(6, 8)
        self.of_place, self.of_state, self.v = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 1)

    def forward(self, x):
        places, last = self.encoder(x)
        state, given, found = last[0], x[:, 0], []
        for _ in range(2):
            state = self.cell(given, state)
            both = torch.tanh(self.of_place(places) + self.of_state(state)[:, None])
            scores = self.v(both)[..., 0]
            at = scores.argmax(-1)
            given = x.gather(1, at[:, None, None].expand(-1, 1, 6))[:, 0]
            found.append(scores)
        return torch.stack(found, 1)


class TiedAutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(5, 12))
        self.b1, self.b2 = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        code = torch.relu(F.linear(x, self.w1, self.b1)) @ self.w2.t()
        return F.linear(torch.relu(F.linear(code, self.w2.t())), self.w1.t(), self.b2)


class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.look, self.read = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 10)
        self.theta, self.a, self.b = nn.Linear(10, 6), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.mid = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        h = torch.relu(self.read(torch.relu(self.look(x)).mean((2, 3))))
        h = self.theta(h).view(-1, 2, 3) * 0.1 + torch.eye(2, 3, dtype=x.dtype)
        features = torch.relu(self.a(x))
        grid = F.affine_grid(h, features.shape, align_corners=False)
        return self.b(F.relu(self.mid(F.grid_sample(features, grid, align_corners=False))))


class VectorQuantised(nn.Module):
    """A code for each vector: the nearest one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)
        self.codes, self.c, self.d = nn.Embedding(10, 4), nn.Linear(4, 9), nn.Linear(9, 6)

    def forward(self, x):
        z = self.b(torch.relu(self.a(x)))
        table = self.codes.weight
        far = (z * z).sum(-1, keepdim=True) - 2 * z @ table.t() + (table * table).sum(-1)
        return self.d(torch.relu(self.c(self.codes(far.argmin(-1)))))


class Memory(nn.Module):
    """Keys and values in a table; the two best of all are read."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
        self.keys, self.values = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12, 8))

    def forward(self, x):
        scores, at = (self.q(x) @ self.keys.t()).topk(2, -1)
        return self.o((scores.softmax(-1)[..., None] * self.values[at]).sum(-2))


class MaskedTokens(nn.Module):
    """Tokens that a mask names are replaced by a learnt one; those that are left are read."""

    def __init__(self):
        super().__init__()
        self.a, self.token = nn.Linear(6, 12), nn.Parameter(torch.randn(12))
        self.b, self.c, self.d = nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):  # [batch, places, 6]
        mask = x[..., 0] > 0.5
        h = self.a(x)
        h[mask] = self.token
        y = self.d(self.c(torch.relu(self.b(torch.tanh(h)))))
        y[~mask] = self.d(torch.relu(self.c(torch.relu(self.b(torch.tanh(h[~mask]))))))
        return y


class HandGroupNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x):
        n, c, h, w = (y := self.a(x)).shape
        y = y.view(n, 2, c // 2, h, w)
        mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), keepdim=True)
        y = ((y - mean) / (var + 1e-5).sqrt()).view(n, c, h, w)
        return self.b(torch.relu(y * self.scale))


class JoinedGroupNorm(nn.Module):
    """Two convolutions side by side under one group norm."""

    def __init__(self, left=8, right=8, groups=4):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, left, 3, padding=1), nn.Conv2d(3, right, 1)
        self.norm = nn.GroupNorm(groups, left + right)
        self.last = nn.Conv2d(left + right, 4, 1)

    def forward(self, x):
        return self.last(torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))))


class Variational(nn.Module):
    """Noise is added to the code, and to what is read of it."""

    def __init__(self):
        super().__init__()
        self.enter, self.mean, self.spread = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(12, 8)
        self.mid, self.leave = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x):
        h = torch.relu(self.enter(x))
        mean = self.mean(h)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * self.spread(h))
        h = torch.relu(self.mid(code))
        return self.leave(h + 0.1 * torch.rand_like(h))


class Addressed(nn.Module):
    """A memory that is read by the cosine of keys."""

    def __init__(self):
        super().__init__()
        self.a, self.key, self.sharp = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(12, 1)
        self.memory, self.leave = nn.Parameter(torch.randn(5, 8)), nn.Linear(20, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        near = F.cosine_similarity(self.key(h)[:, None], self.memory[None], dim=-1)
        weight = (F.softplus(self.sharp(h)) * near).softmax(-1)
        return self.leave(torch.cat([h, weight @ self.memory], -1))


IMAGE, SERIES = (3, 6, 6), (3, 9)
MODELS = {
    "squeeze and excite": (SqueezeExcite, IMAGE),
    "channel and spatial attention": (Cbam, IMAGE),
    "gated convolution": (GatedConv, SERIES),
    "convolution with GLU": (GluConv, SERIES),
    "hypernetwork": (HyperNetwork, (6,)),
    "FiLM": (Film, IMAGE),
    "mixture of softmaxes": (MixtureOfSoftmaxes, (6,)),
    "perceiver": (Perceiver, (7, 6)),
    "graph attention": (GraphAttention, (5, 6)),
    "capsules": (Capsules, (6,)),
    "slot attention": (SlotAttention, (7, 6)),
    "Fourier mixing": (FourierMixing, (7, 6)),
    "Fourier operator": (SpectralConv, (7, 6)),
    "state-space convolution": (StateSpaceConv, (7, 6)),
    "pointer network": (PointerNetwork, (7, 6)),
    "tied auto-encoder": (TiedAutoEncoder, (6,)),
    "spatial transformer": (SpatialTransformer, IMAGE),
    "vector quantisation": (VectorQuantised, (6,)),
    "memory": (Memory, (6,)),
    "masked tokens": (MaskedTokens, (7, 6)),
    "variational auto-encoder": (Variational, (6,)),
    "memory by cosines": (Addressed, (6,)),
    "group norm by hand": (HandGroupNorm, IMAGE),
    "group norm of two streams": (JoinedGroupNorm, IMAGE),
}


def model_and_input(name):
    """A model of fixed numbers in float64, and a batch for it."""
    kind, shape = MODELS[name]
    torch.manual_seed(0)
    return kind().double().eval(), torch.randn(4, *shape, dtype=torch.float64)
