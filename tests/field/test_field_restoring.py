"""Where accelerated models live: subclasses, batching, wrappers, and the way back."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.runtime import accelerate
from tests.field.modules import (
    Block,
    Held,
    M,
    N,
    Odd,
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
    assert len(text.splitlines()) <= 12
    assert "22 of 22 modules" in text
    assert len(flashnorm.acceleration(fast).to_json()["parts"]) == 22
    refused = flashnorm.accelerate_(random_(Two(Held("flip"), Odd("flip"))), (inputs(),))
    lines = str(flashnorm.acceleration(refused)).splitlines()
    assert sum("own code" in line for line in lines if line.startswith(("norm", "reader"))) >= 2


def test_field_inference_mode_computes_ahead(monkeypatch):
    original, fast = pair(Block())
    widths = []
    kernel = cpu.run_packed
    monkeypatch.setattr(cpu, "run_packed", lambda *a: widths.append(list(a[2])) or kernel(*a))
    with torch.inference_mode():
        found, expected = fast(inputs()), original(inputs())
    assert close(found, expected)
    assert widths == [[M, M]]
