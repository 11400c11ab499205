"""Models that random search found to be changed without a word, made small by hand or by itself."""

import pytest

from tests.fuzz.oracle import Options, judge
from tests.fuzz.program import HEADER, Written

ROWS = (("x", 12),)

# (what was wrong, the model, its inputs, what is done with it)
FOUND = {
    "a bias of a reader was scaled with it": (
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(12)
        self.plain = nn.Linear(12, 12, bias=False)
        self.biased = nn.Linear(12, 12)
        self.after = nn.RMSNorm(12)
        self.head = nn.Linear(12, 12)

    def forward(self, x):
        z = self.norm(x)
        return self.head(self.after(self.plain(z) * self.biased(z)))
""",
        Options(cancel=True),
    ),
    "a centered norm lost its buffer": (
        """
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))
        self.register_buffer("bias", torch.zeros(12))

    def forward(self, x):
        return F.layer_norm(x, (12,), self.weight, self.bias, 1e-6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.writer = nn.Linear(12, 12)
        self.norm = Norm()

    def forward(self, x):
        return self.norm(self.writer(x))
""",
        Options(center=True),
    ),
    "a centered norm lost the order of its gain": (
        """
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x):
        return F.layer_norm(x, (12,), self.weight.flip(0), None, 1e-6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.writer = nn.Linear(12, 12)
        self.norm = Norm()

    def forward(self, x):
        return self.norm(self.writer(x))
""",
        Options(center=True),
    ),
    "a centered norm lost its hook": (
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.writer = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.norm.register_forward_hook(lambda m, i, o: o * 1.5)
        self.reader = nn.Linear(12, 12)

    def forward(self, x):
        return self.reader(self.norm(self.writer(x)))
""",
        Options(center=True),
    ),
    "a hook of a reader came before its scale": (
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(12)
        self.plain = nn.Linear(12, 12, bias=False)
        self.other = nn.Linear(12, 12, bias=False)
        self.other.register_forward_hook(lambda m, i, o: o + 0.25)
        self.after = nn.RMSNorm(12)
        self.head = nn.Linear(12, 12)

    def forward(self, x):
        z = self.norm(x)
        return self.head(self.after(self.plain(z))) + self.other(z)
""",
        Options(cancel=True),
    ),
    "a norm over each head was taken for one over all": (
        """
class Norm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x.unflatten(-1, (2, -1)), (6,), None, 1e-5).flatten(-2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()
        self.reader = nn.Linear(12, 12, bias=False)

    def forward(self, x):
        return self.reader(self.norm(x))
""",
        Options(accelerate=True),
    ),
    "a gain in two conventions was read in the first": (
        """
class OnePlus(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x):
        return F.rms_norm(x, (12,), 1 + self.weight, 1e-6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = OnePlus()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second = nn.LayerNorm(12)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.b(self.second(self.a(self.first(x))))
""",
        Options(center=True, accelerate=True),
    ),
    "a bias met one row of a bank of gains": (
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bank = nn.Parameter(torch.ones(2, 12))
        self.bias = nn.Parameter(torch.zeros(12))
        self.reader = nn.Linear(12, 12, bias=False)

    def forward(self, x):
        return self.reader(F.rms_norm(x, (12,)) * self.bank[0] + self.bias)
""",
        Options(),
    ),
    "a weight read in parts was told as one": (
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(12)
        self.weight = nn.Parameter(torch.empty(12, 12))

    def forward(self, x):
        z = self.norm(x)
        return torch.cat([z @ self.weight[:, 1:], z @ self.weight[:, :1]], -1)
""",
        Options(cancel=True),
    ),
    "a norm's input was centered where it is read beside it": (
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)
        self.writer = nn.Linear(12, 12)

    def forward(self, x):
        y = self.norm(x + x)
        return self.last(y + self.writer(self.norm(y)))
""",
        Options(center=True),
    ),
    "a write through another name had no schema": (
        """
class Model(nn.Module):
    def forward(self, x):
        x.mT.mul_(2)
        return x
""",
        Options(accelerate=True),
    ),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("seed", range(2))
def test_it_is_exact_now(name, seed):
    source, options = FOUND[name]
    verdict = judge(Written(HEADER + source, ROWS), seed, options)
    assert not verdict.invalid
    assert not verdict.wrong, verdict.detail
