"""Linear layers in every layout, and modules that only look like one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

# A reader is its lines and its tensors. {a}: width in, {b}: width out, {s}: its number.
Reader = tuple[tuple[str, ...], dict[str, str]]


def _made(**made: str) -> dict[str, str]:
    return made


def _parameter(*shape: str) -> str:
    return f"nn.Parameter(torch.zeros({', '.join(shape)}))"


LINEAR = "nn.Linear({a}, {b}, bias={bias})"
OI, IO = _parameter("{b}", "{a}"), _parameter("{a}", "{b}")
BIAS = "nn.Parameter(torch.zeros({b}))"
IN, OUT = "torch.ones({a})", "torch.ones({b}, 1)"
# Two blocks with one norm.
TWINS = "nn.ModuleList([nn.Sequential(n, nn.Linear({{a}}, {{b}})) for n in [{}] * 2])"

# What a fold has to get right. The plain linear layer comes most often.
READERS: tuple[Reader, ...] = (
    *[(("{out} = self.l{s}({{0}})",), _made(l=LINEAR))] * 6,
    (("{out} = {{0}} @ self.w{s}",), _made(w=IO)),
    (("{out} = torch.matmul({{0}}, self.w{s}) + self.b{s}",), _made(w=IO, b=BIAS)),
    (("{out} = {{0}} @ self.w{s}.T",), _made(w=OI)),
    (("{out} = {{0}} @ self.w{s}.transpose(0, 1)",), _made(w=OI)),
    (("{out} = {{0}}.matmul(self.w{s}.mT).add(self.b{s})",), _made(w=OI, b=BIAS)),
    (("{out} = torch.einsum('bti,oi->bto', {{0}}, self.w{s})",), _made(w=OI)),
    (("{out} = torch.einsum('...i,io->...o', {{0}}, self.w{s})",), _made(w=IO)),
    (("{out} = torch.einsum('oi,bti->bto', self.w{s}, {{0}})",), _made(w=OI)),
    (("{out} = torch.tensordot({{0}}, self.w{s}, dims=([-1], [1]))",), _made(w=OI)),
    (
        (
            "{out} = torch.addmm(self.b{s}, {{0}}.reshape(-1, {a}), self.w{s})"
            ".view(*{{0}}.shape[:-1], {b})",
        ),
        _made(w=IO, b=BIAS),
    ),
    (
        ("{out} = F.linear({{0}}, self.w{s}[1 : {b} + 1], self.b{s})",),
        _made(w=_parameter("{b} + 3", "{a}"), b=BIAS),
    ),
    (("{out} = F.linear({{0}}, self.w{s}[:, 2:])",), _made(w=_parameter("{b}", "{a} + 2"))),
    (("{out} = F.linear({{0}}, self.w{s}[:, :-1])",), _made(w=_parameter("{b}", "{a} + 1"))),
    (("{out} = F.linear({{0}}, self.w{s}[:, ::2])",), _made(w=_parameter("{b}", "2 * {a}"))),
    (("{out} = F.linear({{0}}, self.w{s}.chunk(2)[1])",), _made(w=_parameter("2 * {b}", "{a}"))),
    (("{out} = F.linear({{0}}, self.w{s}[1])",), _made(w=_parameter("3", "{b}", "{a}"))),
    (("{out} = F.linear({{0}}, self.w{s}.view({b}, {a}))",), _made(w=_parameter("{b} * {a}"))),
    (
        (
            "{out} = torch.bmm({{0}}.reshape(1, -1, {a}).expand(3, -1, -1), self.w{s}).sum(0)"
            ".view(*{{0}}.shape[:-1], {b})",
        ),
        _made(w=_parameter("3", "{a}", "{b}")),
    ),
    (
        ("{out} = torch.einsum('bti,eoi->beto', {{0}}, self.w{s}).mean(1)",),
        _made(w=_parameter("3", "{b}", "{a}")),
    ),
    (
        ("{out} = ({{0}}.unsqueeze(1) @ self.w{s}).sum(1)",),
        _made(w=_parameter("2", "{a}", "{b}")),
    ),
    (
        (
            "r{s} = torch.softmax(self.r{s}({{0}}), -1)",
            "{out} = torch.einsum('bti,eoi,bte->bto', {{0}}, self.w{s}, r{s})",
        ),
        _made(w=_parameter("2", "{b}", "{a}"), r="nn.Linear({a}, 2, bias=False)"),
    ),
    (
        ("{out} = self.l{s}({{0}}.transpose(1, 2)).transpose(1, 2)",),
        _made(l="nn.Conv1d({a}, {b}, 1, bias={bias})"),
    ),
    (
        ("{out} = F.conv1d({{0}}.mT, self.w{s}.unsqueeze(-1), self.b{s}).mT",),
        _made(w=OI, b=BIAS),
    ),
    (
        ("{out} = self.l{s}({{0}}.permute(0, 2, 1).unsqueeze(-1)).squeeze(-1).permute(0, 2, 1)",),
        _made(l="nn.Conv2d({a}, {b}, 1, bias={bias})"),
    ),
    (
        ("{out} = self.l{s}({{0}}.mT).mT",),
        _made(l="nn.ConvTranspose1d({a}, {b}, 1, bias={bias})"),
    ),
    (
        (
            "{out} = F.linear({{0}}[..., : {a} // 2], self.w{s}[:, : {a} // 2])",
            "{out} = {out} + F.linear({{0}}[..., {a} // 2 :], self.w{s}[:, {a} // 2 :])",
        ),
        _made(w=OI),
    ),
    (
        (
            "{out} = F.linear({{0}}[..., {a} // 2 :], self.w{s}[:, : {a} // 2])",
            "{out} = {out} + F.linear({{0}}[..., : {a} // 2], self.w{s}[:, {a} // 2 :])",
        ),
        _made(w=OI),
    ),
    (
        ("{out} = self.l{s}({{0}}) + self.o{s}(self.i{s}({{0}}))",),
        _made(l=LINEAR, i="nn.Linear({a}, 2, bias=False)", o="nn.Linear(2, {b}, bias=False)"),
    ),
    (
        ("{out} = sum(e({{0}}) for e in self.e{s})",),
        _made(e="nn.ModuleList([nn.Linear({a}, {b}), nn.Linear({a}, {b}, bias=False)])"),
    ),
    (
        ("{out} = self.e{s}({{0}})",),
        _made(e="nn.Sequential(nn.Linear({a}, {a}), nn.ReLU(), nn.Linear({a}, {b}))"),
    ),
    (
        ("{out} = self.e{s}({{0}})",),
        _made(e="nn.Sequential(nn.RMSNorm({a}), nn.Linear({a}, {b}))"),
    ),
    (
        ("{out} = self.l{s}({{0}})",),
        _made(l="nn.utils.parametrizations.weight_norm(nn.Linear({a}, {b}))"),
    ),
    (
        (
            "i{s} = torch.softmax(self.r{s}({{0}}), -1).argmax(-1)",
            "{out} = torch.einsum('bti,btoi->bto', {{0}}, self.w{s}[i{s}])",
        ),
        _made(r="nn.Linear({a}, 2)", w=_parameter("2", "{b}", "{a}")),
    ),
    (("{out} = {{0}} @ self.w{s} + {{0}}[..., :1] * self.b{s}",), _made(w=IO, b=BIAS)),
    (("{out} = torch.cat([{{0}} @ self.w{s}[:, 1:], {{0}} @ self.w{s}[:, :1]], -1)",), _made(w=IO)),
    (("{out} = torch.vmap(self.l{s})({{0}})",), _made(l=LINEAR)),
    (
        ("{out} = torch.kron(torch.eye(1, dtype={{0}}.dtype), self.w{s}).matmul({{0}}.mT).mT",),
        _made(w=OI),
    ),
    (
        ("{out} = F.linear({{0}}, torch.cat([self.w{s}, self.v{s}], 1))",),
        _made(w=_parameter("{b}", "{a} - 1"), v=_parameter("{b}", "1")),
    ),
    (("{out} = F.linear({{0}}, torch.stack([self.w{s}, self.w{s}]).mean(0))",), _made(w=OI)),
    (("{out} = F.linear({{0}}, self.w{s} + self.v{s})",), _made(w=OI, v=OI)),
    (
        ("{out} = F.linear({{0}}, self.w{s} @ self.v{s})",),
        _made(w=_parameter("{b}", "2"), v=_parameter("2", "{a}")),
    ),
    (
        ("{out} = {{0}} @ (self.w{s} @ self.v{s})",),
        _made(w=_parameter("{a}", "2"), v=_parameter("2", "{b}")),
    ),
    (("{out} = F.linear({{0}}, self.w{s} * 0.5)",), _made(w=OI)),
    (("{out} = F.linear({{0}}, self.w{s} * self.u{s})",), _made(w=OI, u=IN)),
    (("{out} = F.linear({{0}}, self.w{s} * self.u{s})",), _made(w=OI, u=OUT)),
    (("{out} = F.linear({{0}}, self.w{s}, self.b{s} * 2)",), _made(w=OI, b=BIAS)),
    (("{out} = F.linear({{0}}, self.w{s}, self.b{s}.flip(0))",), _made(w=OI, b=BIAS)),
    (
        ("{out} = F.linear({{0}}, self.w{s}, self.b{s}[1:])",),
        _made(w=OI, b="nn.Parameter(torch.zeros({b} + 1))"),
    ),
    (("{out} = F.linear({{0}}, self.w{s}, self.u{s})",), _made(w=OI, u="torch.ones({b})")),
    (("{out} = F.linear({{0}}, self.w{s}) - self.b{s}",), _made(w=OI, b=BIAS)),
    (("{out} = F.linear({{0}}, self.w{s}.flip(1))",), _made(w=OI)),
    (("{out} = F.linear({{0}}, self.w{s}.roll(1, 1))",), _made(w=OI)),
    (("{out} = F.linear({{0}}, self.w{s}[:, self.u{s}])",), _made(w=OI, u="torch.randperm({a})")),
    (("{out} = F.linear({{0}}, F.normalize(self.w{s}, dim=-1))",), _made(w=OI)),
    (("{out} = F.linear({{0}}, self.w{s}.detach().clone())",), _made(w=OI)),
    (
        ("{out} = torch.baddbmm(self.b{s}, {{0}}, self.w{s}.expand({{0}}.shape[0], -1, -1))",),
        _made(w=IO, b=BIAS),
    ),
    (("{out} = self.l{s}({{0}}) + self.b{s}",), _made(l=LINEAR, b=BIAS)),
    (
        ("{out} = ({{0}} @ self.v{s}).unsqueeze(-1) * self.b{s}",),
        _made(v=_parameter("{a}"), b=BIAS),
    ),
    (("{out} = ({{0}}.unsqueeze(-2) * self.w{s}).sum(-1)",), _made(w=OI)),
    (("{out} = F.bilinear({{0}}, {{0}}, self.w{s})",), _made(w=_parameter("{b}", "{a}", "{a}"))),
    (("{out} = torch.cdist({{0}}, self.w{s})",), _made(w=OI)),
    (
        ("{out} = self.l{s}({{0}}.float().to(self.l{s}.weight.dtype))",),
        _made(l=LINEAR),
    ),
    (
        ("{out} = F.linear(torch.cat([{{0}}, {{0}}.flip(-1)], -1), self.w{s})",),
        _made(w=_parameter("{b}", "2 * {a}")),
    ),
    (
        (
            "{out} = {{0}}.new_zeros(*{{0}}.shape[:-1], {b})",
            "{out}[:, ::2] = F.linear({{0}}[:, ::2], self.w{s})",
            "{out}[:, 1::2] = F.linear({{0}}[:, 1::2], self.w{s}) * 2",
        ),
        _made(w=OI),
    ),
    (
        ("{out} = torch.zeros_like({{0}} @ self.w{s}.T)", "{out} += {{0}} @ self.w{s}.T"),
        _made(w=OI),
    ),
)
# Those that need as much out as in.
SQUARE: tuple[Reader, ...] = (
    (
        ("{out} = self.e{s}({{0}}, {{0}}, {{0}}, need_weights=False)[0]",),
        _made(e="nn.MultiheadAttention({a}, 2, batch_first=True)"),
    ),
    (("{out} = {{0}} @ self.w{s} @ self.w{s}.T",), _made(w=OI)),
    (("{out} = {{0}} @ self.w{s}.T + {{0}} @ self.w{s}",), _made(w=OI)),
    (
        (
            "{out} = torch.einsum('bthi,hio->btho', {{0}}.unflatten(-1, (2, -1)), self.w{s})"
            ".flatten(-2)",
        ),
        _made(w=_parameter("2", "{a} // 2", "{a} // 2")),
    ),
    (("{out} = self.l{s}({{0}}.mT).mT",), _made(l="nn.Conv1d({a}, {a}, 1, groups=2)")),
    (("{out} = self.l{s}({{0}}.mT).mT",), _made(l="nn.Conv1d({a}, {a}, 3, padding=1)")),
    (("{out} = self.l{s}({{0}}.mT).mT",), _made(l="nn.Conv1d({a}, {a}, 1, groups={a})")),
    (
        (
            "q{s}, k{s}, v{s} = self.l{s}({{0}}).chunk(3, -1)",
            "{out} = torch.softmax(q{s} @ k{s}.mT, -1) @ v{s}",
        ),
        _made(l="nn.Linear({a}, 3 * {a}, bias={bias})"),
    ),
    (
        (
            "q{s}, k{s}, v{s} = self.l{s}({{0}}).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)",
            "{out} = F.scaled_dot_product_attention(q{s}, k{s}, v{s}).transpose(1, 2).flatten(-2)",
        ),
        _made(l="nn.Linear({a}, 3 * {a}, bias={bias})"),
    ),
    (
        (
            "v{s} = self.l{s}({{0}})",
            "{out} = torch.softmax(v{s} @ v{s}.mT, -1) @ {{0}} @ self.w{s}",
        ),
        _made(l="nn.Linear({a}, 3)", w=IO),
    ),
    (
        ("g{s}, u{s} = self.l{s}({{0}}).split({a}, -1)", "{out} = F.silu(g{s}) * u{s}"),
        _made(l="nn.Linear({a}, 2 * {a}, bias={bias})"),
    ),
    (
        ("{out} = F.relu(self.l{s}({{0}})) * self.k{s}({{0}})",),
        _made(l="nn.Linear({a}, {a}, bias=False)", k="nn.Linear({a}, {a}, bias=False)"),
    ),
    (
        ("{out} = torch.sigmoid(self.l{s}({{0}})) * {{0}}",),
        _made(l="nn.Linear({a}, {a})"),
    ),
)
# Which branch runs depends on the length; what the other one reads is in doubt.
BRANCHES: dict[str, Reader] = {
    "cold reader": (
        ("{out} = self.l{s}({{0}}) if {{0}}.shape[1] <= 4 else self.k{s}({{0}})",),
        _made(l=LINEAR, k=LINEAR),
    ),
    "cold expert": (
        ("{out} = self.e{s}[{{0}}.shape[1] // 5]({{0}})",),
        _made(e="nn.ModuleList([nn.Linear({a}, {b}) for _ in range(2)])"),
    ),
    "routed rows": (
        (
            "i{s} = {{0}}.detach().mean(-1) > 0",
            "{out} = {{0}}.new_zeros(*{{0}}.shape[:-1], {b})",
            "{out}[i{s}] = self.l{s}({{0}}[i{s}])",
            "{out}[~i{s}] = self.k{s}({{0}}[~i{s}])",
        ),
        _made(l=LINEAR, k=LINEAR),
    ),
    "routed index": (
        (
            "i{s} = torch.nonzero(self.l{s}({{0}}).flatten() > 0)[:, 0]",
            "{out} = {{0}}.new_zeros({{0}}.shape[0] * {{0}}.shape[1], {b})",
            "{out}.index_add_(0, i{s}, self.k{s}({{0}}.flatten(0, 1)[i{s}]))",
            "{out} = {out}.view(*{{0}}.shape[:-1], {b})",
        ),
        _made(l="nn.Linear({a}, 1)", k="nn.Linear({a}, {b}, bias=False)"),
    ),
    "cold vector": (
        (
            "{out} = self.l{s}({{0}})",
            "if {{0}}.shape[1] > 4:",
            "    {out} = {out} + {{0}} @ self.v{s}.unsqueeze(-1)",
        ),
        _made(l=LINEAR, v=_parameter("{a}")),
    ),
    "cold block": (
        ("{out} = self.e{s}[{{0}}.shape[1] // 5]({{0}})",),
        _made(
            e=TWINS.format("nn.RMSNorm({a})"),
        ),
    ),
    "cold centered block": (
        ("{out} = self.e{s}[{{0}}.shape[1] // 5](self.l{s}({{0}}))",),
        _made(
            l="nn.Linear({a}, {a})",
            e=TWINS.format("nn.LayerNorm({a})"),
        ),
    ),
    "cold rows": (
        ("{out} = F.linear({{0}}, self.w{s}[min({{0}}.shape[1] // 5, 1)])",),
        _made(w=_parameter("2", "{b}", "{a}")),
    ),
}


def reader(rng: Random, a: int, b: int, number: int, out: str) -> tuple[tuple[str, ...], Any]:
    """The lines of a linear layer from a to b features, and its tensors by attribute."""
    square = a == b and a % 2 == 0 and rng.random() < 0.25
    return _filled(rng.choice(SQUARE if square else READERS), rng, a, b, number, out)


def branch(rng: Random, kind: str, a: int, b: int, number: int, out: str) -> tuple[Any, Any]:
    return _filled(BRANCHES[kind], rng, a, b, number, out)


def _filled(
    chosen: Reader, rng: Random, a: int, b: int, number: int, out: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    lines, made = chosen
    values = {"a": a, "b": b, "s": number, "out": "{out}", "bias": rng.random() < 0.55}
    fill: Callable[[str], str] = lambda text: text.format(**values)  # noqa: E731
    tensors = {f"{name}{number}": fill(code) for name, code in made.items()}
    return tuple(fill(line) for line in lines), tensors
