"""Norm + linear as modules under torch.compile, export, torch.func, autocast, and in threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from flashnorm.kernels import dispatch, ops
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_NORM
from tests.test_nn_fused import (
    BARE,
    FULL,
    KINDS,
    assert_equal_in_float64,
    build,
    call_of,
    given,
    plain,
    results,
)
from tests.test_nn_fused_changes import other_values

# torch.func and torch.export still use what torch would like to be rid of.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind, norm):
    """What it computes follows the parameters, without a gradient and with one."""
    module = build(kind, norm, **FULL)
    run = compiled(module)
    for rows in (2, 5):
        arguments = given(kind, torch.float32, rows)
        for change in (lambda: None, lambda: module.load_state_dict(other_values(module))):
            change()
            with torch.no_grad():
                assert all(map(torch.equal, results(run, *arguments), results(module, *arguments)))
            for y, value in zip(results(run, *arguments), results(module, *arguments), strict=True):
                torch.testing.assert_close(y, value)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_compile(kind):
    module, arguments = build(kind, dtype=torch.float64, **FULL), given(kind, torch.float64)
    found = []
    for run in (module, compiled(module)):
        total = sum(y.square().sum() for y in results(run, *arguments))
        found.append(torch.autograd.grad(total, list(module.parameters())))
    assert_equal_in_float64(*found)


def test_a_compiled_module_sees_new_parameters():
    module, arguments = build("linear", **FULL), given("linear", torch.float32)
    run = compiled(module)
    with torch.no_grad():
        run(*arguments)
        module.load_state_dict(other_values(module), assign=True)
        assert_close(call_of("linear", module, *arguments), [run(*arguments)])
        assert_close(call_of("linear", module.fold_(), *arguments), [run(*arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(kind):
    torch._dynamo.reset()
    module, arguments = build(kind, **FULL), given(kind, torch.float32)
    run = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        assert_close(call_of(kind, module, *arguments), results(run, *arguments))
    sum(y.sum() for y in results(run, *arguments)).backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export_keeps_the_operation_and_the_parameters(kind, strict):
    module, arguments = build(kind, **FULL), given(kind, torch.float32)
    with torch.no_grad():
        program = torch.export.export(module, arguments, strict=strict)
        assert any(node.target is ops.operator for node in program.graph.nodes)
        assert program.state_dict.keys() == module.state_dict().keys()
        assert_close(call_of(kind, module, *arguments), results(program.module(), *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_what_it_is_given(kind):
    module, arguments = build(kind, **FULL), given(kind, torch.float32)
    twin, others = build(kind, **FULL), other_values(module)
    twin.load_state_dict(others)
    with torch.no_grad():
        before = results(module, *arguments)
        expected = results(twin, *arguments)
        for held in (others, dict(twin.named_parameters())):
            found = functional_call(module, held, arguments)
            found = [found] if isinstance(found, torch.Tensor) else found
            assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, results(module, *arguments), before))
        run = compiled(lambda held, *given: functional_call(module, held, given))
        assert all(map(torch.equal, results(run, others, *arguments), expected))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_sample(kind, norm):
    """vmap of grad of functional_call is the gradient of every sample by itself."""
    module, arguments = build(kind, norm, torch.float64, **FULL), given(kind, torch.float64)
    held = {name: p.detach() for name, p in module.named_parameters()}

    def loss(held, *sample):
        found = functional_call(module, held, sample)
        return sum(
            y.square().sum() for y in ([found] if isinstance(found, torch.Tensor) else found)
        )

    together = vmap(grad(loss), (None, *[0] * len(arguments)))(held, *arguments)
    for i in range(2):
        sample = [a[i] for a in arguments]
        total = sum(
            y.square().sum() for y in plain(kind, module, dict(module.named_parameters()), *sample)
        )
        alone = torch.autograd.grad(total, list(module.parameters()))
        assert_equal_in_float64([together[name][i] for name in held], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_forward_derivatives_without_a_gradient(kind, dtype):
    """Where the kernels would do, were it not for the transform."""
    module, arguments = build(kind, dtype=dtype, **FULL), given(kind, dtype)
    with torch.no_grad():
        expected = results(module, *arguments)
        for y, value in zip(results(vmap(module), *arguments), expected, strict=True):
            torch.testing.assert_close(y, value)
    tangents = tuple(torch.ones_like(a) for a in arguments)
    _, moved = jvp(lambda *given: results(module, *given)[0], arguments, tangents)
    assert moved.abs().max() > 0
    module.requires_grad_(False)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(a, t) for a, t in zip(arguments, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(results(module, *dual)[0]).tangent
    torch.testing.assert_close(tangent, moved)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_decides_the_dtype_in_every_mode(kind):
    module, (x, *_) = build(kind, **FULL), given(kind, torch.float32)
    run = compiled(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_gradient = results(module, x)
        with torch.no_grad():
            without, in_a_graph = results(module, x), results(run, x)
    for found in (with_gradient, without, in_a_graph):
        assert {y.dtype for y in found} == {torch.bfloat16}
        assert all(map(torch.equal, found, without))


def test_why_a_transform_falls_back_is_said():
    module, (x, *_) = build("linear", **BARE), given("linear", torch.float32)
    module.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice = dispatch.explain(call_of("linear", module, x))
        module(x)
    assert choice.backend == "reference"
    assert "autocast" in choice.reason
    assert dispatch.fallbacks()[choice.reason] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_several_threads_call_one_module(kind):
    """Each with its own dtype and number of rows, so that each finds what another one packed."""
    module = build(kind, "layer", **FULL)
    given_to = [given(kind, dtype, rows) for dtype in DTYPES for rows in (1, 2, 5)]
    with torch.no_grad():
        expected = [
            dispatch.norm_linear(call_of(kind, module, *arguments)) for arguments in given_to
        ]
    wrong: list[int] = []

    @torch.no_grad()
    def work(i: int) -> None:
        for _ in range(100):
            found = results(module, *given_to[i])
            if not all(map(torch.equal, found, expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given_to))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for arguments, found in zip(given_to, expected, strict=True):
        assert_close(call_of(kind, module, *arguments), found, fused=False)
