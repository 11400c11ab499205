"""Gradients of norm + linear: right, of what is asked for, and from x and its row scales alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashnorm.functional.fused import run
from flashnorm.kernels import autograd, norms, ops, reference
from flashnorm.kernels.call import Call
from flashnorm.verification.bounds import CONFIDENCE, HALF_RATIO, unit_roundoff
from tests.kernels.bounds import STEPS, wide
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, make, random

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, a few thousand roundings at most
FULL = {"gain": True, "norm_bias": True, "bias": True}


def variables(call: Call) -> Call:
    """The same call on tensors of its own that want a gradient."""

    def fresh(value: object) -> object:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_()
        return [fresh(v) for v in value] if isinstance(value, list) else value

    return Call(*[fresh(value) for value in call])


def with_tensors(call: Call, tensors: tuple[Tensor, ...]) -> Call:
    """The call with other tensors in the places of its own."""
    left = list(tensors)

    def replace(value: object) -> object:
        if isinstance(value, Tensor):
            return left.pop(0)
        return [replace(v) for v in value] if isinstance(value, list) else value

    return Call(*[replace(value) for value in call])


def gradients(call: Call, function=run) -> list[Tensor]:
    """Of a sum with random coefficients, by every tensor of the call that wants one."""
    found = function(call)
    grads = [random(*y.shape, dtype=y.dtype, seed=60 + i) for i, y in enumerate(found)]
    wanted = [t for t in call.tensors() if t.requires_grad]
    return list(torch.autograd.grad(found, wanted, grads))


CASES = {
    "readers": make((2, 3, 8), (5, 4), torch.float64, **FULL)._replace(
        biases=[random(5, dtype=torch.float64), None]
    ),
    "residual": make((2, 3, 8), (5,), torch.float64, gain=True, residual=True),
    "bare": make((3, 8), (5,), torch.float64),
    **{
        activation: make((3, 8), (5, 5), torch.float64, **FULL, residual=True)._replace(
            activation=activation
        )
        for activation in EVERY_ACTIVATION
    },
}


def of_norm(call: Call, norm: str) -> Call:
    alpha = torch.tensor([0.4], dtype=call.x.dtype) if norm == "dyt" else None
    return variables(call._replace(norm=norms.find(norm), alpha=alpha))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_differences(name, norm):
    call = of_norm(CASES[name], norm)
    assert torch.autograd.gradcheck(lambda *t: tuple(run(with_tensors(call, t))), call.tensors())


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("name", ["readers", "silu"])
def test_so_are_second_gradients(name, norm):
    call = of_norm(CASES[name], norm)
    assert torch.autograd.gradgradcheck(
        lambda *t: tuple(run(with_tensors(call, t))), call.tensors(), fast_mode=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_no_farther_from_the_truth_than_the_reference(norm, dtype, activation):
    """Over many elements, where errors of one size have norms that hardly differ."""
    call = of_norm(make((96, 64), (48, 48), dtype, **FULL, activation=activation), norm)
    truth = gradients(variables(wide(call)), reference.norm_linear)
    ours, theirs = gradients(call), gradients(call, reference.norm_linear)
    u = unit_roundoff(dtype)
    for found, eager, exact in zip(ours, theirs, truth, strict=True):
        assert found.dtype == dtype
        if found.numel() == 1:  # dα = Σ x dx/α: λ standard deviations of the terms' own roundings
            terms = (truth[0] * wide(call).x / wide(call).alpha).norm()
            assert (found.double() - exact).abs() <= CONFIDENCE * STEPS * u * terms
            continue
        error = (found.double() - exact).norm()
        assert error <= HALF_RATIO * (eager.double() - exact).norm() + u * exact.norm()


def saved_by(function, held: list[Tensor]) -> list[Tensor]:
    """Tensors that autograd keeps, one for each storage, without those of `held`."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        result = function()
    assert result is not None
    places = {t.untyped_storage().data_ptr() for t in held}
    return [t for place, t in kept.items() if place not in places]


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_x_and_numbers_per_row_are_saved(norm, activation):
    rows, dtype = 4, torch.bfloat16
    call = of_norm(make((rows, 64), (48, 48), dtype, **FULL, activation=activation), norm)
    kept = saved_by(lambda: run(call), call.tensors())
    per_row = [torch.float32] * {"rms": 1, "layer": 2}.get(norm, 0)
    assert [t.dtype for t in kept if t.numel() == rows] == per_row
    products = [t for t in kept if t.numel() != rows]
    assert [t.shape for t in products] == [(rows, 48)] * (0 if activation is None else 2)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func._schema.name:
            self.count["mm"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "count"),
    [("x", 2), ("gain", 2), ("norm_bias", 2), ("biases", 0), ("weights", 2), ("all", 4)],
)
def test_nothing_is_computed_that_nobody_asked_for(wanted, count):
    call = make((3, 8), (5, 4), torch.float64, **FULL)
    full = variables(call)
    call = full if wanted == "all" else call._replace(**{wanted: getattr(full, wanted)})
    found = run(call)
    with Products() as products:
        grads = torch.autograd.grad([y.sum() for y in found], call_wanted(call))
    assert products.count["mm"] == count
    for ours, theirs in zip(grads, gradients_of_sums(call), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def call_wanted(call: Call) -> list[Tensor]:
    return [t for t in call.tensors() if t.requires_grad]


def gradients_of_sums(call: Call) -> tuple[Tensor, ...]:
    found = reference.norm_linear(call)
    return torch.autograd.grad([y.sum() for y in found], call_wanted(call))


def test_one_of_two_results_is_enough_and_strides_do_not_matter():
    call = variables(make((6, 8), (5, 4), torch.float64, "layer", **FULL))
    turned = random(5, 6, dtype=torch.float64, seed=2).T
    wanted = [call.x, call.weights[0], call.gain]
    with Products() as products:
        y = run(call)[0]
        forward = products.count["mm"]
        found = torch.autograd.grad(y, wanted, turned)
    assert products.count["mm"] - forward == 2
    expected = torch.autograd.grad(reference.norm_linear(call)[0], wanted, turned)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_rows(norm, dtype):
    call = of_norm(make((2, 0, 8), (5, 5), dtype, **FULL, activation="silu"), norm)
    found = gradients(call)
    assert [g.shape for g in found] == [t.shape for t in call.tensors()]
    assert not any(bool(g.any()) for g in found)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_checkpointed(reentrant, activation):
    call = variables(make((3, 8), (5, 5), torch.float64, **FULL, activation=activation))

    def again(c: Call) -> list[Tensor]:
        x, *rest = c
        return list(checkpoint(lambda x: tuple(run(Call(x, *rest))), x, use_reentrant=reentrant))

    for ours, theirs in zip(gradients_by_backward(call, again), gradients(call), strict=True):
        assert torch.equal(ours, theirs)


def gradients_by_backward(call: Call, function) -> list[Tensor]:
    """Reentrant checkpoints know `backward` only."""
    found = function(call)
    grads = [random(*y.shape, dtype=y.dtype, seed=60 + i) for i, y in enumerate(found)]
    torch.autograd.backward(found, grads)
    return [t.grad for t in call.tensors()]


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("norm", EVERY_NORM)
def test_compiled_as_one_graph_with_the_operation_in_it(norm, activation):
    torch._dynamo.reset()
    call = of_norm(make((3, 8), (5, 5), torch.float32, **FULL, activation=activation), norm)
    graphs = []

    def note(graph, example):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, e: make_boxed_func(note(g, e).forward))
    compiled = torch.compile(
        lambda *t: tuple(run(with_tensors(call, t))), fullgraph=True, backend=backend
    )
    found = gradients(call, lambda c: list(compiled(*c.tensors())))
    assert any(ops.operator in targets for targets in graphs)
    for ours, theirs in zip(found, gradients(call), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_func_inside_of_a_compiled_graph():
    torch._dynamo.reset()
    call = make((3, 8), (5, 5), torch.float64, **FULL)
    loss = lambda x: run(call._replace(x=x))[0].square().sum()  # noqa: E731
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager")
    torch.testing.assert_close(compiled(call.x), torch.func.grad(loss)(call.x))


def test_parts_are_the_whole():
    """A norm and linear layers that make its output again are the operation in one piece."""
    call = variables(make((3, 8), (5, 4), torch.float64, "layer", **FULL))
    form = autograd.Form(call.norm, call.eps, call.gain_offset)

    def parts(c: Call) -> list[Tensor]:
        z, *numbers = autograd.Norm.apply(form, c.x, c.gain, c.norm_bias, None)
        sources = (c.x, *numbers, c.gain, c.norm_bias, None)
        make_again = autograd.Remake(form)
        pairs = zip(c.weights, c.biases, strict=True)
        return [autograd.Linear.apply(make_again, z, w, b, *sources) for w, b in pairs]

    for ours, theirs in zip(gradients(call, parts), gradients(call), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    tensors = tuple(call.tensors())
    assert torch.autograd.gradgradcheck(
        lambda *t: tuple(parts(with_tensors(call, t))), tensors, fast_mode=True
    )
