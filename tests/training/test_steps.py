"""Ten steps of training: the losses of accelerated models are those of the models themselves."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.verification.precision import Float64Mode
from tests.training.models import batch, bounds, build, train


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "dyt"])
def test_ten_steps(name, dtype):
    plain = build(name, dtype)
    fused = flashnorm.accelerate_(copy.deepcopy(plain), batch()[:, :-1], training=True)
    with Float64Mode() if dtype == torch.float64 else nullcontext():
        expected = train(plain)
        with dispatch.forbid_fallback():
            found = train(fused)
    limits = bounds(expected, dtype)
    assert expected.losses[0] - expected.losses[-1] > 2 * limits[-1]
    pairs = zip(found.losses, expected.losses, limits, strict=True)
    assert all(abs(ours - theirs) <= limit for ours, theirs, limit in pairs)
