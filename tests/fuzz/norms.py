"""Norms in random spellings: what is divided by what, where the gain stands, and the bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

SQUARES = (
    "{v}.pow(2).mean(-1, keepdim=True)",
    "({v} * {v}).mean(-1, keepdim=True)",
    "{v}.square().sum(-1, keepdim=True) / {w}",
    "torch.mean({v} ** 2, dim=-1, keepdim=True)",
    "{v}.norm(dim=-1, keepdim=True).pow(2) / {w}",
    "torch.linalg.vector_norm({v}, dim=-1, keepdim=True) ** 2 / {w}",
    "torch.einsum('...i,...i->...', {v}, {v}).unsqueeze(-1) / {w}",
    "{v}.abs().pow(2).mean(dim=-1, keepdim=True)",
)
FACTORS = (
    "torch.rsqrt({m} + {e})",
    "({m} + {e}).rsqrt()",
    "1 / torch.sqrt({m} + {e})",
    "({m} + {e}) ** -0.5",
    "({m} + {e}).sqrt().reciprocal()",
    "1 / ({m}.sqrt() + {e})",
    "{m}.clamp(min={e}).rsqrt()",
    "({m} + {p}eps{s}).rsqrt()",
)
CENTERED = (
    "{v} - {v}.mean(-1, keepdim=True)",
    "{v} - {v}.sum(-1, keepdim=True) / {w}",
    "{v}.sub({v}.mean(dim=-1, keepdim=True))",
)
VARIANCES = (
    "{v}.var(-1, keepdim=True, unbiased=False)",
    "{c}.pow(2).mean(-1, keepdim=True)",
    "{v}.var(dim=-1, keepdim=True, correction=0)",
    "torch.var_mean({v}, dim=-1, keepdim=True, correction=0)[0]",
    "{v}.var(-1, keepdim=True)",
    "({v} * {v}).mean(-1, keepdim=True) - {v}.mean(-1, keepdim=True).pow(2)",
)
WHOLE = {
    "rms": (
        "F.rms_norm({v}, ({w},), None, {e})",
        "F.normalize({v}, dim=-1) * {w} ** 0.5",
        "{v} / ({v}.norm(dim=-1, keepdim=True) * {w} ** -0.5 + {e})",
        "{v} / {v}.pow(2).mean(-1, keepdim=True).add({e}).sqrt()",
    ),
    "layer": (
        "F.layer_norm({v}, ({w},), None, None, {e})",
        "({v} - {v}.mean(-1, keepdim=True)) / ({v}.std(-1, keepdim=True) + {e})",
    ),
    "dyt": ("torch.tanh({p}alpha{s} * {v})", "torch.tanh({v} * {p}alpha{s})"),
}
FUSED = {
    "rms": "F.rms_norm({v}, ({w},), {g}, {e})",
    "layer": "F.layer_norm({v}, ({w},), {g}, {b}, {e})",
}
# How a gain is written, the plain one most often; `u` needs a buffer of its shape.
PLAIN = ("{n} * {g}", "{g} * {n}", "torch.mul({n}, {g})")
GAINS = (
    *PLAIN * 3,
    "{n} * (1 + {g})",
    "{n} * (1.0 + {g})",
    "({g} + 1) * {n}",
    "{n} + {n} * {g}",
    "torch.addcmul({n}, {n}, {g})",
    "{n} * ({g} * {p}u{s})",
    "{n} * {g} * {p}u{s}",
    "{n} * {p}u{s} * {g}",
    "{n} * {g}.flip(0)",
    "{n} * {g}.roll(1)",
    "{n} * ({g} * 0.5)",
    "{n} * {g} / 2",
    "{n} * -{g}",
    "{n} * {g}.abs()",
    "{n} * torch.exp({g})",
    "{n} * {g}.to({n}.dtype)",
    "{n} * {g}.view(1, 1, -1)",
    "{n} * {g}.expand_as({n})",
    "{n} * torch.cat([{g}[1:], {g}[:1]])",
    "{n} * (2 - {g})",
    "{n} / {g}",
    "{n}.clone().mul_({g})",
    "torch.einsum('...i,i->...i', {n}, {g}.to({n}.dtype))",
    "{n} @ torch.diag({g}).to({n}.dtype)",
    "{n} * {p}gate{s} * {g}",
    "{n}.flip(-1) * {g}",
    "({n}.unflatten(-1, (2, -1)) * {g}.view(2, -1)).flatten(-2)",
    "{n} * {g} * {n}.new_full((1,), 2.0)",
    "torch.where({g} > 1, {n} * {g}, {n})",
    "({n} * {g}) * torch.sigmoid({g})",
    "{n} * ({g} + {p}gate{s})",
    "{n} * {g}[None, None]",
    "{n} * {g}.pow(2)",
    "({n}.mT * {g}[:, None]).mT",
)
BIASES = (
    *("{n} + {b}", "{b} + {n}", "torch.add({n}, {b})") * 2,
    *("{n} - {b}",) * 2,
    "{n} + 0.5 * {b}",
    "torch.add({n}, {b}, alpha=2)",
    "{n} + {b}.flip(0)",
    "{n} + {p}beta{s}",
    "{n} + {b} + {p}beta{s}",
    "{n} + 0.25",
)


@dataclass
class Spelling:
    """The lines that compute a norm of `{0}` into `{out}`, and the lines that make its tensors."""

    made: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    gain: str = ""


def spell(rng: Random, width: int, x: str, out: str, prefix: str, tail: str) -> Spelling:
    """A norm over the last axis of x, [.., width]; its tensors are `prefix + name + tail`."""
    spelling = Spelling()
    kind = rng.choices(("rms", "layer", "dyt"), (6, 4, 1))[0]
    gained = rng.random() < 0.93
    biased = rng.random() < (0.6 if kind == "layer" else 0.25)
    names = _Names(x, out, prefix, tail, width, rng.choice(("1e-6", "1e-5", "1e-3")))
    if gained:
        spelling.made["weight"] = f"nn.Parameter(torch.ones({width}))"
        spelling.gain = f"weight{tail}"
    if biased:
        spelling.made["bias"] = f"nn.Parameter(torch.zeros({width}))"
    if kind in FUSED and rng.random() < 0.2:
        _fused(rng, spelling, names, kind, gained, biased)
    else:
        _by_hand(rng, spelling, names, kind, gained, biased)
    text = "\n".join(spelling.lines)
    for name, code in _EXTRAS.items():
        if f"{prefix}{name}{tail}" in text:
            spelling.made[name] = code.format(w=width)
    return spelling


_EXTRAS = {
    "eps": "torch.ones(1)",
    "alpha": "nn.Parameter(torch.ones(1))",
    "gate": "nn.Parameter(torch.ones(1))",
    "u": "torch.ones({w})",
    "beta": "torch.zeros({w})",
}


@dataclass(frozen=True)
class _Names:
    x: str
    out: str
    p: str
    s: str
    w: int
    e: str

    def fill(self, template: str, **more: str) -> str:
        g, b = f"{self.p}weight{self.s}", f"{self.p}bias{self.s}"
        values = {"p": self.p, "s": self.s, "w": self.w, "e": self.e, "g": g, "b": b}
        return template.format(**values | more)


def _fused(
    rng: Random, spelling: Spelling, names: _Names, kind: str, gained: bool, biased: bool
) -> None:
    gain = rng.choice(("{g}", "{g}", "{g}", "1 + {g}", "{g}.flip(0)", "{g} * {p}u{s}"))
    bias = rng.choice(("{b}", "{b}", "{b}", "{b} * 2", "{p}beta{s}", "{b}.flip(0)"))
    given = names.fill(gain) if gained else "None"
    added = names.fill(bias) if biased else "None"
    line = names.fill(FUSED[kind], v=names.x, g=given, b=added)
    spelling.lines.append(f"{names.out} = {line}")


def _by_hand(
    rng: Random, spelling: Spelling, names: _Names, kind: str, gained: bool, biased: bool
) -> None:
    lines, v = spelling.lines, names.x
    cast = rng.random() < 0.2
    if cast:
        lines.append(f"v{names.s} = {v}.float()")
        v = f"v{names.s}"
    late = rng.random() < 0.5
    first = gained and kind == "rms" and rng.random() < 0.08
    normalized = _normalized(rng, lines, names, kind, v, first)
    lines.append(f"n{names.s} = {normalized}")
    result = f"n{names.s}"
    if cast and not late:
        lines.append(f"{result} = {result}.to({names.x}.dtype)")
    steps = [GAINS] if gained and not first else []
    steps += [BIASES] if biased else []
    if rng.random() < 0.1:
        steps.reverse()
    lines += [f"{result} = {names.fill(rng.choice(step), n=result)}" for step in steps]
    if cast and late:
        lines.append(f"{result} = {result}.to({names.x}.dtype)")
    lines.append(f"{names.out} = {result}")


def _normalized(
    rng: Random, lines: list[str], names: _Names, kind: str, v: str, first: bool
) -> str:
    if not first and (kind == "dyt" or rng.random() < 0.25):
        return names.fill(rng.choice(WHOLE[kind]), v=v)
    centered = v
    if kind == "layer":
        centered = f"c{names.s}"
        lines.append(f"{centered} = {names.fill(rng.choice(CENTERED), v=v)}")
        statistic = names.fill(rng.choice(VARIANCES), v=v, c=centered)
    else:
        statistic = names.fill(rng.choice(SQUARES), v=v)
    if rng.random() < 0.04:
        statistic = statistic.replace("-1, keepdim", "1, keepdim")  # over the tokens
    lines.append(f"m{names.s} = {statistic}")
    factor = names.fill(rng.choice(FACTORS), m=f"m{names.s}")
    if first:
        by = rng.choice(("({v} * {g}) * {f}", "{v} * ({g} * {f})", "{g} * {v} * {f}"))
        return names.fill(by, v=v, f=f"({factor})")
    by = rng.choice(("{v} * {f}", "{f} * {v}", "{v} / (1 / {f})"))
    return by.format(v=centered, f=f"({factor})")
