"""Packed layers of an accelerated model: their products, and every way back to their own code."""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.errors import FlashNormError
from flashnorm.kernels import dispatch
from flashnorm.quantized import layout
from flashnorm.verification.bounds import Size, output_bound
from tests.errors import relative
from tests.quantized.columns import GptqLinear
from tests.quantized.models import GROUP, ORIGINS, N, dequantized, rows, toy

DEPTH = 6  # layers behind each other
PLAIN = [name for name in ORIGINS if name != "awq"]  # which computes in half precision only
HALVES = [torch.bfloat16, torch.float16]


def bound(dtype, half=None):
    """How far a model of these widths may be from its float64 truth."""
    return output_bound(Size(3 * N, DEPTH, half or dtype), dtype)


def accelerated(model, x, **options):
    with torch.no_grad():
        flashnorm.accelerate_(model, (x,), **options)
    reasons = {p.path: p.reason for p in flashnorm.acceleration(model).parts if p.reason}
    return model, reasons


@torch.no_grad()
def run(model, x):
    return model(x)


@pytest.mark.parametrize("count", [1, 3, 700])
@pytest.mark.parametrize("origin", PLAIN)
def test_every_packed_layer_runs_on_a_kernel_and_computes_the_dequantized_model(
    decoded, origin, count
):
    x = rows(count, N)
    model = ORIGINS[origin](toy())
    truth = run(dequantized(model), x.double())
    own = run(copy.deepcopy(model), x)
    model, reasons = accelerated(model, x)
    assert reasons == {}
    decoded.ran.clear()
    found = run(model, x)
    assert relative(found.double(), truth) <= bound(torch.float32)
    assert sum(decoded.ran.values()) == (6 if count <= 512 else 9)
    assert dispatch.fallbacks() == {}
    assert torch.equal(run(model, x), found)
    flashnorm.restore_(model)
    assert torch.equal(run(model, x), own)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("origin", ORIGINS)
def test_half_precision_is_no_farther_off_than_the_model_itself(decoded, origin, dtype):
    x = rows(64, N, dtype=dtype)
    model = ORIGINS[origin](toy(dtype))
    truth = run(dequantized(model), x.double())
    own = run(copy.deepcopy(model), x).double()
    model, reasons = accelerated(model, x)
    assert reasons == {}
    found = run(model, x)
    assert found.dtype == dtype
    assert relative(found.double(), truth) <= bound(torch.float32, dtype)
    rms = [(y - truth).square().mean().sqrt() for y in (found.double(), own)]
    assert rms[0] <= 1.1 * rms[1]
    flashnorm.restore_(model)
    assert torch.equal(run(model, x).double(), own)


def test_a_merged_gate_and_up_are_parts_of_one_packed_weight(decoded):
    x = rows(5, N)
    for origin, pair in (("torchao int8", True), ("compressed-tensors int4", True)):
        model = ORIGINS[origin](toy(merged=True))
        truth = run(dequantized(model), x.double())
        model, reasons = accelerated(model, x)
        assert reasons == {}
        decoded.ran.clear()
        assert relative(run(model, x).double(), truth) <= bound(torch.float32)
        assert any(len(formats) == 2 for formats in decoded.ran) == pair
        flashnorm.restore_(model)


def test_parts_of_words_are_no_pair(decoded):
    x = rows(5, N)
    model = ORIGINS["gptq"](toy(merged=True))
    truth = run(dequantized(model), x.double())
    model, reasons = accelerated(model, x)
    assert "not dense" in reasons["mlp"]
    assert list(reasons) == ["mlp"]
    assert relative(run(model, x).double(), truth) <= bound(torch.float32)


def mixed():
    """q dense, k and v packed in two formats; gate and up in two."""
    model = toy()
    model.k = GptqLinear.of(model.k, GROUP)
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = {"v", "mlp.up"}
    quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=lambda m, path: path in chosen)
    model.mlp.gate = GptqLinear.of(model.mlp.gate, GROUP)
    return model.eval()


def test_readers_of_several_formats_are_several_calls(decoded):
    x = rows(5, N)
    model = mixed()
    truth = run(dequantized(model), x.double())
    model, reasons = accelerated(model, x)
    assert list(reasons) == ["mlp"]
    assert "two formats" in reasons["mlp"]
    parts = {part.path: part for part in flashnorm.acceleration(model).parts}
    assert set(parts["before"].precomputed) == {"q", "k", "v"}
    decoded.ran.clear()
    assert relative(run(model, x).double(), truth) <= bound(torch.float32)
    assert decoded.ran == Counter({("gptq4",): 2, ("int8-rows",): 2})
    assert dispatch.fallbacks() == {}


def test_without_such_kernels_layers_keep_their_own_code_and_say_why():
    x = rows(5, N)
    model = ORIGINS["gptq"](toy())
    own = run(model, x)
    model, reasons = accelerated(model, x)
    found = flashnorm.acceleration(model)
    if reasons:  # this backend decodes no such format yet
        assert "format" in reasons["q"]
        assert "runs its own code" in reasons["mlp"]
        assert relative(run(model, x).double(), own.double()) <= bound(torch.float32)
    else:
        assert found.fused


# What happens to a packed model between two calls, and what has to come of it.


def moved(model):
    model.q.qweight = model.q.qweight.clone()
    model.q.scales = model.q.scales.clone()


def other_values(model):
    other = ORIGINS["gptq"](toy(seed=3))
    model.q.qweight, model.q.qzeros = other.q.qweight, other.q.qzeros
    model.q.scales = other.q.scales


def written(model):
    model.q.qzeros.add_(1)


def written_scales(model):
    model.mlp.gate.scales.mul_(2)


def through_data(model):
    model.q.qzeros.data = model.q.qzeros.data.roll(1, 1)


def other_bias(model):
    model.q.bias = model.q.bias.clone().fill_(3.0)


def loaded(model):
    model.load_state_dict(ORIGINS["gptq"](toy(seed=4)).state_dict())


CHANGES = [moved, other_values, written, written_scales, through_data, other_bias, loaded]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_packed_weight_is_made_of_is_followed(decoded, change):
    x = rows(5, N)
    model, _ = accelerated(ORIGINS["gptq"](toy()), x)
    before = run(model, x)
    change(model)
    decoded.ran.clear()
    found = run(model, x)
    flashnorm.restore_(model)
    truth = run(dequantized(model), x.double())
    assert relative(found.double(), truth) <= bound(torch.float32)
    assert sum(decoded.ran.values()) == 6
    assert torch.equal(found, before) == (change is moved)


def act_order(model):
    model.q.g_idx = model.q.g_idx.roll(3)


def more_bits(model):
    model.q.bits = 3


def another_class(model):
    class Doubled(GptqLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.q.__class__ = Doubled


def hooked(model):
    model.q.register_forward_hook(lambda module, given, y: 2 * y)


def hooked_before(model):
    model.q.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def a_new_forward(model):
    own = model.q.forward
    model.q.forward = lambda x: 3 * own(x)


def a_dense_layer(model):
    torch.manual_seed(9)
    model.q = nn.Linear(N, N)


def gone(model):
    model.q.dense = lambda: torch.ones(N, N)
    model.q.qweight = None


FALLS_BACK = [
    act_order,
    more_bits,
    another_class,
    hooked,
    hooked_before,
    a_new_forward,
    a_dense_layer,
    gone,
]


@pytest.mark.parametrize("change", FALLS_BACK)
def test_a_layer_that_became_another_runs_itself(decoded, change):
    x = rows(5, N)
    plain = ORIGINS["gptq"](toy())
    model, _ = accelerated(copy.deepcopy(plain), x)
    run(model, x)
    for one in (plain, model):
        change(one)
    assert relative(run(model, x).double(), run(plain, x).double()) <= bound(torch.float32)


@pytest.mark.parametrize("origin", ["gptq", "torchao int8", "compressed-tensors int4"])
def test_a_gradient_is_the_model_s_own(decoded, origin):
    x = rows(5, N).requires_grad_()
    plain = ORIGINS[origin](toy())
    model, _ = accelerated(copy.deepcopy(plain), x.detach())
    grads = [torch.autograd.grad(one(x).square().sum(), x)[0] for one in (plain, model)]
    assert torch.equal(*grads)
    assert sum(decoded.ran.values()) == 0


@pytest.mark.parametrize("origin", ["torchao int8", "gptq", "compressed-tensors int4 zeros"])
def test_copies_have_packed_weights_of_their_own(decoded, origin):
    x = rows(5, N)
    model, _ = accelerated(ORIGINS[origin](toy()), x)
    found = run(model, x)
    twin = copy.deepcopy(model)
    for tensor in layout.find(model.q).tensors(model.q)[:2]:
        tensor.zero_()
    decoded.ran.clear()
    assert torch.equal(run(twin, x), found)
    assert sum(decoded.ran.values()) == 6
    assert not torch.equal(run(model, x), found)
    flashnorm.restore_(twin)
    assert relative(run(twin, x).double(), found.double()) <= bound(torch.float32)


def test_an_accelerated_packed_model_can_be_pickled(decoded):
    x = rows(5, N)
    model, _ = accelerated(ORIGINS["gptq"](toy()), x)
    found = run(model, x)
    twin = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert torch.equal(run(twin, x), found)
    assert dispatch.fallbacks() == {}


@pytest.mark.parametrize("origin", PLAIN)
def test_the_state_dict_and_the_module_tree_stay(decoded, origin):
    x = rows(5, N)
    model = ORIGINS[origin](toy())
    before = {n: (type(t), t.clone()) for n, t in copy.deepcopy(model).state_dict().items()}
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    model, _ = accelerated(model, x)
    run(model, x)
    assert [(n, type(m)) for n, m in model.named_modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    for name, (kind, tensor) in before.items():
        assert type(after[name]) is kind
        if kind is torch.Tensor:
            assert torch.equal(after[name], tensor)


@pytest.mark.parametrize("option", ["training", "adjacent_weights", "fold"])
@pytest.mark.parametrize("origin", ["torchao int8", "gptq"])
def test_options_leave_packed_layers_right(decoded, origin, option):
    x = rows(5, N)
    model = ORIGINS[origin](toy())
    truth = run(dequantized(model), x.double())
    own = run(copy.deepcopy(model), x)
    wanted = torch.autograd.grad(copy.deepcopy(model)(g := x.clone().requires_grad_()).sum(), g)
    model, reasons = accelerated(model, x, **{option: True})
    assert reasons == {}
    assert relative(run(model, x).double(), truth) <= bound(torch.float32)
    found = torch.autograd.grad(model(g := x.clone().requires_grad_()).sum(), g)
    assert relative(found[0].double(), wanted[0].double()) <= bound(torch.float32)
    if option == "training":
        parts = {p.path: p.reason for p in flashnorm.acceleration(model).training}
        assert "its weight is packed" in parts["q"]
        assert "its weight is packed" in parts["mlp"]
        assert parts["before"] == ""
    flashnorm.restore_(model)
    assert torch.equal(run(model, x), own)


@pytest.mark.parametrize("origin", ["torchao int8", "gptq"])
def test_a_compiled_graph_holds_the_modules_own_code(decoded, origin):
    x = rows(5, N)
    plain = ORIGINS[origin](toy())
    model, _ = accelerated(copy.deepcopy(plain), x)
    compiled = torch.compile(model, backend="eager")
    decoded.ran.clear()
    assert relative(run(compiled, x).double(), run(plain, x).double()) <= bound(torch.float32)
    assert sum(decoded.ran.values()) == 0


def test_a_model_that_would_unpack_itself_is_kept_from_it_or_refused(decoded):
    x = rows(5, N)
    model = ORIGINS["compressed-tensors int4"](toy())
    hooks = dict(model._forward_pre_hooks)
    forward = model.q.forward
    model, _ = accelerated(model, x)
    assert not model._forward_pre_hooks
    run(model, x)
    assert "weight_packed" in model.q._parameters
    flashnorm.restore_(model)
    assert dict(model._forward_pre_hooks) == hooks
    assert vars(model.q)["forward"] == forward
    model.head.quantization_scheme.weights.num_bits = 3
    with pytest.raises(FlashNormError, match=r"unpacks its quantized weights at its first call"):
        flashnorm.accelerate_(model, (x,))
    assert dict(model._forward_pre_hooks) == hooks
    assert vars(model.q)["forward"] == forward


def test_bitsandbytes_layers_that_were_packed_anew_run_themselves(decoded):
    x = rows(64, N)
    model = ORIGINS["bitsandbytes nf4"](toy())
    model, _ = accelerated(model, x)
    found = run(model, x)
    # A call that wants a gradient is the model's own, which may pack the weights anew.
    model(x.clone().requires_grad_())
    truth = run(dequantized(ORIGINS["bitsandbytes nf4"](toy())), x.double())
    assert relative(run(model, x).double(), truth) <= bound(torch.float32, torch.bfloat16)
    assert relative(found.double(), truth) <= bound(torch.float32)


class Times(GptqLinear):
    """A layer like the others, but for a factor that no layout knows of."""

    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


def test_a_layer_that_is_not_what_its_weight_says_runs_its_own_code(decoded):
    x = rows(5, N)
    model = toy()
    model.q, model.v = Times.of(model.q, GROUP), Times.of(model.v, GROUP)
    model.v.factor = 2.0  # one of its kind has shown to be a product, this one is none
    own = run(copy.deepcopy(model.eval()), x)
    model, reasons = accelerated(model, x)
    assert list(reasons) == ["v"]
    assert "is not what its packed weight says" in reasons["v"]
    assert relative(run(model, x).double(), own.double()) <= bound(torch.float32)
    assert sum(decoded.ran.values()) == 1
