"""Which private names of torch and of transformers a file uses, by its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set

LIBRARIES = ("torch", "transformers")
# What transformers documents as importable; any other module of it may move with a release.
PUBLIC = ("transformers", "transformers.utils")
# Python's own names that begin with an underscore, and the prefix of what we leave on objects.
PYTHON = {"_asdict", "_fields", "_getframe", "_replace"}
OURS = "_flashnorm"
SELF = ("self", "cls", "super()")
ACCESS = ("getattr", "setattr", "hasattr", "delattr")


def private_names(
    source: str, allowed: Set[str] = frozenset(), inherited: Set[str] = frozenset()
) -> list[str]:
    """`torch._C.name` where the path is known, else `.name` or `self.name`; sorted, every use.

    An attribute is somebody else's unless the file defines it, `allowed` has it, or it is an
    object's own and `inherited` has it.
    """
    tree = ast.parse(source)
    own = {"": defined(tree) | PYTHON | allowed}
    own["self"] = own[""] | inherited
    found = (name.rpartition(".") for name in (*_imports(tree), *_attributes(tree, _bound(tree))))
    return sorted(
        f"{owner}.{name}"
        for owner, _, name in found
        if owner not in own or not (name in own[owner] or name.startswith(OURS))
    )


def _is_private(part: str) -> bool:
    return part.startswith("_") and not (part.startswith("__") and part.endswith("__"))


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and _is_library(node.module):
            closed = node.module.startswith("transformers") and node.module not in PUBLIC
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if closed or any(map(_is_private, name.split("."))):
                    yield name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                closed = alias.name.startswith("transformers.") and alias.name not in PUBLIC
                if _is_library(alias.name) and (
                    closed or any(map(_is_private, alias.name.split(".")))
                ):
                    yield alias.name


def _bound(tree: ast.AST) -> dict[str, str]:
    """What the names that a file imports from the libraries stand for."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and _is_library(node.module):
            bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_library(alias.name):
                    root = alias.name.partition(".")[0]
                    bound[alias.asname or root] = alias.name if alias.asname else root
    return bound


def _attributes(tree: ast.AST, bound: dict[str, str]) -> Iterator[str]:
    """Chains from a library to their last private name, and private attributes of anything else."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):  # from the outside in: a chain is met before its parts
        if isinstance(node, ast.Attribute) and node not in inside:
            chain = [node]
            while isinstance(chain[-1].value, ast.Attribute):
                chain.append(chain[-1].value)
            inside.update(chain)
            start, parts = chain[-1].value, [link.attr for link in reversed(chain)]
            root = bound.get(start.id) if isinstance(start, ast.Name) else None
            if root and any(map(_is_private, parts)):
                yield ".".join([root, *parts])
            elif root is None:
                owner = "self" if ast.unparse(start) in SELF else ""
                yield from (
                    f"{'' if i else owner}.{part}"
                    for i, part in enumerate(parts)
                    if _is_private(part)
                )
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ACCESS:
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and _is_private(str(name.value)):
                root = bound.get(ast.unparse(node.args[0]), "")
                yield f"{root}.{name.value}"


def defined(tree: ast.AST) -> set[str]:
    """The names that a file gives its own functions, classes, fields and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in SELF:
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found
