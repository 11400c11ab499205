"""Norms in every spelling that comes to mind, and a grammar that makes up more of them.

`SPELLED` are named ones: code of a norm of x [.., D], with parameters g and b [D], a and s [1].
`python -m tests.graph.spellings --count 10000 --seed 0` tries random ones from the grammar:
found where the norm is a row whose gain folds (or that says why not), wrong where the folded model
gives something else.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from flashnorm.plan import Site
from tests.errors import relative
from tests.graph.grammar import D, made_up

K = 6
# Rounding of float64, times the operations of a norm and two products.
BOUND = 1e-12
LEAST_FOUND = 0.98
TOGETHER = 20  # norms in one model: recording many at once is faster

RMS = "torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)"
SPREAD = "(x.var(-1, keepdim=True, correction=0) + 1e-5)"
MEAN = "x.mean(-1, keepdim=True)"

SPELLED = {
    "plain": f"g * (x * {RMS})",
    "gain_before_statistic": f"(x * g) * {RMS}",
    "gain_on_statistic": f"x * (g * {RMS})",
    "gain_over_root": "g * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)",
    "gain_divided_first": "(g / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * x",
    "quotient": "g * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6))",
    "sum_over_width": f"x * torch.rsqrt(torch.square(x).sum(-1, keepdim=True) / {D} + 1e-6) * g",
    "sum_times_inverse": f"x * (x**2).sum(-1, keepdim=True).mul(1 / {D}).add(1e-6).rsqrt() * g",
    "sum_scaled_after": f"x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True)) * {D}**0.5 * g",
    "einsum": f"x * torch.rsqrt(torch.einsum('...i,...i->...', x, x)[..., None] / {D} + 1e-6) * g",
    "matmul": f"x * (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1).div({D}).add(1e-6).rsqrt() * g",
    "vecdot": f"x * (torch.linalg.vecdot(x, x).unsqueeze(-1) / {D} + 1e-6).rsqrt() * g",
    "vector_norm": f"x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) * {D}**0.5 * g",
    "linalg_norm": f"x / (torch.linalg.norm(x, dim=-1, keepdim=True) / {D}**0.5 + 1e-6) * g",
    "tensor_norm": f"x * {D}**0.5 / (x.norm(p=2, dim=-1, keepdim=True) + 1e-6) * g",
    "normalize": f"F.normalize(x, dim=-1) * {D}**0.5 * g",
    "normalize_one_plus": f"F.normalize(x, dim=-1) * {D}**0.5 * (g + 1)",
    "normalize_gain_first": f"(g * {D}**0.5) * F.normalize(x, dim=-1)",
    "clamped": "x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6) * g",
    "maximum": "x / torch.maximum(x.pow(2).mean(-1, keepdim=True).sqrt(), s.new_tensor(1e-6)) * g",
    "eps_buffer": "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * g",
    "eps_learned": "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + a.abs() * 1e-3) * g",
    "float_inside": "(lambda y: (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)))"
    "(x.to(torch.float64)).to(x.dtype) * g",
    "power_minus_half": "x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5 * g",
    "reciprocal": "x * (1.0 / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()) * g",
    "exp_log": "x * torch.exp(-0.5 * torch.log(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * g",
    "where_zero": "x / torch.where(x.norm(dim=-1, keepdim=True) > 0, "
    "x.norm(dim=-1, keepdim=True), 1.0) * g",
    "layer": f"g * ((x - {MEAN}) * torch.rsqrt{SPREAD}) + b",
    "annotated": f"g * (x - {MEAN}) / (x.std(-1, keepdim=True) + 1e-6) + b",
    "layer_gain_on_spread": f"(x - {MEAN}) * (torch.rsqrt{SPREAD} * g) + b",
    "layer_own_variance": f"g * (x - {MEAN}) / ((x - {MEAN}).pow(2).mean(-1, keepdim=True) + 1e-5)"
    ".sqrt() + b",
    "layer_squares": "g * (x - x.mean(-1, True)) * torch.rsqrt((x * x).mean(-1, True) "
    "- x.mean(-1, True) ** 2 + 1e-5) + b",
    "layer_var_mean": "(lambda v, m: (x - m) / (v + 1e-5).sqrt() * g + b)"
    "(*torch.var_mean(x, -1, correction=0, keepdim=True))",
    "layer_std_mean": "(lambda v, m: (x - m) / (v + 1e-5) * g + b)"
    "(*torch.std_mean(x, -1, keepdim=True))",
    "layer_length_of_centered": f"(lambda d: d / d.norm(dim=-1, keepdim=True) * {D}**0.5 * g + b)"
    f"(x - {MEAN})",
    "layer_mean_of_sums": f"(x - x.sum(-1, True) / {D}) * torch.rsqrt{SPREAD} * g + b",
    "layer_negated": f"(x + -{MEAN}) * torch.rsqrt{SPREAD} * g + b",
    "layer_affine_map": f"(lambda r: x * r + (b - {MEAN} * r))(g * torch.rsqrt{SPREAD})",
    "layer_expanded": f"(lambda r: (x * r - {MEAN} * r) * g + b)(torch.rsqrt{SPREAD})",
    "layer_addcmul": f"torch.addcmul(b, (x - {MEAN}) * torch.rsqrt{SPREAD}, g)",
    "layer_fused": f"F.layer_norm(x, ({D},), g, b, 1e-5)",
    "layer_fused_bare": f"F.layer_norm(x, ({D},)) * g + b",
    "layer_bias_first": f"(F.layer_norm(x, ({D},)) + b) * g",
    "rms_fused": f"F.rms_norm(x, ({D},), g, 1e-6)",
    "rms_flipped": f"F.rms_norm(x, ({D},), g.flip(0), 1e-6)",
    "rms_half_of_gain": f"F.rms_norm(x, ({D},), 0.5 * g, 1e-6)",
    "groups": "F.group_norm(x.transpose(1, 2), 2, g, b).transpose(1, 2)",
    "instance": "F.instance_norm(x.transpose(1, 2), weight=g, bias=b).transpose(1, 2)",
    "channels_first": "(lambda y: ((y - y.mean(1, True)) / "
    "((y - y.mean(1, True)).pow(2).mean(1, True) + 1e-6).sqrt() * g[:, None] + b[:, None])"
    ".transpose(1, 2))(x.transpose(1, 2))",
    "heads": f"(lambda y: y * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-6))"
    f"(x.view(*x.shape[:-1], 2, {D // 2})).flatten(-2) * g",
    "mean_magnitude": "g * x / x.abs().mean(-1, keepdim=True)",
    "largest": "x / x.abs().amax(-1, keepdim=True) * g",
    "one_norm": "F.normalize(x, p=1, dim=-1) * g",
    "three_norm": "x / torch.linalg.vector_norm(x, 3, dim=-1, keepdim=True) * g",
    "part": "x * torch.rsqrt(x[..., :4].pow(2).mean(-1, keepdim=True) + 1e-6) * g",
    "not_centered": f"x * torch.rsqrt{SPREAD} * g",
    "centered_over_square": f"(x - {MEAN}) * {RMS} * g",
    "dyt": "torch.tanh(a * x) * g + b",
    "dyt_one_plus": "torch.tanh((a + 1) * x) * g + b",
    "dyt_quotient": "g * torch.tanh(x / a) + b",
    "dyt_right": "torch.tanh(x * a) * (1 + g)",
    "dyt_exponential": "torch.tanh(torch.exp(a) * x) * g",
    "dyt_error_function": "torch.erf(a * x + s) * g + b",
    "dyt_addcmul": "torch.addcmul(b, g, torch.tanh(a * x))",
}

# Norms that are rows, but whose gain is kept: words of the reason.
KEPT = {
    "product_of_gains": (f"x * {RMS} * (g * b)", "made of .*b, .*g in a way"),
    "early_product_of_gains": (f"x * (g * b * {RMS})", "made of"),
    "divided_by_gain": (f"x * {RMS} / g", "divided by its gain"),
    "square_of_gain": (f"x * {RMS} * g.square()", "made of .*g in a way"),
    "one_number": ("a * x / x.norm(dim=-1, keepdim=True)", "one number"),
    "sorted_gain": (f"x * {RMS} * g.sort().values", "made of .*g in a way"),
}

# What is no norm of x, although it looks like one: no row may say that it is one.
LOOK_ALIKES = {
    "of_another": "x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1e-6) * g",
    "of_more": "x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6) * g",
    "by_itself": "x / x * g",
    "by_magnitude": "x / x.abs() * g",
    "wrong_degree": "x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) * g",
    "changed_between": "(lambda y: y.add_(1) * r * g)(x.clone()) if (r := "
    + RMS
    + ") is not None else x",
    "softmax": "torch.softmax(x, -1) * g",
    "gate": "x * torch.sigmoid(x) * g",
    "stored": "(x - self.m) * torch.rsqrt(self.v + 1e-5) * g + b",
}


class Spelled(nn.Module):
    """The norm that `code` spells."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = compile(code, "spelling", "eval")
        for name, size in (("g", D), ("b", D), ("a", 1), ("s", 1)):
            if self._names(name):
                self.register_parameter(name, nn.Parameter(1 + 0.3 * torch.randn(size)))
        # What nobody reads could be another gain, for all that a recording knows.
        held = {"eps": torch.tensor(1e-5), "m": torch.randn(D), "v": torch.rand(D) + 0.5}
        for name, value in held.items():
            if self._names(name):
                self.register_buffer(name, value)

    def _names(self, name: str) -> bool:
        inner = [c for c in self.code.co_consts if hasattr(c, "co_names")]
        return any(name in c.co_names for c in (self.code, *inner))

    def forward(self, x):
        names = {"x": x, "self": self, "torch": torch, "F": F, **self._parameters}
        return eval(self.code, names)


class Blocks(nn.Module):
    """Norms between linear layers, all of one value, each with a residual around it."""

    def __init__(self, codes: Sequence[str]) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.norms = nn.ModuleList(Spelled(code) for code in codes)
        self.readers = nn.ModuleList(nn.Linear(D, K) for _ in codes)

    def forward(self, x):
        x = self.first(x)
        pairs = zip(self.readers, self.norms, strict=True)
        return [reader(norm(x)) + x[..., :K] for reader, norm in pairs]


def blocks(codes: Sequence[str], seed: int = 0, dtype: torch.dtype = torch.float64) -> Blocks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Blocks(codes).to(dtype).eval()


def inputs(seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, D, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Outcome:
    """The rows of one norm, and what folding did to the outputs."""

    sites: tuple[Site, ...]
    error: float

    @property
    def folded(self) -> bool:
        return any(site.gain_state == "folded" for site in self.sites)

    @property
    def kept(self) -> bool:
        """A row says why the gain stays; that there is none would not be true."""
        return any(site.gain_state == "kept" and site.reason for site in self.sites)

    @property
    def state(self) -> str:
        if not self.error <= BOUND:
            return "wrong"
        return "folded" if self.folded else "kept" if self.kept else "missed"


@torch.no_grad()
def outcomes(codes: Sequence[str], seed: int = 0) -> list[Outcome]:
    """What becomes of these norms, side by side in one model."""
    model, x = blocks(codes, seed), inputs()
    before = model(x)
    plan = flashnorm.folding(flashnorm.fold_(model, (x,)))
    errors = [relative(found, wanted) for found, wanted in zip(model(x), before, strict=True)]
    paths = [f"norms.{number}" for number in range(len(codes))]
    rows = [tuple(site for site in plan.sites if site.path == path) for path in paths]
    return [Outcome(found, error) for found, error in zip(rows, errors, strict=True)]


def run(count: int, seed: int, show: int = 20) -> Counter[str]:
    """Try random spellings, some at a time; print those that were missed or wrong."""
    random_, counts = random.Random(seed), Counter[str]()
    for first in range(0, count, TOGETHER):
        codes = [made_up(random_) for _ in range(min(TOGETHER, count - first))]
        for code, result in zip(codes, outcomes(codes, first), strict=True):
            counts[result.state] += 1
            if result.state in ("missed", "wrong") and counts[result.state] <= show:
                print(f"{result.state} (error {result.error:.1e}): {code}", flush=True)
    return counts


def found(counts: Counter[str]) -> float:
    """The share of norms that are rows which fold, or say truly why not."""
    return (counts["folded"] + counts["kept"]) / max(1, counts.total())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Random spellings of norms, folded in float64.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    counts = run(given.count, given.seed)
    print(
        f"{given.count} spellings: {found(counts):.2%} found ({counts['folded']} folded, "
        f"{counts['kept']} kept for a reason), {counts['missed']} missed, {counts['wrong']} wrong"
    )
    return int(counts["wrong"] > 0 or found(counts) < LEAST_FOUND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
