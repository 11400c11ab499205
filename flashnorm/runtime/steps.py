"""What modules run when a gradient is wanted: norms and gates whose results nobody has to save.

A norm returns z with what recomputes it: x and s. A linear layer that is given such a tensor saves
what recomputes it, which autograd keeps anyhow, and not the tensor. The same holds for
`act(a) ⊙ b`, which is made again from a and b. Whoever else reads these tensors finds ordinary
values with an ordinary gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.compat.torch_names import tracing_state, without_dispatch_modes
from flashnorm.kernels import autograd, dispatch, gradient, norms
from flashnorm.runtime.bound import GONE, misfit
from flashnorm.runtime.forwards import Inner
from flashnorm.runtime.spec import Norm
from flashnorm.runtime.stand import Stand
from flashnorm.runtime.watch import CHANGED, Watch

RANDOM = "in training the module draws random numbers, or computes something else than was recorded"
SUBCLASS = "a tracer watches, or a tensor is of a subclass (sharded, fake) with its own operations"
INSIDE = "a module inside is another one than it was, or has hooks"
EMPTY = "x has no rows or no features"
CONTIGUOUS = torch.contiguous_format


class Recompute(NamedTuple):
    """A tensor of this version is `make(*sources)`."""

    version: int
    make: Callable[..., Tensor]
    sources: tuple[Tensor | None, ...]


def attach(result: Tensor, make: Callable[..., Tensor], *sources: Tensor | None) -> Tensor:
    """The result, with what makes it again."""
    made = Recompute(result._version, make, sources)
    result._flashnorm_recompute = made  # type: ignore[attr-defined]
    return result


def recompute_of(x: Tensor) -> Recompute | None:
    """How the rows of x can be made again, unless it was changed since or nobody knows."""
    recompute: Recompute | None = getattr(x, "_flashnorm_recompute", None)
    if recompute is None and x._base is not None and _same_rows(x, x._base):
        recompute = getattr(x._base, "_flashnorm_recompute", None)
    return recompute if recompute is not None and recompute.version == x._version else None


def _same_rows(view: Tensor, base: Tensor) -> bool:
    """Whether a view has all rows of its base in their order: `z.view(-1, n)`, `z[:, 0:]`."""
    if view.numel() != base.numel() or view.shape[-1:] != base.shape[-1:]:
        return False
    return view.dim() > 0 and view.is_contiguous() and base.is_contiguous()


class Step:
    """A module's forward with a gradient, where it is what was recorded; else None."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.watch = module, Watch(module, modes=False)
        # In which dtypes and modes the module was seen to compute what this does, or not.
        self._seen: dict[tuple[torch.dtype, str, bool], bool] = {}

    def __call__(self, x: Any) -> Tensor | None:
        if not self.useful(x):
            return None
        if reason := self.why_not(x) or self._first(x):
            dispatch.fell_back(reason)
            return None
        return self.run(x)

    def useful(self, x: Any) -> bool:
        """Whether a gradient is wanted that would save more if the module ran by itself."""
        raise NotImplementedError

    def run(self, x: Tensor) -> Tensor:
        """What the module returns, with its gradient."""
        raise NotImplementedError

    def parameters(self) -> Sequence[Tensor | None]:
        """Those that `run` reads itself; KeyError where the module does not hold one any more."""
        raise NotImplementedError

    def why_not(self, x: Tensor) -> str:
        if dispatch.transformed():
            return dispatch.TRANSFORM
        if self.watch.changed():
            return CHANGED
        try:
            held = [p for p in self.parameters() if p is not None]
        except KeyError:
            return GONE
        if tracing_state() is not None or not _PLAIN.issuperset(map(type, (x, *held))):
            return SUBCLASS
        return "" if x.numel() else EMPTY

    def _first(self, x: Tensor) -> str:
        """The first call of its kind is compared with the module's own, on a few rows."""
        kind = (x.dtype, x.device.type, self.module.training)
        if kind not in self._seen:
            few = x[tuple([slice(2)] * (x.dim() - 1))]
            self._seen[kind] = self._agrees(few.detach().clone(memory_format=CONTIGUOUS))
        return "" if self._seen[kind] else RANDOM

    @torch.no_grad()
    def _agrees(self, x: Tensor) -> bool:
        """Same shape and dtype, and values within the roundings of a few operations."""
        apart = torch.random.fork_rng([x.device] if x.is_cuda else [])
        with without_dispatch_modes(), apart, dispatch.forbid_fallback(False):
            before = _random_state(x)
            expected = type(self.module).forward(self.module, x)
            if not torch.equal(before, _random_state(x)):
                return False
            found = self.run(x)
        if expected.shape != found.shape or expected.dtype != found.dtype:
            return False
        return bool((found - expected).abs().max() <= _tolerance(x) * expected.abs().max())


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


# Largest relative difference of two ways to compute a norm or a gated pair and a product behind it:
# a few roundings to the dtype of x, and sums in float32 (Higham and Mary 2019, λ = 4).
ROUNDINGS, CONFIDENCE = 8, 4.0


def _tolerance(x: Tensor) -> float:
    u, u32 = (torch.finfo(dtype).eps / 2 for dtype in (x.dtype, torch.float32))
    return CONFIDENCE * (ROUNDINGS * max(u, u32) + x.shape[-1] ** 0.5 * u32)


_PLAIN = frozenset((Tensor, nn.Parameter))


def _wants(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


class NormStep(Step):
    """z of a norm, recomputed from x and s."""

    def __init__(self, module: nn.Module, norm: Norm) -> None:
        super().__init__(module)
        self.form = autograd.Form(norms.find(norm.kind), norm.eps, norm.offset)
        self.names = norm.names()

    def parameters(self) -> Sequence[Tensor | None]:
        held = self.module._parameters
        return [held[name] if name else None for name in self.names]

    def useful(self, x: Any) -> bool:
        return isinstance(x, Tensor) and (x.requires_grad or _wants(*self.module.parameters()))

    def why_not(self, x: Tensor) -> str:
        return super().why_not(x) or misfit(x.shape[-1:], *self.parameters())

    def run(self, x: Tensor) -> Tensor:
        parameters = self.parameters()
        z, scale, mean = autograd.Norm.apply(self.form, x, *parameters)
        kept = [_own(parameter) for parameter in parameters]
        return attach(z, autograd.Remake(self.form), x, scale, mean, *kept)


def _own(parameter: Tensor | None) -> Tensor | None:
    """A copy of n numbers where `fully_shard` may have freed the parameter of a module by itself.

    It gives memory back between a module's forward and its backward, and the gradient of a reader
    is computed before that of its norm. torch does not say which parameters it does that to.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return parameter.clone() if several and parameter is not None else parameter


class LinearStep(Step):
    """`x Wᵀ + c` for an x that can be recomputed; with `turned` the weight is held as [in, out]."""

    def __init__(self, module: nn.Module, weight: str, bias: str, turned: bool = False) -> None:
        super().__init__(module)
        self.names, self.turned = (weight, bias), turned

    def parameters(self) -> Sequence[Tensor | None]:
        held = self.module._parameters
        return [held[name] if name else None for name in self.names]

    def useful(self, x: Any) -> bool:
        held = self.module._parameters
        return isinstance(x, Tensor) and (x.requires_grad or _wants(*held.values()))

    def run(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters()
        assert weight is not None
        weight = weight.T if self.turned else weight
        if (recompute := recompute_of(x)) is None or not weight.requires_grad:
            return F.linear(x, weight, bias)  # a weight that wants no gradient saves no x
        return autograd.Linear.apply(recompute.make, x, weight, bias, *recompute.sources)


class Half(NamedTuple):
    """Columns `start : start + length` of what a linear module returns."""

    module: nn.Module
    start: int
    length: int
    total: int


class GatedStep(Step):
    """`down(act(gate(x)) ⊙ up(x))` by the modules themselves, whose hooks are called.

    `inner` are the modules that it stands for.
    """

    def __init__(
        self,
        module: nn.Module,
        halves: tuple[Half, Half],
        activation: str,
        down: nn.Module,
        inner: Sequence[Inner],
    ) -> None:
        super().__init__(module)
        self.halves, self.activation, self.down = halves, activation, down
        self.inner = tuple(inner)

    def parameters(self) -> Sequence[Tensor | None]:
        return ()

    def useful(self, x: Any) -> bool:
        return isinstance(x, Tensor) and (x.requires_grad or _wants(*self.module.parameters()))

    def why_not(self, x: Tensor) -> str:
        return super().why_not(x) or ("" if self._intact() else INSIDE)

    def _intact(self) -> bool:
        """Modules that are called here may have hooks; what is between them may not."""
        called = (self.halves[0].module, self.halves[1].module, self.down)
        for owner, name, child, _ in self.inner:
            if owner.get(name) is not child:
                return False
            hooked = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks
            if hooked and child not in called:
                return False
        return True

    def run(self, x: Tensor) -> Tensor:
        gate, up = self.halves
        first = gate.module(x)
        second = first if up.module is gate.module else up.module(x)
        a, b = _columns(first, gate), _columns(second, up)
        hidden = autograd.Gate.apply(self.activation, a, b)
        return self.down(attach(hidden, Regate(self.activation), a, b))


def _columns(y: Tensor, half: Half) -> Tensor:
    return y if half.length == half.total else y[..., half.start : half.start + half.length]


@dataclass(frozen=True)
class Regate:
    """Makes `act(a) ⊙ b` again."""

    activation: str

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return gradient.gated(self.activation, a, b)


class Trained(Stand):
    """A forward that is a step where a gradient is wanted, else what it was before."""

    def __init__(self, step: Step, forward: Callable[..., Any] | None) -> None:
        self.step, self.forward, self.module = step, forward, step.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = len(args) == 1 and not kwargs and not torch.compiler.is_compiling()
        if alone and torch.is_grad_enabled() and (y := self.step(*args)) is not None:
            return y
        return self._before(*args, **kwargs)

    def _before(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward is not None:
            return self.forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)
