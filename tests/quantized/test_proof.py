"""A layout that says anything else than its module computes is found, whatever it gets wrong."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from flashnorm.graph.packed import named, twin_of
from flashnorm.kernels.weights import dense
from flashnorm.quantized import layout, proof
from flashnorm.runtime.packed import Proven
from tests.quantized.models import ORIGINS, N, toy

HALF = 2  # numbers in a byte


def swapped(weight):
    """The two halves of every byte exchanged."""
    b = weight.values.view(torch.uint8)
    return weight._replace(values=((b >> 4) | (b << 4)).view(weight.values.dtype))


def moved(weight, by=1):
    """Every number one place further."""
    return weight._replace(values=weight.values.roll(by, -1))


def upside_down(weight):
    return weight._replace(values=weight.values.flip(0).contiguous())


def scaled(weight, factor=1 + 2**-5):
    return weight._replace(scales=weight.scales * factor)


def other_scales(weight):
    return weight._replace(scales=weight.scales.roll(1, 0))


def other_groups(weight):
    return weight._replace(scales=weight.scales.roll(1, 1))


def higher(weight):
    """Zero points one off."""
    found = 8 if weight.format.name.startswith("int4") else 0
    zeros = torch.full_like(weight.scales, found) if weight.zeros is None else weight.zeros
    return weight._replace(zeros=zeros + 1)


def other_zeros(weight):
    return weight._replace(zeros=weight.zeros.roll(1, 0))


def other_table(weight):
    return weight._replace(table=weight.table.flip(0))


def mutants(weight):
    """The mistakes that a layout of this format could make."""
    yield from (moved, upside_down, scaled, other_scales)
    if weight.format.name in ("codebook4", "int4-groups"):
        yield swapped
    if weight.scales.shape[1] > 1:
        yield other_groups
    if weight.format.name not in ("codebook4", "fp8-rows", "int8-rows"):
        yield higher
    if weight.zeros is not None:
        yield other_zeros
    if weight.table is not None:
        yield other_table


def asked(origin, dtype):
    """(module, held, weight, bias, why_not of a weight and a bias)."""
    module = ORIGINS[origin](toy(dtype)).out
    held = layout.find(module)
    weight, bias = held.read(module), named(module, held.bias)

    def own(x):
        twin = twin_of(module)
        return (held.own or type(twin).forward)(twin, x)

    return held, weight, bias, partial(proof.why_not, forward=own, dtype=dtype)


def dtypes(origin):
    return [torch.float16] if origin == "awq" else [torch.float32, torch.bfloat16]


CASES = [(origin, dtype) for origin in ORIGINS for dtype in dtypes(origin)]


@pytest.mark.parametrize(("origin", "dtype"), CASES)
def test_what_a_layout_says_holds_and_every_mutant_is_found(origin, dtype):
    held, weight, bias, why_not = asked(origin, dtype)
    why_not = partial(why_not, coarse=dtype, rounds=held.rounds)
    assert why_not(weight, bias) == ""
    for mutant in mutants(weight):
        assert "is not what its packed weight says" in why_not(mutant(weight), bias), mutant
    assert "is not what" in why_not(weight, None)
    assert "is not what" in why_not(weight, bias.roll(1))


def exact(weight, x):
    return F.linear(x, dense(weight, x.dtype))


def rounded_rows(weight, x):
    """x quantized to 8 bits row by row first, as dynamic quantization does."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return exact(weight, (x / scale).round() * scale)


OTHERS = {
    "quantizes x": (rounded_rows, "is not what"),
    "an activation": (lambda w, x: exact(w, x).relu(), "is not what"),
    "half of it": (lambda w, x: exact(w, x) / 2, "is not what"),
    "a NaN": (lambda w, x: exact(w, x).index_fill(1, torch.tensor([3]), torch.nan), "is not what"),
    "another dtype": (lambda w, x: exact(w, x).double(), "returns"),
    "another shape": (lambda w, x: exact(w, x)[:, :-1], "returns"),
    "does not run": (lambda w, x: x @ x, "does not run in torch.float32 (RuntimeError"),
    "one row otherwise": (lambda w, x: exact(w, x) * (1 + (len(x) == 1)), "is not what"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_code_is_no_product(case):
    forward, reason = OTHERS[case]
    weight = asked("gptq", torch.float32)[1]
    assert proof.why_not(weight, None, partial(exact, weight), torch.float32) == ""
    assert reason in proof.why_not(weight, None, partial(forward, weight), torch.float32)


@pytest.mark.parametrize("origin", ["bitsandbytes nf4", "torchao int8", "gptq"])
def test_a_proof_leaves_the_module_as_it_was(origin):
    module = ORIGINS[origin](toy()).q
    held = layout.find(module)
    before = [(t.data_ptr(), layout.version(t), t.clone()) for t in held.tensors(module)]
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    packed = Proven((torch.float32, torch.bfloat16)).packed(
        module, held, frozenset({torch.float32})
    )
    assert packed.dtypes[torch.float32] == ""
    for (place, count, values), now in zip(before, held.tensors(module), strict=True):
        assert (now.data_ptr(), layout.version(now)) == (place, count)
        assert torch.equal(now, values)
    assert plain == {n: value for n, value in vars(module).items() if not n.startswith("_")}


def test_wide_layers_are_looked_at_in_stretches():
    found = proof._stretches(4 * proof.OUTPUTS + 8)
    assert found[0] == (0, proof.OUTPUTS)
    assert sum(found[-1]) == 4 * proof.OUTPUTS + 8
    assert all(start % proof.EACH == 0 for start, _ in found)
    assert proof._stretches(N) == [(0, N)]
