"""A grammar of norms: random spellings of statistics, ε, casts, and the order of the product."""

from __future__ import annotations

import random

D = 8  # features


def made_up(random_: random.Random) -> str:
    """A random spelling of a random norm: statistic, ε, casts, and the order of the product."""
    pick = random_.choice
    kind = pick(("rms", "rms", "rms", "layer", "layer", "layer", "other", "dyt"))
    if kind == "dyt":
        return _with_gain(_dynamic(pick), pick, pick((True, False)))
    keep = "-1, keepdim=True"
    x = pick(("x", "x", "x", "x.clone()", "x.to(torch.float64)", "x.contiguous()"))
    statistic, numerator = _STATISTICS[kind](pick, x, keep)
    return _put_together(pick, numerator, statistic, kind == "layer")


def _rms(pick, x, keep):
    square = pick(
        (
            f"{x}.pow(2)",
            f"({x} * {x})",
            f"torch.square({x})",
            f"{x} ** 2",
            f"{x}.abs().pow(2)",
            f"{x}.square()",
        )
    )
    total = pick(
        (
            f"({square}).mean({keep})",
            f"({square}).sum({keep}) / {D}",
            f"({square}).sum({keep}) * (1 / {D})",
            f"torch.mean({square}, dim=-1).unsqueeze(-1)",
            f"torch.einsum('...i,...i->...', {x}, {x})[..., None] / {D}",
            f"({x}.unsqueeze(-2) @ {x}.unsqueeze(-1)).squeeze(-1) / {D}",
            f"{x}.norm(dim=-1, keepdim=True).pow(2) / {D}",
            f"torch.linalg.vector_norm({x}, dim=-1, keepdim=True).square() * {1 / D}",
        )
    )
    length = pick(
        (
            f"{x}.norm({'dim=-1, keepdim=True'})",
            f"torch.linalg.norm({x}, dim=-1, keepdim=True)",
            f"({square}).sum({keep}).sqrt()",
        )
    )
    return pick((_rooted(pick, total), _rooted(pick, total), _outside(pick, length))), pick(
        (x, "x")
    )


def _layer(pick, x, keep):
    mean = pick(
        (f"{x}.mean({keep})", f"{x}.sum({keep}) / {D}", f"torch.mean({x}, -1).unsqueeze(-1)")
    )
    centered = pick((f"({x} - {mean})", f"({x} + -({mean}))", f"torch.sub({x}, {mean})"))
    again = pick((centered, f"({x} - {x}.mean({keep}))"))
    spread = pick(
        (
            f"{x}.var({keep}, correction=0)",
            f"{x}.var({keep}, unbiased=False)",
            f"{x}.var({keep})",
            f"({again}).pow(2).mean({keep})",
            f"({again} * {again}).sum({keep}) / {D}",
            f"({x}.pow(2).mean({keep}) - {x}.mean({keep}).pow(2))",
            f"(({x} * {x}).mean({keep}) - {x}.mean({keep}) * {x}.mean({keep}))",
            f"torch.var_mean({x}, {keep}, correction=0)[0]",
        )
    )
    deviation = pick(
        (
            f"{x}.std({keep})",
            f"{x}.std({keep}, correction=0)",
            f"torch.std_mean({x}, {keep})[0]",
            f"({again}).norm(dim=-1, keepdim=True)",
        )
    )
    return pick((_rooted(pick, spread), _rooted(pick, spread), _outside(pick, deviation))), centered


def _other(pick, x, keep):
    size = pick(
        (
            f"{x}.abs().mean({keep})",
            f"{x}.abs().amax({keep})",
            f"{x}.abs().sum({keep})",
            f"{x}.norm(p=1, dim=-1, keepdim=True)",
            f"torch.linalg.vector_norm({x}, 4, -1, True)",
            f"{x}.abs().max({keep}).values",
            f"{x}.std({keep})",
            f"{x}[..., :3].pow(2).mean({keep}).sqrt()",
        )
    )
    return _outside(pick, size), x


_STATISTICS = {"rms": _rms, "layer": _layer, "other": _other}


def _rooted(pick, square):
    """(what to multiply by, what to divide by) with ε inside the root or outside of it."""
    eps = pick(("1e-6", "1e-5", "self.eps"))
    total = pick(
        (
            f"({square} + {eps})",
            f"({eps} + {square})",
            f"torch.add({square}, {eps})",
            f"({square}).clamp(min=1e-6)",
            f"torch.clamp_min({square}, 1e-6)",
        )
    )
    root = pick(
        (
            f"({total}).sqrt()",
            f"torch.sqrt({total})",
            f"({total}) ** 0.5",
            f"torch.pow({total}, 0.5)",
        )
    )
    inverse = pick(
        (
            f"torch.rsqrt({total})",
            f"({total}).rsqrt()",
            f"({total}) ** -0.5",
            f"(1 / {root})",
            f"({root}).reciprocal()",
            f"torch.exp(-0.5 * torch.log({total}))",
        )
    )
    return f"({inverse})", f"({root})"


def _outside(pick, length):
    total = pick(
        (
            f"({length} + 1e-6)",
            f"({length}).clamp(min=1e-6)",
            f"({length})",
            f"torch.maximum({length}, self.eps)",
            f"torch.add({length}, 1e-5)",
        )
    )
    return pick((f"({total}).reciprocal()", f"(1.0 / {total})", f"({total}) ** -1")), total


def _put_together(pick, x, statistic, centered):
    inverse, root = statistic
    gain = pick(("g", "g", "g", "(1 + g)", "(g * 0.5)", "g.flip(0)", "g.view(1, -1)", "g.float()"))
    c = pick(("", "", "", " * 1.5"))
    normal = pick((f"({x} * {inverse}){c}", f"({inverse} * {x}){c}", f"({x} / {root}){c}"))
    product = pick(
        (
            f"{gain} * ({normal})",
            f"({normal}) * {gain}",
            f"torch.mul({gain}, {normal})",
            f"({x} * {gain}) * {inverse}",
            f"({gain} * {x}) / {root}",
            f"{x} * ({gain} * {inverse})",
            f"({inverse} * {gain}) * {x}",
            f"({gain} / {root}) * {x}",
            f"({normal}).to(torch.float64).mul({gain})",
        )
    )
    return _with_bias(product, pick, centered)


def _with_bias(product, pick, biased):
    if not biased or pick((True, False)):
        return product
    return pick((f"({product}) + b", f"b + ({product})", f"torch.add({product}, b)"))


def _dynamic(pick):
    alpha = pick(("a", "(a + 1)", "(2 * a)", "torch.exp(a)", "a.abs()"))
    argument = pick((f"{alpha} * x", f"x * {alpha}", f"x / {alpha}", f"{alpha} * x + s"))
    return pick((f"torch.tanh({argument})", f"({argument}).tanh()", f"torch.erf({argument})"))


def _with_gain(normal, pick, biased):
    gain = pick(("g", "(1 + g)", "g.flip(0)"))
    return _with_bias(pick((f"{gain} * {normal}", f"{normal} * {gain}")), pick, biased)
