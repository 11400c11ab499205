"""Who runs a call and why, what is said when nobody fast can, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import flashnorm
from flashnorm import functional
from flashnorm.errors import FlashNormError
from flashnorm.functional import Prepared
from flashnorm.kernels import dispatch, norms, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu import library
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close, wide
from tests.kernels.cases import make

CALL = make((2, 3, 16), (5,), torch.float32, gain=True)


@cases.compiled
def test_an_ordinary_call_runs_on_the_kernels():
    choice = dispatch.explain(CALL)
    assert choice.backend == "cpu"
    assert "kernels on" in choice.reason


REFUSED = {
    "float64": (wide(CALL), "x is torch.float64"),
    "meta": (CALL._replace(x=CALL.x.to("meta")), "x is on meta"),
    "weight": (CALL._replace(weights=[torch.randn(5, 32)[:, ::2]]), "rows are not dense"),
    "quantized": (CALL._replace(weights=[torch.ones(5, 16, dtype=torch.int8)]), "torch.int8"),
    "residual": (
        CALL._replace(output_residual=torch.ones(2, 3, 5).bfloat16()),
        "residual is not like x",
    ),
    "bias": (CALL._replace(biases=[torch.ones(5).half()]), "bias is not of its weight's dtype"),
    "gain": (CALL._replace(gain=torch.ones(16).double()), "gain is not of the kernels' dtypes"),
}


@cases.compiled
@pytest.mark.parametrize(("call", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_refuse_runs_on_the_reference(call, reason):
    choice = dispatch.explain(call)
    assert choice.backend == "reference"
    assert reason in choice.reason
    if call.weights[0].is_floating_point() and not call.x.is_meta:
        before = dispatch.fallbacks().get(choice.reason, 0)
        assert torch.equal(dispatch.norm_linear(call)[0], reference.norm_linear(call)[0])
        assert dispatch.fallbacks()[choice.reason] == before + 1
    with dispatch.forbid_fallback(), pytest.raises(FlashNormError, match="which is forbidden"):
        dispatch.norm_linear(call)


def test_without_a_library_all_is_still_there(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "PATH", tmp_path / "_cpu.so")
    library.load.cache_clear()
    try:
        usable, said = cpu.available()
        assert not usable
        assert "installed without compiled kernels; reinstall flashnorm with a C++17" in said
        assert dispatch.explain(CALL) == dispatch.Choice("reference", said)
        assert torch.equal(dispatch.norm_linear(CALL)[0], reference.norm_linear(CALL)[0])
        (tmp_path / "_cpu.so").write_bytes(b"not a library")
        library.load.cache_clear()
        assert "the compiled kernels do not load" in cpu.available()[1]
    finally:
        library.load.cache_clear()


@cases.compiled
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(FlashNormError, match="no 'sse9' kernels in this build or CPU; it has"):
        use_isa("sse9").__enter__()


WRONG = {
    "width": (CALL._replace(weights=[torch.ones(5, 15)]), r"a weight is \[5, 15\]; x has 16"),
    "biases": (CALL._replace(biases=[]), "0 biases for 1 weights"),
    "bias": (CALL._replace(biases=[torch.ones(4)]), r"a bias is \[4\]; its weight has 5 rows"),
    "gain": (CALL._replace(gain=torch.ones(5)), r"gain is \[5\]; it must be \[16\]"),
    "norm_bias": (CALL._replace(norm_bias=torch.ones(1)), r"norm_bias is \[1\]; it must be \[16\]"),
    "alpha": (CALL._replace(alpha=torch.ones(2)), r"alpha is \[2\]; it must be one number"),
    "act": (CALL._replace(activation="tanh"), "activation is 'tanh'; it must be one of identity"),
    "glu": (CALL._replace(activation="silu"), "a GLU needs two weights of one shape"),
    "residual": (
        CALL._replace(output_residual=torch.ones(5)),
        r"residual is \[5\]; the result is \[2, 3",
    ),
    "results": (
        CALL._replace(weights=CALL.weights * 2, output_residual=torch.ones(2, 3, 5)),
        "a residual can be added to one result only",
    ),
}


def test_a_norm_that_there_is_not():
    with pytest.raises(ValueError, match="norm is 'batch'; it must be one of none, rms"):
        functional.norm_linear(CALL.x, CALL.weights[0], norm="batch")


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        dispatch.norm_linear(call)


def test_a_gradient_flows_and_is_explained_as_its_forward():
    x = CALL.x.clone().requires_grad_()
    assert dispatch.explain(CALL._replace(x=x)) == dispatch.explain(CALL)
    functional.norm_linear(x, CALL.weights[0], gain=CALL.gain).sum().backward()
    y = CALL.x.clone().requires_grad_()
    F.linear(F.rms_norm(y, (16,), CALL.gain, 1e-6), CALL.weights[0]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_whoever_asks_for_a_backend_with_a_gradient_gets_the_reference():
    """`functional` and the operation take the gradient upon themselves; backends have none."""
    call = CALL._replace(x=CALL.x.clone().requires_grad_())
    assert torch.equal(dispatch.norm_linear(call)[0], reference.norm_linear(call)[0])
    with dispatch.forbid_fallback(), pytest.raises(FlashNormError, match="a gradient is wanted"):
        dispatch.norm_linear(call)


def test_the_functions_are_the_operation():
    x, w, g = CALL.x, CALL.weights[0], CALL.gain
    up, b, r = (
        make((1, 16), (5, 5), torch.float32).weights[1],
        torch.randn(16),
        torch.randn(2, 3, 5),
    )
    c, alpha = torch.randn(5), torch.tensor([0.3])
    options = {"gain": g, "gain_offset": 1.0}
    functions = {
        functional.rms_norm_linear(x, w, c, **options, residual=r): Call(
            x, [w], [c], norms.RMS, 1e-6, g, 1.0, output_residual=r
        ),
        functional.layer_norm_linear(x, w, c, **options, norm_bias=b, residual=r): Call(
            x, [w], [c], norms.LAYER, 1e-5, g, 1.0, b, output_residual=r
        ),
        functional.dyt_linear(x, w, c, alpha, gain=g, norm_bias=b, residual=r): Call(
            x, [w], [c], norms.DYT, 0.0, g, 0.0, b, alpha, output_residual=r
        ),
        functional.norm_linear(x, w, c, norm="layer", eps=0.1, **options): Call(
            x, [w], [c], norms.LAYER, 0.1, g, 1.0
        ),
        functional.norm_glu(x, w, up, c, None, activation="gelu", **options, residual=r): Call(
            x, [w, up], [c, None], norms.RMS, 1e-6, g, 1.0, activation="gelu", output_residual=r
        ),
    }
    for found, call in functions.items():
        assert_close(call, [found])
    call = Call(x, [w, up], [c, None], norms.RMS, 1e-6, g, 1.0, b)
    assert_close(call, functional.norm_linears(x, [w, up], [c, None], **options, norm_bias=b))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_prepared_is_the_function(rows):
    call = make((rows, 33), (7,), torch.bfloat16, "layer", gain=True, bias=True, residual=True)
    x, weights, biases, *_ = call
    options = {name: getattr(call, name) for name in ("eps", "gain", "gain_offset")}
    prepared = Prepared(weights, biases, norm=call.norm.name, **options)
    with torch.no_grad():
        expected = dispatch.norm_linear(call)[0]
        for _ in range(2):
            assert torch.equal(prepared(x, call.output_residual)[0], expected)
        wider = prepared(x.float(), call.output_residual.float())[0]
        assert_close(
            call._replace(x=x.float(), output_residual=call.output_residual.float()), [wider]
        )
        assert torch.equal(prepared(x, call.output_residual)[0], expected)
        weights[0].data = weights[0].data.clone() * 2
        doubled = call._replace(weights=[weights[0]])
        assert torch.equal(prepared(x, call.output_residual)[0], dispatch.norm_linear(doubled)[0])
    with pytest.raises(ValueError, match="residual is"):
        prepared(x, call.output_residual[:, :1])
    with pytest.raises(ValueError, match="x has 32 features"):
        prepared(x[:, :32])
    assert torch.equal(copy.deepcopy(prepared)(x)[0], prepared(x)[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_of_any_device_keeps_torchs_operations(device):
    torch.set_autocast_enabled(device, True)
    try:
        assert dispatch.explain(CALL) == dispatch.Choice("reference", dispatch.TRANSFORM)
    finally:
        torch.set_autocast_enabled(device, False)


@cases.compiled
def test_explain_takes_the_arguments_of_the_operation():
    x, weights, biases, *rest = make((3, 16), (5, 5), torch.float32, "layer", gain=True, bias=True)
    eps, gain, offset = rest[1:4]
    options = {"norm": "layer", "eps": eps, "gain": gain, "gain_offset": offset}
    assert flashnorm.explain(x, *weights, biases=biases, **options).backend == "cpu"
    assert flashnorm.explain(x, *weights, activation="silu").backend == "cpu"
    with pytest.raises(ValueError, match="a GLU needs two weights of one shape"):
        flashnorm.explain(x, weights[0], activation="silu")
