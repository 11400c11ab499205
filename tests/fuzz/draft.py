"""From a seed to a program: blocks as models have them, with mischief in between."""

from __future__ import annotations

import textwrap
from random import Random

from tests.fuzz import edits, readers
from tests.fuzz.norms import spell
from tests.fuzz.program import Program, Statement

# Kinds of models that are wrong until the analysis knows them; empty when it does.
AWAITED: frozenset[str] = frozenset()


def draft(seed: int, without: frozenset[str] = AWAITED) -> Program:
    """The program of a seed, with no feature of `without`."""
    maker = _Draft(Random(seed), without)
    maker.model()
    return maker.program().live()


class _Draft:
    def __init__(self, rng: Random, without: frozenset[str]) -> None:
        self.rng, self.without = rng, without
        self.width = rng.choice((4, 6, 8, 12))
        self.inputs: list[tuple[str, int]] = []
        self.statements: list[Statement] = []
        self.made: dict[str, tuple[str, ...]] = {}
        self.classes: dict[str, str] = {}
        self.returned: list[str] = []
        self.blind = False
        self.values: list[tuple[str, int]] = []
        # Modules that may be called again: attribute, widths in and out.
        self.norms: list[tuple[str, int, str]] = []
        self.linears: list[tuple[str, int, int]] = []

    def program(self) -> Program:
        return Program(
            tuple(self.inputs),
            tuple(self.statements),
            tuple(self.returned),
            self.made,
            self.classes,
            self.blind,
        )

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def number(self) -> int:
        return len(self.made) + len(self.statements)

    def add(
        self,
        kind: str,
        reads: tuple[str, ...],
        width: int,
        body: tuple[str, ...],
        gain: str | None = None,
        path: str = "",
    ) -> str:
        out = f"h{len(self.statements)}"
        self.statements.append(Statement(kind, out, reads, width, body, gain, path))
        self.values.append((out, width))
        return out

    def model(self) -> None:
        x = self.start()
        for _ in range(self.rng.choice((1, 1, 2, 2, 3))):
            x = self.block(x)
        self.finish(x)

    def start(self) -> str:
        if self.chance(0.15):
            self.inputs.append(("ids", 0))
            self.made["emb"] = (f"self.emb = nn.Embedding(7, {self.width})",)
            return self.add("embedding", ("ids",), self.width, ("{out} = self.emb({0})",))
        self.inputs.append(("x", self.width))
        self.values.append(("x", self.width))
        if self.chance(0.25):
            self.inputs.append(("y", self.width))
            self.values.append(("y", self.width))
        return self.reader("x", self.width) if self.chance(0.4) else "x"

    def finish(self, x: str) -> None:
        if self.chance(0.6):
            x = self.mischief(self.norm(x))
            if "emb" in self.made and self.chance(0.7):
                tied = self.rng.choice(("F.linear({0}, self.emb.weight)", "self.head({0})"))
                self.made["head"] = (
                    f"self.head = nn.Linear({self.width}, 7, bias=False)",
                    "self.head.weight = self.emb.weight",
                )
                x = self.add("tied", (x,), 7, (f"{{out}} = {tied}",))
            else:
                x = self.reader(x, self.rng.choice((3, 5, self.width)))
        self.returned.append(x)
        if self.chance(0.1):
            self.returned.append(self.rng.choice(self.values)[0])

    # Blocks -----------------------------------------------------------------------------------

    def block(self, x: str) -> str:
        kinds = ("pre", "post", "from", "parallel", "double", "sandwich", "concat", "product")
        kind = self.rng.choices(kinds, (8, 1, 1, 2, 2, 3, 1, 1))[0]
        return getattr(self, f"block_{kind}")(x)

    def block_pre(self, x: str) -> str:
        return self.residual(x, self.sublayer(self.mischief(self.norm(x))))

    def block_post(self, x: str) -> str:
        return self.norm(self.residual(x, self.sublayer(x)))

    def block_from(self, x: str) -> str:
        h = self.norm(x)
        return self.residual(h, self.sublayer(self.mischief(h)))

    def block_parallel(self, x: str) -> str:
        h = self.mischief(self.norm(x))
        first = self.sublayer(h)
        return self.residual(self.residual(x, first), self.sublayer(self.mischief(h)))

    def block_double(self, x: str) -> str:
        first, second = self.norm(x), self.norm(x)
        a, b = self.reader(self.mischief(first), self.width), self.reader(second, self.width)
        return self.residual(x, self.add("meet", (a, b), self.width, ("{out} = {0} * {1}",)))

    def block_sandwich(self, x: str) -> str:
        inner = self.sublayer(self.mischief(self.norm(x)))
        return self.residual(x, self.norm(inner))

    def block_concat(self, x: str) -> str:
        other = self.other(x, self.width) or x
        h = self.add(
            "cat", (self.norm(x), other), 2 * self.width, ("{out} = torch.cat([{0}, {1}], -1)",)
        )
        return self.residual(x, self.reader(self.mischief(h), self.width))

    def block_product(self, x: str) -> str:
        h = self.norm(x)
        other = self.norm(x) if self.chance(0.3) else self.mischief(h)
        h = self.add("meet", (h, other), self.width, ("{out} = {0} * {1}",))
        return self.residual(x, self.sublayer(h))

    def residual(self, x: str, y: str) -> str:
        if self.chance(0.08):
            return self.add("write", (x, y), self.width, ("{out} = {0}.add_({1})",))
        form = self.rng.choice(("{0} + {1}",) * 5 + ("{1}", "{0} + 0.5 * {1}", "{0}.add({1})"))
        return self.add("sum", (x, y), self.width, (f"{{out}} = {form}",))

    def sublayer(self, h: str) -> str:
        """One linear layer, or two with something between."""
        if self.chance(0.4):
            return self.reader(h, self.width)
        inner = self.rng.choice((self.width, self.width, 2 * self.width))
        y = self.reader(h, inner)
        if self.chance(0.4):
            other = self.reader(h, inner)
            gate = self.rng.choice(
                ("F.silu({0}) * {1}", "{0} * {1}", "F.relu({0}) * {1}", "{0} + {1}")
            )
            y = self.add("gate", (y, other), inner, (f"{{out}} = {gate}",))
        elif self.chance(0.7):
            act = self.rng.choice(("F.relu({0})", "F.silu({0})", "{0}.tanh()", "F.gelu({0})"))
            y = self.add("act", (y,), inner, (f"{{out}} = {act}",))
        if self.chance(0.15):
            y = self.mischief(self.norm(y))
        return self.reader(y, self.width)

    # Parts ------------------------------------------------------------------------------------

    def width_of(self, name: str) -> int:
        return next(width for found, width in self.values if found == name)

    def other(self, x: str, width: int) -> str | None:
        """Another value of that width."""
        found = [name for name, w in self.values if w == width and name != x]
        return self.rng.choice(found) if found else None

    def norm(self, x: str) -> str:
        width = self.width_of(x)
        again = [norm for norm in self.norms if norm[1] == width]
        if again and self.chance(0.08):
            attribute, _, gain = self.rng.choice(again)
            again = [n for n in self.statements if n.path == attribute and n.gain is not None]
            gain = again[0].gain if again else gain
            return self.add(
                "norm", (x,), width, (f"{{out}} = self.{attribute}({{0}})",), gain, attribute
            )
        if "cold norm" not in self.without and self.chance(0.02):
            return self.cold_norm(x, width)
        if self.chance(0.25):
            return self.torch_norm(x, width)
        if self.chance(0.6):
            return self.module_norm(x, width)
        return self.inline_norm(x, width)

    def torch_norm(self, x: str, width: int) -> str:
        s = self.number()
        made = self.rng.choice(
            (
                f"nn.RMSNorm({width}, eps=1e-5)",
                f"nn.RMSNorm({width})",
                f"nn.LayerNorm({width})",
                f"nn.LayerNorm({width}, bias=False)",
                f"nn.RMSNorm({width}, elementwise_affine=False)",
            )
        )
        gain = "" if "False)" in made and "affine" in made else f"n{s}.weight"
        return self.called_norm(x, width, f"n{s}", made, gain)

    def called_norm(
        self, x: str, width: int, name: str, made: str, gain: str, inner: int = 0
    ) -> str:
        lines = (f"self.{name} = {made}",)
        tied = [n for n in self.norms if n[1] == width and n[2].endswith(".weight")]
        if not inner and gain.endswith(".weight") and tied and self.chance(0.06):
            other = self.rng.choice(tied)[2]
            lines += (f"self.{gain} = self.{other}",)
            gain = other
        if self.chance(0.06):
            lines += (f"self.{name}.{self.hook()}",)
        self.made[name] = lines
        self.norms.append((name, width, "" if inner else gain))
        return self.add("norm", (x,), width, (f"{{out}} = self.{name}({{0}})",), gain, name)

    def hook(self) -> str:
        silent = edits.SILENT_HOOKS if "silent hook" not in self.without else ()
        return self.rng.choice(edits.HOOKS + silent)

    def module_norm(self, x: str, width: int) -> str:
        s = self.number()
        heads, inner = self.heads(width)
        spelling = spell(self.rng, inner, "x", "x", "self.", "")
        made = [f"self.{k} = {v}" for k, v in spelling.made.items()] or ["pass"]
        made = [_buffered(line) for line in made]
        lines = [*spelling.lines, "return x"]
        if heads:
            lines = ["x = x.unflatten(-1, (2, -1))", *spelling.lines, "return x.flatten(-2)"]
        gated = None if heads or not self.chance(0.08) else self.other(x, width)
        if gated:
            where = self.rng.choice((0, len(lines) - 1))
            lines.insert(where, "x = x * F.silu(z)")
        self.classes[f"N{s}"] = (
            f"class N{s}(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            + textwrap.indent("\n".join(made), " " * 8)
            + f"\n\n    def forward(self, x{', z' if gated else ''}):\n"
            + textwrap.indent("\n".join(lines), " " * 8)
        )
        gain = f"n{s}.{spelling.gain}" if spelling.gain else ""
        if not gated:
            return self.called_norm(x, width, f"n{s}", f"N{s}()", gain, inner if heads else 0)
        self.made[f"n{s}"] = (f"self.n{s} = N{s}()",)
        body = (f"{{out}} = self.n{s}({{0}}, {{1}})",)
        return self.add("norm", (x, gated), width, body, gain, f"n{s}")

    def heads(self, width: int) -> tuple[bool, int]:
        """Whether a norm is over each of two heads by itself, and how wide it then is."""
        heads = self.chance(0.12) and width >= 8
        return heads, width // 2 if heads else width

    def inline_norm(self, x: str, width: int) -> str:
        s = self.number()
        heads, inner = self.heads(width)
        spelling = spell(self.rng, inner, "{0}" if not heads else f"x{s}", "{out}", "self.", str(s))
        for name, code in spelling.made.items():
            self.made[f"{name}{s}"] = (_buffered(f"self.{name}{s} = {code}"),)
        lines, gain = tuple(spelling.lines), spelling.gain
        if gain and self.chance(0.1):
            # A row of a bank of gains, which another norm may read as well.
            bank, row = f"bank{inner}", self.rng.randrange(2)
            self.made[bank] = (f"self.{bank} = nn.Parameter(torch.ones(2, {inner}))",)
            lines = tuple(li.replace(f"self.{gain}", f"self.{bank}[{row}]") for li in lines)
            gain = bank
        if heads:
            flat = "{out} = {out}.flatten(-2)"
            lines = (f"x{s} = {{0}}.unflatten(-1, (2, -1))", *lines, flat)
        return self.add("norm", (x,), width, lines, gain, "")

    def cold_norm(self, x: str, width: int) -> str:
        """Another norm for longer inputs, before the same readers."""
        s = self.number()
        for name in (f"n{s}", f"o{s}"):
            self.made[name] = (f"self.{name} = nn.RMSNorm({width})",)
        body = (f"{{out}} = self.n{s}({{0}}) if {{0}}.shape[1] <= 4 else self.o{s}({{0}})",)
        return self.add("cold", (x,), width, body)

    def reader(self, h: str, out: int) -> str:
        width, s = self.width_of(h), self.number()
        again = [found for found in self.linears if found[1:] == (width, out)]
        if again and self.chance(0.08):
            name = self.rng.choice(again)[0]
            form = self.rng.choice((f"self.{name}({{0}})", f"F.linear({{0}}, self.{name}.weight)"))
            return self.add("reader", (h,), out, (f"{{out}} = {form}",))
        kind = self.rng.choice(sorted(readers.BRANCHES))
        if self.chance(0.05) and kind not in self.without:
            body, made = readers.branch(self.rng, kind, width, out, s, h)
        else:
            body, made = readers.reader(self.rng, width, out, s, h)
        for name, code in made.items():
            self.made[name] = (_buffered(f"self.{name} = {code}"),)
        if f"l{s}" in made and self.linears and self.chance(0.15):
            self.tie(f"l{s}", made[f"l{s}"], width, out)
        if f"l{s}" in made and made[f"l{s}"].startswith("nn.Linear") and len(made) == 1:
            self.linears.append((f"l{s}", width, self.rows(made[f"l{s}"])))
            if self.chance(0.05):
                self.made[f"l{s}"] += (f"self.l{s}.{self.hook()}",)
        return self.add("reader", (h,), out, body)

    def tie(self, name: str, made: str, width: int, out: int) -> None:
        """Two linear layers with one weight."""
        alike = [found for found, *widths in self.linears if widths == [width, out]]
        if alike and made.startswith(f"nn.Linear({width}, {out}"):
            self.made[name] += (f"self.{name}.weight = self.{self.rng.choice(alike)}.weight",)

    def rows(self, made: str) -> int:
        rows = made.split(",")[1].strip(" )")
        return int(rows) if rows.isdigit() else 0

    def mischief(self, h: str) -> str:
        for _ in range(self.rng.choices((0, 1, 2), (6, 3, 1))[0]):
            h = self.norm(h) if self.chance(0.06) else self.edit(h)
        return h

    def edit(self, h: str) -> str:
        width, s = self.width_of(h), self.number()
        kind = self.rng.choices(("move", "factor", "meet", "write", "write2"), (6, 4, 2, 3, 1))[0]
        other = self.other(h, width)
        if kind in ("meet", "write2") and other is None:
            kind = "move"
        table = {
            "move": edits.MOVES,
            "factor": edits.FACTORS,
            "meet": edits.MEETINGS,
            "write": edits.WRITES,
            "write2": edits.WRITES_OF_TWO,
        }[kind]
        lines, made = self.rng.choice(table)
        for name, code in made.items():
            attribute = f"{name}{s}"
            self.made[attribute] = (_buffered(f"self.{attribute} = {code.format(a=width)}"),)
        body = tuple(line.format(a=width, s=s, out="{out}") for line in lines)
        reads = (h, other) if other is not None and kind in ("meet", "write2") else (h,)
        return self.add(kind, reads, width, body)


def _buffered(line: str) -> str:
    """An assignment of a plain tensor as the registration of a buffer."""
    target, _, code = line.partition(" = ")
    if not code.startswith("torch."):
        return line
    return f"self.register_buffer({target.removeprefix('self.')!r}, {code})".replace("'", '"')
