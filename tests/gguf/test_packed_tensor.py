"""A packed weight is the tensor of its numbers, in every operation, or says why it is not."""

from __future__ import annotations

import copy
import io
import pickle
from fractions import Fraction
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import flashnorm
from flashnorm.errors import FlashNormError
from flashnorm.kernels.formats.blocks import BLOCKS
from flashnorm.quantized import decoding, layout
from flashnorm.quantized.ggml import PLAIN, kind, scale_places
from flashnorm.quantized.packed_tensor import PackedTensor, rebuilt
from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff
from tests.gguf import files
from tests.gguf.files import Q

KINDS = [
    *(Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q2_K, Q.Q3_K),
    *(Q.IQ4_XS, Q.IQ2_XXS, Q.IQ3_S, Q.TQ2_0, Q.MXFP4, Q.F16, Q.BF16),
]
HALVES = [torch.bfloat16, torch.float16]


def packed(
    kind: Q = Q.Q4_1, shape: tuple[int, ...] = (24, 256), dtype: torch.dtype = torch.float32
) -> tuple[PackedTensor, torch.Tensor]:
    """A packed weight, and its numbers by gguf."""
    data = files.values(shape, kind, np.random.default_rng(0))
    numbers = torch.from_numpy(gguf.dequantize(data, kind)).view(shape).to(dtype)
    rows = torch.from_numpy(data.view(np.uint8)).view(int(np.prod(shape[:-1])), -1)
    return rebuilt(rows.clone(), kind.name.lower(), shape[-1], shape, dtype), numbers


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a small matrix is decoded in several."""
    monkeypatch.setattr(decoding, "ELEMENTS", 5 * 256)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_numbers_are_those_of_gguf_to_the_last_bit(kind):
    """In float32. A block's numbers are sums of two products of at most 22 bits (d · scale · q of
    11, 6 and 5 bits; Q6_K 11, 7 and 5): each product is exact in float32 and the sum is rounded
    once there; in float64 it is exact, because the exponents of float16 span 40 binary places."""
    weight, numbers = packed(kind)
    assert numbers.abs().max() > 0
    assert torch.equal(weight.dequantize(), numbers)
    assert weight.held.dequantized().float().equal(numbers)


def nearest(value: float, dtype: torch.dtype) -> float:
    """The number of a dtype next to a value, ties to even, by fractions."""
    step = int(torch.tensor(value, dtype=torch.float64).to(dtype).view(torch.int16)) & 0x7FFF
    around = torch.tensor([max(0, step - 1), step, step + 1], dtype=torch.int16)
    numbers = [float(n) for n in around.view(dtype)]
    size = Fraction(abs(value))
    best = min(
        (i for i in range(3) if np.isfinite(numbers[i])),
        key=lambda i: (abs(Fraction(numbers[i]) - size), int(around[i]) & 1),
    )
    return numbers[best] if value >= 0 else -numbers[best]


@given(st.floats(-6e4, 6e4), st.integers(-60, -20), st.sampled_from(HALVES), st.booleans())
def test_numbers_are_rounded_once(value, power, dtype, at_a_tie):
    """Also those that float32 would move onto a tie."""
    if at_a_tie:
        below = torch.tensor(value).to(dtype).double()
        above = torch.tensor(value * (1 + unit_roundoff(dtype) * 2)).to(dtype).double()
        value = float((below + above) / 2) * (1 + 2.0**power)
    found = decoding.rounded(torch.tensor([value], dtype=torch.float64), dtype)
    assert float(found) == nearest(value, dtype)


def test_two_roundings_would_be_another_number():
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert float(value.to(torch.bfloat16)) == 1  # torch's own
    assert float(decoding.rounded(value, torch.bfloat16)) == 1 + 2.0**-7
    special = torch.tensor([float("inf"), -float("inf"), 3e38, float("nan"), 0.0, -0.0])
    for dtype in HALVES:
        found = decoding.rounded(special.double(), dtype)
        assert torch.equal(found.nan_to_num(1, 2, 3), special.to(dtype).nan_to_num(1, 2, 3))
        assert found[4:].signbit().equal(special[4:].signbit())


def test_places_of_scales_are_found_by_decoding():
    for found, places in files.SCALES.items():
        assert scale_places(found.name.lower()) == places
    assert scale_places("q4_1") == (0, 2)
    assert scale_places("mxfp4") == ()  # its scale is a power of two of eight bits


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (0, 256)])
def test_products_decode_blocks_of_rows(mode, bias, shape):
    weight, numbers = packed()
    layer = nn.Linear(256, 24, bias=bias)
    x = torch.randn(shape)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    n, u = 256, unit_roundoff(torch.float32)
    limit = 2 * CONFIDENCE * n**0.5 * u * (x.abs() @ numbers.abs().T + 1)
    with mode():
        expected = F.linear(x, numbers, layer.bias)
        for found in (layer(x), F.linear(x, weight, layer.bias)):
            assert ((found - expected).abs() <= limit).all()
        if not bias:
            assert ((x @ weight.T - expected).abs() <= limit).all()
            assert ((torch.matmul(x, weight.transpose(0, 1)) - expected).abs() <= limit).all()
        elif x.dim() == 2:
            found = torch.addmm(layer.bias, x, weight.t())
            assert ((found - expected).abs() <= limit).all()
            doubled = torch.addmm(layer.bias, x, weight.t(), beta=2, alpha=3)
            mixed = 2 * layer.bias + 3 * (expected - layer.bias)
            assert ((doubled - mixed).abs() <= 8 * limit).all()


def test_a_product_never_decodes_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(decoding, "ELEMENTS", 4 * 256)
    weight, _ = packed(shape=(64, 256))
    decoded, real = [], decoding.rounded

    def counted(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        decoded.append(values.numel())
        return real(values, dtype)

    monkeypatch.setattr(decoding, "rounded", counted)
    F.linear(torch.randn(2, 256), weight)
    assert decoded == [4 * 256] * 16
    decoded.clear()
    weight.dequantize()
    assert decoded == [4 * 256] * 16
    decoded.clear()
    F.embedding(torch.tensor([[3, 63], [0, 3]]), weight)
    assert decoded == [4 * 256]


def test_rows_that_are_asked_for():
    weight, numbers = packed(shape=(4, 6, 256))
    rows, whole = packed()
    ids = torch.tensor([[3, 0], [23, 3]])
    assert torch.equal(F.embedding(ids, rows), whole[ids])
    assert torch.equal(rows[ids], whole[ids])
    assert torch.equal(rows[-1].dequantize(), whole[-1])
    assert torch.equal(rows[-1] * 2, whole[-1] * 2)
    assert torch.equal(rows[[1, -2]], whole[[1, -2]])
    assert torch.equal(rows[whole[:, 0] > 0], whole[whole[:, 0] > 0])
    assert torch.equal(rows[:, 3], whole[:, 3])
    assert torch.equal(rows[2:20:3], whole[2:20:3])
    assert torch.equal(rows.index_select(0, ids[0]), whole[ids[0]])
    assert torch.equal(rows.T[3], whole.T[3])
    assert torch.equal(weight[torch.tensor([2, 0])], numbers[[2, 0]])
    assert torch.equal(weight[torch.tensor([[-1, 0]])], numbers[torch.tensor([[-1, 0]])])
    for part, expected in (
        (weight[2], numbers[2]),
        (weight[torch.tensor(-1)], numbers[-1]),
        (weight[1:3], numbers[1:3]),
        (weight[1:-1][1], numbers[2]),
        (rows[4:9], whole[4:9]),
        (rows[4:9].T, whole[4:9].T),
        (rows.T.T, whole),
        (rows[9:4], whole[9:4]),
    ):
        assert isinstance(part, PackedTensor)
        assert torch.equal(part.dequantize(), expected)
    for wrong in (lambda: rows[24], lambda: rows[-25], lambda: rows[torch.tensor([24])]):
        with pytest.raises(IndexError):
            wrong()
    for wrong in (24, -1):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([wrong]), rows)
    with pytest.raises(IndexError):
        rows.index_select(0, torch.tensor([-1]))


def test_every_other_operation_takes_its_numbers():
    weight, numbers = packed()
    x = torch.randn(3, 24)
    assert torch.equal(weight + 1, numbers + 1)
    assert torch.equal(weight.sum(0), numbers.sum(0))
    assert torch.equal(x @ weight, x @ numbers)
    assert torch.equal(torch.cat([weight, weight]), torch.cat([numbers, numbers]))
    assert torch.equal(torch.where(numbers > 0, weight, numbers), numbers)
    assert torch.equal(weight.flatten(), numbers.flatten())
    assert torch.equal(weight.to(torch.int32), numbers.to(torch.int32))
    assert weight.float() is weight or torch.equal(weight.float().dequantize(), numbers)


def test_gradients_pass_through_products():
    weight, numbers = packed()
    x = torch.randn(2, 256, requires_grad=True)
    y = torch.randn(2, 24)
    F.linear(x, weight).backward(y)
    assert torch.equal(x.grad, y @ numbers)


MENDED = r"flashnorm\.dequantize_\(model\)"


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda w: w.add_(1), "add_ would write into a packed weight"),
        (lambda w: w.zero_(), "would write into a packed weight"),
        (lambda w: nn.init.normal_(w), "normal_ would write"),
        (lambda w: w.__setitem__(0, 1), "would write"),
        (lambda w: w.__setitem__((slice(None), 1), 1), "would write"),
        (lambda w: w[3].zero_(), "zero_ would write"),
        (lambda w: w[3:5].fill_(0), "fill_ would write"),
        (lambda w: w.T.mul_(0), "mul_ would write"),
        (lambda w: w.data.mul_(0), "mul_ would write"),
        (lambda w: w.copy_(torch.zeros(24, 256)), "numbers cannot be written into"),
        (lambda w: torch.add(w, 1, out=w), "would write into"),
        (lambda w: w.data_ptr(), "no plain memory"),
        (lambda w: w.storage(), "no plain memory"),
        (lambda w: w.numpy(), "no plain memory"),
        (lambda w: np.asarray(w), "no plain memory"),
        (lambda w: w.requires_grad_(), "no gradient"),
        (lambda w: setattr(w, "requires_grad", True), "no gradient"),
        (lambda w: nn.Parameter(w), "no gradient"),
    ],
)
def test_what_is_refused_says_the_mend(act, said):
    weight, numbers = packed()
    with pytest.raises(FlashNormError, match=f"({said}).*{MENDED}"):
        act(weight)
    assert torch.equal(weight.dequantize(), numbers)
    weight.requires_grad_(False)
    weight.requires_grad = False


def model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    """A tied table and head, and a bias."""
    weight, numbers = packed(dtype=dtype)
    parameter = nn.Parameter(weight, requires_grad=False)
    table, head = nn.Embedding(24, 256), nn.Linear(256, 24)
    table.weight = head.weight = parameter
    return nn.Sequential(table, head).to(dtype), numbers


def same(one: nn.Module, other: nn.Module) -> bool:
    ids = torch.tensor([[1, 2, 23]])
    first, second = one[0].weight, other[0].weight
    assert other[0].weight is other[1].weight
    assert isinstance(second, PackedTensor)
    assert isinstance(second, nn.Parameter)
    assert (second.dtype, second.shape) == (first.dtype, first.shape)
    return torch.equal(one(ids), other(ids))


def test_copies_are_packed_and_tied():
    made, _ = model()
    copied = copy.deepcopy(made)
    assert same(made, copied)
    assert copied[0].weight.packed.data_ptr() != made[0].weight.packed.data_ptr()
    assert same(made, pickle.loads(pickle.dumps(made)))
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert same(made, torch.load(buffer, weights_only=False))


def test_a_state_dict_is_packed_and_can_be_loaded():
    made, numbers = model()
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    assert len(buffer.getvalue()) < numbers.nbytes  # once, in blocks
    buffer.seek(0)
    state = torch.load(buffer)  # weights_only
    assert isinstance(state["0.weight"], PackedTensor)
    other, _ = model()
    other[0].weight.packed.zero_()
    other.load_state_dict(state)
    assert same(made, other)
    plain = {"0.weight": numbers, "1.weight": numbers, "1.bias": made[1].bias}
    with pytest.raises(RuntimeError, match=f"numbers cannot be written.*{MENDED}"):
        other.load_state_dict(plain)
    other.load_state_dict(plain, assign=True)
    assert not isinstance(other[0].weight, PackedTensor)
    wrong, _ = packed(Q.Q8_0)
    with pytest.raises(FlashNormError, match="another format"):
        made[0].weight.copy_(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype_changes_no_byte(dtype):
    made, _ = model()
    place = made[0].weight.packed.data_ptr()
    ids = torch.tensor([[1, 2, 23]])
    before = made(ids)
    made.to(dtype)
    assert made[0].weight is made[1].weight
    assert made[0].weight.dtype == dtype
    assert made[0].weight.packed.data_ptr() == place
    assert made(ids).dtype == dtype
    assert torch.equal(made.float()(ids), before) or dtype in HALVES  # the bias was rounded
    assert made.to("meta")[0].weight.is_meta


def test_dequantize_makes_an_ordinary_model():
    made, numbers = model()
    before = made(torch.tensor([[1, 2]]))
    assert flashnorm.dequantize_(made) is made
    assert type(made[0].weight) is nn.Parameter
    assert made[0].weight is made[1].weight
    assert torch.equal(made[0].weight, numbers)
    assert torch.equal(made(torch.tensor([[1, 2]])), before)
    made(torch.tensor([[1, 2]])).sum().backward()
    assert made[0].weight.grad is not None
    turned = nn.Module()
    weight, numbers = packed()
    turned.weight = nn.Parameter(weight.T, requires_grad=False)
    turned.register_buffer("table", weight)
    flashnorm.dequantize_(turned)
    assert torch.equal(turned.weight, numbers.T)
    assert turned.weight.is_contiguous()
    assert torch.equal(turned.table, numbers)


def test_layouts_know_a_module_with_a_packed_matrix():
    made, _ = model()
    held: Any = layout.find(made[1])
    assert isinstance(held, layout.Held)
    assert held.origin == "GGUF, q4_1"
    assert (held.weight, held.bias) == ("weight", "bias")
    assert held.tensors(made[1]) == [made[1].weight.packed]
    assert held.read(made[1]) is made[1].weight.held
    assert not held.read(made[1]).unfit()
    assert layout.find(made[0]) is None
    assert layout.find(nn.Linear(2, 2)) is None
    flashnorm.dequantize_(made)
    assert layout.find(made[1]) is None
    with pytest.raises(AttributeError, match="plain now"):
        held.read(made[1])


def test_a_turned_weight_is_no_weight_of_a_linear_layer():
    """x W of a packed Wᵀ is a product with the rows, as GPT-2's layers compute it."""
    weight, _ = packed()
    assert weight.T.turned
    with pytest.raises(ValueError, match="has no rows of its own"):
        PackedTensor(weight.held._replace(outputs=23), (23, 256), torch.float32)
    with pytest.raises(ValueError, match="floating dtype"):
        PackedTensor(weight.held, (24, 256), torch.int32)
    assert repr(weight.T) == "PackedTensor([256, 24], torch.float32, q4_1, turned, cpu)"


def test_every_format_with_a_kernel_is_tested_here():
    ours = {name for name, block in BLOCKS.items() if block.format.code is not None}
    assert ours <= {found.name.lower() for found in KINDS}
    assert {*PLAIN} - {"f32"} <= {found.name.lower() for found in KINDS}
    assert kind("iq4_xs").format.code is None
