"""Norm + linear as modules: values, gradients and folds."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.errors import FoldError
from flashnorm.kernels import dispatch, norms, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.nn import NormGLU, NormLinear, NormLinears
from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff
from tests.kernels.bounds import STEPS, assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, compiled, random

N = 33
KINDS = {
    "linear": lambda **options: NormLinear(N, 7, **options),
    "linears": lambda **options: NormLinears(N, (9, 2, 5), **options),
    "glu": lambda **options: NormGLU(N, 6, **options),
}
BARE = {"gain": False}
FULL = {"gain": True, "gain_offset": 1.0, "norm_bias": True, "bias": True}


def build(kind: str, norm: str = "rms", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """No parameter is left as it begins."""
    options = {"gain": True, **options}
    module = KINDS[kind](norm=norm, eps=1e-3, dtype=dtype, **options)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            scale = N**-0.5 if parameter.dim() == 2 else 0.7
            parameter.copy_(random(*parameter.shape, dtype=torch.float64, seed=i) * scale)
    return module


def given(kind: str, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, ...]:
    """x and, where the module takes one, a residual."""
    x = random(2, rows, N, dtype=dtype, scale=2, seed=50) + 0.7
    k = {"linear": 7, "glu": 6}.get(kind)
    return (x,) if k is None else (x, random(2, rows, k, dtype=dtype, seed=51))


def results(module: nn.Module, *arguments: Tensor) -> list[Tensor]:
    found = module(*arguments)
    return [found] if isinstance(found, Tensor) else list(found)


def parameters(kind: str, held: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    names = {"linear": [""], "linears": ["_0", "_1", "_2"], "glu": ["gate_", "up_"]}[kind]
    pairs = [
        (f"{s}weight", f"{s}bias") if s[-1:] == "_" else (f"weight{s}", f"bias{s}") for s in names
    ]
    return [held[w] for w, _ in pairs], [held.get(c) for _, c in pairs]


def call_of(kind: str, module: nn.Module, *arguments: Tensor) -> Call:
    """The module as the arguments of one operation, by the names of its parameters."""
    held = {name: p.detach() for name, p in module.named_parameters()}
    x, *residual = arguments
    return Call(
        x,
        *parameters(kind, held),
        norms.find(module.norm),
        module.eps,
        held.get("gain"),
        module.gain_offset,
        held.get("norm_bias"),
        held.get("alpha"),
        module.activation,
        *residual,
    )


def plain(kind: str, module: nn.Module, held: dict[str, Tensor], x: Tensor, *residual: Tensor):
    """The formula in torch's own functions."""
    formulas = {
        "rms": lambda: F.rms_norm(x, (N,), None, module.eps),
        "layer": lambda: F.layer_norm(x, (N,), None, None, module.eps),
        "dyt": lambda: torch.tanh(held["alpha"] * x),
        "none": lambda: x,
    }
    z = formulas[module.norm]()
    z = z * (module.gain_offset + held["gain"]) if "gain" in held else z
    z = z + held["norm_bias"] if "norm_bias" in held else z
    made = [F.linear(z, w, c) for w, c in zip(*parameters(kind, held), strict=True)]
    if kind == "glu":
        made = [reference.ACTIVATIONS[module.activation](made[0]) * made[1]]
    return [made[0] + residual[0]] if residual else made


def assert_equal_in_float64(found, expected) -> None:
    for y, value in zip(found, expected, strict=True):
        limit = 2 * CONFIDENCE * STEPS * sqrt(N) * unit_roundoff(torch.float64)
        assert y.dtype == torch.float64
        assert (y - value).abs().max() <= limit * value.abs().max()


@pytest.mark.parametrize("options", [BARE, FULL], ids=["bare", "full"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_operation(kind, norm, dtype, options):
    """Few rows (the fused kernel) and many (torch's matmul), with and without a gradient."""
    module = build(kind, norm, dtype, **options)
    for rows in (0, 1, 3, 40):
        arguments = given(kind, dtype, rows)
        call = call_of(kind, module, *arguments)
        with torch.no_grad():
            for _ in range(2):
                assert_close(call, results(module, *arguments), fused=rows < 4)
        if dtype == torch.float32:  # in half precision an eager model rounds in other places
            assert_close(call, [y.detach() for y in results(module, *arguments)], fused=False)
        if dtype == torch.float64 and rows:
            expected = plain(kind, module, dict(module.named_parameters()), *arguments)
            assert_equal_in_float64(results(module, *arguments), expected)


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_activations(activation):
    module = build("glu", activation=activation, **FULL)
    arguments = given("glu", torch.float32)
    with torch.no_grad():
        assert_close(call_of("glu", module, *arguments), results(module, *arguments))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_the_kernels_and_packs_once(kind, dtype, monkeypatch):
    module, arguments = build(kind, dtype=dtype, **FULL), given(kind, dtype)
    module.requires_grad_(False)
    with dispatch.forbid_fallback():
        first = results(module, *arguments)
        monkeypatch.setattr(cpu, "pack", None)
        assert all(map(torch.equal, results(module, *arguments), first))


@pytest.mark.parametrize("options", [BARE, FULL], ids=["bare", "full"])
@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind, norm, options):
    module = build(kind, norm, torch.float64, **options)
    arguments = [a.requires_grad_() for a in given(kind, torch.float64)]
    held = dict(module.named_parameters())
    wanted = [*arguments, *held.values()]
    sums = [
        sum((y * random(*y.shape, dtype=y.dtype, seed=9)).sum() for y in made)
        for made in (results(module, *arguments), plain(kind, module, held, *arguments))
    ]
    found, expected = (torch.autograd.grad(total, wanted) for total in sums)
    for y, value in zip(found, expected, strict=True):
        # A gradient is a sum over the rows, or over what a normalized row takes from itself.
        limit = 8 * CONFIDENCE * STEPS * sqrt(N) * unit_roundoff(torch.float64)
        assert (y - value).abs().max() <= limit * value.abs().max()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind, norm):
    module = build(kind, norm, torch.float64, **FULL)
    names, values = zip(*module.named_parameters(), strict=True)
    arguments = given(kind, torch.float64, rows=1)

    def run(*tensors: Tensor):
        held = dict(zip(names, tensors[len(arguments) :], strict=True))
        return torch.func.functional_call(module, held, tensors[: len(arguments)])

    wanted = [t.detach().clone().requires_grad_() for t in (*arguments, *values)]
    assert torch.autograd.gradcheck(run, wanted, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_changes_nothing_in_float64(kind, norm, offset):
    for bias in (False, True):
        options = FULL | {"gain_offset": offset, "bias": bias}
        module, arguments = build(kind, norm, torch.float64, **options), given(kind, torch.float64)
        expected = results(module, *arguments)
        assert module.fold_() is module
        assert module.gain is None
        assert module.norm_bias is None
        assert_equal_in_float64(results(module, *arguments), expected)
        assert {name for name in module.state_dict() if "bias" in name} == {
            bias for _, bias in module.readers
        }
        again = {name: value.clone() for name, value in module.state_dict().items()}
        assert all(torch.equal(v, again[k]) for k, v in module.fold_().state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_folded_weight_is_rounded_once(dtype):
    module = build("linear", dtype=dtype)
    weight, gain = module.weight.detach().double(), module.gain.detach().double()
    assert torch.equal(module.fold_().weight, (weight * gain).to(dtype))
    assert module.bias is None


@pytest.mark.parametrize("broken", ["gain", "norm_bias"])
def test_a_fold_that_overflows_writes_nothing(broken):
    module = build("linears", dtype=torch.float16, **FULL)
    with torch.no_grad():
        getattr(module, broken)[3] = 60_000
        module.weight_2[0, 3] = 2
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FoldError, match=r"overflows|no finite torch\.float16"):
        module.fold_()
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_begins_as_nn_linear_behind_a_norm_that_only_scales():
    torch.manual_seed(3)
    linear = nn.Linear(N, 7)
    torch.manual_seed(3)
    module = NormLinear(N, 7, bias=True, gain=True, gain_offset=1.0, norm_bias=True)
    assert torch.equal(module.weight, linear.weight)
    assert torch.equal(module.bias, linear.bias)
    assert not module.gain.any()
    assert not module.norm_bias.any()
    x = given("linear", torch.float32)[0]
    expected = linear(F.rms_norm(x, (N,), eps=1e-6))
    torch.testing.assert_close(module(x), expected)
    assert NormLinear(N, 7, norm="dyt", alpha=0.3).alpha.tolist() == [pytest.approx(0.3)]
    assert {p.device.type for p in NormGLU(N, 7, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_without_being_asked_the_norm_has_no_parameters(kind):
    module = KINDS[kind]()
    assert module.gain is None
    assert module.norm_bias is None
    assert all(p.dim() == 2 for p in module.parameters())


def test_says_what_it_is():
    text = str(nn.Sequential(build("glu", "layer", **FULL)))
    assert "NormGLU(33, 6, activation='silu', norm='layer', eps=0.001, gain_offset=1.0" in text
    assert "NormLinears(33, (9, 2, 5), norm='rms'" in str(build("linears"))
    assert "gain=False, norm_bias=False, bias=False" in str(build("linear", **BARE))


def test_each_reader_may_have_a_bias():
    module = NormLinears(N, (3, 4), bias=(True, False))
    assert module.bias_0 is not None
    assert module.bias_1 is None


WRONG = {
    "norm": (
        lambda: NormLinear(4, 4, norm="batch"),
        "norm is 'batch'; it must be one of none, rms",
    ),
    "act": (lambda: NormGLU(4, 4, activation="elu"), "activation is 'elu'; it must be one of iden"),
    "bias": (lambda: NormLinears(4, (4, 4), bias=[True]), "1 answers in bias for 2 readers"),
    "x": (lambda: build("linear")(torch.ones(2, 5)), r"a weight is \[7, 33\]; x has 5 features"),
    "residual": (
        lambda: build("glu")(torch.ones(2, N), torch.ones(2, 5)),
        r"residual is \[2, 5\]; the result is \[2, 6\]",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(wrong, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        wrong()
