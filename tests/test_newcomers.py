"""A new norm kind and a new weight format: each is one file and a registration."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from flashnorm import functional
from flashnorm.functional.prepared import BoundCalls
from flashnorm.kernels import dispatch, norms, weights
from flashnorm.kernels.call import Call
from flashnorm.nn import NormGLU, NormLinear
from tests.errors import relative, rounding
from tests.kernels.cases import EVERY_NORM, random
from tests.toys import mean_norm, sign_weights

ROOT = Path(__file__).parents[1]
EPS = 1e-3


@pytest.fixture
def mean():
    yield norms.register(mean_norm.MEAN).name
    del norms.KINDS["absmean"]


@pytest.fixture
def signs():
    yield weights.register(sign_weights.SIGNS)
    del weights.FORMATS["signs"]


def formula(x, weight, bias, gain, norm_bias):
    z = x / (x.abs().mean(-1, keepdim=True) + EPS)
    return F.linear(z * (1 + gain) + norm_bias, weight, bias)


def arguments(dtype, grad=False):
    shapes = [(2, 3, 16), (5, 16), (5,), (16,), (16,)]
    made = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return [tensor.requires_grad_(grad) for tensor in made]


def fused(x, weight, bias, gain, norm_bias):
    return functional.norm_linear(
        x, weight, bias, norm="absmean", eps=EPS, gain=gain, gain_offset=1.0, norm_bias=norm_bias
    )


def exact(found, expected, depth):
    """Within what roundings of float64 explain: sums of 16 products, `depth` steps in a row."""
    assert found.dtype == torch.float64
    assert relative(found, expected) <= rounding(16, depth)


def test_a_new_norm_is_computed(mean):
    given = arguments(torch.float64)
    exact(fused(*given), formula(*given), 2)  # a norm and a product


def test_a_new_norm_has_its_gradients(mean):
    given = arguments(torch.float64, grad=True)
    assert torch.autograd.gradcheck(fused, given)
    expected = torch.autograd.grad(formula(*given).square().sum(), given)
    found = torch.autograd.grad(fused(*given).square().sum(), given)
    for one, other in zip(found, expected, strict=True):
        exact(one, other, 6)  # a norm and a product, their gradients, and a square


def test_a_new_norm_says_why_no_kernel_runs_it(mean):
    x, weight, *_ = arguments(torch.float32)
    choice = functional.explain(x, weight, norm="absmean")
    assert choice == dispatch.Choice("reference", "the kernels do not know the norm 'absmean'")


def test_a_new_norm_is_compiled(mean):
    given = arguments(torch.float32)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*given), fused(*given))


@pytest.mark.parametrize(
    "module",
    [lambda **o: NormLinear(16, 5, **o), lambda **o: NormGLU(16, 5, **o)],
    ids=["linear", "glu"],
)
def test_a_new_norm_has_modules(mean, module):
    torch.manual_seed(0)
    made = module(norm="absmean", eps=EPS, gain=True, norm_bias=True, dtype=torch.float64)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    x = random(4, 16, dtype=torch.float64)
    expected = made(x)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), expected)
    exact(made.fold_()(x), expected, 4)  # the fold, a norm, a product and a gate


def test_a_new_norm_is_not_quantized_by_the_formulas_of_others(mean):
    x, weight, *_ = arguments(torch.bfloat16)
    with pytest.raises(functional.scaled.FlashNormError, match="behind the norm 'absmean'"):
        functional.scaled_norm_linear(x, functional.quantize_weight(weight), norm="absmean")


def test_a_name_is_taken_once(mean, signs):
    with pytest.raises(ValueError, match="there is a norm 'absmean' already"):
        norms.register(norms.NormKind("absmean"))
    with pytest.raises(ValueError, match="there is a weight format 'signs' already"):
        weights.register(weights.WeightFormat("signs", sign_weights.dequantize))
    with pytest.raises(ValueError, match="norm is 'max'; it must be one of none, rms, layer"):
        norms.find("max")


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_weight_is_multiplied_as_what_it_stands_for(signs, norm, dtype):
    x, weight, bias, gain, _ = arguments(dtype)
    packed = sign_weights.quantize(weight)
    assert packed.values.nbytes == 5 * 2
    options = {"norm": norm, "gain": gain, "eps": EPS}
    expected = functional.norm_linear(
        x.double(), packed.dequantized(), bias.double(), norm=norm, gain=gain.double(), eps=EPS
    )
    found = functional.norm_linear(x, packed, bias, **options)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=_bound(dtype, expected))
    several = functional.norm_linears(x, [packed, packed], [bias, None], **options)
    assert torch.equal(several[0], found)


def _bound(dtype, expected):
    """A few roundings to the dtype, and sums of 16 numbers."""
    return 8 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_a_new_weight_says_why_no_kernel_runs_it(signs):
    x, weight, *_ = arguments(torch.float32)
    choice = functional.explain(x, sign_weights.quantize(weight))
    assert choice.reason == "the kernels do not know weights in the format 'signs'"


def test_a_new_weight_lets_gradients_through_to_x(signs):
    x, weight, bias, gain, _ = arguments(torch.float64)
    packed = sign_weights.quantize(weight)
    x.requires_grad_()
    found = functional.norm_linear(x, packed, bias, gain=gain).square().sum()
    expected = functional.norm_linear(x, packed.dequantized(), bias, gain=gain).square().sum()
    (one,), (other,) = (torch.autograd.grad(y, x) for y in (found, expected))
    exact(one, other, 6)


def test_a_weight_in_another_format_is_not_taken_for_the_dense_one_in_its_memory():
    """What is kept for the parameters of the call before goes by where they lie."""
    x, weight, *_ = arguments(torch.float32)
    doubled = weights.WeightFormat("doubled", lambda w: 2 * w.values.double())
    other, run = weights.Weight(weight, doubled, weight, *weight.shape), BoundCalls()
    with torch.no_grad():
        for given, factor in ((weight, 1), (other, 2), (weight, 1)):
            found = run(Call(x, [given]))[0].double()
            truth = factor * functional.norm_linear(x.double(), weight.double())
            assert relative(found, truth) <= rounding(16, 2, torch.float32)


def test_a_new_weight_is_copied_and_pickled_with_its_format(signs):
    weight = sign_weights.quantize(arguments(torch.float32)[1])
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert twin.format is sign_weights.SIGNS
        assert torch.equal(twin.dequantized(), weight.dequantized())


def test_rows_of_int8_and_fp8_are_weights_like_others():
    x, weight, bias, *_ = arguments(torch.bfloat16)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        quantized = functional.quantize_weight(weight, dtype)
        truth = functional.norm_linear(x.double(), quantized.dequantized(), bias.double())
        found = functional.norm_linear(x, quantized, bias).double()
        torch.testing.assert_close(found, truth, rtol=0, atol=_bound(torch.bfloat16, truth))


@pytest.mark.parametrize("name", ["mean_norm", "sign_weights", "numpy_backend"])
def test_no_other_file_had_to_change(name, capsys):
    """The package does not know the newcomer: the file that brings it is the only one."""
    said = subprocess.run(
        [sys.executable, "-m", "tests.toys.files", name],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert said.splitlines() == [f"tests/toys/{name}.py"]
