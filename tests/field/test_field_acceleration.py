"""Nobody between a norm and its readers is ignored: hooks, code, other forwards."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks

import flashnorm
from flashnorm.kernels.cpu import calls as cpu
from tests.field.modules import (
    Block,
    Glu,
    M,
    Mix,
    N,
    Steered,
    Two,
    close,
    pair,
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
