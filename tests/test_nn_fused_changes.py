"""Norm + linear as modules whose parameters and attributes change between calls; copies of them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flashnorm.errors import FoldError
from flashnorm.kernels import dispatch
from tests.kernels.bounds import assert_close
from tests.kernels.cases import random
from tests.test_nn_fused import FULL, KINDS, N, build, call_of, given, results


def test_an_optimizer_step_is_seen_at_the_next_call():
    module, (x, residual) = build("linear", **FULL), given("linear", torch.float32)
    with torch.no_grad():
        before = module(x, residual)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(x, residual).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = module(x, residual)
        assert not torch.equal(after, before)
        assert_close(call_of("linear", module, x, residual), [after])


def other_values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() * 2 - 0.1 for name, p in module.named_parameters()}


def replace_parameters(module: nn.Module) -> None:
    for name, value in other_values(module).items():
        setattr(module, name, nn.Parameter(value))


def replace_data(module: nn.Module) -> None:
    values = other_values(module)
    for name, parameter in module.named_parameters():
        parameter.data = values[name]


def transpose_in_memory(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.T.contiguous().T


def spread_a_gain(module: nn.Module) -> None:
    wide = torch.randn(2 * N)
    wide[:N] = module.gain.data
    module.gain.data = wide[:N]
    module(given_once(module))
    module.gain.data = wide[::2]  # of the same shape at the same place


def given_once(module: nn.Module) -> Tensor:
    return torch.ones(1, N, dtype=module.gain.dtype)


def same_memory_other_dtype(module: nn.Module) -> None:
    """Memory that has been given back may come again, for numbers of another dtype."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = parameter.data.view(torch.bfloat16)[..., : parameter.shape[-1]]
        parameter.data.copy_(random(*parameter.shape, dtype=torch.float32, seed=i + 20))


CHANGES = {
    "in place": lambda m: [p.data.mul_(-1.5) for p in m.parameters()],
    "parameters": replace_parameters,
    "data": replace_data,
    "load": lambda m: m.load_state_dict(other_values(m)),
    "assign": lambda m: m.load_state_dict(other_values(m), assign=True),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "there and back": lambda m: m.half().bfloat16().float(),
    "strides": transpose_in_memory,
    "strides of a vector": spread_a_gain,
    "other dtype": same_memory_other_dtype,
    "epsilon": lambda m: setattr(m, "eps", 0.5),
    "offset": lambda m: setattr(m, "gain_offset", 0.25),
    "norm": lambda m: setattr(m, "norm", "layer"),
    "no gain": lambda m: setattr(m, "gain", None),
    "reset": lambda m: m.reset_parameters(),
    "fold": lambda m: m.fold_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_change_is_seen_at_the_next_call(kind, change):
    module, arguments = build(kind, **FULL), given(kind, torch.float32)
    with torch.no_grad():
        before = results(module, *arguments)
        change(module)
        call = call_of(kind, module, *arguments)
        found = results(module, *arguments)
        assert_close(call, found, fused=False)
        assert all(map(torch.equal, found, dispatch.norm_linear(call)))
    unchanged = change in (CHANGES["strides"],)
    assert unchanged or not torch.equal(found[0], before[0])


PLACES = {
    "elsewhere": lambda wide, p: torch.randn(p.shape),
    "another dtype": lambda wide, p: wide.view(torch.bfloat16).view(-1)[: p.numel()].view(p.shape),
    "other strides": lambda wide, p: wide[..., ::2],
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["weight", "gain"])
def test_one_parameter_that_lies_otherwise_is_seen(name, place):
    """The address alone would not tell: freed memory comes again, for other numbers."""
    module, (x, _) = build("linear"), given("linear", torch.float32)
    parameter = getattr(module, name)
    wide = torch.zeros(*parameter.shape[:-1], 2 * N)
    with torch.no_grad():
        parameter.data = wide.view(-1)[: parameter.numel()].view(parameter.shape)
        before = module(x)
        parameter.data = place(wide, parameter)
        parameter.data.copy_(random(*parameter.shape, dtype=torch.float32, seed=30))
        call = call_of("linear", module, x)
        assert torch.equal(module(x), dispatch.norm_linear(call)[0])
        assert not torch.equal(module(x), before)
        assert_close(call, [module(x)])


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "file": through_a_file,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_their_own_way(kind, duplicate):
    module, arguments = build(kind, "layer", **FULL), given(kind, torch.float32)
    with torch.no_grad():
        before = results(module, *arguments)
        twin = duplicate(module)
        assert all(map(torch.equal, results(twin, *arguments), before))
        replace_data(twin)
        assert_close(call_of(kind, twin, *arguments), results(twin, *arguments))
        assert all(map(torch.equal, results(module, *arguments), before))


@pytest.mark.parametrize("kind", KINDS)
def test_a_parametrization_is_applied(kind):
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module, arguments = build(kind, **FULL), given(kind, torch.float32)
    name = module.readers[0][0]
    twin = copy.deepcopy(module)
    parametrize.register_parametrization(module, name, Doubled())
    with torch.no_grad():
        getattr(twin, name).mul_(2)
        assert all(map(torch.equal, results(module, *arguments), results(twin, *arguments)))
    with pytest.raises(FoldError, match=f"{name} is not a parameter of the module itself"):
        module.fold_()
