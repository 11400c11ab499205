"""What a recorded graph is made of: values, and the ATen operations between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

# Not an operation: a parameter is read because it lies in the memory of another tensor.
SHARED_MEMORY = "shared_memory"

Origin = Literal["parameter", "input", "constant", "computed"]


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor argument of a node, by the number of its value."""

    value: int


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the recorded passes. `node` is the producer's index, -1 if there is none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin
    node: int
    parameter: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: what it was, what it read and wrote, and the code that called it.

    `op` is the name without namespace, overload and in-place underscore ("mul", "addmm"); `func`
    runs it. `path` is the innermost module, `call` the number of that module's call.
    """

    op: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    path: str
    call: int
    source: str

    @property
    def bound(self) -> dict[str, Any]:
        """The arguments by their names in the operation's schema, defaults filled in.

        What is no operation of torch, such as a write through an alias, names none.
        """
        schema = getattr(self.func, "_schema", None)
        named = {a.name: a.default_value for a in schema.arguments} if schema else {}
        named.update(zip(named, self.args, strict=False))
        named.update(self.kwargs)
        return named

    @property
    def inputs(self) -> tuple[int, ...]:
        return tuple(refs((self.args, tuple(self.kwargs.values()))))

    @property
    def where(self) -> str:
        """The operation, module and source line in the words of a reason."""
        if self.op == SHARED_MEMORY:
            return f"{self.source}, which lies in the same memory"
        return f"{self.op} in '{self.path or '(root)'}' at {self.source}"


@dataclass(slots=True)
class Call:
    """One call of a module: the tensors it was given by position, and those it returned.

    `arguments` counts those that its forward takes, whether they were given or not.
    """

    path: str
    received: tuple[int, ...]
    arguments: int
    returned: tuple[int, ...] = ()


@dataclass
class Graph:
    """All recorded passes of one model, as one graph.

    `parameters` maps every parameter's first name to its value; `aliases` to all of its names;
    `calls` every number of a module's call to what went in and out; `buffers` every buffer to its
    value; `modules` every path of a module to the first path of the same module; `packed` the first
    name of every parameter that is held packed to who packed it, and how.
    """

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    calls: dict[int, Call] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    packed: dict[str, str] = field(default_factory=dict)

    def producer(self, value: int) -> Node | None:
        index = self.values[value].node
        return None if index < 0 else self.nodes[index]

    def is_idle(self, node: Node) -> bool:
        """What has no rows was not computed: an expert that no token was sent to."""
        return any(0 in self.values[out].shape for out in node.outputs)


def refs(tree: Any) -> Iterator[int]:
    """The values in a tree of arguments, in order."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from refs(item)


def substitute(tree: Any, replace: Callable[[int], Any]) -> Any:
    """The tree of arguments with every `Ref` replaced."""
    if isinstance(tree, Ref):
        return replace(tree.value)
    if isinstance(tree, (tuple, list)):
        return type(tree)(substitute(item, replace) for item in tree)
    return tree
