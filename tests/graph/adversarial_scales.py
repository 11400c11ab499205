"""Modules around one question each: does the norm's scale cancel, or where must it be?"""

import torch
from torch import nn
from torch.nn import functional as F

from .adversarial import K, N, Rms


class BigEps(nn.Module):
    """RMSNorm with an epsilon that nobody can ignore."""

    def __init__(self, width=N, eps=0.7):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Base(nn.Module):
    """norm -> linear -> norm: the second undoes the first one's scale, whatever the epsilons."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = BigEps(), BigEps(K)
        self.reader = nn.Linear(N, K, bias=False)
        self.out = nn.Linear(K, N)

    def forward(self, x):
        return self.out(self.inner(self.reader(self.norm(x))))


class Heads(Base):
    """The second norm works per head, on transposed rows."""

    def __init__(self):
        super().__init__()
        self.inner = BigEps(K // 3)

    def forward(self, x):
        heads = self.reader(self.norm(x)).view(*x.shape[:-1], 3, K // 3).transpose(1, 2)
        return self.out(self.inner(heads).transpose(1, 2).flatten(-2))


class Chain(Base):
    """The norm in the middle undoes one scale, and has its own undone."""

    def __init__(self):
        super().__init__()
        self.out, self.last = nn.Linear(K, N, bias=False), BigEps()

    def forward(self, x):
        return self.last(super().forward(x)).cos()


class TwoNormsMet(Base):
    """Outputs of two norms are added, then normalized again."""

    def __init__(self):
        super().__init__()
        self.other = BigEps()

    def forward(self, x):
        return self.out(self.inner(self.reader(self.norm(x) + self.other(x.sin()))))


class LayerFirst(Base):
    """A LayerNorm's scale cancels as well, once its mean is out of the way."""

    def __init__(self):
        super().__init__()
        self.writer, self.norm = nn.Linear(N, N), nn.LayerNorm(N, eps=0.7, bias=False)

    def forward(self, x):
        return super().forward(self.writer(x))


class NormWithBias(Base):
    """The norm adds a bias, for which the reader has no slot."""

    def __init__(self):
        super().__init__()
        self.norm = BigEpsWithBias()


class BigEpsWithBias(BigEps):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(N))

    def forward(self, x):
        return super().forward(x) + self.bias


class Relu(Base):
    """A ReLU passes a positive factor on."""

    def forward(self, x):
        return self.out(self.inner(torch.relu(self.reader(self.norm(x)))))


class Gelu(Base):
    def forward(self, x):
        return self.out(self.inner(F.gelu(self.reader(self.norm(x)))))


class ReaderWithBias(Base):
    def __init__(self):
        super().__init__()
        self.reader = nn.Linear(N, K)


class ReadBeside(Base):
    """The reader's output goes around the second norm as well."""

    def forward(self, x):
        y = self.reader(self.norm(x))
        return self.out(self.inner(y) + y)


class NormReadBeside(Base):
    """The first norm's output is added to something."""

    def forward(self, x):
        y = self.norm(x)
        return self.out(self.inner(self.reader(y))) + y


class OtherRows(Base):
    """The second norm runs over rows: each of them has a scale of its own."""

    def __init__(self):
        super().__init__()
        self.inner = BigEps(5)

    def forward(self, x):
        y = self.reader(self.norm(x)).transpose(1, 2)
        return self.out(self.inner(y).transpose(1, 2))


class Joined(Base):
    """The second norm reads other values beside."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = BigEps(K + N), nn.Linear(K + N, N)

    def forward(self, x):
        return self.out(self.inner(torch.cat([self.reader(self.norm(x)), x], -1)))


class Summed(Base):
    """Values without the scale are added before the second norm."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Linear(N, K, bias=False)

    def forward(self, x):
        return self.out(self.inner(self.reader(self.norm(x)) + self.raw(x)))


class Shifted(Base):
    """The second norm meets rows of other tokens than the first one scaled."""

    def forward(self, x):
        return self.out(self.inner(self.reader(self.norm(x)).roll(1, dims=1)))


class Reversed(Base):
    def forward(self, x):
        return self.out(self.inner(self.reader(self.norm(x)).flip(1)))


class Partly(Base):
    """A latent norm reads a part of the reader's output; the rest needs the scale (MLA)."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = BigEps(K - 4), nn.Linear(K - 4, N)

    def forward(self, x):
        latent, rest = self.reader(self.norm(x)).split([K - 4, 4], -1)
        return self.out(self.inner(latent)) * torch.softmax(rest, -1)[..., :1]


class LatentReadInPart(Partly):
    """Of two latent parts one is also read beside, by two features: all of it needs the scale."""

    def __init__(self):
        super().__init__()
        self.inner, self.second = BigEps(K - 4), BigEps(4)
        self.out, self.other = nn.Linear(K - 4, N), nn.Linear(4, N)

    def forward(self, x):
        first, second = self.reader(self.norm(x)).split([K - 4, 4], -1)
        beside = torch.softmax(first[..., :2], -1)[..., :1]
        return self.out(self.inner(first)) * beside + self.other(self.second(second))


class PartlyWithoutModule(Partly):
    """The part that needs the scale comes from a product without a module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, N))

    def forward(self, x):
        y = self.norm(x)
        latent, rest = self.reader(y).split([K - 4, 4], -1)
        gate = torch.softmax(F.linear(y, self.weight), -1)[..., :1]
        return self.out(self.inner(latent)) * gate * rest[..., :1]


class SharedInner(Base):
    """One module undoes the scales of two norms, so it cannot know whose."""

    def __init__(self):
        super().__init__()
        self.second, self.other = BigEps(), nn.Linear(N, K, bias=False)

    def forward(self, x):
        first = self.inner(self.reader(self.norm(x)))
        return self.out(first + self.inner(self.other(self.second(x.sin()))))


class InnerReadsRaw(Base):
    """The same module also normalizes values without any scale."""

    def forward(self, x):
        return self.out(self.inner(self.reader(self.norm(x))) + self.inner(self.reader(x)))


class Square(Base):
    """Two scaled factors: the scale would come squared."""

    def forward(self, x):
        y = self.reader(self.norm(x))
        return self.out(self.inner(y * y.flip(-1)))


class QueryKeyOnly(nn.Module):
    """Queries and keys are normalized again, values are not (E10): no latent norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.q_inner, self.k_inner = BigEps(), Rms(), Rms()
        self.q, self.k, self.v = (nn.Linear(N, N, bias=False) for _ in range(3))

    def forward(self, x):
        y = self.norm(x)
        scores = self.q_inner(self.q(y)) @ self.k_inner(self.k(y)).transpose(1, 2)
        return torch.softmax(scores, -1) @ self.v(y)


class Glu(nn.Module):
    """The scale of the linear half waits until after the second product (E12)."""

    def __init__(self):
        super().__init__()
        self.norm = BigEps()
        self.gate, self.up = nn.Linear(N, K, bias=False), nn.Linear(N, K, bias=False)
        self.down = nn.Linear(K, N, bias=False)

    def act(self, x):
        return F.silu(x)

    def forward(self, x):
        y = self.norm(x)
        return self.down(self.act(self.gate(y)) * self.up(y))


class ReGlu(Glu):
    """Both halves wait, and s² comes after the second product (E8)."""

    def act(self, x):
        return torch.relu(x)


class WideReGlu(ReGlu):
    """More features come out than went in: the scale waits at a price."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(K, 3 * K, bias=False)


class GluWithBias(Glu):
    """The second product adds a bias at once, so the scale must be there before."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(K, N)
