"""verify says ok to a right fold and not ok to every wrong one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flashnorm import FlashNormError, fold_, folding, verify
from flashnorm.verification.measure import pair
from flashnorm.verification.report import Greedy, Report

from . import tiny


def check(reference: Any, candidate: Any, **options: Any) -> Report:
    return verify(reference, candidate, **{"tokens": 300, "sample": 256, **options})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


def test_a_right_fold_is_ok(model: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    report = check(model, tiny.folded(model))
    assert report.ok, str(report)
    assert 0 < report.float64.max <= report.float64_bound
    assert report.half is not None
    assert report.half.candidate.typical <= 1.1 * report.half.reference.typical
    assert report.greedy is not None
    assert report.greedy.divergence is None
    assert len(report.greedy.reference) == 64
    assert report.layers == ()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_fold_in_float64_is_exact_to_float64(model: Any) -> None:
    wide = copy.deepcopy(model).double()
    report = check(wide, tiny.folded(wide))
    assert report.ok, str(report)
    assert report.float64.max <= 1e-14
    assert report.float64_bound <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fold_in_a_half_dtype_is_ok(model: Any, dtype: torch.dtype) -> None:
    half = copy.deepcopy(model).to(dtype)
    report = check(half, tiny.folded(half))
    assert report.ok, str(report)
    assert report.half_dtype == str(dtype).removeprefix("torch.")


def wrong_gain(model: Any) -> str:
    for linear in tiny.readers(model)[1][1]:
        linear.weight[:, 7] *= 1 + 1e-3
    return "model.layers.0.mlp.gate_proj"


def wrong_projection(model: Any) -> str:
    """The second norm's gain goes into o_proj as well."""
    model.model.layers[0].self_attn.o_proj.weight.mul_(1 + 0.3 * torch.randn(tiny.WIDTH))
    return "model.layers.0.self_attn.o_proj"


def norm_not_reset(model: Any) -> str:
    model.model.layers[1].input_layernorm.weight.copy_(1 + 0.3 * torch.randn(tiny.WIDTH))
    return "model.layers.1.self_attn.q_proj"


def bias_changed(model: Any) -> str:
    model.model.layers[1].self_attn.v_proj.bias[3] += 1e-3
    return "model.layers.1.self_attn.v_proj"


def swapped_shard(model: Any) -> str:
    first, second = (layer.state_dict() for layer in model.model.layers)
    first, second = copy.deepcopy(first), copy.deepcopy(second)
    model.model.layers[0].load_state_dict(second)
    model.model.layers[1].load_state_dict(first)
    return "model.layers.0.self_attn.q_proj"


WRONG = [wrong_gain, wrong_projection, norm_not_reset, bias_changed, swapped_shard]


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_wrong_fold_is_not_ok_and_is_located(model: Any, spoil: Callable[[Any], str]) -> None:
    candidate = tiny.folded(model)
    with torch.no_grad():
        place = spoil(candidate)
    report = check(model, candidate)
    assert not report.ok
    assert report.first_wrong_layer is not None
    assert report.first_wrong_layer.path == place
    assert "NOT" in str(report)
    assert place in str(report)


def test_every_single_gain_element_counts(model: Any) -> None:
    """In each of the four norms, one element off by 1e-3 is beyond the bound."""
    for index in range(2 * tiny.LAYERS):
        candidate = tiny.folded(model)
        with torch.no_grad():
            for linear in tiny.readers(candidate)[index][1]:
                linear.weight[:, index] *= 1 + 1e-3
        report = check(model, candidate)
        assert report.float64.max > 10 * report.float64_bound, (index, report.float64)


def test_not_a_number_is_not_ok(model: Any) -> None:
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        candidate.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    report = check(model, candidate)
    assert not report.ok
    assert json.dumps(report.to_json(), allow_nan=False)


def test_the_report_is_json(model: Any) -> None:
    report = check(model, tiny.folded(model))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["ok"] is True
    assert [row["name"] for row in data["checks"]] == [
        "float64 error",
        "bfloat16 error",
        "greedy tokens",
    ]
    assert data["perplexity"]["top1"] == 1.0
    assert "random tokens" in data["inputs"]
    assert any("no tokenizer" in note for note in data["notes"])


@pytest.mark.parametrize("make", [tiny.gemma, tiny.bert, tiny.t5, tiny.mixtral])
def test_other_kinds_of_models_equal_themselves(make: Callable[[], Any]) -> None:
    model = make()
    report = check(model, copy.deepcopy(model))
    assert report.ok, str(report)
    assert report.float64.max == 0
    assert (report.perplexity is None) == (make in (tiny.bert, tiny.t5))
    assert (report.greedy is None) == any("no greedy tokens" in note for note in report.notes)
    assert report.output == ("last_hidden_state" if make is tiny.bert else "logits")


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma, tiny.mixtral])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_fold_does_is_ok(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make().to(dtype)
    candidate = copy.deepcopy(model)
    assert folding(fold_(candidate)).folded
    report = check(model, candidate)
    assert report.ok, str(report)
    assert dtype != torch.float64 or report.float64.max <= 1e-12


def test_a_router_that_ties_is_followed_and_a_wrong_router_is_not() -> None:
    model = tiny.mixtral().to(torch.bfloat16)
    candidate = copy.deepcopy(model)
    fold_(candidate)
    assert any("discrete choices" in note for note in check(model, candidate).notes)
    with torch.no_grad():
        gate = candidate.model.layers[0].mlp.gate.weight
        gate.copy_(gate.flip(0))
    assert not check(model, candidate).ok


def test_a_divergence_counts_unless_it_is_a_tie() -> None:
    tie = Greedy((1, 2), (1, 3), 1, margin=1e-5, tolerance=1e-4, prompt_tokens=4)
    assert tie.ok
    assert not replace(tie, margin=1e-3).ok
    assert not replace(tie, margin=float("nan")).ok
    assert not replace(tie, margin=None).ok


class Normed(nn.Module):
    """norm -> linear, for inputs that are no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-6)
        self.out = nn.Linear(32, 8)
        with torch.no_grad():
            self.norm.weight.add_(0.3 * torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def test_any_module_with_example_inputs() -> None:
    torch.manual_seed(1)
    model, inputs = Normed(), {"x": torch.randn(128, 32)}
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        candidate.out.weight.mul_(candidate.norm.weight)
        candidate.norm.weight.fill_(1)
    assert check(model, candidate, example_inputs=inputs).ok
    assert check(model, candidate, example_inputs=(inputs["x"],)).ok
    with torch.no_grad():
        candidate.norm.weight[0] = 1.001
    report = check(model, candidate, example_inputs=inputs)
    assert not report.ok
    assert report.first_wrong_layer is not None
    assert report.first_wrong_layer.path == "out"


class Stubborn(Normed):
    """Makes a float32 tensor inside, so that it runs in float32 and float64 only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x).float())


def test_a_model_that_does_not_run_in_half_precision_says_so() -> None:
    report = check(Stubborn(), Stubborn(), example_inputs=(torch.randn(4, 32),))
    assert report.half is None
    assert any("Stubborn does not run in bfloat16" in note for note in report.notes)
    assert json.dumps(report.to_json())


def test_inputs_that_do_not_fit_are_named() -> None:
    with pytest.raises(FlashNormError, match=r"Normed does not run on example_inputs \(Runtime"):
        check(Normed(), Normed(), example_inputs=(torch.randn(4, 33),))


def test_the_ratio_is_judged_beyond_chance() -> None:
    """Half of the rows twice as wrong, half of them exact as before: that may be luck in 4 rows."""
    truth = [torch.ones(4, 8, dtype=torch.float64)]
    error = 0.01 * torch.ones(4, 8, dtype=torch.float64)
    worse = error * torch.tensor([1.0, 2.0, 1.0, 2.0])[:, None]
    few = pair([truth[0] + error], [truth[0] + worse], truth)
    many = pair([truth[0] + error] * 100, [truth[0] + worse] * 100, truth * 100)
    assert few.ratio == pytest.approx(2**0.5) == pytest.approx(many.ratio)
    assert few.ratio_lower_bound <= 1.1 < many.ratio_lower_bound


def test_a_module_without_token_ids_needs_inputs() -> None:
    with pytest.raises(FlashNormError, match="Normed does not start from token ids: pass example_"):
        verify(Normed(), Normed())


def test_two_different_models_are_told_apart_by_shape(model: Any) -> None:
    with pytest.raises(FlashNormError, match="not two versions of one model"):
        check(model, tiny.llama(vocab_size=211))


def test_training_mode_comes_back(model: Any) -> None:
    model.train()
    try:
        check(model, model)
        assert model.training
        assert model.model.layers[0].training
    finally:
        model.eval()


def test_progress_counts_to_its_total(model: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    check(model, model, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(seen[0][1])) == list(range(10))
