"""What stands for a module is right whatever is done to the module later, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.runtime.learn import OTHER
from flashnorm.runtime.names import named_in
from tests.field.modules import (
    Block,
    Glu,
    Held,
    M,
    N,
    Odd,
    Steered,
    Two,
    close,
    inputs,
    pair,
    parts,
    quantized,
    random_,
    run,
    same,
)

DTYPES = [torch.float32, torch.bfloat16]
HOWS = ["added", "before", "roll", "row", "part", "column", "factor", "sum", "square"]


class InPlace(nn.LayerNorm):
    """What it is given is another value afterwards."""

    def forward(self, x):
        return super().forward(x.sub_(1))


def test_a_module_that_writes_into_what_it_is_given():
    original, fast = pair(Block(norm=InPlace(N)))
    same(original, fast)


def test_code_that_always_steers():
    original, fast = pair(Steered(True))
    same(original, fast)


def test_weights_that_become_a_subclass_later():
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, M)))
    for model in (original, fast):
        quantized(model.reader)
    same(original, fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOWS)
def test_a_gain_of_another_kind_is_refused(how, dtype):
    original, fast = pair(Two(Held(how), nn.Linear(N, M)), dtype)
    same(original, fast, dtype)
    assert parts(fast)["norm"].reason


@pytest.mark.parametrize("how", ["buffer", "flip"])
def test_a_product_of_another_kind_is_refused(how):
    original, fast = pair(Two(nn.LayerNorm(N), Odd(how)))
    same(original, fast)
    assert parts(fast)["reader"].reason


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def weight_norm(model):
    parametrizations.weight_norm(model.mix.q)


def old_weight_norm(model):
    torch.nn.utils.weight_norm(model.mix.q)


def parametrized(model):
    parametrize.register_parametrization(model.mix.k, "weight", Doubling())
    parametrize.register_parametrization(model.norm, "weight", Doubling())


def pruned(model):
    prune.l1_unstructured(model.mix.q, "weight", amount=0.5)


def emptied(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.load_state_dict(state)


def applied(model):
    model.apply(lambda m: m.weight.data.mul_(1.5) if isinstance(m, nn.Linear) else None)


def swapped(model):
    model.mix.q.__class__ = Tripled


def narrowed(model):
    model.norm.eps = 0.3
    model.mix.k.in_features = 7  # which nothing reads


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


CHANGES = [
    weight_norm,
    old_weight_norm,
    parametrized,
    pruned,
    emptied,
    applied,
    swapped,
    narrowed,
    lambda model: model.half().float(),
    lambda model: model.requires_grad_(False),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_model_later_is_seen(change):
    original, fast = pair(Block())
    for model in (original, fast):
        change(model)
    same(original, fast)
    for model in (copy.deepcopy(fast), flashnorm.restore_(fast)):
        same(original, model)


def test_a_copy_reads_its_own_weights_and_attributes():
    original, fast = pair(Block())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), saved(fast)):
        same(original, twin)
        other = copy.deepcopy(original)
        for model in (twin, other):
            model.mix.q.weight.data.mul_(2)
            model.norm.eps = 0.7
        same(other, twin)
        same(original, fast)
        with dispatch.forbid_fallback():
            run(fast, inputs())


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_an_attribute_that_nothing_reads_changes_nothing():
    original, fast = pair(Block())
    fast.mix.q.note = "seen"
    with dispatch.forbid_fallback():
        same(original, fast)


def test_a_hook_that_is_gone_leaves_the_kernels(calls):
    original, fast = pair(Block())
    calls.clear()
    handle = fast.mix.register_forward_pre_hook(lambda module, args: None)
    same(original, fast, rows=(1,))
    assert calls == [(M,), (M,)] * 2
    handle.remove()
    calls.clear()
    same(original, fast, rows=(1,))
    assert calls == [(M, M)] * 2


def test_what_a_forward_names_is_followed_into_what_it_calls():
    class Helped(nn.Linear):
        @property
        def factor(self):
            return self.scale

        def forward(self, x):
            return self.helped(x)

        def helped(self, x):
            return F.linear(x, self.weight, self.bias) * self.factor

    assert {"scale", "factor", "helped", "weight"} <= named_in(Helped).all
    assert not named_in(Helped).stores
    assert not named_in(nn.Linear).stores


def test_an_other_dtype_is_not_taken_where_the_module_does_something_else_in_it():
    class Careful(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) if x.dtype == torch.float32 else 2 * super().forward(x)

    original, fast = pair(Two(Careful(N), nn.Linear(N, M)))
    assert fast.norm.forward.dtypes[torch.bfloat16] == OTHER.format(torch.bfloat16)
    original.bfloat16(), fast.bfloat16()
    same(original, fast, torch.bfloat16)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=False)


class Flagged(nn.Linear):
    def __init__(self):
        super().__init__(N, M)
        self.doubled = False

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return 2 * y if self.doubled else y


def test_a_compiled_graph_is_made_again_for_what_has_changed():
    original, fast = pair(Two(nn.LayerNorm(N), Flagged()), torch.bfloat16)
    graph, x = compiled(fast), inputs(2, torch.bfloat16)
    for doubled in (False, True, False):
        original.reader.doubled = fast.reader.doubled = doubled
        assert close(run(graph, x), run(original, x), torch.bfloat16)


@pytest.mark.parametrize("change", ["hook", "act", "bias"])
def test_a_compiled_gate_is_made_again_for_what_has_changed_inside(change):
    original, fast = pair(Two(nn.LayerNorm(N), Glu()), torch.bfloat16)
    graph, x = compiled(fast), inputs(2, torch.bfloat16)
    assert close(run(graph, x), run(original, x), torch.bfloat16)
    for model in (original, fast):
        if change == "hook":
            model.reader.gate.register_forward_hook(lambda module, args, y: 3 * y)
        elif change == "act":
            model.reader.act = nn.Tanh()
        else:
            model.reader.gate.bias = None
    if change == "hook":  # torch itself guards no hooks (skip_nnmodule_hook_guards)
        graph = compiled(fast)
    assert close(run(graph, x), run(original, x), torch.bfloat16)


def test_a_module_that_is_accelerated_in_training_waits_for_evaluation():
    original = random_(Block()).train()
    fast = flashnorm.accelerate_(copy.deepcopy(original), (inputs(),))
    same(original, fast)
    original.eval(), fast.eval()
    with dispatch.forbid_fallback():
        same(original, fast)
