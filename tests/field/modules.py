"""Small models of what people write, with random gains and biases; held against their originals."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from tests.errors import relative, rounding

N, M = 64, 96


class Block(nn.Module):
    """norm, then linear layers or a gated pair that read it, inside a module of their own."""

    def __init__(self, norm=None, reader=None):
        super().__init__()
        self.norm = nn.LayerNorm(N) if norm is None else norm
        self.mix = Mix(nn.Linear(N, M) if reader is None else reader, nn.Linear(N, M))

    def forward(self, x):
        y = self.mix(self.norm(x))
        return torch.cat([y, x], -1)


class Mix(nn.Module):
    def __init__(self, q, k):
        super().__init__()
        self.q, self.k = q, k

    def forward(self, h):
        return torch.cat([self.q(h), self.k(h)], -1)


class Glu(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate, self.up = nn.Linear(N, M), nn.Linear(N, M)
        self.down, self.act = nn.Linear(M, M), nn.SiLU() if act is None else act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Two(nn.Module):
    """A norm and one reader, in turn."""

    def __init__(self, norm, reader):
        super().__init__()
        self.norm, self.reader = norm, reader

    def forward(self, x):
        return self.reader(self.norm(x))


def random_(model, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) / 8)
    return model.to(dtype).eval()


def inputs(rows=2, dtype=torch.float32, seed=2):
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(model, dtype=torch.float32, **options):
    """(the original, the same model accelerated and run once)."""
    original = random_(model, dtype)
    fast = flashnorm.accelerate_(copy.deepcopy(original), (inputs(dtype=dtype),), **options)
    run(fast, inputs(dtype=dtype))
    return original, fast


def run(model, x):
    with torch.no_grad():
        return model(x.clone())


def close(found, expected, dtype=torch.float32):
    """Within what rounding explains: each step rounds to the dtype, sums are in float32."""
    return relative(found, expected) <= rounding(max(N, M), 8, dtype, torch.float32)


def same(original, fast, dtype=torch.float32, rows=(1, 2, 40)):
    """Whether both compute the same, called several times, with few rows and with many."""
    for number in rows:
        x = inputs(number, dtype)
        for _ in range(2):
            expected = run(original, x)
            assert close(run(fast, x), expected, dtype), number


def parts(fast):
    return {part.path: part for part in flashnorm.acceleration(fast).parts}


class Steered(nn.Module):
    """The code around a norm writes past the version, always or where it is told to."""

    def __init__(self, always):
        super().__init__()
        self.norm, self.q = nn.LayerNorm(N), nn.Linear(N, M)
        self.on, self.by = always, "data"

    def forward(self, x):
        h = self.norm(x)
        if self.on and self.by == "data":
            h.data.add_(1)
        elif self.on:
            h.detach().numpy()[...] *= 2
        return self.q(h)


class Held(nn.Module):
    """A norm of torch's with gain and bias of many origins."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        shape = {"row": (3, N), "part": (2 * N,), "column": (N, 3)}.get(how, (N,))
        self.gamma = nn.Parameter(torch.ones(shape))
        self.register_buffer("beta", torch.randn(N, generator=torch.Generator().manual_seed(8)))

    def forward(self, x):
        g, b = self.gamma, self.beta
        if self.how == "bias":
            return F.layer_norm(x, (N,), g, b)
        if self.how == "added":
            return F.layer_norm(x, (N,), g) + b
        if self.how == "before":
            return (F.layer_norm(x, (N,)) + b) * g
        gain = {
            "flip": lambda: g.flip(0),
            "roll": lambda: g.roll(1),
            "row": lambda: g[0],
            "part": lambda: g[:N],
            "column": lambda: g[:, 1],
            "factor": lambda: g * b,
            "sum": lambda: g + b,
            "square": lambda: g * g,
        }[self.how]()
        return F.rms_norm(x, (N,), gain, 1e-6)


class Odd(nn.Module):
    """A product that only looks like `x Wᵀ + c` with whole parameters."""

    def __init__(self, how):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(N, N))
        self.bias = nn.Parameter(torch.zeros(N))
        self.register_buffer("offset", torch.randn(N, generator=torch.Generator().manual_seed(4)))

    def forward(self, x):
        if self.how == "axis":
            return torch.mm(x, self.weight.transpose(0, 0))
        if self.how == "buffer":
            return F.linear(x, self.weight, self.offset)
        if self.how == "narrow":
            return F.linear(x.to(torch.bfloat16).to(x.dtype), self.weight, self.bias)
        if self.how == "rows":
            return F.linear(x.expand(2, -1, -1).reshape(-1, N), self.weight, self.bias)
        return F.linear(x, self.weight.flip(0), self.bias)


class Int8(torch.Tensor):
    """As torchao's: a weight in eight bits, which knows how it is multiplied and has no memory."""

    @staticmethod
    def __new__(cls, codes, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    @staticmethod
    def of(weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return Int8((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map(
            lambda t: t.codes * t.scale if isinstance(t, Int8) else t, (args, kwargs or {})
        )
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].codes, args[0].scale)
        return func(*plain[0], **plain[1])


def quantized(linear):
    linear.weight = nn.Parameter(Int8.of(linear.weight.detach()), requires_grad=False)
