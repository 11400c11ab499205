"""`accelerate_(training=True)`: the gradients of the original from less, and the original after."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.runtime import steps
from tests.runtime.models import LLAMA, NEOX, QWEN3, close, dyt, ids, logits, tiny

GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0)
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gpt_neox": NEOX, "gpt2": GPT2}


def original(name, dtype=torch.float32):
    return (dyt(dtype) if name == "dyt" else tiny(CONFIGS[name], dtype)).train()


def pair(name="llama", dtype=torch.float32, **options):
    """(the original in training, the same model accelerated for it)."""
    model = original(name, dtype)
    return model, flashnorm.accelerate_(copy.deepcopy(model), training=True, **options)


def gradients(model, tokens=None, seed=0, **options):
    torch.manual_seed(seed)
    tokens = ids(2, 6) if tokens is None else tokens
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens, use_cache=False, **options).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert close(found[name], value), name


NAMES = [*CONFIGS, "dyt"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_original(name):
    first, model = pair(name)
    with dispatch.forbid_fallback():
        found = gradients(model)
    same(found, gradients(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_from_the_truth(dtype):
    first, model = pair(dtype=dtype)
    truth = gradients(copy.deepcopy(first).double())
    ours, theirs = gradients(model), gradients(first)

    def distance(found):
        return sum(float((found[n].double() - truth[n]).norm() / truth[n].norm()) for n in truth)

    assert distance(ours) < 1.1 * distance(theirs)


def outputs_that_are_kept(model, kinds):
    """How many results of modules of these classes autograd keeps."""
    made, kept = [], set()
    for module in model.modules():
        if type(module).__name__.endswith(kinds):
            module.register_forward_hook(lambda m, given, output: made.append(output))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.add(t.untyped_storage().data_ptr()), t)[1], lambda t: t
    ):
        result = model(ids(2, 6), use_cache=False)
    assert result.logits.requires_grad
    return sum(output.untyped_storage().data_ptr() in kept for output in made)


@pytest.mark.parametrize("name", NAMES)
def test_no_normalized_rows_are_kept(name):
    first, model = pair(name)
    gradients(model)
    kinds = ("RMSNorm", "LayerNorm", "DyT")
    assert outputs_that_are_kept(first, kinds) == 5
    assert outputs_that_are_kept(model, kinds) == 0


def test_neither_is_the_product_of_gate_and_up():
    _, model = pair()
    gradients(model)
    given, kept = [], set()
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.add(t.untyped_storage().data_ptr()), t)[1], lambda t: t
    ):
        result = model(ids(2, 6), use_cache=False)
    assert result.logits.requires_grad
    assert len(given) == 2
    assert not any(hidden.untyped_storage().data_ptr() in kept for hidden in given)


def test_without_a_gradient_the_kernels_run_as_ever():
    first, model = pair()
    model.eval(), first.eval()
    logits(model, ids())
    with dispatch.forbid_fallback():
        found = logits(model, ids())
    assert close(found, logits(first, ids()))
    plain = flashnorm.accelerate_(copy.deepcopy(first))
    logits(plain, ids())
    assert torch.equal(found, logits(plain, ids()))


def test_restore_gives_the_original_back():
    first, model = pair()
    held = {name: id(p) for name, p in model.named_parameters()}
    same(gradients(model), gradients(first))
    flashnorm.restore_(model)
    assert {name: id(p) for name, p in model.named_parameters()} == held
    assert not any("forward" in module.__dict__ for module in model.modules())
    found, expected = gradients(model), gradients(first)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_train_by_themselves():
    first, model = pair()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(gradients(other), gradients(first))
        assert outputs_that_are_kept(other, ("RMSNorm",)) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant):
    first, model = pair()
    options = {"use_reentrant": reentrant}
    for each in (first, model):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        each.enable_input_require_grads()
    same(gradients(model), gradients(first))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_norm_outside_of_a_checkpoint(reentrant):
    x, found = torch.randn(2, 3, 64), []
    for each in pair():
        layer = each.model.layers[0]
        z, linear = layer.input_layernorm(x), layer.self_attn.q_proj
        checkpoint(linear, z, use_reentrant=reentrant).square().sum().backward()
        found.append((linear.weight.grad, layer.input_layernorm.weight.grad))
    assert all(map(close, found[1], found[0]))


def test_frozen_parameters_get_none_and_keep_nothing():
    first, model = pair()
    for each in (first, model):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("k_proj" in name or name == "model.norm.weight")
    found = gradients(model)
    assert len(found) == 3
    same(found, gradients(first))


def test_an_adapter_that_is_trained():
    from peft import LoraConfig, get_peft_model

    first, model = pair()
    found = []
    for each in (first, model):
        torch.manual_seed(3)
        targets = ["q_proj", "gate_proj", "down_proj"]
        adapted = get_peft_model(each, LoraConfig(target_modules=targets, init_lora_weights=False))
        found.append(gradients(adapted))
    assert len(found[0]) == 12
    same(found[1], found[0])


def test_hooks_are_called_and_what_they_change_is_used():
    first, model = pair()
    for each in (first, model):
        layer = each.model.layers[0]
        layer.input_layernorm.register_forward_hook(lambda m, given, output: output.mul_(2))
        layer.post_attention_layernorm.register_forward_hook(lambda m, given, output: 3 * output)
        layer.mlp.up_proj.register_forward_hook(lambda m, given, output: -output)
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        each.model.layers[1].mlp.act_fn.register_forward_hook(lambda m, given, output: output + 1)
    same(gradients(model), gradients(first))


def test_what_is_changed_inside_later_is_used():
    first, model = pair()
    gradients(model)
    for each in (first, model):
        each.model.layers[0].mlp.act_fn = nn.Tanh()
        each.model.layers[1].mlp.act_fn.register_forward_hook(lambda m, given, output: output + 1)
    same(gradients(model), gradients(first))


def test_dropout_is_the_models_own():
    first, model = pair("gpt2")
    assert first.config.resid_pdrop > 0
    assert not close(
        gradients(first, seed=1)["lm_head.weight" if False else "transformer.wpe.weight"],
        gradients(first, seed=2)["transformer.wpe.weight"],
    )
    same(gradients(model, seed=1), gradients(first, seed=1))


class Gated(nn.Module):
    """Drops out what no module in it would tell of, or, at a rate of almost zero, its values."""

    def __init__(self, dropped):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.dropped = dropped

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(F.dropout(h, self.dropped, self.training))


def test_a_view_of_all_rows_has_the_recipe_and_no_other():
    z = steps.attach(torch.randn(2, 3, 4), steps.Regate("silu"), torch.ones(1), torch.ones(1))
    for view in (z, z.view(6, 4), z[:, 0:], z[:2], z.flatten(0, 1)):
        assert steps.recompute_of(view) is not None
    for other in (
        z[:1],
        z.transpose(0, 1),
        z.view(2, 12),
        z.clone(),
        z[..., :2],
        z.view(torch.int32),
    ):
        assert steps.recompute_of(other) is None
    z.view(6, 4).mul_(2)
    assert steps.recompute_of(z) is None


@pytest.mark.parametrize(("dropped", "fused"), [(0.0, True), (0.3, False), (1e-9, False)])
def test_a_gated_module_that_drops_out_runs_as_it_is(dropped, fused):
    torch.manual_seed(0)
    first = nn.Sequential(nn.RMSNorm(8), Gated(dropped))
    model = flashnorm.accelerate_(copy.deepcopy(first), torch.randn(2, 8), training=True)
    x, found = torch.randn(5, 8), []
    before = dispatch.fallbacks().get(steps.RANDOM, 0)
    for each in (first.train(), model.train()):
        torch.manual_seed(1)
        found.append(each(x).detach())
    assert close(found[1], found[0])
    assert (dispatch.fallbacks().get(steps.RANDOM, 0) == before) is fused


def test_a_norm_that_does_something_else_in_training_runs_as_it_is():
    class Moving(nn.RMSNorm):
        def forward(self, x):
            return 1.5 * super().forward(x) if self.training else super().forward(x)

    model = nn.Sequential(Moving(8), nn.Linear(8, 3))
    twin = flashnorm.accelerate_(copy.deepcopy(model), torch.randn(2, 8), training=True)
    assert not [p for p in flashnorm.acceleration(twin).training if p.reason]
    x = torch.randn(5, 8)
    for mode in (False, True, False):
        assert close(twin.train(mode)(x).detach(), model.train(mode)(x).detach())


def test_autocast_is_the_models_own():
    first, model = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = gradients(model), gradients(first)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_it_is_the_compiled_original():
    torch._dynamo.reset()
    first, model = pair()
    for each in (first, model):
        each.compile(backend="aot_eager", fullgraph=True)
    found, expected = gradients(model), gradients(first)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_second_gradients_are_those_of_the_original():
    found = []
    for each in pair("gpt_neox", torch.float64):
        layer = each.gpt_neox.layers[0].eval()
        x = torch.linspace(-1, 2, 128, dtype=torch.float64).sin().view(2, 64).requires_grad_()
        y = layer.mlp(layer.post_attention_layernorm(x))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_the_report_says_what_saves_less_and_what_does_not():
    _, model = pair()
    report = flashnorm.acceleration(model)
    assert {part.kind for part in report.training} == {"linear", "gated", "norm"}
    assert not [part for part in report.training if part.reason]
    assert "in training 22 of 22 modules save less: 5 norm, 2 gated, 15 linear" in str(report)
    assert len(report.to_json()["training"]) == len(report.training)
