"""A random model as a program: a list of statements, printed as source code and run from it.

A statement reads variables and gives one; what it needs in `__init__` is kept by attribute, so that
deleting a statement never breaks another one that shares its module.
"""

from __future__ import annotations

import itertools
import linecache
import re
from dataclasses import dataclass, field, replace

import torch
from torch import nn

HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"
_ATTRIBUTE = re.compile(r"self\.(\w+)")
_NAME = re.compile(r"\b[A-Z]\w*\b")
_serial = itertools.count()


@dataclass(frozen=True)
class Statement:
    """Lines of a forward: `{0}`, `{1}` are what it reads, `{out}` what it gives, `width` wide.

    `gain` is the parameter of the norm that this is, `path` its module; None where it is no norm.
    """

    kind: str
    out: str
    reads: tuple[str, ...]
    width: int
    body: tuple[str, ...]
    gain: str | None = None
    path: str = ""

    @property
    def text(self) -> str:
        return "\n".join(self.body)

    def lines(self) -> list[str]:
        return [line.format(*self.reads, out=self.out) for line in self.body]


@dataclass(frozen=True)
class Program:
    """A model: its inputs with their widths (0: token ids), statements, and what it returns.

    `made` are the lines of `__init__` by attribute, `classes` the sources of helper classes by
    name. `blind` where another length would run code that the recorded pass did not see, and that
    no analysis of it can know of.
    """

    inputs: tuple[tuple[str, int], ...]
    statements: tuple[Statement, ...]
    returned: tuple[str, ...]
    made: dict[str, tuple[str, ...]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    blind: bool = False

    @property
    def source(self) -> str:
        """Self-contained code of a class `Model`."""
        body = [line for s in self.statements for line in s.lines()]
        made = self._made(body)
        classes = self._classes(made)
        names = "".join(f", {name}" for name, _ in self.inputs)
        lines = [
            HEADER,
            *(f"\n{source}" for source in classes),
            "\nclass Model(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in made),
            "",
            f"    def forward(self{names}):",
            *(f"        {line}" for line in body),
            f"        return {', '.join(self.returned)}",
        ]
        return "\n".join(lines) + "\n"

    def _made(self, body: list[str]) -> list[str]:
        """The lines of `__init__` for the attributes that the forward mentions."""
        wanted = set(_ATTRIBUTE.findall("\n".join(body)))
        while True:
            lines = [line for name, lines in self.made.items() if name in wanted for line in lines]
            more = wanted | set(_ATTRIBUTE.findall("\n".join(lines)))
            if more == wanted:
                return lines
            wanted = more

    def _classes(self, made: list[str]) -> list[str]:
        wanted = set(_NAME.findall("\n".join(made)))
        return [source for name, source in self.classes.items() if name in wanted]

    @property
    def norms(self) -> tuple[Statement, ...]:
        return tuple(s for s in self.statements if s.gain is not None)

    def live(self) -> Program:
        """Without the statements that nothing returned depends on."""
        wanted, kept = set(self.returned), []
        for statement in reversed(self.statements):
            writes = statement.kind.startswith("write")
            if statement.out in wanted or (writes and wanted & set(statement.reads)):
                wanted |= {statement.out, *statement.reads}
                kept.append(statement)
        return replace(self, statements=tuple(reversed(kept)))


@dataclass(frozen=True)
class Written:
    """A model whose code was written down: a counterexample. `inputs` as in `Program`."""

    source: str
    inputs: tuple[tuple[str, int], ...]
    blind: bool = False
    statements: tuple[Statement, ...] = ()
    norms: tuple[Statement, ...] = ()


def build(program: Program | Written, seed: int) -> nn.Module:
    """The model in float64, with random gains, biases and weights."""
    source = program.source
    name = f"<fuzz {next(_serial)}>.py"[1:].replace(">", "")
    linecache.cache.pop(name, None)
    space: dict[str, object] = {"__name__": "fuzzed"}
    exec(compile(source, name, "exec"), space)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # permutations are drawn where the model is made
        model: nn.Module = space["Model"]()  # type: ignore[operator]
    return randomized(model, seed)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """The model in float64 with every parameter and buffer of floats drawn anew, none near one."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.ndim < 2:
                tensor.add_(0.3 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


def inputs_of(
    program: Program | Written, seed: int, batch: int, tokens: int
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _, width in program.inputs:
        if width == 0:
            found.append(torch.randint(7, (batch, tokens), generator=generator))
        else:
            shape = (batch, tokens, width)
            found.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return tuple(found)
