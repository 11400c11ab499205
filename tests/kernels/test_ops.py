"""The operation under torch's dispatcher: opcheck, torch.compile, tracers and modes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashnorm import functional
from flashnorm.functional import Prepared
from flashnorm.kernels import dispatch, ops, reference
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, make

# opcheck and this file still cover torch.jit, which torch would like to be rid of.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CALLS = {
    "rms": make((2, 3, 16), (5,), torch.float32, gain=True, residual=True),
    "readers": make((1, 16), (5, 7), torch.bfloat16, "layer", bias=True, norm_bias=True),
    "glu": make((4, 16), (6, 6), torch.float16, "dyt", activation="silu"),
    "float64": make((4, 16), (6, 6), torch.float64, activation="gelu"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_opcheck(call):
    x, weights, biases, norm, *rest = call
    biases = biases or [None] * len(weights)
    torch.library.opcheck(ops.operator, (x, weights, biases, norm.name, *rest))


def network(x, w, gate, up, gain, residual):
    x = functional.rms_norm_linear(x, w, gain=gain, gain_offset=1.0, residual=residual)
    x = functional.norm_glu(x, gate, up, norm="layer")
    return functional.norm_linears(x, [w[:, : gate.shape[0]].contiguous(), gate[:, :9]])


def arguments(dtype, rows=2):
    call = make((rows, 12), (12,), dtype, gain=True, residual=True)
    gate, up = make((1, 12), (9, 9), dtype).weights
    return call.x, call.weights[0], gate, up, call.gain, call.output_residual


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_compiles_as_one_graph(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 5):
        given = arguments(dtype, rows)
        for found, expected in zip(compiled(*given), network(*given), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.slow
def test_inductor_runs_the_registered_operation():
    torch._dynamo.reset()
    given = arguments(torch.float32)
    found, expected = torch.compile(network, fullgraph=True)(*given), network(*given)
    torch.testing.assert_close(found, expected)


def test_prepared_compiles_as_one_graph():
    torch._dynamo.reset()
    x, w, *_, residual = arguments(torch.float32)
    prepared = Prepared([w], eps=1e-3)
    compiled = torch.compile(lambda *args: prepared(*args)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, residual), prepared(x, residual)[0])


def test_gradients_under_compile():
    torch._dynamo.reset()

    def loss(x, w):
        return functional.rms_norm_linear(x, w).square().sum()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, w = (tensor.clone().requires_grad_() for tensor in arguments(torch.float32)[:2])
        f(x, w).backward()
        grads.append((x.grad, w.grad))
    torch.testing.assert_close(*grads)


def test_the_operation_itself_has_a_gradient():
    call = CALLS["rms"]
    grads = []
    for function in (ops.run, reference.norm_linear):
        x = call.x.clone().requires_grad_()
        function(call._replace(x=x))[0].square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_one_operation():
    x, w, *_ = arguments(torch.float32)
    prepared = Prepared([w])
    for f in (lambda: functional.rms_norm_linear(x, w), lambda: prepared(x)[0]):
        with Recorder() as recorder:
            found = f()
        assert recorder.seen[0] == "flashnorm.norm_linear.default"
        assert torch.equal(found, functional.rms_norm_linear(x, w))


def test_fake_tensors_and_jit_tracing():
    x, w, *_ = arguments(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = functional.rms_norm_linear(mode.from_tensor(x), mode.from_tensor(w))
        assert functional.rms_norm_linear(x, w).shape == fake.shape == (2, 12)
    traced = torch.jit.trace(functional.rms_norm_linear, (x, w))
    found, expected = traced(x * 2 + 1, w), functional.rms_norm_linear(x * 2 + 1, w)
    torch.testing.assert_close(found, expected)


def test_export_keeps_the_operation():
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(arguments(torch.float32)[1])

        def forward(self, x):
            return functional.rms_norm_linear(x, self.weight)

    x = arguments(torch.float32)[0]
    with torch.no_grad():
        program = torch.export.export(Block(), (x,))
    assert any(node.target is ops.operator for node in program.graph.nodes)
    assert dispatch.explain(CALLS["rms"]).backend in {"cpu", "reference"}
    with torch.no_grad():
        assert_close(make((2, 12), (12,), torch.float32)._replace(eps=1e-6), [program.module()(x)])
