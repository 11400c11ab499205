"""The norms that take the place of a model's own."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from flashnorm.nn import FlashLinkedRMSNorm, FlashRMSNorm, RowScale, ScaleFeatures

N = 40


def vector(seed):
    values = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(1 + 0.3 * values)


def rows(dtype):
    x = torch.randn(3, 5, N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (x * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None]).to(dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("bias", [None, vector(2)])
@pytest.mark.parametrize("weight", [None, vector(1)])
def test_equals_the_definition_in_float64(weight, bias, offset):
    norm = FlashRMSNorm(N, 1e-5, weight=weight, bias=bias, offset=offset).double()
    x = rows(torch.float64)
    gain = None if weight is None else (offset + weight).double()
    expected = F.rms_norm(x, (N,), gain, 1e-5)
    expected = expected if bias is None else expected + bias.double()
    assert (norm(x) - expected).abs().max() <= 4 * 2.0**-53 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_computed_in_float32_and_rounded_once(dtype):
    norm, x = FlashRMSNorm(N, weight=vector(1), bias=vector(2)).to(dtype), rows(dtype)
    truth = copy.deepcopy(norm).double()(x.double())
    # Half a unit in the last place, and a little for float32.
    bound = torch.finfo(dtype).eps / 2 * truth.abs() * 1.001 + torch.finfo(dtype).tiny
    assert norm(x).dtype == dtype
    assert bool(((norm(x).double() - truth).abs() <= bound).all())


def test_is_what_other_engines_look_for():
    norm = FlashRMSNorm(1)
    assert type(norm).__name__.endswith("RMSNorm")
    assert "weight" in norm._parameters
    assert norm.weight is None
    assert norm.with_scale is False
    assert norm.eps == norm.variance_epsilon == 1e-6
    assert FlashRMSNorm(N, weight=vector(1)).with_scale is True


def test_a_state_dict_keeps_what_the_fold_removed():
    absent = {"weight": torch.ones(N), "bias": torch.zeros(N)}
    norm = torch.nn.ModuleDict({"norm": FlashRMSNorm(N, absent=absent)})
    state = norm.state_dict()
    assert set(state) == {"norm.weight", "norm.bias"}
    torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(N)}).load_state_dict(state)
    assert norm.load_state_dict(state).missing_keys == []
    assert not list(norm.parameters())
    assert norm.to(torch.bfloat16).state_dict()["norm.weight"].dtype == torch.bfloat16


def test_a_state_dict_of_an_unfolded_model_is_refused():
    norm = FlashRMSNorm(N, absent={"weight": torch.ones(N)})
    with pytest.raises(ValueError, match="weight holds other numbers than the folded norm had"):
        norm.load_state_dict({"weight": torch.full((N,), 2.0)})


def test_a_norm_that_undoes_a_scale_equals_the_norm_of_the_scaled_values():
    x, v, s = rows(torch.float64), rows(torch.float64) + 0.1, RowScale()
    s.set(x.pow(2).mean(-1, keepdim=True) + 0.3)
    undoing = FlashLinkedRMSNorm(N, 0.5, weight=vector(1)).double()
    undoing.undoes, undoing.rows = s, (0, 1)
    scaled = v * s.get().rsqrt()
    expected = F.rms_norm(scaled, (N,), undoing.weight, 0.5)
    assert (undoing(v) - expected).abs().max() <= 8 * 2.0**-53 * expected.abs().max()


def test_only_the_named_features_are_scaled():
    s = RowScale()
    s.set(torch.full((3, 5, 1), 4.0))
    y = torch.randn(3, 5, N)
    scaled = ScaleFeatures(s, [(2, 3), (10, 1)])(torch.nn.Identity(), (), y)
    where = [2, 3, 4, 10]
    rest = [i for i in range(N) if i not in where]
    assert torch.equal(scaled[..., where], y[..., where] / 2)
    assert torch.equal(scaled[..., rest], y[..., rest])


def test_a_scale_that_nobody_made_is_an_error_and_can_be_pickled():
    with pytest.raises(RuntimeError, match="ran before it: run the model as a whole"):
        RowScale().get()
    assert isinstance(pickle.loads(pickle.dumps(RowScale())), RowScale)
