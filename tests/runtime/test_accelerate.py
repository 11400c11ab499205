"""`accelerate_`: the same model on kernels, whoever looks at it, and the original again after."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import flashnorm
from flashnorm.kernels import dispatch
from tests.kernels.cases import rows_for_kernels
from tests.runtime.models import LLAMA, NEOX, QWEN3, close, ids, logits, tiny

CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gpt_neox": NEOX}


def accelerated(config=LLAMA, dtype=torch.float32, **options):
    """(the original, the same model accelerated and past its first call)."""
    original = tiny(config, dtype)
    model = flashnorm.accelerate_(copy.deepcopy(original), **options)
    logits(model, ids())
    return original, model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (2, 40)], ids=str)
def test_the_outputs_are_those_of_the_original(name, shape):
    original, model = accelerated(CONFIGS[name])
    tokens = ids(*shape)
    with dispatch.forbid_fallback():
        found = logits(model, tokens)
    assert close(found, logits(original, tokens))


def test_readers_of_a_norm_run_as_one_call(calls):
    _, model = accelerated()
    calls.clear()
    logits(model, ids(1, 1))
    # q, k and v (in the order of their names); o; gate and up with their activation; down; head.
    layer = [(32, 64, 32), (64,), (160,), (64,)]
    assert calls == [*layer, *layer, (256,)]


def test_many_rows_go_to_the_library(backend, calls, monkeypatch):
    rows_for_kernels(monkeypatch, 16)
    original, model = accelerated()
    calls.clear()
    tokens = ids(1, backend.rows(torch.float32, 64, 1, False) + 1)
    assert close(logits(model, tokens), logits(original, tokens))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_from_the_truth(dtype):
    original, model = accelerated(dtype=dtype)
    tokens = ids(2, 4)
    truth = logits(tiny().double(), tokens)
    rounded = tiny(dtype=dtype).double()
    truth = logits(rounded, tokens)
    with dispatch.forbid_fallback():
        ours = (logits(model, tokens).double() - truth).norm()
    theirs = (logits(original, tokens).double() - truth).norm()
    assert ours < 1.1 * theirs


def test_restore_gives_the_original_back():
    original, model = accelerated()
    expected = logits(original, ids())
    assert not torch.equal(logits(model, ids()), expected)
    assert flashnorm.restore_(model) is model
    assert torch.equal(logits(model, ids()), expected)
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(flashnorm.FlashNormError, match="not accelerated"):
        flashnorm.restore_(model)


def test_weights_are_neither_copied_nor_changed():
    original = tiny()
    model = copy.deepcopy(original)
    before = {name: (p.data_ptr(), id(p)) for name, p in model.named_parameters()}
    flashnorm.accelerate_(model)
    logits(model, ids())
    assert {n: (p.data_ptr(), id(p)) for n, p in model.named_parameters()} == before
    state, expected = model.state_dict(), original.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_twice_is_refused():
    _, model = accelerated()
    with pytest.raises(flashnorm.FlashNormError, match="accelerated already; restore_ it first"):
        flashnorm.accelerate_(model)


def test_fold_moves_the_gains_first():
    original, model = accelerated(fold=True)
    gains = [p for name, p in model.named_parameters() if name.endswith("layernorm.weight")]
    assert gains
    assert all(bool((gain == 1).all()) for gain in gains)
    assert close(logits(model, ids()), logits(original, ids()))
    flashnorm.restore_(model)
    assert close(logits(model, ids()), logits(original, ids()))
    assert not bool((gains[0] == 1).all())


def test_a_copy_is_a_model_of_its_own():
    _, model = accelerated()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    original = tiny()
    assert close(logits(other, ids()), logits(original, ids()))
    assert not close(logits(model, ids()), logits(original, ids()))
    flashnorm.restore_(other)
    assert torch.equal(logits(other, ids()), logits(original, ids()))


def test_it_can_be_pickled():
    original, model = accelerated()
    other = pickle.loads(pickle.dumps(model))
    assert close(logits(other, ids()), logits(original, ids()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert close(logits(other, ids()), logits(original, ids()))


def test_saved_it_is_the_original(tmp_path):
    original, model = accelerated()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids()), logits(original, ids()))


def test_new_weights_are_noticed():
    _, model = accelerated()
    other = tiny(seed=7)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    model.load_state_dict(state)
    assert close(logits(model, ids()), logits(other, ids()))
    third = tiny(seed=8)
    model.load_state_dict(third.state_dict(), assign=True)
    model.tie_weights()
    assert close(logits(model, ids()), logits(third, ids()))


def test_a_weight_that_is_computed_or_grows_is_used():
    original, model = accelerated()
    for m in (original, model):
        parametrizations.weight_norm(m.model.layers[0].self_attn.q_proj)
        prune.l1_unstructured(m.model.layers[0].mlp.up_proj, "weight", amount=0.5)
        layer = m.model.layers[1].mlp
        torch.manual_seed(5)
        layer.down_proj.weight = nn.Parameter(torch.randn(64, 200))
        for linear in (layer.gate_proj, layer.up_proj):
            linear.weight = nn.Parameter(torch.randn(200, 64))
    assert close(logits(model, ids()), logits(original, ids()))


def test_a_reader_that_wants_a_gradient_where_the_norm_had_none():
    _, model = accelerated()
    layer, x = model.model.layers[0], torch.randn(1, 1, 64)
    with torch.no_grad():
        z = layer.input_layernorm(x)
    assert layer.self_attn.q_proj(z).requires_grad


def test_another_dtype_is_noticed():
    original, model = accelerated()
    model.double(), original.double()
    assert torch.equal(logits(model, ids()), logits(original, ids()))
    model.float(), original.float()
    assert close(logits(model, ids()), logits(original, ids()))
    model.bfloat16(), original.bfloat16()
    logits(model, ids())
    assert close(logits(model, ids()), logits(original, ids()), torch.bfloat16)


def test_a_dtype_that_the_original_refuses_is_refused():
    _, model = accelerated()
    linear = model.model.layers[0].self_attn.o_proj
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        linear(torch.randn(1, 1, 64, dtype=torch.bfloat16))


def test_gradients_are_those_of_the_original():
    original, model = accelerated()
    for m in (original, model):
        m(ids(), labels=ids()).loss.backward()
    pairs = zip(original.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_norm_without_gradient_leaves_those_of_its_readers():
    original, model = accelerated()
    for m in (original, model):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(name.endswith("k_proj.weight"))
        m(ids(), labels=ids()).loss.backward()
    pairs = zip(original.parameters(), model.parameters(), strict=True)
    wanted = [(a.grad, b.grad) for a, b in pairs if a.requires_grad]
    assert len(wanted) == 2
    assert all(close(found, expected) for expected, found in wanted)


def test_a_hook_that_changes_a_norms_output_in_place_is_seen():
    original, model = accelerated()
    with torch.no_grad():
        for m in (original, model):
            norm = m.model.layers[0].input_layernorm
            norm.register_forward_hook(lambda module, given, output: output.mul_(2))
    assert close(logits(model, ids()), logits(original, ids()))
    with torch.inference_mode():
        found, expected = model(ids()).logits, original(ids()).logits
    assert close(found, expected)


def test_a_hook_that_replaces_an_output_is_seen():
    original, model = accelerated()
    for m in (original, model):
        m.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda module, given, output: 3 * output
        )
        m.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *call: -call[-1])
        m.model.norm.register_forward_hook(lambda module, given, output: output + 1)
    assert close(logits(model, ids()), logits(original, ids()))


def test_a_module_that_is_replaced_later_is_used():
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x) + x.sum()

    original, model = accelerated()
    for m in (original, model):
        m.model.layers[0].mlp.gate_proj = Doubled(m.model.layers[0].mlp.gate_proj)
        m.model.layers[0].self_attn.v_proj = Doubled(m.model.layers[0].self_attn.v_proj)
        m.model.layers[1].mlp.act_fn = nn.Tanh()
    assert close(logits(model, ids()), logits(original, ids()))


def test_an_adapter_can_be_put_on_it():
    from peft import LoraConfig, get_peft_model

    original, model = accelerated()
    found = []
    for m in (original, model):
        torch.manual_seed(3)
        targets = ["q_proj", "gate_proj", "down_proj"]
        adapted = get_peft_model(m, LoraConfig(target_modules=targets, init_lora_weights=False))
        found.append(logits(adapted, ids()))
        with adapted.disable_adapter():
            found.append(logits(adapted, ids()))
    assert close(found[2], found[0])
    assert close(found[3], found[1])
    assert not close(found[0], found[1])


def test_training_and_dropout_are_the_models_own():
    original, model = accelerated()
    model.train(), original.train()
    assert close(logits(model, ids()), logits(original, ids()))


def test_inspecting_it_shows_the_original():
    original, model = accelerated()
    assert flashnorm.inspect(model) == flashnorm.inspect(original)
    report = flashnorm.acceleration(model)
    assert {part.kind for part in report.parts} == {"linear", "gated", "norm"}
    assert "22 of 22 modules run on" in str(report)
    assert report.to_json()["folded"] is False


def test_autocast_is_the_models_own():
    original, model = accelerated()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model, ids()), logits(original, ids()))


def test_threads_of_python_do_not_meet():
    original, model = accelerated()
    inputs = [ids(1, 1 + i, seed=i) for i in range(8)]
    expected = [logits(original, tokens) for tokens in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not close(logits(model, inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_may_change(threads):
    original, model = accelerated()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert close(logits(model, ids()), logits(original, ids()))
    finally:
        torch.set_num_threads(before)
