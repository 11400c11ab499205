"""What is done ahead, or stands for a module, is what the module itself would have done."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks

import flashnorm
from flashnorm.kernels import cpu, dispatch
from flashnorm.runtime import accelerate
from tests.field.modules import (
    Block,
    Glu,
    Held,
    M,
    Mix,
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
from tests.runtime.models import ids, logits, tiny

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason="no compiled kernels here")
DTYPES = [torch.float32, torch.bfloat16]
STEER = torch.linspace(-1, 1, N)


# What comes between a norm and its readers.


def add_data(module, args, output):
    output.data.add_(STEER.to(output.dtype))


def add_numpy(module, args, output):
    output.detach().view(torch.int16 if output.dtype == torch.bfloat16 else torch.int32).numpy()[
        ..., :8
    ] = 0


def swap_data(module, args, output):
    output.data = output.flip(-1)


def turn_data(module, args, output):
    """The same memory, read in another order."""
    output.data = output.data.t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hook", [add_data, add_numpy, swap_data])
def test_field_a_hook_that_steers_past_the_version(hook, dtype):
    original, fast = pair(Block(), dtype)
    for model in (original, fast):
        model.norm.register_forward_hook(hook)
    same(original, fast, dtype)


def test_field_a_hook_that_turns_the_memory():
    few = 8
    original = random_(Two(nn.LayerNorm(few), nn.Linear(few, M)))
    x = torch.randn(few, few)
    fast = flashnorm.accelerate_(copy.deepcopy(original), (x,))
    run(fast, x)
    for model in (original, fast):
        model.norm.register_forward_hook(turn_data)
    assert close(run(fast, x), run(original, x))


def test_field_steering_a_whole_model():
    original = tiny()
    fast = flashnorm.accelerate_(copy.deepcopy(original))
    logits(fast, ids())
    for model in (original, fast):
        norm = model.model.layers[1].input_layernorm
        norm.register_forward_hook(add_data)
    assert close(logits(fast, ids()), logits(original, ids()))


@pytest.mark.parametrize("reader", ["linear", "gated"])
def test_field_a_hook_that_changes_the_readers_weight(reader):
    made = nn.Linear(N, M) if reader == "linear" else Glu()
    original, fast = pair(Two(nn.LayerNorm(N), made))

    def halve(module, args):
        for parameter in module.parameters():
            parameter.data.mul_(0.5)

    for model in (original, fast):
        model.reader.register_forward_pre_hook(halve)
    same(original, fast)


def test_field_a_hook_on_what_the_reader_is_in():
    def halve(module, args):
        module.q.weight.data.mul_(0.5)

    def steer(module, args):
        args[0].data.add_(STEER)

    for hook in (halve, steer):
        original, fast = pair(Block())
        for model in (original, fast):
            model.mix.register_forward_pre_hook(hook)
        same(original, fast)


class Aliased(nn.Module):
    """The modules that read are registered in two places; they are called from the later one."""

    def __init__(self):
        super().__init__()
        self.all = nn.ModuleList([nn.LayerNorm(N), nn.Linear(N, M), nn.Linear(N, M)])
        self.norm, self.mix = self.all[0], Mix(self.all[1], self.all[2])

    def forward(self, x):
        return self.mix(self.norm(x))


def test_field_a_hook_on_what_calls_the_reader_by_another_name():
    def halve(module, args):
        module.q.weight.data.mul_(0.5)

    original, fast = pair(Aliased())
    for model in (original, fast):
        model.mix.register_forward_pre_hook(halve)
    same(original, fast)


def test_field_a_hook_for_all_modules():
    original, fast = pair(Block())

    def steer(module, args, output):
        if isinstance(module, nn.LayerNorm):
            output.data.add_(STEER)

    handle = global_hooks.register_module_forward_hook(steer)
    try:
        same(original, fast)
    finally:
        handle.remove()


@pytest.mark.parametrize("by", ["data", "numpy"])
def test_field_code_that_steers_when_it_is_told_to(by):
    original, fast = pair(Steered(False))
    for on in (True, False):
        for model in (original, fast):
            model.on, model.by = on, by
        same(original, fast)


def test_field_a_forward_put_over_that_of_a_reader():
    original, fast = pair(Block())
    for model in (original, fast):
        before = model.mix.q.forward

        def around(x, q=model.mix.q, before=before):
            q.weight.data.mul_(0.5)
            return before(x)

        model.mix.q.forward = around
    same(original, fast)


def test_field_a_forward_put_over_that_of_a_gate():
    original, fast = pair(Two(nn.LayerNorm(N), Glu()))
    for model in (original, fast):
        before = model.reader.gate.forward
        model.reader.gate.forward = lambda x, before=before: 3 * before(x)
    same(original, fast)


# Modes.


class Dropped(nn.Linear):
    def forward(self, x):
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


class DroppedNorm(nn.LayerNorm):
    def __init__(self, n):
        super().__init__(n)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


class Unmerged(nn.Linear):
    """As loralib's: the update is in the weight in evaluation, beside it in training."""

    def __init__(self):
        super().__init__(N, M)
        self.a, self.b = nn.Parameter(torch.randn(4, N)), nn.Parameter(torch.randn(M, 4))
        self.merged = True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "norm", "gated"])
def test_field_monte_carlo_dropout(kind, dtype):
    norm = DroppedNorm(N) if kind == "norm" else nn.LayerNorm(N)
    reader = {"linear": lambda: Dropped(N, M), "gated": lambda: Glu(nn.SiLU())}
    model = Two(norm, reader.get(kind, lambda: nn.Linear(N, M))())
    if kind == "gated":
        model.reader.gate = Dropped(N, M)
    original, fast = pair(model, dtype)
    for mode in (True, False, True):
        original.train(mode), fast.train(mode)
        found = []
        for each in (original, fast):
            torch.manual_seed(3)
            found.append(run(each, inputs(2, dtype)))
        assert close(found[1], found[0], dtype), mode


def test_field_a_branch_that_a_flag_chooses():
    original, fast = pair(Two(nn.LayerNorm(N), Unmerged()))
    for merged in (False, True):
        for model in (original, fast):
            model.reader.merged = merged
        same(original, fast)


# One model, one answer.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_field_the_first_call_is_like_all_others(dtype):
    fast = flashnorm.accelerate_(tiny(dtype=dtype))
    first = logits(fast, ids(1, 3))
    assert all(torch.equal(logits(fast, ids(1, 3)), first) for _ in range(3))


def test_field_the_first_call_in_another_dtype_is_like_all_others():
    original = tiny()
    fast = flashnorm.accelerate_(copy.deepcopy(original))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        original.to(dtype), fast.to(dtype)
        first = logits(fast, ids())
        assert torch.equal(logits(fast, ids()), first)
        with dispatch.forbid_fallback():
            assert torch.equal(logits(fast, ids()), first)


def test_field_generating_twice_gives_one_text():
    fast = flashnorm.accelerate_(tiny(dtype=torch.bfloat16))
    texts = [fast.generate(ids(1, 4), max_new_tokens=24, do_sample=False) for _ in range(2)]
    scores = []
    other = flashnorm.accelerate_(tiny(dtype=torch.bfloat16))
    for _ in range(2):
        given = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        scores.append(torch.stack(other.generate(ids(1, 4), output_logits=True, **given).logits))
    assert torch.equal(*texts)
    assert torch.equal(*scores)


class Widening(nn.Linear):
    """Returns float32 where it is given less."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).float()


def test_field_a_dtype_that_is_not_returned_is_learnt_without_a_call():
    original, fast = pair(Two(nn.LayerNorm(N), Widening(N, M)))
    same(original, fast)
    original.bfloat16(), fast.bfloat16()
    for _ in range(2):
        x = inputs(2, torch.bfloat16)
        assert run(fast, x).dtype == torch.float32
        assert close(run(fast, x), run(original, x), torch.bfloat16)


# What a module reads at each call.


@pytest.mark.parametrize("affine", [True, False])
def test_field_an_eps_that_depends_on_the_dtype(affine):
    model = random_(Two(nn.RMSNorm(N, elementwise_affine=affine), nn.Linear(N, M)), torch.float64)
    original = copy.deepcopy(model)
    fast = flashnorm.accelerate_(model, (inputs(dtype=torch.float64),))
    original.float(), fast.float()
    x = inputs(2) * 1e-4
    for _ in range(2):
        assert close(run(fast, x), run(original, x))
    assert fast.norm.forward.dtypes.get(torch.float32, "") != ""


def test_field_an_eps_that_is_changed_later():
    original = tiny()
    fast = flashnorm.accelerate_(copy.deepcopy(original))
    logits(fast, ids())
    for eps in (0.5, 1e-6):
        for model in (original, fast):
            model.model.layers[0].input_layernorm.variance_epsilon = eps
            model.model.layers[1].post_attention_layernorm.variance_epsilon = eps
        assert close(logits(fast, ids()), logits(original, ids()))
    with dispatch.forbid_fallback():
        logits(fast, ids())


class Configured(nn.Module):
    """A norm that reads its eps from an object, and a global."""

    def __init__(self, config):
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.ones(N))

    def forward(self, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps)
        return x * scale * self.weight if SCALED else x * scale


class Config:
    eps = 0.1

    def __init__(self):
        self.eps, self.other = 0.2, []


SCALED = True


def test_field_an_eps_that_an_object_has(monkeypatch):
    original, fast = pair(Two(Configured(Config()), nn.Linear(N, M)))
    for model in (original, fast):
        model.norm.config.eps = 2.0
    same(original, fast)
    monkeypatch.setattr("tests.field.test_field_acceleration.SCALED", False)
    same(original, fast)


def test_field_a_class_that_is_patched_later(monkeypatch):
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    original, fast = pair(Two(nn.LayerNorm(N), Mine(N, M)))
    monkeypatch.setattr(Mine, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
    same(original, fast)
    same(original, copy.deepcopy(fast))


def test_field_a_bias_that_comes_later():
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, M, bias=False)))
    bias = torch.randn(M)
    for model in (original, fast):
        model.reader.bias = nn.Parameter(bias.clone())
    same(original, fast)


def test_field_a_weight_whose_memory_is_read_in_another_order():
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, N)))
    for model in (original, fast):
        model.reader.weight.data = model.reader.weight.data.t()
    same(original, fast)


def test_field_a_reader_that_was_replaced_is_not_computed(monkeypatch):
    """By a quantizer, say, which exchanges linear layers later."""
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, M)))
    other = random_(nn.Linear(N, M), seed=9)
    for model in (original, fast):
        model.reader = copy.deepcopy(other)
    widths = []
    kernel = cpu.run_packed
    monkeypatch.setattr(cpu, "run_packed", lambda *a: widths.append(a[2]) or kernel(*a))
    same(original, fast)
    assert widths == []


class Counting(nn.LayerNorm):
    """A norm that does something beside: it counts its calls."""

    def __init__(self, n, how):
        super().__init__(n)
        self.how = how
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.number = 0

    def forward(self, x):
        if self.how == "buffer":
            self.calls += 1
        else:
            self.number = self.number + 1
        return super().forward(x)


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_field_a_module_that_does_something_beside(how):
    original, fast = pair(Two(Counting(N, how), nn.Linear(N, M)))
    before = int(fast.norm.calls), fast.norm.number
    run(fast, inputs())
    after = int(fast.norm.calls), fast.norm.number
    assert sum(after) == sum(before) + 1
    same(original, fast)


# Gains and biases are what the graph says.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["bias", "flip"])
def test_field_gains_and_biases_are_what_the_graph_says(how, dtype):
    original, fast = pair(Two(Held(how), nn.Linear(N, M)), dtype)
    same(original, fast, dtype)
    assert parts(fast)["norm"].reason


@pytest.mark.parametrize("how", ["axis", "narrow", "rows"])
def test_field_products_are_what_the_graph_says(how):
    original, fast = pair(Two(nn.LayerNorm(N), Odd(how)))
    same(original, fast)
    assert parts(fast)["reader"].reason


# Where a model lives, and in what state.


def test_field_weights_of_a_tensor_subclass():
    original = random_(Two(nn.LayerNorm(N), nn.Sequential(nn.Linear(N, N), nn.Linear(N, M))))
    quantized(original.reader[0])
    expected = [run(original, inputs(rows)) for rows in (1, 2, 40)]
    flashnorm.accelerate_(original, (inputs(),))
    for rows, value in zip((1, 2, 40), expected, strict=True):
        assert close(run(original, inputs(rows)), value)
    found = parts(original)
    assert "Int8" in found["reader.0"].reason
    assert not found["reader.1"].reason


def test_field_continuous_batching():
    from transformers import ContinuousBatchingConfig, GenerationConfig

    # Otherwise the cache takes most of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    original = tiny()
    fast = flashnorm.accelerate_(copy.deepcopy(original))
    name = fast.config._attn_implementation
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=255)
    texts = []
    for model in (original, fast, fast):
        found = model.generate_batch(
            [[5, 6, 7], [9, 10, 11, 12], [3]],
            generation_config=settings,
            continuous_batching_config=small,
        )
        texts.append([answer.generated_tokens for answer in found.values()])
    assert texts[1] == texts[2] == texts[0]
    assert fast.config._attn_implementation == name
    twin = pickle.loads(pickle.dumps(fast))
    assert torch.equal(logits(twin, ids()), logits(fast, ids()))
    flashnorm.restore_(fast)
    assert torch.equal(logits(fast, ids()), logits(original, ids()))


# What a user did in between.


def test_field_restored_after_a_forward_was_deleted():
    original, fast = pair(Block())
    del fast.mix.q.forward
    flashnorm.restore_(fast)
    assert not any("forward" in module.__dict__ for module in fast.modules())
    assert torch.equal(run(fast, inputs()), run(original, inputs()))


def test_field_restored_below_a_wrapper_of_the_user(caplog):
    original, fast = pair(Block())
    ours = fast.mix.q.forward

    def twice(x):
        return 2 * ours(x)

    fast.mix.q.forward = twice
    with caplog.at_level(logging.WARNING, "flashnorm"):
        flashnorm.restore_(fast)
    assert fast.mix.q.forward is twice
    assert "mix.q" in caplog.text
    plain = original.mix.q.forward
    original.mix.q.forward = lambda x: 2 * plain(x)
    assert torch.equal(run(fast, inputs()), run(original, inputs()))
    flashnorm.accelerate_(fast, (inputs(),))
    same(original, fast)


def test_field_restoring_can_be_tried_again(monkeypatch):
    original, fast = pair(Block(), fold=True)
    with monkeypatch.context() as patched:
        patched.setattr(accelerate, "unfold_", lambda model: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no"):
            flashnorm.restore_(fast)
    flashnorm.restore_(fast)
    assert close(run(fast, inputs()), run(original, inputs()))
    with pytest.raises(flashnorm.FlashNormError, match="not accelerated"):
        flashnorm.restore_(fast)


def test_field_scripting_says_what_to_do():
    _, fast = pair(Block())
    with pytest.raises(flashnorm.FlashNormError, match="restore_"):
        torch.jit.script(fast)
    flashnorm.restore_(fast)
    torch.jit.script(fast)


def test_field_a_gain_that_is_loaded_after_a_fold():
    """Folded gains are one until somebody loads others."""
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, M)), fold=True)
    other = random_(copy.deepcopy(original), seed=5)
    fast.load_state_dict(other.state_dict())
    same(other, fast)


def test_field_the_report_is_a_summary():
    fast = flashnorm.accelerate_(tiny())
    text = str(flashnorm.acceleration(fast))
    assert len(text.splitlines()) <= 8
    assert "linear: 15 of 15" in text
    assert "norm: 5 of 5" in text
    assert len(flashnorm.acceleration(fast).to_json()["parts"]) == 22
    refused = flashnorm.accelerate_(random_(Two(Held("flip"), Odd("flip"))), (inputs(),))
    lines = str(flashnorm.acceleration(refused)).splitlines()
    assert sum("norm: " in line or "reader: " in line for line in lines) >= 2


def test_field_inference_mode_computes_ahead(monkeypatch):
    original, fast = pair(Block())
    widths = []
    kernel = cpu.run_packed
    monkeypatch.setattr(cpu, "run_packed", lambda *a: widths.append(list(a[2])) or kernel(*a))
    with torch.inference_mode():
        found, expected = fast(inputs()), original(inputs())
    assert close(found, expected)
    assert widths == [[M, M]]
