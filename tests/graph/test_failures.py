"""A rule refuses with a reason; a bug in one is a refusal for users, and an error under test."""

import pytest
import torch
from torch import nn

from flashnorm.graph import follow, gains, proof, scales, streams
from flashnorm.graph.failures import RAISE_BUGS, UnknownSpelling
from flashnorm.graph.ir import Node
from flashnorm.graph.replay import run
from flashnorm.planner import inspect_module

N = 8


class Rms(nn.Module):
    """Written out, so that there is something to prove."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(N) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Net(nn.Module):
    """A LayerNorm behind a linear layer, and a norm whose scale the next one undoes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.second = nn.Linear(N, N), nn.LayerNorm(N), nn.Linear(N, N)
        self.norm, self.third = Rms(), nn.Linear(N, N, bias=False)
        self.last, self.head = Rms(), nn.Linear(N, N)
        nn.init.uniform_(self.layer.weight, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.layer(moved(self.first(x))))
        return self.head(moved(self.last(moved(self.third(self.norm(x))))))


def moved(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(0).squeeze(0)


def broken(*_):
    raise AttributeError("a slip of the pen")


def break_follow(patch):
    patch.setitem(follow.RULES, "squeeze", broken)


def break_streams(patch):
    patch.setitem(streams._RULES, "squeeze", broken)


def break_scales(patch):
    patch.setitem(scales._RULES, "squeeze", broken)


def break_gains(patch):
    patch.setattr(gains, "_evaluate", broken)


def break_proof(patch):
    patch.setattr(proof, "run", broken)


BREAKS = {
    "follow": (break_follow, lambda plan: plan.sites[2].gain_state == "kept"),
    "streams": (break_streams, lambda plan: plan.sites[0].centering == "kept"),
    "scales": (break_scales, lambda plan: plan.sites[1].scale == "deferred"),
    "gains": (break_gains, lambda plan: not plan.folded),
    "proof": (break_proof, lambda plan: plan.sites[1].scale == "kept"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_bug_in_a_rule_is_a_refusal_for_users_and_an_error_under_test(name, monkeypatch):
    sabotage, is_refused = BREAKS[name]
    model, inputs = Net(), (torch.randn(3, N),)
    assert not is_refused(inspect_module(model, inputs, center=True))
    sabotage(monkeypatch)
    with pytest.raises(AttributeError, match="a slip of the pen"):
        inspect_module(model, inputs, center=True)
    monkeypatch.delenv(RAISE_BUGS)
    assert is_refused(inspect_module(model, inputs, center=True))


class Written(nn.Module):
    """What `write` does with a norm's output, before its reader."""

    def __init__(self, write) -> None:
        super().__init__()
        self.norm, self.reader, self.write = nn.RMSNorm(N), nn.Linear(N, N), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.norm(x)
        return self.reader(z) + self.write(z)


SPELLINGS = {
    "index_add": lambda z: torch.zeros(()).index_add(0, torch.tensor([0]), z[0, 0]),
    "index_select": lambda z: z[0, 0].index_select(0, torch.tensor([0])),
    "gather": lambda z: z[0, 0].gather(0, torch.tensor(0)),
    "cumsum": lambda z: z[0, 0].cumsum(0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_has_no_axis_is_refused(name):
    (site,) = inspect_module(Written(SPELLINGS[name]), (torch.randn(3, N),)).sites
    assert site.gain_state == "kept"
    assert "could not be followed" not in site.reason


def test_an_operation_that_fails_on_other_numbers_is_no_bug():
    node = Node("mine", broken, (), {}, (0,), "", 0, "")
    with pytest.raises(UnknownSpelling, match="mine does not run on other numbers: a slip"):
        run(node, lambda value: torch.zeros(value))
