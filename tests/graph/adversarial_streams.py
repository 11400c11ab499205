"""Modules around one question each: may the writers of what a LayerNorm reads lose their mean?"""

import torch
from torch import nn
from torch.nn import functional as F

from .adversarial import K, N


class Base(nn.Module):
    """A stream with two writers, read by a LayerNorm and nothing else."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)
        self.norm = nn.LayerNorm(N)
        self.reader = nn.Linear(N, K)

    def stream(self, x):
        return self.first(x) + self.second(x.sin())

    def forward(self, x):
        return self.reader(self.norm(self.stream(x)))


class RawReader(Base):
    def forward(self, x):
        h = self.stream(x)
        return self.reader(self.norm(h)) + self.reader(h)


class Returned(Base):
    def forward(self, x):
        h = self.stream(x)
        return self.reader(self.norm(h)), h


class ReadByAnRms(Base):
    """Only a norm that subtracts the mean may read the stream."""

    def __init__(self):
        super().__init__()
        self.other = nn.RMSNorm(N)

    def forward(self, x):
        h = self.stream(x)
        return self.reader(self.norm(h)) + self.reader(self.other(h))


class ReadByANormAlready(Base):
    """There is no LayerNorm at all: centering an RMSNorm model is wrong."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(N)


class InputAdded(Base):
    """The model's own input is no linear layer's output."""

    def stream(self, x):
        return x + self.first(x)


class FactorPerFeature(Base):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(N))

    def stream(self, x):
        return self.factor * self.first(x) + self.second(x)


class FactorPerRow(Base):
    def stream(self, x):
        return x[..., :1] * self.first(x) + 0.5 * self.second(x)


class GroupedConvolution(Base):
    """Each feature is written from its own input: the mean of the weights is that of no output."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(N, N, 3, padding=1, groups=N)

    def stream(self, x):
        return self.first(x.transpose(1, 2)).transpose(1, 2) + self.second(x)


class Convolution(GroupedConvolution):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(N, N, 3, padding=1)


class Activation(Base):
    def stream(self, x):
        return F.gelu(self.first(x)) + self.second(x)


class Constant(Base):
    def stream(self, x):
        return self.first(x) + 1.0


class Positions(Base):
    """A table of positions and a token of its own are writers as well."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, N))
        self.table = nn.Parameter(torch.zeros(1, 6, N))

    def stream(self, x):
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), self.first(x)], 1)
        return tokens + self.table + self.second(tokens.new_ones(1)[:, None, None].expand(2, 6, N))


class WriterReadElsewhere(Base):
    def forward(self, x):
        return super().forward(x) * self.first.weight.sum()


class WriterUsedTwice(Base):
    """One of the two products of the writer is not read by the norm."""

    def forward(self, x):
        return super().forward(x) + self.reader(self.first(x.cos()))


class WriterWithinTheStream(Base):
    """Attention over rows: what is read are the values, mixed."""

    def stream(self, x):
        scores = torch.softmax(x @ x.transpose(1, 2), -1)
        return scores @ self.first(x) + self.second(x)


class Half(Base):
    """The norm reads a half of what the writer writes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(N, 2 * N)

    def stream(self, x):
        return self.first(x)[..., :N] + self.second(x)


class Halves(Base):
    """Half of each writer's features, side by side: as many as the norm reads."""

    def stream(self, x):
        return torch.cat([self.first(x)[..., : N // 2], self.second(x)[..., N // 2 :]], -1)


class SwappedHalves(Base):
    """All features of a writer, in another order."""

    def stream(self, x):
        a, b = self.first(x).chunk(2, -1)
        return torch.cat([b, a], -1)


class Shuffled(Base):
    """The features are moved around, all of them: their mean stays."""

    def stream(self, x):
        return self.first(x).flip(-1) + self.second(x).flip(-1)


class Crossed(Base):
    """Every feature meets another one in the sum: no element would know its own writer."""

    def stream(self, x):
        return self.first(x).flip(-1) + self.second(x)


class Experts(Base):
    """Written by a 3-D parameter, weighted per row."""

    def __init__(self):
        super().__init__()
        del self.second  # what nothing reads is a doubt
        self.experts = nn.Parameter(torch.ones(3, N, N))
        self.biases = nn.Parameter(torch.zeros(3, N))

    def stream(self, x):
        rows = x.reshape(-1, N)
        routing = torch.softmax(rows[:, :3], -1)
        out = torch.bmm(rows.expand(3, -1, -1), self.experts) + self.biases.unsqueeze(1)
        return (routing.t().unsqueeze(-1) * out).sum(0).view(x.shape) + self.first(x)


class Spelled(Base):
    """The norm written out; its mean is not used elsewhere."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x):
        h = self.stream(x)
        c = h - h.mean(-1, keepdim=True)
        return self.reader(c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5))


class MeanReadElsewhere(Spelled):
    def forward(self, x):
        h = self.stream(x)
        mean = h.mean(-1, keepdim=True)
        c = h - mean
        return self.reader(c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)) + mean


class Unbiased(Base):
    """A variance with n − 1 is no mean square: centered, but no RMSNorm."""

    def __init__(self):
        super().__init__()
        self.norm = UnbiasedNorm()


class UnbiasedNorm(nn.Module):
    def forward(self, h):
        c = h - h.mean(-1, keepdim=True)
        return c / torch.sqrt(h.var(-1, keepdim=True) + 1e-5)


class EpsilonOutside(Base):
    def __init__(self):
        super().__init__()
        self.norm = EpsilonOutsideNorm()


class EpsilonOutsideNorm(nn.Module):
    def forward(self, h):
        c = h - h.mean(-1, keepdim=True)
        return c / (torch.sqrt(c.pow(2).mean(-1, keepdim=True)) + 0.1)


class StridedInput(Base):
    """What reads the norm counts on the layout that a LayerNorm always gives."""

    def forward(self, x):
        return self.reader(self.norm(self.stream(x).transpose(0, 1)).view(-1, N))


class NormWithAnOption(Base):
    """The norm is called with a second argument, which another module would not take."""

    def __init__(self):
        super().__init__()
        self.norm = NormOfTwo(N)

    def forward(self, x):
        return self.reader(self.norm(self.stream(x), None))


class NormOfTwo(nn.LayerNorm):
    def forward(self, x, scaling=None):
        return super().forward(x)


class NonlinearEntry(nn.Module):
    """A stream that a gelu begins, long enough to pay for one operation of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(N, N), nn.ModuleList([Block() for _ in range(3)])
        self.norm, self.reader = nn.LayerNorm(N), nn.Linear(N, K)

    def forward(self, x):
        h = F.gelu(self.stem(x))
        for block in self.blocks:
            h = block(h)
        return self.reader(self.norm(h))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(N), nn.Linear(N, K), nn.Linear(K, N)

    def forward(self, h):
        return h + self.down(F.gelu(self.up(self.norm(h))))


class EntryReadElsewhere(NonlinearEntry):
    def forward(self, x):
        return super().forward(x) + self.reader(F.gelu(self.stem(x)))
