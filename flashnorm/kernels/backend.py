"""What a backend is: where its kernels run, what they take, and how they share work with torch.

A backend is registered in `kernels.dispatch`. Whoever calls kernels (functions, modules, the
forwards of `accelerate_`) knows this file and no backend by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flashnorm.kernels.call import Call

T = TypeVar("T")


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is no subclass, and has its elements in memory, one by one."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and not tensor.is_meta and tensor.layout == torch.strided


class Way(Enum):
    """How `act(gate) ⊙ up` is computed."""

    KERNEL = "products, gate and activation in one kernel"
    BLOCKS = "torch's products, and a gate of one pass, for a block of rows at a time"
    LIBRARY = "torch's own operations"


class Precompute(Enum):
    """When a norm computes its readers in the same call."""

    NEVER = "never"
    ALWAYS = "always"
    IN_CAPTURE = "while the calls of a step are captured, to be run again without Python"


@dataclass(frozen=True)
class Policy:
    """Who computes what in the modules of an accelerated model.

    idle: why a linear layer that no norm computes keeps its own forward; empty where it has a
    kernel. few and many: of a gated pair, up to `Bound.most` elements of x and above.
    captured_rows: most rows of x that a norm computes readers for in a capture.
    """

    precompute: Precompute
    idle: str
    few: Way
    many: Way
    captured_rows: int = 0


@dataclass(frozen=True)
class CompiledPolicy:
    """The same in graphs of torch.compile.

    alone: linear layers and gated pairs call their kernels. precompute: norms compute their
    readers. unknown: dtypes in which they do for any number of rows, where that is not known.
    fuses: calls of the operator take up the sums after them, and join (`runtime/fusing.py`).
    defers: with more rows, a norm without a gain scales a gated pair's products instead of x
    (`runtime/deferred.py`).
    """

    alone: bool
    precompute: bool
    unknown: tuple[torch.dtype, ...] = ()
    fuses: bool = False
    defers: bool = False


@dataclass(frozen=True)
class Limits:
    """What kernels take. dtypes: of x and parameters; weights: most of one call; contiguous:
    whether a norm by itself takes dense x only; turned: most rows of x where weights are held as
    [in, out] and given as views [k, n] with stride (1, k), all of a call alike; 0: none. packed:
    most rows of x with packed weights, which no library multiplies by."""

    dtypes: tuple[torch.dtype, ...]
    weights: int
    contiguous: bool = False
    turned: int = 0
    packed: int = 0


class Bound(Protocol):
    """A kernel with its parameters. most: elements of x that it takes; more are a library's."""

    most: int

    def run(self, x: Tensor, output_residual: Tensor | None = None) -> list[Tensor]:
        """What `reference.norm_linear` says, for x [.., n] like the one of the bound call."""

    def normalize(self, x: Tensor) -> Tensor:
        """norm(x) · (offset + gain) + β, rounded once, contiguous."""

    def precomputes(self, x: Tensor) -> bool:
        """Whether norm and products of this x are one kernel."""

    def normalize_and_run(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """(norm(x), the results); z is norm(x) where that is known."""


class Attention(ABC):
    """softmax(scale · q kᵀ + mask) v for one new token per sequence (`cpu.attention.attend`)."""

    @abstractmethod
    def why_not(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
        """Why the kernel cannot take these, or None where it can."""

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        """[B, 1, H, Dv] of q [B, H, 1, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]."""

    def why_not_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> str | None:
        """`why_not` for a compiled graph."""
        return "there is no operator for compiled graphs"

    def attend_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        """`attend` as an operator that a compiled graph calls."""
        raise NotImplementedError


class Experts(ABC):
    """Products with some of the matrices in one tensor. most: tokens that are worth it."""

    most: int

    @abstractmethod
    def why_not(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
        """Why the kernels cannot take x [S, n] with W [E, k, n] and c [E, k], or None."""

    @abstractmethod
    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: Sequence[tuple[int, int]]
    ) -> Tensor:
        """[S, k]: the next `rows` rows of x times W_eᵀ + c_e, for each (e, rows) of `groups`.

        An x of one row goes to every expert.
        """


class Packaging(ABC):
    """What ahead-of-time compiled code needs to call a backend's operators without Python."""

    @abstractmethod
    def why_not(self) -> str:
        """Why nothing can be packaged here; empty where it can."""

    @abstractmethod
    def entries(self) -> dict[Any, list[str]]:
        """The C declarations of every operator that such code may call."""

    @abstractmethod
    def adding(
        self, operator: Any, arguments: tuple[Any, ...], residual: Any
    ) -> tuple[Any, ...] | None:
        """The arguments of a call that adds a residual as well, of the shape and dtype of its only
        result; None where an operator, or this call of it, cannot."""

    @abstractmethod
    def options(self) -> dict[str, object]:
        """Options of the compiler that its code should be made with."""

    @abstractmethod
    def expose(self) -> None:
        """Let code that is loaded from now on find the entries."""

    @abstractmethod
    def described(self) -> dict[str, str]:
        """What compiled code depends on beside the model: processor, kernels."""


class Captures(ABC):
    """What records the work of a step, to run it again without Python."""

    @abstractmethod
    def capture(
        self, function: Callable[[], T], device: torch.device
    ) -> tuple[Callable[[], None], T]:
        """(replay, what `function` returned): replay does again all that it launched on a device.

        On the same memory: what was returned is written by replays, and has no values before the
        first. Nothing is executed, so that memory is as it was, after an error too.
        """

    @abstractmethod
    def position(self) -> object:
        """How far the capture is: equal to an earlier one only where nothing came in between.

        Where that is not known nothing is equal.
        """

    def settings(self) -> tuple[object, ...]:
        """What of the process's settings chooses kernels or their precision."""
        return ()


@dataclass(frozen=True, eq=False)
class Backend(ABC):
    """Kernels on one kind of device. attention: what attends there, or why nothing does; experts
    the same for them, packaging for code that is compiled ahead of time, captures for steps.

    keeps: what `bind` returns depends on nothing but where the parameters lie, holds none of them,
    and may be kept; elsewhere every call binds anew.
    """

    name: str
    device: str  # the type of torch.device that x is on
    limits: Limits
    policy: Policy
    compiled: CompiledPolicy
    attention: Attention | str = field(default="the backend has no attention")
    keeps: bool = True
    experts: Experts | str = field(default="the backend has no kernels for experts")
    packaging: Packaging | str = field(default="the backend has no operators for packages")
    captures: Captures | str = field(default="the backend captures no steps")

    @abstractmethod
    def claims(self, x: Tensor) -> bool:
        """Whether x is where the kernels run."""

    @abstractmethod
    def available(self, device: torch.device) -> tuple[bool, str]:
        """Whether the kernels run on this device, and what they are; or why not."""

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """Why the kernels cannot take a call, or None. A norm alone has no weights."""

    @abstractmethod
    def run(self, call: Call) -> list[Tensor]:
        """`reference.norm_linear`, for a call that `why_not` has nothing against."""

    @abstractmethod
    def bind(self, call: Call) -> Bound | str:
        """The kernel of all calls with these parameters and an x like this, or why not."""

    @abstractmethod
    def gate_(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """act(gate) ⊙ up, written over gate: [rows, width]."""

    @abstractmethod
    def rows(self, dtype: torch.dtype, n: int, weights: int, compiled: bool) -> int:
        """How many rows of x the kernel takes before a library does; 0 where it takes none."""

    def explain(self, call: Call) -> str:
        """On what a call runs that `why_not` has nothing against."""
        return self.available(call.x.device)[1]

    def elsewhere(self, x: Tensor) -> str:
        """What is wrong with an x that is not claimed."""
        return f"x is on {x.device}, not where the {self.name} kernels run"

    def uses(self, part: str) -> bool:
        """Whether a part of what it can do is turned on, by its name; a model that is accelerated
        meanwhile has it."""
        return True

    def capturing(self) -> bool:
        """Whether the kernels that are called now are recorded, to be run again without Python."""
        return False

    def in_graph(self, call: Call) -> list[Tensor] | None:
        """The call as an operator without Python around it, for a compiled graph; None: no such."""
        return None

    def prepare_memory(self, parameters: Iterable[Tensor]) -> int:
        """Make parameters faster to read, where they are. Returns the bytes of which it did."""
        return 0

    def __reduce__(self) -> tuple[Any, ...]:
        from flashnorm.kernels.dispatch import find

        return find, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self
