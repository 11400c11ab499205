"""The float64 mode really removes the float32 floor, and leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashnorm.verification.precision import float64_truth, in_dtype, parameter_dtype

from . import tiny

IDS = torch.arange(40)[None] % 199


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma])
def test_a_float64_model_has_a_float32_floor_without_the_mode(make: Callable[[], Any]) -> None:
    model = make().double()
    with torch.no_grad():
        plain = logits(model)
    with float64_truth() as mode:
        truth = logits(model)
    assert 1e-8 < error(plain, truth) < 1e-4
    assert not mode.leaks


def test_a_fold_is_exact_within_the_mode() -> None:
    model = tiny.llama().double()
    with float64_truth():
        assert 0 < error(logits(tiny.folded(model)), logits(model)) <= 1e-13


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma, tiny.mixtral])
def test_scaling_by_powers_of_three_shows_whether_the_casts_are_gone(
    make: Callable[[], Any],
) -> None:
    """A hidden float32 cast rounds 3·x otherwise than x; RMSNorm with a tiny eps undoes the 3."""
    model = make().double()
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-300)
    norm = next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm"))
    x = torch.randn(5, tiny.WIDTH, dtype=torch.float64)

    def gap() -> float:
        a, b = norm(x), norm(3 * x)
        return float((a - b).abs().max() / a.abs().max())

    with torch.no_grad():
        assert 1e-9 < gap() < 1e-6
    with float64_truth():
        assert gap() < 1e-14


def test_every_kind_of_cast_becomes_float64() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    with float64_truth():
        results = [
            x.float(),
            x.to(torch.bfloat16),
            x.half(),
            x.type_as(torch.ones(1, dtype=torch.float32)),
            x.softmax(-1, dtype=torch.float32),
            x.mean(-1, dtype=torch.float32),
            x.sum(dtype=torch.float32),
            x.cumsum(0, dtype=torch.float32),
            torch.linalg.vector_norm(x, dtype=torch.float32),
            torch.zeros(3, dtype=torch.float32),
            torch.arange(3, dtype=torch.float32),
            torch.full_like(x, 1.0, dtype=torch.bfloat16),
            torch.ones(3),
            torch.tensor([1.5], dtype=torch.float32) * 1.0,
            torch.arange(3).float(),
        ]
        rotation = torch.polar(x.float(), x.float())
        pairs = torch.view_as_complex(x.float().view(2, 2, 2))
    assert {result.dtype for result in results} == {torch.float64}
    assert rotation.dtype == pairs.dtype == torch.complex128
    assert torch.equal(results[0], x)
    assert torch.get_default_dtype() == torch.float32


def test_bits_integers_and_float8_are_left_alone() -> None:
    with float64_truth():
        assert torch.zeros(2, dtype=torch.int32).view(torch.float32).dtype == torch.float32
        assert torch.ones(2).to(torch.float8_e4m3fn).dtype == torch.float8_e4m3fn
        assert torch.ones(2).long().dtype == torch.int64


def test_a_write_into_an_older_float32_tensor_is_reported() -> None:
    cache = torch.zeros(3)
    with float64_truth() as mode:
        cache.copy_(torch.ones(3))
    assert mode.leaks == {"aten::copy_"}


def test_in_dtype_keeps_ties_and_rotary_tables_and_undoes_itself() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    table = model.model.rotary_emb.inv_freq
    with in_dtype(model, torch.bfloat16):
        assert parameter_dtype(model) == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert table.dtype == torch.float32
    with in_dtype(model, torch.float64):
        assert table.dtype == torch.float64
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_in_dtype_undoes_itself_after_an_error() -> None:
    model = tiny.llama()
    with pytest.raises(RuntimeError, match="halt"), in_dtype(model, torch.float64):
        raise RuntimeError("halt")
    assert parameter_dtype(model) == torch.float32
