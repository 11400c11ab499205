"""A counterexample made small: whatever can be left out while it still fails is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from tests.fuzz.oracle import Options, judge
from tests.fuzz.program import Program, Statement

Fails = Callable[[Program], bool]


def shrink(program: Program, fails: Fails, steps: int = 400) -> Program:
    """The smallest program that greedy deletion finds, no larger than this one."""
    program = program.live()
    for _ in range(steps):
        found = next((p for p in _smaller(program) if _size(p) < _size(program) and fails(p)), None)
        if found is None:
            return program
        program = found
    return program


def fails_alike(seed: int, options: Options, wrong: str) -> Fails:
    return lambda program: judge(program, seed, options).wrong == wrong


def fewest(program: Program, seed: int, options: Options, wrong: str) -> Options:
    """The options without those that the failure does not need."""
    for field in fields(Options):
        less = replace(options, **{field.name: False})
        if less != options and judge(program, seed, less).wrong == wrong:
            options = less
    return options


def _size(program: Program) -> tuple[int, int, int]:
    return len(program.statements) + len(program.returned), len(program.source), len(program.inputs)


def _smaller(program: Program) -> Iterator[Program]:
    if len(program.returned) > 1:
        for i in range(len(program.returned)):
            kept = program.returned[:i] + program.returned[i + 1 :]
            yield replace(program, returned=kept).live()
    for statement in program.statements:
        if program.returned != (statement.out,):
            yield replace(program, returned=(statement.out,)).live()
    widths = dict(program.inputs) | {s.out: s.width for s in program.statements}
    for statement in reversed(program.statements):
        for other in dict.fromkeys((*statement.reads, *(n for n, _ in program.inputs))):
            if widths[other] == statement.width:
                yield _without(program, statement, other)
    for i, statement in enumerate(program.statements):
        yield from (_with(program, i, *simple) for simple in _simpler(statement, widths))
    for name, lines in program.made.items():
        if len(lines) > 1:
            yield replace(program, made={**program.made, name: lines[:1]})
    for name, source in program.classes.items():
        for shorter in _shorter(source):
            yield replace(program, classes={**program.classes, name: shorter})
    yield from _fewer_lines(program)
    used = {name for s in program.statements for name in s.reads} | set(program.returned)
    if len(program.inputs) > 1 and (inputs := tuple(i for i in program.inputs if i[0] in used)):
        yield replace(program, inputs=inputs)


def _without(program: Program, statement: Statement, other: str) -> Program:
    """What was read from a statement is read from `other`."""

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(other if name == statement.out else name for name in names)

    rest = tuple(
        replace(s, reads=renamed(s.reads)) for s in program.statements if s is not statement
    )
    return replace(program, statements=rest, returned=renamed(program.returned)).live()


def _with(
    program: Program, index: int, statement: Statement, made: dict[str, tuple[str, ...]]
) -> Program:
    statements = list(program.statements)
    statements[index] = statement
    return replace(program, statements=tuple(statements), made={**program.made, **made}).live()


def _simpler(
    statement: Statement, widths: dict[str, int]
) -> Iterator[tuple[Statement, dict[str, tuple[str, ...]]]]:
    """The plainest statement of its kind, where this one may be plainer."""
    width, name = widths[statement.reads[0]], f"s{statement.out}"
    body = (f"{{out}} = self.{name}({{0}})",)
    reads = statement.reads[:1]
    if statement.kind == "norm":
        made = f"self.{name} = nn.RMSNorm({width})"
        plain = replace(statement, reads=reads, body=body, gain=f"{name}.weight", path=name)
        yield plain, {name: (made,)}
    if statement.kind in ("reader", "tied", "write", "gate") and width:
        made = f"self.{name} = nn.Linear({width}, {statement.width}, bias=False)"
        yield replace(statement, kind="reader", reads=reads, body=body), {name: (made,)}
    if statement.kind == "embedding":
        return
    if len(statement.reads) == 2:
        for form in ("{0} + {1}", "{0} * {1}"):
            yield replace(statement, body=(f"{{out}} = {form}",)), {}


# Simplifications of single expressions.
_REWRITES = (
    (r"\.float\(\)", ""),
    (r"\.to\(x\.dtype\)", ""),
    (r"1 \+ (self\.\w+)", r"\1"),
)


def _shorter(source: str) -> Iterator[str]:
    lines = source.splitlines()
    for i, line in enumerate(lines):
        if " = " in line and not line.strip().startswith("self."):
            yield "\n".join(lines[:i] + lines[i + 1 :])
    for pattern, to in _REWRITES:
        if (changed := re.sub(pattern, to, source)) != source:
            yield changed


def _fewer_lines(program: Program) -> Iterator[Program]:
    for i, statement in enumerate(program.statements):
        if len(statement.body) > 1:
            for j in range(len(statement.body)):
                body = statement.body[:j] + statement.body[j + 1 :]
                yield _with(program, i, replace(statement, body=body), {})
