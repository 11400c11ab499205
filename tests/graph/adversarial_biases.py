"""Modules whose norms add a bias: into the readers (E2), kept as β/g (E13), or neither?"""

import torch
from torch import nn
from torch.nn import functional as F

from .adversarial import K, N


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(N)
        self.reader = nn.Linear(N, K)

    def forward(self, x):
        return self.reader(self.norm(x))


class NoSlot(Base):
    def __init__(self):
        super().__init__()
        self.reader = nn.Linear(N, K, bias=False)


class OneWithoutSlot(Base):
    """One reader of two could take the bias: then neither does."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(N, K, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return self.reader(y) + self.other(y)


class Decomposed(Base):
    """The norm spelled out, gain and bias added one by one."""

    def __init__(self):
        super().__init__()
        self.norm = None
        self.gain, self.shift = nn.Parameter(torch.ones(N)), nn.Parameter(torch.zeros(N))

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        z = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.reader(z * self.gain + self.shift)


class Gated(Base):
    """A factor per row passes a gain, but a folded bias would miss it."""

    def forward(self, x):
        return self.reader(self.norm(x) * x[..., :1])


class Scaled(Base):
    def forward(self, x):
        return self.reader(0.5 * self.norm(x))


class Masked(Base):
    """Rows set to zero after the bias."""

    def forward(self, x):
        y = self.norm(x)
        mask = torch.arange(x.shape[1]).view(1, -1, 1) > 2
        return self.reader(y.masked_fill(mask, 0.0))


class TokenShift(Base):
    """A row minus the one before it: the bias would cancel, but for the first row."""

    def forward(self, x):
        y = self.norm(x)
        return self.reader(y + F.pad(y, (0, 0, 1, -1)))


class Pooled(Base):
    """The mean over rows keeps the bias, their sum multiplies it."""

    def forward(self, x):
        return self.reader(self.norm(x).sum(1))


class ScaledProduct(Base):
    def forward(self, x):
        return torch.addmm(self.reader.bias, self.norm(x)[0], self.reader.weight.t(), alpha=0.5)


class HalfBias(Base):
    """Only a part of the reader's bias is added."""

    def forward(self, x):
        return torch.addmm(self.reader.bias, self.norm(x)[0], self.reader.weight.t(), beta=0.5)


class ReaderBiasShared(Base):
    """The reader's bias is also added where the norm's output is not read."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Linear(N, K)
        self.raw.bias = self.reader.bias

    def forward(self, x):
        return self.reader(self.norm(x)) + self.raw(x)


class ReaderBiasReadElsewhere(Base):
    """The reader's bias has another use, which must not see `W β`."""

    def forward(self, x):
        return self.reader(self.norm(x)) * self.reader.bias.sum()


class ReaderBiasReversed(Base):
    def forward(self, x):
        return torch.addmm(self.reader.bias.flip(0), self.norm(x)[0], self.reader.weight.t())


class ReaderScaled(Base):
    def forward(self, x):
        return F.linear(self.norm(x), 2.0 * self.reader.weight, self.reader.bias)


class Packed(Base):
    """Two readers in one matrix, each with its part of one bias."""

    def forward(self, x):
        first, second = self.reader.weight.chunk(2)
        b1, b2 = self.reader.bias.chunk(2)
        y = self.norm(x)
        return F.linear(y, first, b1) * F.linear(y, second, b2)


class PackedWrongly(Base):
    """The parts of the bias belong to the other reader."""

    def forward(self, x):
        first, second = self.reader.weight.chunk(2)
        b1, b2 = self.reader.bias.chunk(2)
        y = self.norm(x)
        return F.linear(y, first, b2) * F.linear(y, second, b1)


class Transposed(Base):
    """[in, out], as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.reader = None
        self.weight, self.bias = nn.Parameter(torch.ones(N, K)), nn.Parameter(torch.zeros(K))

    def forward(self, x):
        y = self.norm(x)
        return torch.addmm(self.bias, y.view(-1, N), self.weight)


class TwoNorms(Base):
    """Two norms side by side before one reader: both biases go into its bias."""

    def __init__(self):
        super().__init__()
        self.second = nn.LayerNorm(N)
        self.reader = nn.Linear(2 * N, K)

    def forward(self, x):
        return self.reader(torch.cat([self.second(x.flip(1)), self.norm(x)], -1))


class OneWithBias(TwoNorms):
    def __init__(self):
        super().__init__()
        self.second = nn.LayerNorm(N, bias=False)


class BiasReadElsewhere(Base):
    def forward(self, x):
        return self.reader(self.norm(x)) * self.norm.bias.sum()


class BiasOfTwoNorms(Base):
    def __init__(self):
        super().__init__()
        self.second = nn.LayerNorm(N)
        self.second.bias = self.norm.bias
        self.other = nn.Linear(N, K)

    def forward(self, x):
        return self.reader(self.norm(x)) + self.other(self.second(x))


class Subtracted(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(N, bias=False)
        self.shift = nn.Parameter(torch.zeros(N))

    def forward(self, x):
        return self.reader(self.norm(x) - self.shift)


class OtherOrder(Subtracted):
    """The bias is added in another order than the gain's."""

    def forward(self, x):
        return self.reader(self.norm(x) + self.shift.flip(0))


class ScaledShift(Subtracted):
    def forward(self, x):
        return self.reader(self.norm(x) + 2.0 * self.shift)


class TwoShifts(Base):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(N))

    def forward(self, x):
        return self.reader(self.norm(x) + self.shift)


class BeforeAndAfter(Base):
    """One reader sees the gain without the bias."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(N, bias=False)
        self.shift = nn.Parameter(torch.zeros(N))
        self.other = nn.Linear(N, K)

    def forward(self, x):
        y = self.norm(x)
        return self.reader(y + self.shift) * self.other(y)


class Residual(Base):
    def forward(self, x):
        y = self.norm(x)
        return self.reader(y) + F.pad(y, (0, K - N))


class Convolved(Base):
    """Zero padding enters after the bias, so only β/g is exact."""

    def __init__(self):
        super().__init__()
        self.reader = None
        self.conv = nn.Conv1d(N, K, 3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(x).transpose(1, 2))


class ZeroGain(Base):
    """The gain is zero where the bias is not."""

    def __init__(self):
        super().__init__()
        self.reader = nn.Linear(N, K, bias=False)
