"""Everything that flashnorm does with a module that is no model of transformers, on a small one.

A program, so that it runs in Pythons that lack packages: `tests.packaging.absent`, or an empty
environment. It ends with 0 and a last line "fine" where all is right. `kernels` as its argument
asks for compiled kernels as well.
"""

from __future__ import annotations

import copy
import json
import sys

import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
import flashnorm.nn
from flashnorm import functional

WIDTH, HIDDEN = 48, 96
# What sums of so many products explain many times over; a wrong gain is a thousand times larger.
EXACT, SINGLE = 1e-12, 1e-5


class Block(nn.Module):
    """Two norms with random gains and biases, each read by layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH, eps=1e-5), nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down, self.head = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.first(x)
        x = x + self.down(F.silu(self.gate(z)) * self.up(z))
        return self.head(self.second(x))


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"{error} is more than {bound}"


def folding(model: nn.Module, x: torch.Tensor) -> None:
    plan = flashnorm.inspect(model, example_inputs=(x,))
    assert len(plan.folded) == 2, str(plan)
    assert "first: rms 48" in str(plan)
    assert json.loads(json.dumps(plan.to_json()))
    before, state = model(x), copy.deepcopy(model.state_dict())
    original = copy.deepcopy(model)
    flashnorm.fold_(model, example_inputs=(x,))
    assert not torch.equal(model.first.weight, original.first.weight)
    close(model(x), before, EXACT)
    report = flashnorm.verify(original, model, example_inputs=(x,))
    assert report.ok, str(report)
    assert "The candidate computes what the reference computes." in str(report)
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    broken = copy.deepcopy(model)
    broken.head.weight[0, 0] += 1
    wrong = flashnorm.verify(original, broken, example_inputs=(x,))
    assert not wrong.ok, "a wrong weight was not seen"
    assert {"head", "FAIL"} <= {*str(wrong).split()}, str(wrong)
    flashnorm.unfold_(model)
    for name, value in model.state_dict().items():
        close(value, state[name], EXACT)


def accelerating(model: nn.Module, x: torch.Tensor, kernels: bool) -> None:
    expected = copy.deepcopy(model).double()(x.double()).float()
    flashnorm.accelerate_(model, example_inputs=(x,))
    close(model(x), expected, SINGLE)
    said = str(flashnorm.acceleration(model))
    assert not kernels or "6 of 6 modules run on" in said, said
    assert "attention of single tokens runs on its own code" in said, said
    flashnorm.restore_(model)
    close(model(x), expected, SINGLE)


def calling(x: torch.Tensor, kernels: bool) -> None:
    weight, bias, gain = torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN), torch.randn(WIDTH)
    wide = [t.double() for t in (x, weight, bias, gain)]
    z = F.rms_norm(wide[0], (WIDTH,), wide[3], 1e-5)
    y = functional.rms_norm_linear(x, weight, bias, gain=gain, eps=1e-5)
    close(y, F.linear(z, *wide[1:3]).float(), SINGLE)
    choice = functional.explain(x, weight, norm="rms", gain=gain)
    assert not kernels or choice.backend == "cpu", choice
    layer = flashnorm.nn.NormLinear(WIDTH, HIDDEN)
    assert layer(x).shape == (*x.shape[:-1], HIDDEN)


def main(kernels: bool) -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    x = torch.randn(3, 5, WIDTH)
    folding(Block().eval().double(), x.double())
    accelerating(Block().eval(), x, kernels)
    calling(x, kernels)
    print("fine")


if __name__ == "__main__":
    main("kernels" in sys.argv[1:])
