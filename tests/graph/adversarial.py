"""Modules made to break a fold, none of them from transformers.

Each is a small network around one question; `expectations.py` has the answers.
"""

import torch
from torch import nn
from torch.nn import functional as F

N, K = 8, 12


class Rms(nn.Module):
    """RMSNorm with a plain or a 1 + w gain."""

    def __init__(self, width=N, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width) - offset)
        self.offset = offset

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.offset + self.weight) if self.offset else self.weight * x


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Rms()
        self.reader = nn.Linear(N, K)


class Plain(Base):
    def forward(self, x):
        return self.reader(self.norm(x))


class OnePlus(Plain):
    def __init__(self):
        super().__init__()
        self.norm = Rms(offset=1.0)


class FusedNorm(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(N)


class BiasFreeLayerNorm(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(N, bias=False)


class LayerNormWithBias(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(N)


class Residual(Base):
    def forward(self, x):
        y = self.norm(x)
        return F.pad(y, (0, K - N)) + self.reader(y)


class SigmoidGate(Base):
    def forward(self, x):
        y = self.norm(x)
        return self.reader(y) * torch.sigmoid(y).sum(-1, keepdim=True)


class SelfProduct(Base):
    def forward(self, x):
        y = self.norm(x)
        return self.reader(y * y)


class ProductOfNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Rms(), Rms()
        self.reader = nn.Linear(N, K)

    def forward(self, x):
        return self.reader(self.first(x) * self.second(x + 1))


class SharedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Rms(), Rms()
        self.second.weight = self.first.weight
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, K)

    def forward(self, x):
        return self.b(self.second(x + self.a(self.first(x))))


class SharedWeightHalfBlocked(SharedWeight):
    def forward(self, x):
        y = self.second(x + self.a(self.first(x)))
        return self.b(y) + torch.sin(y).sum(-1, keepdim=True)


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Rms()
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, K)

    def forward(self, x):
        return self.b(self.norm(x + self.a(self.norm(x))))


class SharedReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Rms(), Rms()
        self.reader = nn.Linear(N, N)

    def forward(self, x):
        return self.reader(self.second(self.reader(self.first(x))))


class RawReader(Base):
    def forward(self, x):
        return self.reader(self.norm(x)) + self.reader(x)


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(K, N)
        self.norm = Rms()
        self.head = nn.Linear(N, K, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class ScalarMultiplier(Base):
    def forward(self, x):
        return self.reader(self.norm(x) * 0.7)


class ScalarParameter(Base):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.reader(self.norm(x) * self.scale)


class Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Rms()
        self.a, self.b = nn.Linear(N // 2, K), nn.Linear(N // 2, K)

    def forward(self, x):
        first, second = self.norm(x).chunk(2, -1)
        return self.a(second) + self.b(first)


class ChunkBlocked(Chunks):
    def forward(self, x):
        first, second = self.norm(x).chunk(2, -1)
        return self.a(first) + torch.tanh(second).sum(-1, keepdim=True)


class TransposedWeight(Base):
    def __init__(self):
        super().__init__()
        self.reader = nn.Parameter(torch.zeros(N, K))

    def forward(self, x):
        return self.norm(x) @ self.reader


class SquareTransposed(Base):
    """A square weight: the axis cannot be told from the shape."""

    def __init__(self):
        super().__init__()
        self.reader = nn.Parameter(torch.zeros(N, N))

    def forward(self, x):
        return F.linear(self.norm(x), self.reader.t())


class Einsum(Base):
    def __init__(self):
        super().__init__()
        self.reader = nn.Parameter(torch.zeros(2, N, 3))

    def forward(self, x):
        return torch.einsum("btn,hnd->bthd", self.norm(x), self.reader)


class HeadsEinsum(nn.Module):
    """A gain shared by all heads, read by one matrix over all of them."""

    def __init__(self):
        super().__init__()
        self.norm = Rms(N // 2)
        self.reader = nn.Linear(N, K)

    def forward(self, x):
        heads = self.norm(x.unflatten(-1, (2, N // 2)))
        return self.reader(heads.flatten(-2))


class Concatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Rms(), Rms(N // 2)
        self.reader = nn.Linear(N + N // 2, K)

    def forward(self, x):
        return self.reader(torch.cat([self.second(x[..., : N // 2]), self.first(x)], -1))


class ConcatenationWithRaw(Concatenation):
    def __init__(self):
        super().__init__()
        del self.second  # nobody would know whether it takes the first one's place

    def forward(self, x):
        return self.reader(torch.cat([x[..., : N // 2], self.first(x)], -1))


class NoGrad(Base):
    def forward(self, x):
        y = self.norm(x)
        with torch.no_grad():
            return self.reader(y)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class CustomFunction(Base):
    def forward(self, x):
        return _Matmul.apply(self.norm(x), self.reader.weight)


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class CustomNonlinear(Base):
    def forward(self, x):
        return self.reader(_Sine.apply(self.norm(x)))


class GainReadElsewhere(Base):
    def forward(self, x):
        return self.reader(self.norm(x)) + self.norm.weight.sum()


class WeightReadElsewhere(Base):
    def forward(self, x):
        return self.reader(self.norm(x)) + self.reader.weight.norm()


class InPlace(Base):
    """The normalized value is scaled in place, and a view of it is read."""

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        view = y.view(-1, N)
        y.mul_(self.norm.weight)
        return self.reader(view)


class InPlaceOnReader(Base):
    def forward(self, x):
        y = self.norm(x)
        y[..., :2] += 1.0
        return self.reader(y)


class ColdExpert(nn.Module):
    """Only the first expert runs: what the second does with the gain was not seen."""

    def __init__(self):
        super().__init__()
        self.norm = Rms()
        self.experts = nn.ModuleList([nn.Linear(N, K), nn.Linear(N, K)])

    def forward(self, x, index=0):
        return self.experts[index](self.norm(x))


class Returned(Base):
    def forward(self, x):
        y = self.norm(x)
        return self.reader(y), y


class Exponential(Base):
    """A gain that is no affine function of its parameter."""

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.reader(y * torch.exp(self.norm.weight))


class Weightless(Base):
    def forward(self, x):
        return self.reader(F.rms_norm(x, (N,)))


class Dyt(Base):
    def __init__(self):
        super().__init__()
        self.norm = None
        self.alpha = nn.Parameter(torch.tensor(0.8))
        self.weight, self.bias = nn.Parameter(torch.ones(N)), nn.Parameter(torch.zeros(N))

    def forward(self, x):
        return self.reader(torch.tanh(self.alpha * x) * self.weight + self.bias)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Rms()
        self.reader = nn.Conv1d(N, K, 3, padding=1)

    def forward(self, x):
        return self.reader(self.norm(x).transpose(1, 2))


class ZeroRows(Base):
    """The reader also multiplies zeros, and no rows at all: neither says anything of a gain."""

    def forward(self, x):
        y = self.norm(x)
        first = self.reader(y.new_zeros(x.shape[0], 1, N))
        return torch.cat([first, self.reader(y), self.reader(x[:, :0])], 1)


class EmptyRows(Base):
    """A gain used on an empty value as well."""

    def forward(self, x):
        return torch.cat([self.reader(self.norm(x)), self.reader(self.norm(x[:, :0]))], 1)


class Scatter(Base):
    """Rows gathered, computed on, and added back, as experts do."""

    def forward(self, x):
        y = self.norm(x).view(-1, N)
        index = torch.arange(y.shape[0]).flip(0)
        out = torch.zeros_like(y).index_add_(0, index, y[index])
        return self.reader(out)


class AttentionValues(nn.Module):
    """A gain on the values passes the attention's sum over positions."""

    def __init__(self):
        super().__init__()
        self.norm = Rms()
        self.query = nn.Linear(N, N)
        self.reader = nn.Linear(N, K)

    def forward(self, x):
        weights = torch.softmax(self.query(x) @ x.transpose(1, 2), -1)
        return self.reader(weights @ self.norm(x))


class AttentionScores(AttentionValues):
    def forward(self, x):
        return self.reader(torch.softmax(self.norm(x) @ x.transpose(1, 2), -1) @ x)
